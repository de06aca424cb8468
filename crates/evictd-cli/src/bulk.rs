//! `delete-key --key-id=-`: many deletions, several at a time.
//!
//! All ids are read and checked before the first deletion, so a wrong file deletes nothing. Each deletion is printed
//! when it is done, and a run that was interrupted can be repeated with the same list. A server that is unreachable
//! or rejects the root key ends the run, because the remaining deletions would fail one by one.
//!
//! * [`deletion`]: the flags of a run, and the outcome of each deletion.
//! * [`list`]: the ids.
//! * [`report`]: what is printed for each, and for all.

mod deletion;
mod list;
mod report;

use std::io::{self, IsTerminal};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use evictd_wire::api::envelope::{Failure, Success};
use evictd_wire::api::error::ErrorKind;
use evictd_wire::api::requests::DeleteKey;
use indicatif::ProgressDrawTarget;
use parking_lot::Mutex;
use serde_json::value::RawValue;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;

use crate::call::{self, ApiAnswer, ApiCall, NoAnswer, Repeat, SentCall, Transport};
use crate::http::HttpTransport;
use crate::print::note;
use crate::render;
use crate::settings::ClientSettings;
use crate::wait::{self, WaitDisplay};
use deletion::DeletionOutcome;
use report::BulkReport;

pub(crate) use deletion::{BulkDeletion, DEFAULT_CONCURRENCY};

/// How long the server may delay an answer until every region has confirmed: well below the timeout of an attempt.
/// After that the receipt is queried, as for a single deletion.
const PREFER_MAX: Duration = Duration::from_secs(20);

/// The shortest pause after the server's rate limit was reached.
const LIMIT_PAUSE_MIN: Duration = Duration::from_secs(1);

/// The pause between two attempts from which on the user gets a note.
const NOTED_ABOVE: Duration = Duration::from_millis(500);

/// How often a wait looks for a stop.
const STOP_POLL: Duration = Duration::from_millis(50);

/// A worker's message to the report.
enum BulkEvent {
    /// The outcome of the id at this index.
    Done(usize, DeletionOutcome),
    /// Why the run is slow.
    Note(String),
}

/// Deletes the keys whose ids are on standard input.
pub(crate) fn run(deletion: &BulkDeletion, settings: &ClientSettings) -> anyhow::Result<ExitCode> {
    if io::stdin().is_terminal() {
        note("Type the ids of the keys to delete, one per line, and end with Ctrl-D.");
    }
    let ids = list::read(io::stdin().lock())?;
    let run = BulkRun::new(&ids, deletion, settings);
    run.stop.set_on_signals().context("cannot handle Ctrl-C")?;
    let output = (Box::new(io::stdout()) as _, Box::new(io::stderr()) as _);
    let mut report = BulkReport::new(&ids, settings.json, output, ProgressDrawTarget::stderr());
    run.work(&mut report);
    report.conclude(deletion).map(ExitCode::from)
}

/// Stops the run: workers finish the deletion in progress and start no other.
#[derive(Clone, Default)]
struct StopFlag {
    is_interrupted: Arc<AtomicBool>,
    failure: Arc<OnceLock<String>>,
}

impl StopFlag {
    /// The first SIGINT or SIGTERM stops the run. The second one ends the process, with the exit code of a shell.
    fn set_on_signals(&self) -> io::Result<()> {
        for signal in [SIGINT, SIGTERM] {
            // The handlers run in this order, so the first signal finds the flag unset.
            flag::register_conditional_shutdown(signal, 128 + signal, self.is_interrupted.clone())?;
            flag::register(signal, self.is_interrupted.clone())?;
        }
        Ok(())
    }

    /// Stops the run because of a failure. The first one is reported.
    fn fail(&self, reason: String) {
        // A second reason is dropped.
        let _ = self.failure.set(reason);
    }

    fn reason(&self) -> Option<&str> {
        let interrupted = "Finishing the deletions in progress. A second Ctrl-C ends the run at once.";
        let is_interrupted = self.is_interrupted.load(Ordering::Relaxed);
        self.failure.get().map(String::as_str).or_else(|| is_interrupted.then_some(interrupted))
    }

    /// Waits. Returns false if the run was stopped.
    fn rest(&self, pause: Duration) -> bool {
        let until = Instant::now() + pause;
        while self.reason().is_none() {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return true;
            }
            std::thread::sleep(left.min(STOP_POLL));
        }
        false
    }
}

/// The state that the workers share.
struct BulkRun<'a> {
    ids: &'a [String],
    deletion: &'a BulkDeletion,
    settings: &'a ClientSettings,
    next: AtomicUsize,
    stop: StopFlag,
    /// The end of the server's rate limit.
    limited_until: Mutex<Instant>,
}

impl<'a> BulkRun<'a> {
    fn new(ids: &'a [String], deletion: &'a BulkDeletion, settings: &'a ClientSettings) -> Self {
        let limited_until = Mutex::new(Instant::now());
        Self { ids, deletion, settings, next: AtomicUsize::new(0), stop: StopFlag::default(), limited_until }
    }

    /// Deletes until no id is left, or the run is stopped.
    fn work(&self, report: &mut BulkReport<'_>) {
        // Unbounded, so that a slow reader of standard output does not delay deletions.
        let (sender, events) = mpsc::channel();
        std::thread::scope(|scope| {
            for _ in 0..self.deletion.concurrency.min(self.ids.len()) {
                let http = HttpTransport::new(self.settings);
                let mut worker = Worker { http, run: self, events: sender.clone() };
                scope.spawn(move || worker.work());
            }
            drop(sender);
            let mut has_reported_stop = false;
            loop {
                let event = events.recv_timeout(STOP_POLL);
                if let Some(reason) = self.stop.reason().filter(|_| !has_reported_stop) {
                    has_reported_stop = true;
                    report.note(reason);
                }
                match event {
                    Ok(BulkEvent::Done(index, outcome)) => report.done(index, &outcome),
                    Ok(BulkEvent::Note(note)) => report.note(&note),
                    Err(RecvTimeoutError::Timeout) => {}
                    Err(RecvTimeoutError::Disconnected) => break,
                }
            }
        });
    }

    /// Waits for the end of the rate limit. Returns false if the run was stopped.
    fn wait_for_limit(&self) -> bool {
        loop {
            let left = self.limited_until.lock().saturating_duration_since(Instant::now());
            if !self.stop.rest(left) {
                return false;
            }
            if left.is_zero() {
                return true;
            }
        }
    }

    /// Extends the rate limit. Returns whether it had ended.
    fn extend_limit(&self, pause: Duration) -> bool {
        let now = Instant::now();
        let mut limited_until = self.limited_until.lock();
        let is_new = *limited_until <= now;
        *limited_until = (now + pause).max(*limited_until);
        is_new
    }
}

/// Deletes one key after the other, on its own connection.
struct Worker<'a> {
    http: HttpTransport<'a>,
    run: &'a BulkRun<'a>,
    events: Sender<BulkEvent>,
}

impl Worker<'_> {
    fn work(&mut self) {
        while self.run.stop.reason().is_none() {
            let index = self.run.next.fetch_add(1, Ordering::Relaxed);
            let Some(id) = self.run.ids.get(index) else { return };
            match self.delete(id) {
                Ok(outcome) => self.report(BulkEvent::Done(index, outcome)),
                Err(error) => return self.run.stop.fail(format!("{error:#}")),
            }
        }
    }

    fn delete(&mut self, id: &str) -> anyhow::Result<DeletionOutcome> {
        let deletion = self.run.deletion;
        let request = DeleteKey { key_id: id.to_owned(), permanent: deletion.permanent };
        let prefer = deletion.wait.map(|wait| wait.min(PREFER_MAX));
        let call = ApiCall { prefer, ..ApiCall::new(DeleteKey::PATH, &request, Repeat::FindsNothing)? };
        let mut is_maybe_done = false;
        loop {
            if !self.run.wait_for_limit() {
                return Ok(if is_maybe_done {
                    DeletionOutcome::Failed("it may or may not have been deleted".to_owned())
                } else {
                    DeletionOutcome::NotStarted
                });
            }
            let started = self.http.elapsed();
            let sent = call::send(self, &call);
            is_maybe_done |= sent.is_maybe_done;
            match sent.result {
                // The server refuses these before it does anything.
                Ok(ApiAnswer { status: 429, retry_after: Some(pause), .. }) => {
                    let pause = pause.max(LIMIT_PAUSE_MIN);
                    if self.run.extend_limit(pause) {
                        let seconds = pause.as_secs();
                        self.report(BulkEvent::Note(format!(
                            "The server's rate limit is reached; continuing in {seconds} s."
                        )));
                    }
                }
                _ => return Ok(self.judge(&call, sent, is_maybe_done, started)),
            }
        }
    }

    fn judge(
        &mut self,
        call: &ApiCall,
        sent: SentCall,
        is_maybe_done: bool,
        started: Duration,
    ) -> DeletionOutcome {
        let Some(problem) = render::problem(call, self.run.settings, &sent) else {
            return self.deleted(sent.result, started);
        };
        let problem = problem.lines().next().unwrap_or_default().to_owned();
        match error_type(&sent) {
            Some(kind) if kind == ErrorKind::KeyNotFound.type_url() => {
                DeletionOutcome::NotFound { is_maybe_done }
            }
            Some(kind) if concerns_one_key(&kind) => DeletionOutcome::Failed(problem),
            _ => {
                self.run.stop.fail(format!("Stopped, because the others would fail too. {problem}"));
                DeletionOutcome::Failed(problem)
            }
        }
    }

    /// Waits for the regions, if requested.
    fn deleted(&mut self, result: Result<ApiAnswer, NoAnswer>, started: Duration) -> DeletionOutcome {
        let request_id = |answer: &ApiAnswer| {
            serde_json::from_slice(&answer.body).map(|success: Success<&RawValue>| success.meta.request_id)
        };
        let Some((answer, request_id)) =
            result.ok().and_then(|answer| request_id(&answer).ok().map(|id| (answer, id)))
        else {
            return DeletionOutcome::Failed("the answer cannot be parsed".to_owned());
        };
        let receipt = self.run.deletion.wait.and_then(|wait| {
            let left = wait.saturating_sub(self.http.elapsed().saturating_sub(started));
            wait::wait_for_regions(self, &answer, left, &mut WaitDisplay::Silent, &mut |_| {})
        });
        DeletionOutcome::Deleted { request_id, receipt: receipt.map(Box::new) }
    }

    fn report(&self, event: BulkEvent) {
        // The receiver lives until the last worker has ended.
        drop(self.events.send(event));
    }
}

impl Transport for Worker<'_> {
    fn attempt(&mut self, call: &ApiCall) -> Result<ApiAnswer, NoAnswer> {
        self.http.attempt(call)
    }

    fn elapsed(&self) -> Duration {
        self.http.elapsed()
    }

    fn pause(&mut self, pause: Duration, cause: &str) {
        if pause > NOTED_ABOVE {
            let url = &self.run.settings.url;
            self.report(BulkEvent::Note(format!("{url} {cause}; retrying.")));
        }
        // Not cut short by a stop, because a deletion in progress is finished.
        std::thread::sleep(pause);
    }

    fn rest(&mut self, pause: Duration) -> bool {
        self.run.stop.rest(pause)
    }
}

/// Returns the type of the error, if the answer has the form of evictd and Unkey.
fn error_type(sent: &SentCall) -> Option<String> {
    let answer = sent.result.as_ref().ok()?;
    serde_json::from_slice(&answer.body).ok().map(|failure: Failure| failure.error.r#type)
}

/// Returns whether another key may succeed.
fn concerns_one_key(kind: &str) -> bool {
    [ErrorKind::InvalidInput, ErrorKind::InsufficientPermissions].iter().any(|about| kind == about.type_url())
}

#[cfg(test)]
mod tests;
