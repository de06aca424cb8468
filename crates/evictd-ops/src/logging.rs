//! Log output: to stderr, as text for people or as JSON for collectors.

use std::error::Error;
use std::io::IsTerminal as _;

use serde::Deserialize;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::util::SubscriberInitExt as _;

use crate::config::Validate;

/// How log lines look.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// Lines for people; coloured if stderr is a terminal.
    #[default]
    Text,
    /// One JSON object per line.
    Json,
}

/// What is logged when the given filter can't be read.
const FALLBACK_FILTER: &str = "info";

/// The section of logging.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LogConfig {
    /// The form.
    pub format: LogFormat,
    /// Which events, as `level` or `target=level,...`.
    pub filter: String,
}

impl Validate for LogConfig {
    fn validate(&self, problems: &mut Vec<String>) {
        problems.extend(check_filter(&self.filter).err().map(|error| format!("log.filter: {error}")));
    }
}

/// Starts logging to stderr. `filter` is a list of directives such as `info,evictd_agent=debug`.
///
/// A filter that can't be read is replaced by `info` and complained about, because a process that
/// logs is better than none; use [`check_filter`] to refuse it earlier. A second call changes
/// nothing: whoever embeds the daemons may have set up logging of their own.
pub fn init(format: LogFormat, filter: &str) {
    let (directives, complaint) = match EnvFilter::try_new(filter) {
        Ok(directives) => (directives, None),
        Err(error) => (EnvFilter::new(FALLBACK_FILTER), Some(error)),
    };
    let lines = tracing_subscriber::fmt().with_writer(std::io::stderr).with_env_filter(directives);
    let started = match format {
        LogFormat::Text => lines.with_ansi(wants_colour()).finish().try_init(),
        LogFormat::Json => lines.json().flatten_event(true).finish().try_init(),
    };
    if let (Ok(()), Some(error)) = (started, complaint) {
        tracing::warn!(%error, "the log filter can't be read; logging at `{FALLBACK_FILTER}` instead");
    }
}

/// Says what is wrong with a log filter, if anything is.
pub fn check_filter(filter: &str) -> Result<(), String> {
    EnvFilter::try_new(filter)
        .map(drop)
        .map_err(|error| format!("not a log filter such as `info,evictd_agent=debug`: {error}"))
}

fn wants_colour() -> bool {
    std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|set| set.is_empty())
}

/// An error and its causes, of which the innermost often says the most: that a password is wrong, say. Some drivers'
/// errors repeat their cause in their own text; it isn't told twice.
pub fn with_causes(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let said = cause.to_string();
        if !text.ends_with(&said) {
            text.push_str(": ");
            text.push_str(&said);
        }
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_start_and_an_unreadable_filter_are_harmless() {
        init(LogFormat::Json, "no such level = =");
        init(LogFormat::Text, "info");
    }

    #[test]
    fn a_filter_can_be_checked_before_it_is_used() {
        assert_eq!(check_filter("info,evictd_agent=debug"), Ok(()));
        assert!(
            check_filter("evictd=loud").is_err_and(|problem| problem.contains("info,evictd_agent=debug"))
        );
    }
}
