//! The ids of the keys to delete: one per line, all checked before any is used.

use std::collections::HashSet;
use std::io::Read;

use anyhow::{Context as _, bail};

/// How many malformed lines are shown. More of them mean a wrong file.
const SHOWN_MAX: usize = 10;

/// How much of a malformed line is shown. It may be a secret, such as a key instead of its id.
const SHOWN_CHARS: usize = 8;

/// Reads ids without duplicates, in the order of their first appearance. Skips blank lines and comments, which begin
/// with `#` at the start of a line or after a space. The error lists malformed lines.
pub(super) fn read(mut from: impl Read) -> anyhow::Result<Vec<String>> {
    let mut text = Vec::new();
    from.read_to_end(&mut text).context("cannot read standard input")?;
    let (mut ids, mut seen, mut bad) = (Vec::new(), HashSet::new(), Vec::new());
    for (index, line) in text.split(|byte| *byte == b'\n').enumerate() {
        let line = String::from_utf8_lossy(line);
        let id = without_comment(&line).trim();
        if id.is_empty() {
            continue;
        }
        if !is_id(id) {
            bad.push((index + 1, excerpt(id)));
        } else if seen.insert(id.to_owned()) {
            ids.push(id.to_owned());
        }
    }
    if bad.is_empty() {
        return Ok(ids);
    }
    let lines: Vec<_> =
        bad.iter().take(SHOWN_MAX).map(|(line, text)| format!("\n  line {line}: {text}")).collect();
    let more = bad.len().saturating_sub(SHOWN_MAX);
    let more = if more > 0 { format!("\n  and {more} more") } else { String::new() };
    bail!(
        "nothing was deleted: standard input has lines that are not ids of keys. Write one id per line, such as \
         key_1234abcd; # begins a comment. (`evictd api keys verify-key` shows the id of a key.){}{more}",
        lines.concat()
    );
}

fn without_comment(line: &str) -> &str {
    let begins = |(at, _): &(usize, &str)| line[..*at].chars().next_back().is_none_or(char::is_whitespace);
    line.match_indices('#').find(begins).map_or(line, |(at, _)| &line[..at])
}

/// Returns whether the text has the form of the ids that the server generates. The server accepts other ids too, and so
/// the keys themselves: a list of leaked keys would get "not found" for each, and look deleted.
fn is_id(text: &str) -> bool {
    text.starts_with("key_")
        && (5..=255).contains(&text.len())
        && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
}

fn excerpt(text: &str) -> String {
    let start: String = text.chars().take(SHOWN_CHARS).flat_map(char::escape_debug).collect();
    if text.chars().count() > SHOWN_CHARS { format!("{start}...") } else { start }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_read_between_comments_and_blank_lines() {
        let text =
            "# leaked on Friday\nkey_2\n\n  key_1  # the CI's\r\n\t\nkey_2\nkey_3#not\tcounted as a comment";
        assert!(read(text.as_bytes()).is_err());
        let text = "# leaked on Friday\nkey_2\n\n  key_1  # the CI's\r\n\t\nkey_2\n#key_4\nkey_3";
        assert_eq!(read(text.as_bytes()).unwrap(), ["key_2", "key_1", "key_3"]);
        assert_eq!(read("".as_bytes()).unwrap(), Vec::<String>::new());
        assert_eq!(read("\n# nothing\n".as_bytes()).unwrap(), Vec::<String>::new());
    }

    #[test]
    fn malformed_lines_are_listed_but_hardly_shown() {
        let text = b"key_1\nid,name\nkey-2\n\xff\xff\xff\nk\nprod.3ZYxwvutsrqp\nkey_6\n".as_slice();
        let error = read(text).unwrap_err().to_string();
        for line in ["line 2: id,name", "line 3: key-2", "line 4: ", "line 5: k", "line 6: prod.3ZY..."] {
            assert!(error.contains(&format!("\n  {line}")), "{line} is missing in: {error}");
        }
        assert!(error.starts_with("nothing was deleted") && !error.contains("line 7"), "{error}");
        assert!(!error.contains("3ZYx"), "{error}");
    }

    #[test]
    fn wrong_file_is_not_shown_whole() {
        let error = read("some words\n".repeat(25).as_bytes()).unwrap_err().to_string();
        assert_eq!(error.matches("some wor...").count(), 10);
        assert!(error.ends_with("and 15 more"), "{error}");
    }

    #[test]
    fn id_has_the_servers_prefix_and_length() {
        let longest = format!("key_{}", "k".repeat(251));
        for (text, expected) in [
            ("key_1", true),
            ("key_", false),
            ("k_1", false),
            ("kkey_1", false),
            ("key-1", false),
            (longest.as_str(), true),
            (&format!("{longest}k"), false),
        ] {
            assert_eq!(is_id(text), expected, "{text}");
        }
    }
}
