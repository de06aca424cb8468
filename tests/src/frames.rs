//! The NATS protocol, split into frames: one control line, and a payload if the line announces one.
//!
//! It covers as much as is needed to find messages in a connection of a client or a leaf node, in both directions.

use std::ops::Range;

/// The longest control line that is accepted. A server's `INFO` is the longest.
const LINE_BYTES_MAX: usize = 1 << 20;

/// Verbs whose first argument is a subject and whose last is the size of the payload that follows.
const MESSAGES: [&str; 5] = ["MSG", "HMSG", "PUB", "HPUB", "LMSG"];

/// Verbs of frames without a payload.
const LINES: [&str; 10] = ["INFO", "CONNECT", "SUB", "UNSUB", "PING", "PONG", "+OK", "-ERR", "LS+", "LS-"];

/// One frame, with all its bytes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Frame {
    bytes: Vec<u8>,
    /// The control line without its line break; empty for bytes that are not NATS.
    line: Range<usize>,
    /// The payload (headers included) without its line break.
    payload: Range<usize>,
}

impl Frame {
    /// Returns all bytes of the frame, as received.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Returns all bytes of the frame, as received.
    pub fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }

    /// Returns the control line; empty for bytes that are not NATS.
    pub fn line(&self) -> &str {
        std::str::from_utf8(&self.bytes[self.line.clone()]).unwrap_or_default()
    }

    /// Returns the first word of the control line.
    pub fn verb(&self) -> &str {
        self.line().split_ascii_whitespace().next().unwrap_or_default()
    }

    /// Returns the subject if this is a message.
    pub fn subject(&self) -> Option<&str> {
        let mut words = self.line().split_ascii_whitespace();
        let verb = words.next()?;
        if MESSAGES.contains(&verb) { words.next() } else { None }
    }

    /// Returns the reply subject if this is a message from a server to a client, without headers.
    pub fn reply(&self) -> Option<&str> {
        let words: Vec<_> = self.line().split_ascii_whitespace().collect();
        match words[..] {
            ["MSG", _subject, _sid, reply, _size] => Some(reply),
            _ => None,
        }
    }

    /// Returns the payload, headers included. Empty if there is none.
    pub fn payload(&self) -> &[u8] {
        &self.bytes[self.payload.clone()]
    }
}

/// Splits a stream of bytes into frames. Other protocols, such as TLS, pass unchanged.
#[derive(Default)]
pub struct FrameParser {
    buffer: Vec<u8>,
    /// Where in `buffer` the next frame begins.
    start: usize,
    /// The stream is not NATS: from there on, bytes pass unparsed.
    opaque: bool,
}

impl FrameParser {
    /// Appends the next bytes of the stream, which may end anywhere.
    pub fn push(&mut self, bytes: &[u8]) {
        self.buffer.drain(..std::mem::take(&mut self.start));
        self.buffer.extend_from_slice(bytes);
    }

    /// Returns the next complete frame.
    pub fn next_frame(&mut self) -> Option<Frame> {
        if !self.opaque {
            match self.measure() {
                Measure::Complete { line, payload, total } => {
                    let bytes = self.buffer[self.start..][..total].to_vec();
                    self.start += total;
                    return Some(Frame { bytes, line, payload });
                }
                Measure::Incomplete => return None,
                Measure::NotNats => self.opaque = true,
            }
        }
        let bytes = self.buffer.split_off(std::mem::take(&mut self.start));
        self.buffer.clear();
        (!bytes.is_empty()).then_some(Frame { bytes, line: 0..0, payload: 0..0 })
    }

    /// Measures the next frame, from `start`.
    fn measure(&self) -> Measure {
        let unread = &self.buffer[self.start..];
        let line_end = unread.windows(2).position(|pair| pair == b"\r\n");
        let head = &unread[..line_end.unwrap_or(unread.len())];
        if head.len() > LINE_BYTES_MAX || !may_be_nats(head) {
            return Measure::NotNats;
        }
        let Some(line_end) = line_end else { return Measure::Incomplete };
        let Ok(text) = std::str::from_utf8(head) else { return Measure::NotNats };
        let mut words = text.split_ascii_whitespace();
        let body = line_end + 2;
        if !words.next().is_some_and(|verb| MESSAGES.contains(&verb)) {
            return Measure::Complete { line: 0..line_end, payload: body..body, total: body };
        }
        let size = words.next_back().and_then(|size| size.parse::<usize>().ok());
        let Some(total) = size.and_then(|size| body.checked_add(size)?.checked_add(2)) else {
            return Measure::NotNats;
        };
        if unread.len() < total {
            return Measure::Incomplete;
        }
        Measure::Complete { line: 0..line_end, payload: body..total - 2, total }
    }
}

enum Measure {
    Complete { line: Range<usize>, payload: Range<usize>, total: usize },
    Incomplete,
    NotNats,
}

/// Whether `head`, the beginning of a control line, begins with a known verb or with a part of one.
fn may_be_nats(head: &[u8]) -> bool {
    let word_end = head.iter().position(u8::is_ascii_whitespace);
    MESSAGES.iter().chain(&LINES).any(|verb| match word_end {
        Some(end) => verb.as_bytes() == &head[..end],
        None => verb.as_bytes().starts_with(head),
    })
}

/// Whether `subject` matches `pattern`, where `*` stands for one token and `>` for all that follow.
pub fn subject_matches(pattern: &str, subject: &str) -> bool {
    let mut tokens = subject.split('.');
    for expected in pattern.split('.') {
        match (expected, tokens.next()) {
            (">", Some(_)) => return true,
            ("*", Some(_)) => {}
            (_, Some(token)) if token == expected => {}
            _ => return false,
        }
    }
    tokens.next().is_none()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Frames of clients, servers and leaf nodes, including payloads that look like frames.
    const STREAM: &[u8] = b"INFO {\"server_id\":\"N\"} \r\n\
        CONNECT {\"verbose\":false}\r\nPING\r\nPONG\r\n+OK\r\n-ERR 'Permissions Violation'\r\n\
        SUB a.> q 7\r\nUNSUB 7\r\nLS+ a.> q 1\r\nLS- a.>\r\n\
        MSG a.b 7 12\r\nPING\r\nPONG\r\n\r\nMSG a.c 7 _INBOX.x 0\r\n\r\n\
        HMSG a.d 7 12 14\r\nNATS/1.0\r\n\r\nhi\r\nPUB a.e 2\r\nhi\r\nHPUB a.f r 12 12\r\nNATS/1.0\r\n\r\n\r\n\
        LMSG a.g r 3\r\n\r\n.\r\nLMSG a.h + r q1 q2 1\r\nx\r\n";

    fn frames(pieces: &[&[u8]]) -> Vec<Frame> {
        let mut parser = FrameParser::default();
        let mut frames = Vec::new();
        for piece in pieces {
            parser.push(piece);
            frames.extend(std::iter::from_fn(|| parser.next_frame()));
        }
        frames
    }

    #[test]
    fn only_messages_have_subjects() {
        let subjects: Vec<_> =
            frames(&[STREAM]).iter().filter_map(|frame| frame.subject().map(str::to_owned)).collect();
        assert_eq!(subjects, ["a.b", "a.c", "a.d", "a.e", "a.f", "a.g", "a.h"]);
    }

    #[test]
    fn payload_reply_and_verb_are_found() {
        let frames = frames(&[STREAM]);
        let of = |subject| frames.iter().find(|frame| frame.subject() == Some(subject)).unwrap();
        assert_eq!(of("a.b").payload(), b"PING\r\nPONG\r\n");
        assert_eq!((of("a.c").reply(), of("a.c").payload()), (Some("_INBOX.x"), &b""[..]));
        assert_eq!((of("a.d").verb(), of("a.d").payload()), ("HMSG", &b"NATS/1.0\r\n\r\nhi"[..]));
        assert_eq!((of("a.g").verb(), of("a.g").payload()), ("LMSG", &b"\r\n."[..]));
    }

    #[test]
    fn frames_do_not_depend_on_where_the_stream_is_cut() {
        let whole = frames(&[STREAM]);
        for cut in 0..=STREAM.len() {
            let (head, tail) = STREAM.split_at(cut);
            assert_eq!(frames(&[head, tail]), whole, "cut at byte {cut}");
        }
        let bytes: Vec<_> = STREAM.chunks(1).collect();
        assert_eq!(frames(&bytes), whole, "byte by byte");
    }

    #[test]
    fn nothing_is_lost_or_added() {
        let joined: Vec<u8> = frames(&[STREAM]).into_iter().flat_map(Frame::into_bytes).collect();
        assert_eq!(joined, STREAM);
    }

    #[test]
    fn other_protocols_pass_unchanged() {
        for stream in [&b"\x16\x03\x01 PING\r\n"[..], b"GET / HTTP/1.1\r\n\r\n", b"MSG a 1 many\r\n", b"\r\n"]
        {
            for cut in 0..=stream.len() {
                let (head, tail) = stream.split_at(cut);
                let out = frames(&[b"PING\r\n", head, tail]);
                assert!(out.iter().all(|frame| frame.subject().is_none()));
                let joined: Vec<u8> = out.into_iter().skip(1).flat_map(Frame::into_bytes).collect();
                assert_eq!(joined, stream, "cut at byte {cut}");
            }
        }
    }

    #[test]
    fn patterns_match_as_nats_subscriptions_do() {
        for (pattern, subject, matches) in [
            ("a.b", "a.b", true),
            ("a.b", "a.b.c", false),
            ("a.*", "a.b", true),
            ("a.*", "a.b.c", false),
            ("a.*.c", "a.b.c", true),
            ("a.>", "a.b.c", true),
            ("a.>", "a", false),
            (">", "a", true),
            ("a.b", "a", false),
        ] {
            assert_eq!(subject_matches(pattern, subject), matches, "{pattern} and {subject}");
        }
    }
}
