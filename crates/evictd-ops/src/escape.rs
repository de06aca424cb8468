//! Characters that a terminal acts on, or that change how others are read, shown as escapes.
//!
//! Names, user agents and texts of servers come from others. Printed as they are, they could move the cursor, begin a
//! line, or turn the reading direction.

use std::borrow::Cow;
use std::fmt::Write as _;

/// Whether a terminal shows `c` as something else than a character of its own: control characters, line and paragraph
/// separators, and the controls of bidirectional text.
fn is_hidden(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// Replaces all hidden characters by their escapes in JSON, but for those in `kept`. JSON stays JSON of the same value.
pub fn escaped<'a>(text: &'a str, kept: &[char]) -> Cow<'a, str> {
    let is_escaped = |c: char| is_hidden(c) && !kept.contains(&c);
    if !text.contains(is_escaped) {
        return Cow::Borrowed(text);
    }
    let mut shown = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        match c {
            _ if !is_escaped(c) => shown.push(c),
            '\n' => shown.push_str("\\n"),
            '\r' => shown.push_str("\\r"),
            '\t' => shown.push_str("\\t"),
            // All hidden characters have one code unit. Writing to a String can't fail.
            _ => drop(write!(shown, "\\u{:04x}", u32::from(c))),
        }
    }
    Cow::Owned(shown)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hidden_characters_are_escaped() {
        for (text, shown) in [
            ("a\u{1b}[31mb", "a\\u001b[31mb"),
            ("\u{9b}2J", "\\u009b2J"),
            ("a\u{202e}b\u{2066}\u{200f}\u{61c}", "a\\u202eb\\u2066\\u200f\\u061c"),
            ("a\nb\rc\td\u{7f}\u{2028}", "a\\nb\\rc\\td\\u007f\\u2028"),
            ("Zoë 日本 👩\u{200d}💻", "Zoë 日本 👩\u{200d}💻"),
        ] {
            assert_eq!(escaped(text, &[]), shown);
        }
        assert_eq!(escaped("a\nb\u{9b}", &['\n']), "a\nb\\u009b");
    }

    #[test]
    fn json_keeps_its_value() {
        let value = serde_json::json!({ "name": "a\u{9b}b\u{202e}c\u{7f}\n\"" });
        let pretty = serde_json::to_string_pretty(&value).unwrap();
        let shown = escaped(&pretty, &['\n']);
        assert!(
            shown.contains("\\u009b") && shown.contains("\\u202e") && shown.contains("\\u007f"),
            "{shown}"
        );
        assert_eq!(serde_json::from_str::<serde_json::Value>(&shown).unwrap(), value);
    }
}
