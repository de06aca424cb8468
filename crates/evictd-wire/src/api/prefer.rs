//! `Prefer: wait=<seconds>` (RFC 7240): how long a client waits for the receipt of its change.

use std::time::Duration;

pub const PREFER: &str = "prefer";

/// The answer's header, which lists the preferences that were honored.
pub const PREFERENCE_APPLIED: &str = "preference-applied";

/// The longest wait. Longer ones are shortened to this.
pub const WAIT_MAX: Duration = Duration::from_mins(1);

/// Returns the wait of the header's lines, at most [`WAIT_MAX`].
///
/// Of several, the first counts. An invalid one is ignored, as RFC 7240 requires: a preference is never a reason to
/// reject a request.
pub fn wait<'a>(lines: impl IntoIterator<Item = &'a [u8]>) -> Option<Duration> {
    let lines = lines.into_iter().filter_map(|line| std::str::from_utf8(line).ok());
    let mut preferences = lines.flat_map(|line| outside_quotes(line, ','));
    let value = preferences.find_map(|preference| {
        // Parameters follow a semicolon. `wait` has none.
        let preference = outside_quotes(preference, ';').next()?;
        let (name, value) = preference.split_once('=').unwrap_or((preference, ""));
        name.trim().eq_ignore_ascii_case("wait").then(|| value.trim())
    })?;
    let digits = value.strip_prefix('"').and_then(|rest| rest.strip_suffix('"')).unwrap_or(value);
    if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    // Digits fail to parse only if there are too many.
    Some(digits.parse().map_or(WAIT_MAX, Duration::from_secs).min(WAIT_MAX))
}

/// Returns the value of [`PREFERENCE_APPLIED`].
pub fn applied(wait: Duration) -> String {
    format!("wait={}", wait.as_secs())
}

/// Splits `text` at separators outside quotes.
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
    fn a_wait_is_found_in_every_standard_form() {
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
    fn other_preferences_are_ignored() {
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
    fn no_wait_is_longer_than_the_server_keeps_a_request() {
        assert_eq!(seconds(&["wait=61"]), Some(60));
        assert_eq!(seconds(&["wait=99999999999999999999999999"]), Some(60));
        assert_eq!(applied(WAIT_MAX), "wait=60");
    }
}
