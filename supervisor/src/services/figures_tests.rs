use super::*;
use qrelay_shared::ipc::message::Times as Spent;

fn mail<'a>(action: &'a str, next_hop: Option<&'a str>, status: Option<Status>) -> MailRecord<'a> {
    MailRecord {
        sender: "".into(),
        recipients: "".into(),
        recipient_count: 1,
        recipients_cut: 0,
        account: None,
        action,
        next_hop,
        forwarded: next_hop.is_some(),
        status,
        text: "".into(),
        size: 1,
        received: 1,
        sent: 1,
        duration: 3000,
        answered: 0,
        times: Spent { queue: 50, read: 100, lua: 101, hop: 2000 },
        message_id: None,
        cause: None,
        refused: false,
    }
}

fn at(start: Instant, seconds: u64) -> Instant {
    start + Duration::from_secs(seconds)
}

const K: Option<Status> = Some(Status::Accepted);

#[test]
fn mails_are_counted_by_what_they_have_in_common() {
    let start = Instant::now();
    let mut figures = Figures::new(start);
    let listener: Arc<str> = "/in".into();
    figures.count(&mail("connect", Some("hop"), K), Some(&listener), start);
    figures.count(&mail("connect", Some("hop"), K), Some(&listener), start);
    figures.count(&mail("discard", None, K), Some(&listener), start);
    figures.count(&mail("nonsense", None, None), None, start);
    let unreached = MailRecord { forwarded: false, ..mail("connect", Some("gone"), K) };
    figures.count(
        &MailRecord { status: Some(Status::Temporary), ..unreached },
        Some(&listener),
        start,
    );
    let shown: Vec<_> = figures
        .mails()
        .into_iter()
        .map(|m| format!("{} {} {} {}", m.listener, m.action, m.reply, m.count))
        .collect();
    let expected = ["/in connect K 2", "/in connect Z 1", "/in discard K 1", "other - - 1"];
    assert_eq!(shown, expected);
    let answers = admin::Answers { accepted: 3, temporary: 1, permanent: 0, unanswered: 1 };
    assert_eq!(figures.answers(), answers);
    let in_flight = BTreeMap::from([("hop".into(), 2), ("hangs".into(), 3)]);
    let hops = figures.next_hops(start, &in_flight);
    let waiting: Vec<_> = hops.iter().map(|hop| (&*hop.next_hop, hop.in_flight)).collect();
    assert_eq!(waiting, [("gone", 0), ("hangs", 3), ("hop", 2)]);
    let brief =
        |hop: &admin::NextHop| (hop.next_hop.clone(), hop.answers.accepted, hop.connect_failures);
    let brief: Vec<_> = hops.iter().map(brief).collect();
    assert_eq!(brief, [("gone".into(), 0, 1), ("hangs".into(), 0, 0), ("hop".into(), 2, 0)]);
    assert_eq!(hops[2].times.buckets.iter().sum::<u64>(), 2);
}

#[test]
fn times_fall_into_buckets_by_their_upper_bounds() {
    let start = Instant::now();
    let mut figures = Figures::new(start);
    figures.count(&mail("connect", Some("hop"), K), None, start);
    let times = figures.times(start);
    let bucket = |histogram: &admin::Histogram| histogram.buckets.iter().position(|&n| n == 1);
    assert_eq!(bucket(&times.queue), Some(0));
    assert_eq!(bucket(&times.read), Some(0), "a bound belongs to its bucket");
    assert_eq!(bucket(&times.lua), Some(1));
    assert_eq!(bucket(&times.hop), Some(4));
    assert_eq!(times.hop.sum, 0.002);
    assert_eq!(times.bounds.len() + 1, times.hop.buckets.len());
    let slow = MailRecord { duration: u64::MAX, ..mail("connect", Some("hop"), K) };
    figures.count(&slow, None, start);
    assert_eq!(figures.times(start).all.buckets.last(), Some(&1));
}

#[test]
fn quantiles_are_those_of_the_last_minute() {
    let start = Instant::now();
    let mut figures = Figures::new(start);
    assert_eq!(figures.times(start).all.p50, None);
    for _ in 0..99 {
        figures.count(&MailRecord { duration: 1000, ..mail("discard", None, K) }, None, start);
    }
    figures.count(&MailRecord { duration: 900_000, ..mail("discard", None, K) }, None, start);
    let all = figures.times(at(start, 59)).all;
    let (p50, p99) = (all.p50.expect("mails"), all.p99.expect("mails"));
    assert!((0.0005..=0.001).contains(&p50), "{p50}");
    assert!((0.0005..=0.001).contains(&p99), "{p99}");
    figures.count(&MailRecord { duration: 900_000, ..mail("discard", None, K) }, None, start);
    assert!(figures.times(start).all.p99.expect("mails") > 0.5);
    assert_eq!(figures.times(at(start, 80)).all.p99, None, "all that is long ago");
    figures.count(&MailRecord { duration: 1000, ..mail("discard", None, K) }, None, at(start, 80));
    assert!(figures.times(at(start, 80)).all.p99.expect("a mail") <= 0.001);
    assert_eq!(figures.times(at(start, 80)).all.buckets.iter().sum::<u64>(), 102);
}

#[test]
fn rates_count_whole_seconds() {
    let start = Instant::now();
    let mut figures = Figures::new(start);
    assert_eq!(figures.rates(start), admin::Rates::default());
    for second in 0..100 {
        for _ in 0..10 {
            figures.count(&mail("discard", None, K), None, at(start, second));
        }
    }
    let rates = figures.rates(at(start, 100));
    assert_eq!(rates, admin::Rates { second: 10.0, minute: 10.0, quarter: 10.0 });
    let rates = figures.rates(at(start, 130));
    assert_eq!((rates.second, rates.minute), (0.0, 5.0));
    assert_eq!(figures.rates(at(start, 2000)), admin::Rates::default());
    figures.count(&mail("discard", None, K), None, at(start, 2000));
    assert_eq!(figures.rates(at(start, 2001)).second, 1.0);
    assert_eq!(figures.rates(at(start, 2001)).minute, 1.0 / 60.0);
}

#[test]
fn tables_are_bounded() {
    let start = Instant::now();
    let mut figures = Figures::new(start);
    for number in 0..1000 {
        let name = format!("hop {number}");
        let listener: Arc<str> = name.as_str().into();
        figures.count(&mail("connect", Some(&name), K), Some(&listener), start);
    }
    let in_flight = (0..9).map(|number| (format!("new {number}"), 1)).collect();
    let hops = figures.next_hops(start, &in_flight);
    assert_eq!(hops.len(), MOST + 1);
    assert_eq!(hops.iter().map(|hop| hop.in_flight).sum::<u64>(), 9);
    assert_eq!(hops.iter().map(|hop| hop.answers.accepted).sum::<u64>(), 1000);
    assert!(hops.iter().any(|hop| hop.next_hop == OTHER));
    assert_eq!(figures.mails().len(), MOST + 1);
    assert_eq!(figures.mails().iter().map(|mails| mails.count).sum::<u64>(), 1000);
}
