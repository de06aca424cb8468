//! Log output: to stderr, as text for people or as JSON for collectors.

use std::error::Error;
use std::io::IsTerminal as _;
use std::sync::OnceLock;

use serde::Deserialize;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::reload::Handle;
use tracing_subscriber::util::SubscriberInitExt as _;

use crate::config::Validate;

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// Lines for people, in color if stderr is a terminal.
    #[default]
    Text,
    /// One JSON object per line.
    Json,
}

/// Changes the filter of this process's log.
static FILTER: OnceLock<SetFilter> = OnceLock::new();

type SetFilter = Box<dyn Fn(EnvFilter) -> Result<(), String> + Send + Sync>;

/// In place of a filter that can't be parsed.
const FALLBACK_FILTER: &str = "info";

/// The section `[log]` of a configuration.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LogConfig {
    pub format: LogFormat,
    /// As `level` or `target=level,...`.
    pub filter: String,
}

impl Validate for LogConfig {
    fn validate(&self, problems: &mut Vec<String>) {
        problems.extend(check_filter(&self.filter).err().map(|error| format!("log.filter: {error}")));
    }
}

/// Starts logging to stderr. `filter` is a list of directives such as `info,evictd_agent=debug`.
///
/// A filter that can't be parsed is replaced by `info`, with a warning, because a process that logs is better than none.
/// [`check_filter`] refuses it earlier. A second call changes nothing: a program that embeds the daemons may have set up
/// logging of its own.
pub fn init(format: LogFormat, filter: &str) {
    let (directives, parse_error) = match EnvFilter::try_new(filter) {
        Ok(directives) => (directives, None),
        Err(error) => (EnvFilter::new(FALLBACK_FILTER), Some(error)),
    };
    let lines = tracing_subscriber::fmt().with_writer(std::io::stderr).with_env_filter(directives);
    let started = match format {
        LogFormat::Text => {
            let lines = lines.with_ansi(wants_color()).with_filter_reloading();
            let handle = lines.reload_handle();
            lines.finish().try_init().map(|()| keep(handle))
        }
        LogFormat::Json => {
            let lines = lines.json().flatten_event(true).with_filter_reloading();
            let handle = lines.reload_handle();
            lines.finish().try_init().map(|()| keep(handle))
        }
    };
    if let (Ok(()), Some(error)) = (started, parse_error) {
        tracing::warn!(%error, "cannot parse the log filter; logging at `{FALLBACK_FILTER}` instead");
    }
}

/// Keeps what [`set_filter`] needs.
fn keep<S: 'static>(handle: Handle<EnvFilter, S>) {
    let set = move |filter: EnvFilter| handle.reload(filter).map_err(|error| error.to_string());
    // Logging starts once per process.
    let _ = FILTER.set(Box::new(set));
}

/// Changes the filter of the log that [`init`] started. Without that, changes nothing.
pub fn set_filter(filter: &str) {
    let Some(set) = FILTER.get() else { return };
    let changed = EnvFilter::try_new(filter).map_err(|error| error.to_string()).and_then(set);
    if let Err(error) = changed {
        tracing::warn!(error, "cannot change the log filter");
    }
}

/// Returns what is wrong with a log filter, if anything.
pub fn check_filter(filter: &str) -> Result<(), String> {
    EnvFilter::try_new(filter)
        .map(drop)
        .map_err(|error| format!("not a log filter such as `info,evictd_agent=debug`: {error}"))
}

fn wants_color() -> bool {
    std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|set| set.is_empty())
}

/// Joins an error and its causes, of which the innermost often says the most, as that a password is wrong. Some drivers'
/// errors repeat their cause in their own text; it isn't repeated again.
pub fn with_causes(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.ends_with(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn second_start_and_bad_filter_are_harmless() {
        init(LogFormat::Json, "no such level = =");
        init(LogFormat::Text, "info");
    }

    #[test]
    fn filter_can_be_checked_before_use() {
        assert_eq!(check_filter("info,evictd_agent=debug"), Ok(()));
        assert!(
            check_filter("evictd=loud").is_err_and(|problem| problem.contains("info,evictd_agent=debug"))
        );
    }
}
