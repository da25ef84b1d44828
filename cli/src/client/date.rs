//! Dates in UTC, as mailboxes and messages have them. Pure.
//!
//! # Failure
//! None.

const DAYS: [&str; 7] = ["Thu", "Fri", "Sat", "Sun", "Mon", "Tue", "Wed"];
const MONTHS: [&str; 12] =
    ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];

/// A second since 1970, taken apart.
struct Date {
    year: u64,
    month: &'static str,
    /// From 1.
    day: u64,
    weekday: &'static str,
    /// `hh:mm:ss`.
    clock: String,
}

impl Date {
    fn of(seconds: u64) -> Self {
        let days = seconds / 86_400;
        let (year, month, day) = civil(days);
        let clock = seconds % 86_400;
        Self {
            year,
            month: MONTHS[month],
            day,
            weekday: DAYS[(days % 7) as usize],
            clock: format!("{:02}:{:02}:{:02}", clock / 3600, clock / 60 % 60, clock % 60),
        }
    }
}

/// Formats seconds since 1970 as ctime(3) does, which mbox readers expect in the `From ` line.
pub fn ctime(seconds: u64) -> String {
    let Date { year, month, day, weekday, clock } = Date::of(seconds);
    format!("{weekday} {month} {day:2} {clock} {year}")
}

/// Formats seconds since 1970 as the field `Date` of a message has them (RFC 5322 3.3).
pub fn date_time(seconds: u64) -> String {
    let Date { year, month, day, weekday, clock } = Date::of(seconds);
    format!("{weekday}, {day} {month} {year} {clock} +0000")
}

/// Returns year, month (from 0) and day (from 1) of a number of days since 1970-01-01.
fn civil(mut days: u64) -> (u64, usize, u64) {
    let leap = |year: u64| {
        year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400))
    };
    let mut year = 1970;
    while days >= 365 + u64::from(leap(year)) {
        days -= 365 + u64::from(leap(year));
        year += 1;
    }
    let february = 28 + u64::from(leap(year));
    let mut month = 0;
    for length in [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30] {
        if days < length {
            break;
        }
        days -= length;
        month += 1;
    }
    (year, month, days + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates() {
        assert_eq!(ctime(0), "Thu Jan  1 00:00:00 1970");
        assert_eq!(ctime(951_782_399), "Mon Feb 28 23:59:59 2000");
        assert_eq!(ctime(951_782_400), "Tue Feb 29 00:00:00 2000");
        assert_eq!(ctime(1_709_251_199), "Thu Feb 29 23:59:59 2024");
        assert_eq!(ctime(4_107_542_399), "Sun Feb 28 23:59:59 2100");
        assert_eq!(ctime(4_107_542_400), "Mon Mar  1 00:00:00 2100");
    }

    #[test]
    fn dates_of_messages() {
        assert_eq!(date_time(0), "Thu, 1 Jan 1970 00:00:00 +0000");
        assert_eq!(date_time(1_709_251_199), "Thu, 29 Feb 2024 23:59:59 +0000");
    }
}
