//! Random mutations of valid inputs, the same in every run, with checks that must hold for any
//! bytes. Nothing panics. Two readers of the same bytes agree. Written values parse to the same
//! values again. A verdict about the first bytes stands whatever follows.
//!
//! The fuzz targets in `tests/fuzz` reach more code, guided by coverage; the mutations run with
//! every compiler.
//!
//! # Failure
//! A failed assertion shows the input. The generator has a fixed seed, so the next run finds the
//! same failure.

use qrelay_shared::endpoint::{self, Parsed};
use qrelay_shared::network::Network;
use qrelay_shared::pond;
use qrelay_shared::qmqp::{
    Limits, Progress, Reply, ReplyProgress, Request, encode_request, outgoing, parse, parse_reply,
    progress,
};
use qrelay_shared::{address, header, netstring};

const LIMITS: Limits<'_> = Limits { max_size: 1000, default_domain: None };
const ROUNDS: usize = 30_000;

/// A random number generator: Marsaglia's xorshift64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// Returns a number less than `bound`, which must not be 0.
    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }

    fn pick<'a, T: ?Sized>(&mut self, from: &[&'a T]) -> &'a T {
        from[self.below(from.len())]
    }

    /// Returns a random seed with up to four changes, or with none.
    fn mutated(&mut self, seeds: &[&[u8]]) -> Vec<u8> {
        let mut bytes = self.pick(seeds).to_vec();
        for _ in 0..self.below(5) {
            self.mutate(&mut bytes, seeds);
        }
        bytes
    }

    fn mutate(&mut self, bytes: &mut Vec<u8>, seeds: &[&[u8]]) {
        let at = self.below(bytes.len() + 1);
        let interesting = b"0123456789:,.@[]%-+/ \t\r\n\0\"\\<>KZD\x7f\x80\xff";
        let byte = interesting[self.below(interesting.len())];
        match self.below(7) {
            0 => bytes.truncate(at),
            1 => bytes.insert(at, byte),
            2 if at < bytes.len() => bytes[at] = byte,
            3 if at < bytes.len() => bytes[at] ^= 1 << self.below(8),
            4 if at < bytes.len() => drop(bytes.remove(at)),
            5 => {
                let end = at + self.below(bytes.len() - at + 1);
                let again = bytes[at..end].to_vec();
                bytes.splice(at..at, again);
            }
            _ => {
                let other = self.pick(seeds);
                bytes.truncate(at);
                bytes.extend_from_slice(&other[self.below(other.len() + 1)..]);
            }
        }
    }
}

const REQUESTS: &[&[u8]] = &[
    b"31:6:a: b\n\n,5:s@x.y,3:r@x,5:q@x.y,,",
    b"12:0:,0:,3:r@x,,",
    b"14:1:m,1:s,3:r@x,,",
    b"2000:1000:mmm",
    b"301000:999:m",
    b"28:1:m,3:s@x,3:r@x,3:q@x,3:p@x,,",
    b"99999999999999999999:",
];

/// Returns message, sender and recipients of a parsed request.
fn parts<'a>(input: &'a [u8], request: &Request) -> (&'a [u8], &'a [u8], Vec<&'a [u8]>) {
    let recipients = request.recipients.iter().map(|r| &input[r.clone()]).collect();
    (&input[request.message.clone()], &input[request.sender.clone()], recipients)
}

#[test]
fn requests() {
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let mut accepted = 0;
    for _ in 0..ROUNDS {
        let input = random.mutated(REQUESTS);
        check_prefixes(&input);
        let judged = progress(&input, &LIMITS);
        let parsed = parse(&input, &LIMITS);
        match judged {
            Err(error) => assert_eq!(parsed, Err(error), "{}", input.escape_ascii()),
            Ok(Progress::NeedMore { total }) => {
                assert!(parsed.is_err());
                assert!(total.is_none_or(|total| total > input.len()));
            }
            Ok(Progress::Complete { total }) => {
                assert!(total <= input.len());
                assert_eq!(parse(&input[..total], &LIMITS), parsed);
            }
        }
        if let Ok(request) = parsed {
            accepted += 1;
            check_request(&input, &request);
        }
    }
    assert!(accepted > ROUNDS / 20, "only {accepted} inputs were valid");
}

/// Checks the verdicts about all beginnings of `input`: an error stands, a known total stays, and
/// the request is complete exactly at the total.
fn check_prefixes(input: &[u8]) {
    let mut refused = None;
    let mut known = None;
    for end in 0..=input.len() {
        let judged = progress(&input[..end], &LIMITS);
        if refused.is_some() {
            assert!(judged.is_err(), "{} at {end}", input.escape_ascii());
        }
        match judged {
            Err(error) => refused = Some(error),
            Ok(Progress::NeedMore { total }) => {
                assert!(known.is_none() || known == total);
                assert!(total.is_none_or(|total| end < total));
                known = total;
            }
            Ok(Progress::Complete { total }) => {
                assert!(known.is_none_or(|known| known == total));
                assert!(end >= total);
                known = Some(total);
            }
        }
    }
}

fn check_request(input: &[u8], request: &Request) {
    let (message, sender, recipients) = parts(input, request);
    assert!(message.len() <= LIMITS.max_size);
    assert!(address::is_valid_sender(sender));
    assert!(!recipients.is_empty());
    assert!(recipients.iter().all(|recipient| address::is_valid(recipient)));
    // Only the canonical form is accepted.
    let again = encode_request(message, sender, &recipients);
    assert_eq!(again, input[..request.payload.end + 1]);
    let insert = |out: &mut Vec<u8>| out.extend_from_slice(b"A: b\r\n");
    let around = outgoing(insert, message.len(), sender, recipients.iter());
    let whole = [around.head(), message, around.tail()].concat();
    let relayed =
        parse(&whole, &Limits { max_size: LIMITS.max_size + 6, ..LIMITS }).expect("valid");
    assert_eq!(parts(&whole, &relayed).0, [b"A: b\r\n", message].concat());
    assert_eq!(parts(&whole, &relayed).2, recipients);
}

#[test]
fn replies() {
    let seeds: &[&[u8]] =
        &[b"3:Kok,", b"1:Z,", b"0007:Dfailed,x", b"4090:Kxx", b"10:Zdeferred,,", b"4097:", b"0:,"];
    let mut random = Random(0xd1b5_4a32_d192_ed03);
    let mut accepted = 0;
    for _ in 0..ROUNDS {
        let input = random.mutated(seeds);
        let mut settled = None;
        for end in 0..=input.len() {
            let judged = parse_reply(&input[..end]);
            if let Some(settled) = &settled {
                assert_eq!(judged, *settled, "{} at {end}", input.escape_ascii());
            }
            if judged != ReplyProgress::NeedMore {
                settled = Some(judged);
            }
        }
        if let Some(ReplyProgress::Complete(reply)) = settled {
            accepted += 1;
            check_reply(&reply);
        }
    }
    assert!(accepted > ROUNDS / 10, "only {accepted} inputs were valid");
}

fn check_reply(reply: &Reply) {
    let encoded = reply.encode();
    let ReplyProgress::Complete(again) = parse_reply(&encoded) else { panic!("{reply:?}") };
    assert_eq!(again.status, reply.status);
    assert_eq!(again.text, reply.text[..reply.text.len().min(255)]);
    assert!(netstring::split(&encoded).is_ok_and(|(_, rest)| rest.is_empty()));
}

#[test]
fn netstrings() {
    let mut random = Random(0x2545_f491_4f6c_dd1d);
    for _ in 0..ROUNDS {
        let input = random.mutated(&[b"0:,", b"3:abc,", b"12:hello, world,rest", b"07:", b"11:x"]);
        let Ok((payload, rest)) = netstring::split(&input) else { continue };
        let mut again = Vec::new();
        netstring::encode_into(&mut again, payload);
        again.extend_from_slice(rest);
        assert_eq!(again, input);
    }
}

#[test]
fn addresses() {
    let seeds: &[&[u8]] = &[
        b"first.last@example.com",
        b"\"a@b\"@example.com",
        b"a@[192.0.2.1]",
        b"a@[IPv6:2001:db8::1]",
        "ä,<b>\\@example.com".as_bytes(),
    ];
    let mut random = Random(0x1234_5678_9abc_def1);
    let mut accepted = 0;
    for _ in 0..ROUNDS {
        let input = random.mutated(seeds);
        let shown = address::escape_for_log(&input);
        assert!(!shown.contains(['<', '>', ',']) && !shown.chars().any(char::is_control));
        let printable = address::printable(&input);
        assert!(!printable.chars().any(char::is_control));
        assert_eq!(address::printable(printable.as_bytes()), printable);
        if address::is_valid(&input) {
            accepted += 1;
            assert!(input.len() <= 254 && input.is_ascii() && input.contains(&b'@'));
            assert!(input.iter().all(u8::is_ascii_graphic), "{shown}");
        }
    }
    assert!(accepted > ROUNDS / 10, "only {accepted} inputs were valid");
}

#[test]
fn headers() {
    let seeds: &[&[u8]] = &[
        b"Received: a\r\n b\r\nX-A : 1\r\nx-a: 2\n\tfolded\n\nX-A: body\n",
        b"From x\nReceived:\nreceived: c\n \n\r\n",
        b"garbage\n X-A: no\nX-A:yes",
        b"A: b\rX-A: 1\nReceived: c\rx-a: 2\r\nB: d\r\rReceived: e\r\nX-A: 3\r\r\n\n",
    ];
    let mut random = Random(0x0fed_cba9_8765_4321);
    for _ in 0..ROUNDS {
        let input = random.mutated(seeds);
        let mut end = 0;
        for field in header::fields(&input) {
            assert!(field.name.start >= end && field.name.end < field.value.start);
            assert!(header::valid_header_name(&input[field.name.clone()]));
            end = field.whole().end;
        }
        assert!(end <= input.len());
        check_removal(&input);
        let values = header::headers(&input, b"x-a");
        assert_eq!(values.len(), header::field_ranges(&input, b"X-A").len());
        assert_eq!(values.first(), header::header_value(&input, b"X-a").as_ref());
        assert!(values.iter().all(|value| !value.contains(&b'\n')));
        assert_eq!(header::received_count(&input), header::headers(&input, b"Received").len());
    }
}

/// Checks that after the removal of all fields of one name, the message has no field of that name
/// and the same other fields.
fn check_removal(message: &[u8]) {
    let removed = header::field_ranges(message, b"X-A");
    let left = header::without(message, &removed).collect::<Vec<_>>().concat();
    assert_eq!(header::header_value(&left, b"X-A"), None, "{}", message.escape_ascii());
    let received = b"Received";
    let shown = format!("{} → {}", message.escape_ascii(), left.escape_ascii());
    assert_eq!(header::headers(&left, received), header::headers(message, received), "{shown}");
    // For a next hop for which a bare CR is a character, no two lines have become one.
    for line in unfolded(&left) {
        let line = line.strip_suffix(b"\r").unwrap_or(&line);
        let is_left_of = |whole: &Vec<u8>| {
            let mut bytes = whole.iter();
            line.iter().all(|byte| bytes.any(|other| other == byte))
        };
        assert!(unfolded(message).iter().any(is_left_of), "{}", message.escape_ascii());
    }
}

/// Returns the lines that LFs end, each with its folded lines.
fn unfolded(message: &[u8]) -> Vec<Vec<u8>> {
    let mut lines: Vec<Vec<u8>> = Vec::new();
    for line in message.split(|&b| b == b'\n') {
        match lines.last_mut() {
            Some(last) if line.starts_with(b" ") || line.starts_with(b"\t") => last.extend(line),
            _ => lines.push(line.to_vec()),
        }
    }
    lines
}

#[test]
fn endpoints() {
    let seeds: &[&[u8]] = &[
        b"192.0.2.1:628",
        b"[2001:db8::1]:628",
        b"fe80::1%1",
        b"server1.local:1234",
        b"/run/qrelay.sock",
        b"@abstract",
        b"10.0.0.0/8",
        b"fd00::/8",
    ];
    let mut random = Random(0x0bad_cafe_dead_beef);
    for _ in 0..ROUNDS {
        let input = random.mutated(seeds);
        if let Ok(Parsed::Endpoint(endpoint)) = endpoint::parse(&input, 628) {
            let shown = endpoint.to_string();
            if shown.as_bytes() == address::printable(&input).as_bytes() && shown.is_ascii() {
                assert!(endpoint::parse(shown.as_bytes(), 1).is_ok(), "{shown}");
            }
            let bytes = postcard::to_stdvec(&endpoint).expect("encodes");
            assert_eq!(postcard::from_bytes(&bytes), Ok(endpoint));
        }
        let Ok(text) = str::from_utf8(&input) else { continue };
        if let Ok(network) = text.parse::<Network>() {
            assert_eq!(network.to_string().parse(), Ok(network), "{text}");
        }
    }
}

#[test]
fn pond_messages() {
    let seeds: &[&[u8]] = &[b"r@x", "ü@x".as_bytes(), b"\xff\xfe\0", &[b'<'; 300], &[b'r'; 250]];
    let mut random = Random(0x5eed_5eed_5eed_5eed);
    for _ in 0..300 {
        let count = random.below(400);
        let recipients: Vec<_> = (0..count)
            .map(|_| format!("<{}>", address::escape_for_log(&random.mutated(seeds))))
            .collect();
        let message = pond::Message {
            sender: "s@x",
            recipients: &recipients.join(","),
            recipient_count: count as u32,
            text: "ok",
        };
        let record = pond::Record {
            timestamp: 0,
            remote_host: None,
            site: None,
            forwarded_to: None,
            message,
            length: 0,
            received: 0,
            sent: 0,
            duration: 0,
        };
        let datagram = pond::encode(&record);
        assert!(datagram.len() <= pond::MAX_DATAGRAM);
        let strings = datagram[14..].split(|&b| b == 0).next().expect("MESSAGE");
        let text = str::from_utf8(strings).expect("UTF-8");
        let truncated = datagram[..datagram.len() - 4].ends_with(&[20, 13]);
        assert_eq!(truncated, text.ends_with(" more ok"));
        assert!(!text.chars().any(char::is_control));
    }
}
