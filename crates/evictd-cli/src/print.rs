//! Printing for people and for scripts.

use std::io::{self, Write};

use clap::ValueEnum;
use serde_json::Value;

/// The value of `--output`.
#[derive(Clone, Copy, PartialEq, Eq, Default, ValueEnum, Debug)]
pub enum OutputFormat {
    /// For people.
    #[default]
    Text,
    /// For scripts.
    Json,
}

impl OutputFormat {
    /// Prints a result on one line of standard output.
    pub fn print_line(self, json: &Value, text: &str) {
        match self {
            Self::Text => print_line(text),
            Self::Json => print_line(&json.to_string()),
        }
    }
}

/// Replaces control characters in text from others, so that it cannot move the cursor or begin a line.
pub fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

/// Prints a line on standard output.
pub fn print_line(text: &str) {
    print(io::stdout().lock(), &format!("{text}\n"));
}

/// Prints text. A closed pipe, as of `head`, does not fail the command.
pub(crate) fn print(mut to: impl Write, text: &str) {
    let _ = to.write_all(text.as_bytes()).and_then(|()| to.flush());
}
