//! Log output: to stderr, as text for people or as JSON for collectors.
//!
//! Logging is best effort. No thread waits for the log or fails with it; `queue` says how. `limit` keeps peers from
//! filling it.

mod limit;
mod queue;

use std::backtrace::{Backtrace, BacktraceStatus};
use std::error::Error;
use std::io::{self, IsTerminal as _};
use std::sync::OnceLock;
use std::time::Duration;

use metrics::Unit;
use serde::Deserialize;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::reload::Handle;
use tracing_subscriber::util::SubscriberInitExt as _;

use self::queue::LogQueue;
use crate::config::Validate;
use crate::escape::escaped;
use crate::metrics::{MetricKind, MetricSpec};

pub use self::limit::{LogLimit, Unlogged, WINDOW};

/// [`crate::metric_specs!`] adds it to every daemon's list.
pub const DROPPED_SPEC: MetricSpec = MetricSpec {
    name: "evictd_log_lines_dropped_total",
    kind: MetricKind::Counter,
    unit: Some(Unit::Count),
    labels: &[],
    help: "Log lines of this process that could not be written, or found too many others waiting. No request waits for the log.",
};

/// How long the end of a process may wait for its log.
pub const FLUSH_LIMIT: Duration = Duration::from_secs(1);

/// The lines of this process on their way to stderr, from the first one on.
static QUEUE: OnceLock<LogQueue> = OnceLock::new();

/// The format of the daemon's log, for its last line.
static FORMAT: OnceLock<LogFormat> = OnceLock::new();

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
    let colored = format == LogFormat::Text && wants_color();
    let lines = tracing_subscriber::fmt()
        .with_writer(move || LogSink { colored })
        .log_internal_errors(false)
        .with_env_filter(directives);
    let started = match format {
        LogFormat::Text => {
            let lines = lines.with_ansi(colored).with_filter_reloading();
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

/// Logs panics. The usual hook writes to stderr itself, and waits for its reader.
pub fn log_panics() {
    std::panic::set_hook(Box::new(|panic| {
        let location = panic.location().map(tracing::field::display);
        let backtrace = Backtrace::capture();
        let backtrace = (backtrace.status() == BacktraceStatus::Captured).then(|| backtrace.to_string());
        tracing::error!(location, backtrace, "panicked: {}", panic.payload_as_str().unwrap_or("(no text)"));
    }));
}

/// Sets the format of [`fatal`], before anything can fail.
pub fn set_fatal_format(format: LogFormat) {
    // It is set once per process.
    let _ = FORMAT.set(format);
}

/// Reports the error that ends this process, and waits for the log. It is logged in the format of
/// [`set_fatal_format`], whatever the filter, and printed as plain text on a terminal or if no format was set.
pub fn fatal(program: &str, error: &str) {
    match FORMAT.get().filter(|_| !io::stderr().is_terminal()) {
        None => queue().push(format!("{program}: {}\n", escaped(error, &['\n'])).into_bytes()),
        Some(format) => {
            let lines = tracing_subscriber::fmt()
                .with_writer(|| LogSink { colored: false })
                .with_ansi(false)
                .log_internal_errors(false)
                .with_max_level(tracing::Level::ERROR);
            match format {
                LogFormat::Json => {
                    let json = lines.json().flatten_event(true).finish();
                    tracing::subscriber::with_default(json, || tracing::error!(target: "evictd", "{error}"));
                }
                // A line each: text logs escape line breaks within one.
                LogFormat::Text => tracing::subscriber::with_default(lines.finish(), || {
                    for line in error.lines() {
                        tracing::error!(target: "evictd", "{line}");
                    }
                }),
            }
        }
    }
    flush(FLUSH_LIMIT);
}

/// Waits until what was logged is written, for `limit` at most. To be called before a process exits.
pub fn flush(limit: Duration) {
    if let Some(queue) = QUEUE.get() {
        queue.flush(limit);
    }
}

/// Returns how many lines of this process were lost so far.
pub fn lines_dropped() -> u64 {
    QUEUE.get().map_or(0, LogQueue::dropped)
}

fn queue() -> &'static LogQueue {
    let warn =
        |lines| tracing::warn!(lines, "log lines were dropped; the log could not be written fast enough");
    QUEUE.get_or_init(|| LogQueue::start(io::stderr(), warn))
}

/// Queues each event as one line, with the characters escaped that are not a line's own.
struct LogSink {
    /// Whether lines have colors of their own. The values in them have been escaped then.
    colored: bool,
}

impl io::Write for LogSink {
    fn write(&mut self, event: &[u8]) -> io::Result<usize> {
        let text = String::from_utf8_lossy(event);
        let kept: &[char] = if self.colored { &['\u{1b}'] } else { &[] };
        let mut line = escaped(text.trim_end_matches('\n'), kept).into_owned();
        line.push('\n');
        queue().push(line.into_bytes());
        Ok(event.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Returns what is wrong with a log filter, if anything.
pub fn check_filter(filter: &str) -> Result<(), String> {
    EnvFilter::try_new(filter)
        .map(drop)
        .map_err(|error| format!("not a log filter such as `info,evictd_agent=debug`: {error}"))
}

fn wants_color() -> bool {
    io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|set| set.is_empty())
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
