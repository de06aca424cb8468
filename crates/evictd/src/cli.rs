//! `evictd api ...`: the control and verify APIs from the command line, with the commands, flags and output
//! of Unkey's CLI.
//!
//! It differs from Unkey's where scripts gain: errors go to standard error instead of standard output, so
//! that a pipe never takes one for a result. Like Unkey's, it exits with 1 on every failure, wrong usage
//! included; and with 3 when a change succeeded, but `--wait` didn't see every region confirm it or its bound elapse.
//!
//! * [`args`]: the command tree.
//! * [`mod@usage`]: what of Unkey's flag syntax clap has to be taught, and what of Unkey's is left out.
//! * [`settings`]: where the root key and the URL come from.
//! * [`login`]: `evictd auth login`, which keeps the root key there.
//! * [`client`]: sending, and sending again.
//! * [`output`]: what is printed.
//! * [`wait`]: `--wait`, the way of a change through the regions.
//! * [`bulk`]: many deletions at once.

mod args;
mod bulk;
mod client;
mod login;
mod output;
mod settings;
mod usage;
mod wait;

use std::ffi::OsString;
use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use evictd_wire::api::propagation::Propagation;

pub(crate) use args::ApiArgs;
use args::Job;
use client::{Answer, Call, Http};
pub(crate) use login::AuthCommand;
use output::Outcome;
use settings::{Server, Settings, Surroundings};
pub(crate) use usage::{asking_for_help, normalise};
use wait::Screen;

/// Carries out one `evictd api` command and prints what came of it.
pub(crate) fn run(args: ApiArgs) -> ExitCode {
    match execute(args, &Surroundings::of_process()) {
        Ok(code) => code,
        Err(error) => {
            print(io::stderr(), &format!("{error:#}\n"));
            ExitCode::FAILURE
        }
    }
}

/// Prints what is wrong with an `evictd api` command, or the help that was asked for. Exits with 1 on wrong usage,
/// where clap itself would say 2.
pub(crate) fn usage(error: &clap::Error, args: &[OsString]) -> ExitCode {
    if let Some(explanation) = usage::explained(error, args) {
        print(io::stderr(), &format!("error: {explanation}\n"));
        return ExitCode::FAILURE;
    }
    // Nobody is left to tell when this can't be printed.
    let _ = error.print();
    if error.use_stderr() { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

/// `evictd auth`: keeps the root key for later commands.
pub(crate) fn auth(command: AuthCommand) -> anyhow::Result<()> {
    login::run(command, &Surroundings::of_process())
}

fn execute(args: ApiArgs, surroundings: &Surroundings<'_>) -> anyhow::Result<ExitCode> {
    let (job, connection) = args.into_job()?;
    match job {
        Job::Call { call, follow } => {
            let settings = Settings::resolve(&connection, call.server, surroundings)?;
            Ok(one(&call, follow, &settings, surroundings))
        }
        Job::DeleteKeys(order) => {
            bulk::run(&order, &Settings::resolve(&connection, Server::Publisher, surroundings)?)
        }
    }
}

/// Sends one request, prints what came of it, and follows the change that it made.
fn one(
    call: &Call,
    follow: Option<Duration>,
    settings: &Settings,
    surroundings: &Surroundings<'_>,
) -> ExitCode {
    let started = Instant::now();
    let mut live = Http::new(settings);
    let mut sent = client::send(&mut live, call);
    let took = started.elapsed();
    let told = output::outcome(call, settings, &sent, took);
    let answer = sent.result.as_ref().ok().filter(|_| told.success).cloned();
    let Some((limit, answer)) = follow.zip(answer) else { return conclude(&told) };
    let mut screen = screen(settings, surroundings);
    if settings.json {
        let reached = wait::follow(&mut live, &answer, limit, &mut screen, &mut |_| {});
        if let Some(body) = reached.as_ref().and_then(|reached| wait::with_propagation(&answer, reached)) {
            sent.result = Ok(Answer { body, ..answer });
        }
        conclude(&output::outcome(call, settings, &sent, took));
        return waited(reached.as_ref());
    }
    // The change is done, whatever the wait shows.
    conclude(&told);
    let reached = wait::follow(&mut live, &answer, limit, &mut screen, &mut |text| print(io::stdout(), text));
    waited(reached.as_ref())
}

fn conclude(outcome: &Outcome) -> ExitCode {
    print(io::stdout(), &outcome.stdout);
    print(io::stderr(), &outcome.stderr);
    if outcome.success { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn waited(reached: Option<&Propagation>) -> ExitCode {
    if let Some(warning) = reached.and_then(wait::warning) {
        print(io::stderr(), &warning);
    }
    if reached.is_some_and(wait::is_proven) { ExitCode::SUCCESS } else { ExitCode::from(wait::UNPROVEN) }
}

fn screen(settings: &Settings, surroundings: &Surroundings<'_>) -> Screen {
    if settings.json {
        Screen::Silent
    } else if io::stdout().is_terminal() {
        let no_color = (surroundings.variable)("NO_COLOR").is_some_and(|value| !value.is_empty());
        Screen::Live { drawn: 0, colours: !no_color }
    } else {
        Screen::Lines { settled: std::collections::BTreeSet::new() }
    }
}

/// A reader that went away, such as `head`, is no failure of the command.
fn print(mut to: impl Write, text: &str) {
    let _ = to.write_all(text.as_bytes()).and_then(|()| to.flush());
}
