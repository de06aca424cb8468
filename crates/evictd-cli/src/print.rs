//! Printing for people and for scripts.
//!
//! Results go to standard output, and are not best effort: a command whose result can't be written fails. Notes go to
//! standard error, and are. What others wrote is shown without the characters that a terminal acts on.

use std::io::{self, Write};
use std::process::ExitCode;

use anyhow::Context as _;
use clap::ValueEnum;
use evictd_ops::escape::escaped;
use serde_json::Value;

/// Why a command fails whose result can't be written.
pub(crate) const UNPRINTED: &str = "cannot write the result to standard output; what was printed is incomplete, and what was changed stays changed";

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
    pub fn print_line(self, json: &Value, text: &str) -> anyhow::Result<()> {
        print_line(&self.line(json, text))
    }

    /// As [`OutputFormat::print_line`], for a secret that cannot be shown again. A closed pipe has lost it too.
    pub fn print_secret_line(self, json: &Value, text: &str) -> io::Result<()> {
        write(io::stdout(), &format!("{}\n", self.line(json, text)))
    }

    fn line(self, json: &Value, text: &str) -> String {
        match self {
            Self::Text => text.to_owned(),
            Self::Json => json.to_string(),
        }
    }
}

/// Makes text from others one line: escapes line breaks too.
pub fn printable(text: &str) -> String {
    escaped(text, &[]).into_owned()
}

/// Prints a line on standard output.
pub fn print_line(text: &str) -> anyhow::Result<()> {
    print(io::stdout(), &format!("{text}\n")).context(UNPRINTED)
}

/// Prints evictd's own text on standard output as it is.
pub fn print_bytes(text: &[u8]) -> anyhow::Result<()> {
    unless_closed(write_bytes(io::stdout(), text)).context(UNPRINTED)
}

/// Prints a line on standard error, which may be closed or full.
pub fn note(text: &str) {
    // There is no other place to report it.
    drop(write(io::stderr(), &format!("{text}\n")));
}

/// Asks for input, on standard error.
pub fn prompt(text: &str) {
    drop(write(io::stderr(), text));
}

/// Prints what is wrong with a command line, or the requested help. Exits with `wrong` on wrong usage.
pub fn usage(error: &clap::Error, wrong: u8) -> ExitCode {
    let printed = error.print().and_then(|()| io::stdout().flush());
    if error.use_stderr() {
        return ExitCode::from(wrong);
    }
    match unless_closed(printed) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            note(&format!("cannot write to standard output: {error}"));
            ExitCode::FAILURE
        }
    }
}

/// Prints text. A pipe that its reader has closed, as a pager does, is no failure.
pub(crate) fn print(to: impl Write, text: &str) -> io::Result<()> {
    unless_closed(write(to, text))
}

/// As [`print()`], but a closed pipe is a failure too.
pub(crate) fn write(to: impl Write, text: &str) -> io::Result<()> {
    write_bytes(to, escaped(text, &['\n', '\t']).as_bytes())
}

/// Prints text with colors of its own, whose other parts are [`printable`].
pub(crate) fn print_styled(to: impl Write, text: &str) -> io::Result<()> {
    unless_closed(write_bytes(to, text.as_bytes()))
}

fn write_bytes(mut to: impl Write, bytes: &[u8]) -> io::Result<()> {
    to.write_all(bytes).and_then(|()| to.flush())
}

fn unless_closed(written: io::Result<()>) -> io::Result<()> {
    written.or_else(|error| if error.kind() == io::ErrorKind::BrokenPipe { Ok(()) } else { Err(error) })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Fails each write.
    struct Broken(io::ErrorKind);

    impl Write for Broken {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(self.0.into())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn only_a_closed_pipe_is_no_failure() {
        for kind in [io::ErrorKind::StorageFull, io::ErrorKind::QuotaExceeded, io::ErrorKind::Other] {
            assert_eq!(print(Broken(kind), "text").unwrap_err().kind(), kind);
        }
        assert!(print(Broken(io::ErrorKind::BrokenPipe), "text").is_ok());
        assert!(write(Broken(io::ErrorKind::BrokenPipe), "a secret").is_err());
    }

    #[test]
    fn printed_text_moves_no_cursor() {
        let mut printed = Vec::new();
        print(&mut printed, "a\u{1b}[2J\u{9b}\u{202e}b\tc\n").unwrap();
        assert_eq!(String::from_utf8(printed).unwrap(), "a\\u001b[2J\\u009b\\u202eb\tc\n");
        assert_eq!(printable("a\nb"), "a\\nb");
    }
}
