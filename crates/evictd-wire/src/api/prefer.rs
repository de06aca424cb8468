//! `Prefer: wait=<seconds>` (RFC 7240): how long a caller would wait for the receipt of its change.

use std::time::Duration;

/// The name of the request's header.
pub const PREFER: &str = "prefer";

/// The name of the answer's header that tells which preferences were honoured.
pub const PREFERENCE_APPLIED: &str = "preference-applied";

/// The longest wait; whoever asks for more gets this.
pub const WAIT_MAX: Duration = Duration::from_mins(1);

/// The wait that the header's lines ask for, at most [`WAIT_MAX`].
///
/// Of several, the first counts. One that can't be read asks for nothing, as RFC 7240 wants it: a preference
/// is never a reason to refuse a request.
pub fn wait<'a>(lines: impl IntoIterator<Item = &'a [u8]>) -> Option<Duration> {
    let lines = lines.into_iter().filter_map(|line| std::str::from_utf8(line).ok());
    let mut wishes = lines.flat_map(|line| outside_quotes(line, ','));
    let value = wishes.find_map(|wish| {
        // What follows a semicolon are parameters, of which `wait` has none.
        let wish = outside_quotes(wish, ';').next()?;
        let (name, value) = wish.split_once('=').unwrap_or((wish, ""));
        name.trim().eq_ignore_ascii_case("wait").then(|| value.trim())
    })?;
    let digits = value.strip_prefix('"').and_then(|rest| rest.strip_suffix('"')).unwrap_or(value);
    if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    // Digits alone fail to be a number only by being too many.
    Some(digits.parse().map_or(WAIT_MAX, Duration::from_secs).min(WAIT_MAX))
}

/// What to answer in [`PREFERENCE_APPLIED`].
pub fn applied(wait: Duration) -> String {
    format!("wait={}", wait.as_secs())
}

/// The parts of `text` between separators that don't stand in quotes.
fn outside_quotes(text: &str, separator: char) -> impl Iterator<Item = &str> {
    let (mut quoted, mut escaped) = (false, false);
    text.split(move |character| {
        let separates = character == separator && !quoted;
        if !escaped && character == '"' {
            quoted = !quoted;
        }
        escaped = quoted && !escaped && character == '\\';
        separates
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seconds(lines: &[&str]) -> Option<u64> {
        wait(lines.iter().map(|line| line.as_bytes())).map(|wait| wait.as_secs())
    }

    #[test]
    fn a_wait_is_found_in_every_form_that_the_standard_allows() {
        for lines in [
            &["wait=10"][..],
            &["WAIT = 10"],
            &["wait=\"10\""],
            &["respond-async, wait=10"],
            &["respond-async", "wait=10"],
            &["return=minimal; foo=\"some, wait=3; thing\" , wait=10"],
            &["wait=10; foo=bar"],
            &[r#"a="\", wait=3", wait=10"#],
            &["wait=010"],
            &["wait=10, wait=20"],
        ] {
            assert_eq!(seconds(lines), Some(10), "{lines:?}");
        }
        assert_eq!(seconds(&["wait=0"]), Some(0));
    }

    #[test]
    fn what_is_no_wait_is_ignored() {
        for lines in [
            &[][..],
            &[""],
            &["return=minimal"],
            &["wait"],
            &["wait="],
            &["wait=-1"],
            &["wait=1.5"],
            &["wait=soon"],
            &["wait=+3"],
            &["wait=\"3"],
            &["await=3"],
            &["wait=x, wait=3"],
            &["respond-async; wait=3"],
        ] {
            assert_eq!(seconds(lines), None, "{lines:?}");
        }
        assert_eq!(wait([&b"wait=\xff"[..]]), None);
    }

    #[test]
    fn nobody_waits_for_longer_than_the_server_keeps_a_request() {
        assert_eq!(seconds(&["wait=61"]), Some(60));
        assert_eq!(seconds(&["wait=99999999999999999999999999"]), Some(60));
        assert_eq!(applied(WAIT_MAX), "wait=60");
    }
}
