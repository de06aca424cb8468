//! `delete-key --key-id=-`: many deletions, some at a time.
//!
//! All ids are read and checked before the first deletion, so that a wrong file deletes nothing. What was deleted
//! is reported at once, an id a line; so a run that was cut off can be continued with the same list. A server that
//! can't be reached, or that doesn't take the root key, ends the run: the rest would fail one by one.
//!
//! * [`list`]: the ids.
//! * [`report`]: what is printed of each, and of all.

mod list;
mod report;

use std::io::{self, IsTerminal};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use evictd_ops::shutdown;
use evictd_wire::api::envelope::{Failure, Success};
use evictd_wire::api::error::ErrorKind;
use evictd_wire::api::propagation::Propagation;
use evictd_wire::api::requests::DeleteKey;
use parking_lot::{Condvar, Mutex};
use serde_json::value::RawValue;

use super::client::{self, Answer, Call, Http, Lost, Repeat, Sent, World};
use super::settings::{Server, Settings};
use super::wait::{self, Screen};
use super::{output, print};
use report::Report;

/// How many deletions are under way at once unless said otherwise.
pub(super) const DEFAULT_CONCURRENCY: usize = 8;

/// How long the server is asked to hold an answer back until every region has confirmed: well within what one
/// attempt may take. What takes longer is asked for, as it is after a single deletion.
const HELD_MAX: Duration = Duration::from_secs(20);

/// How long a server that has reached its limit of requests is left alone at least.
const CLOSED_MIN: Duration = Duration::from_secs(1);

/// The pause between two attempts from which on people are told.
const NOTED_ABOVE: Duration = Duration::from_millis(500);

/// How often the progress is drawn.
const DRAW_EVERY: Duration = Duration::from_millis(100);

/// What to delete, and how.
#[derive(PartialEq, Eq, Debug)]
pub(super) struct Order {
    /// Whether nothing of the keys may remain.
    pub(super) permanent: bool,
    /// How many deletions are under way at once.
    pub(super) concurrency: usize,
    /// Whether an id that isn't there is a failure.
    pub(super) strict: bool,
    /// How long each deletion is followed through the regions.
    pub(super) wait: Option<Duration>,
}

/// What became of one id.
#[derive(PartialEq, Debug)]
enum Fate {
    /// It was deleted.
    Deleted {
        /// By this request.
        request_id: String,
        /// How far it came, if that was waited for.
        reached: Option<Box<Propagation>>,
    },
    /// There is no such key.
    NotFound {
        /// Whether an earlier attempt of this run got no answer, and may have deleted it.
        maybe_now: bool,
    },
    /// It wasn't deleted, or nobody knows.
    Failed(String),
    /// It was never sent, or the server took nothing then.
    NotStarted,
}

/// What a worker tells.
enum Event {
    /// What became of the id at this place of the list.
    Done(usize, Fate),
    /// Why it takes longer, for people.
    Note(String),
}

/// Deletes the keys that standard input names.
pub(super) fn run(order: &Order, settings: &Settings) -> anyhow::Result<ExitCode> {
    if io::stdin().is_terminal() {
        print(io::stderr(), "Type the ids of the keys to delete, one a line, and end with Ctrl-D.\n");
    }
    let ids = list::read(io::stdin().lock())?;
    let run = Run::new(&ids, order, settings);
    // Signals are heard on a thread of its own, so that all the rest is plain blocking code.
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
    let runtime = runtime.context("can't listen for Ctrl-C")?;
    let stop = run.stop.clone();
    runtime.spawn(async move {
        shutdown::on_signals().cancelled().await;
        stop.set("Finishing what is under way. Ctrl-C once more ends at once.".to_owned());
    });
    let drawn = io::stderr().is_terminal().then(Instant::now);
    let mut report =
        Report::new(&ids, settings.json, (Box::new(io::stdout()), Box::new(io::stderr())), drawn);
    run.work(&mut report);
    Ok(ExitCode::from(report.conclude(order)))
}

/// Tells everybody to take nothing more, and wakes who waits.
#[derive(Default)]
struct Stop {
    why: Mutex<Option<String>>,
    is_set: Condvar,
}

impl Stop {
    /// The first reason stays.
    fn set(&self, why: String) {
        self.why.lock().get_or_insert(why);
        self.is_set.notify_all();
    }

    fn why(&self) -> Option<String> {
        self.why.lock().clone()
    }

    /// Waits. False if nothing more is wanted.
    fn rest(&self, pause: Duration) -> bool {
        let until = Instant::now() + pause;
        let mut why = self.why.lock();
        while why.is_none() {
            if self.is_set.wait_until(&mut why, until).timed_out() {
                return why.is_none();
            }
        }
        false
    }
}

/// What the workers share.
struct Run<'a> {
    ids: &'a [String],
    order: &'a Order,
    settings: &'a Settings,
    next: AtomicUsize,
    stop: Arc<Stop>,
    /// The server takes nothing before this moment, because of its limit of requests.
    closed_until: Mutex<Instant>,
}

impl<'a> Run<'a> {
    fn new(ids: &'a [String], order: &'a Order, settings: &'a Settings) -> Self {
        let closed_until = Mutex::new(Instant::now());
        Self { ids, order, settings, next: AtomicUsize::new(0), stop: Arc::default(), closed_until }
    }

    /// Deletes until nothing is left, or nothing more is wanted.
    fn work(&self, report: &mut Report<'_>) {
        let (events, heard) = mpsc::channel();
        std::thread::scope(|scope| {
            for _ in 0..self.order.concurrency.min(self.ids.len()) {
                let mut worker = Worker { http: Http::new(self.settings), run: self, events: events.clone() };
                scope.spawn(move || worker.work());
            }
            drop(events);
            let mut is_told = false;
            loop {
                match heard.recv_timeout(DRAW_EVERY) {
                    Ok(Event::Done(at, fate)) => report.done(at, &fate),
                    Ok(Event::Note(note)) => report.note(&note),
                    Err(RecvTimeoutError::Timeout) => {}
                    Err(RecvTimeoutError::Disconnected) => break,
                }
                if !is_told && let Some(why) = self.stop.why() {
                    is_told = true;
                    report.note(&why);
                }
                report.draw();
            }
        });
    }

    /// Waits until the server takes requests again. False if nothing more is wanted.
    fn admitted(&self) -> bool {
        loop {
            let closed = self.closed_until.lock().saturating_duration_since(Instant::now());
            if !self.stop.rest(closed) {
                return false;
            }
            if closed.is_zero() {
                return true;
            }
        }
    }

    /// The server takes nothing for so long. True if that wasn't known.
    fn close(&self, pause: Duration) -> bool {
        let now = Instant::now();
        let mut closed_until = self.closed_until.lock();
        let is_news = *closed_until <= now;
        *closed_until = (now + pause).max(*closed_until);
        is_news
    }
}

/// Deletes one key after the other, on a connection of its own.
struct Worker<'a> {
    http: Http<'a>,
    run: &'a Run<'a>,
    events: Sender<Event>,
}

impl Worker<'_> {
    fn work(&mut self) {
        while self.run.stop.why().is_none() {
            let at = self.run.next.fetch_add(1, Ordering::Relaxed);
            let Some(id) = self.run.ids.get(at) else { return };
            match self.delete(id) {
                Ok(fate) => self.tell(Event::Done(at, fate)),
                Err(error) => return self.run.stop.set(format!("{error:#}")),
            }
        }
    }

    fn delete(&mut self, id: &str) -> anyhow::Result<Fate> {
        let request = DeleteKey { key_id: id.to_owned(), permanent: self.run.order.permanent };
        let call = Call {
            path: DeleteKey::PATH,
            body: serde_json::to_vec(&request)?,
            server: Server::Publisher,
            repeat: Repeat::FindsNothing,
            prefer: self.run.order.wait.map(|wait| wait.min(HELD_MAX)),
        };
        let mut maybe_now = false;
        loop {
            if !self.run.admitted() {
                let unknown = || Fate::Failed("it may or may not have been deleted".to_owned());
                return Ok(if maybe_now { unknown() } else { Fate::NotStarted });
            }
            let began = self.http.elapsed();
            let sent = client::send(self, &call);
            maybe_now |= sent.maybe_done_before;
            match sent.result {
                // It was refused before it was looked at.
                Ok(Answer { status: 429, retry_after: Some(pause), .. }) => {
                    let pause = pause.max(CLOSED_MIN);
                    if self.run.close(pause) {
                        let seconds = pause.as_secs();
                        self.tell(Event::Note(format!(
                            "The limit of requests is reached; going on in {seconds} s."
                        )));
                    }
                }
                _ => return Ok(self.judge(&call, sent, maybe_now, began)),
            }
        }
    }

    fn judge(&mut self, call: &Call, sent: Sent, maybe_now: bool, began: Duration) -> Fate {
        let Some(problem) = output::problem(call, self.run.settings, &sent) else {
            return self.deleted(sent.result, began);
        };
        let problem = problem.lines().next().unwrap_or_default().to_owned();
        match failure(&sent) {
            Some(kind) if kind == ErrorKind::KeyNotFound.type_url() => Fate::NotFound { maybe_now },
            Some(kind) if is_about_one_key(&kind) => Fate::Failed(problem),
            _ => {
                self.run.stop.set(format!("Stopped, because the rest would fail alike. {problem}"));
                Fate::Failed(problem)
            }
        }
    }

    /// Follows the deletion through the regions, if that is wanted.
    fn deleted(&mut self, result: Result<Answer, Lost>, began: Duration) -> Fate {
        let framed = |answer: &Answer| {
            serde_json::from_slice(&answer.body).map(|framed: Success<&RawValue>| framed.meta.request_id)
        };
        let Some((answer, request_id)) =
            result.ok().and_then(|answer| framed(&answer).ok().map(|id| (answer, id)))
        else {
            return Fate::Failed("the answer can't be read".to_owned());
        };
        let reached = self.run.order.wait.and_then(|wait| {
            let left = wait.saturating_sub(self.http.elapsed().saturating_sub(began));
            wait::follow(self, &answer, left, &mut Screen::Silent, &mut |_| {})
        });
        Fate::Deleted { request_id, reached: reached.map(Box::new) }
    }

    fn tell(&self, event: Event) {
        // Who listens does so until the last worker has ended.
        drop(self.events.send(event));
    }
}

impl World for Worker<'_> {
    fn attempt(&mut self, call: &Call) -> Result<Answer, Lost> {
        self.http.attempt(call)
    }

    fn elapsed(&self) -> Duration {
        self.http.elapsed()
    }

    fn pause(&mut self, pause: Duration, why: &str) {
        if pause > NOTED_ABOVE {
            let url = &self.run.settings.url;
            self.tell(Event::Note(format!("{url} {why}; trying again.")));
        }
        // Not cut short: what was begun is brought to an end.
        std::thread::sleep(pause);
    }

    fn rest(&mut self, pause: Duration) -> bool {
        self.run.stop.rest(pause)
    }
}

/// The type of the error, if the answer is one of evictd's or Unkey's.
fn failure(sent: &Sent) -> Option<String> {
    let answer = sent.result.as_ref().ok()?;
    serde_json::from_slice(&answer.body).ok().map(|failure: Failure| failure.error.r#type)
}

/// Whether another key may fare better.
fn is_about_one_key(kind: &str) -> bool {
    [ErrorKind::InvalidInput, ErrorKind::InsufficientPermissions].iter().any(|about| kind == about.type_url())
}

#[cfg(test)]
mod tests;
