//! `--output` of the commands that print for people and for scripts, and how they print.

use std::io::Write;

use clap::ValueEnum;

/// How a command prints its result.
#[derive(Clone, Copy, PartialEq, Eq, Default, ValueEnum, Debug)]
pub(crate) enum OutputFormat {
    /// For people.
    #[default]
    Text,
    /// For scripts: JSON on standard output.
    Json,
}

/// Words that others chose: on a terminal they are words and nothing else, and in a list they begin no line.
pub(crate) fn shown(words: &str) -> String {
    words.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

/// Prints a line on standard output. A reader that went away, such as `head`, is no failure of the command.
pub(crate) fn print_line(text: &str) {
    let mut stdout = std::io::stdout().lock();
    drop(writeln!(stdout, "{text}").and_then(|()| stdout.flush()));
}
