//! `evictd api ...`: the control and verify APIs from the command line, with the commands, flags and output
//! of Unkey's CLI.
//!
//! It differs from Unkey's where scripts gain: errors go to standard error instead of standard output, so
//! that a pipe never takes one for a result. Like Unkey's, it exits with 1 on every failure, wrong usage
//! included; and with 3 when a change succeeded, but `--wait` didn't see every region confirm it or be fenced.
//!
//! * [`args`]: the command tree, and what of Unkey's flag syntax clap has to be taught.
//! * [`settings`]: where the root key and the URL come from.
//! * [`client`]: sending, and sending again.
//! * [`output`]: what is printed.
//! * [`wait`]: `--wait`, the way of a change through the regions.

mod args;
mod client;
mod output;
mod settings;
mod wait;

use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;
use std::time::Instant;

pub(crate) use args::{ApiArgs, normalise};
use evictd_wire::api::propagation::Propagation;
use output::Outcome;
use settings::{Settings, Surroundings};
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

/// Prints what clap found wrong with an `evictd api` command, or the help that was asked for. Exits with 1
/// on wrong usage, where clap itself would say 2.
pub(crate) fn usage(error: &clap::Error) -> ExitCode {
    // Nobody is left to tell when this can't be printed.
    let _ = error.print();
    if error.use_stderr() { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

fn execute(args: ApiArgs, surroundings: &Surroundings<'_>) -> anyhow::Result<ExitCode> {
    let (call, connection) = args.into_call()?;
    let settings = Settings::resolve(&connection, call.server, surroundings)?;
    let started = Instant::now();
    let mut live = client::Http::new(&settings);
    let mut sent = client::send(&mut live, &call);
    let took = started.elapsed();
    let changed = sent.result.as_ref().ok().filter(|answer| answer.status == 200).cloned();
    let Some((limit, answer)) = call.wait.zip(changed) else {
        return Ok(conclude(&output::outcome(&call, &settings, sent, took)));
    };
    let mut screen = screen(&settings, surroundings);
    if !settings.json {
        // The change is done, whatever the wait shows.
        let told = output::outcome(&call, &settings, sent, took);
        let code = conclude(&told);
        if !told.success {
            return Ok(code);
        }
        let reached =
            wait::follow(&mut live, &answer, limit, &mut screen, &mut |text| print(io::stdout(), text));
        return Ok(waited(reached.as_ref()));
    }
    let reached = wait::follow(&mut live, &answer, limit, &mut screen, &mut |_| {});
    let code = waited(reached.as_ref());
    if let Some(body) = reached.and_then(|reached| wait::with_propagation(&answer, reached)) {
        sent.result = Ok(client::Answer { body, ..answer });
    }
    let outcome = output::outcome(&call, &settings, sent, took);
    let told = conclude(&outcome);
    Ok(if outcome.success { code } else { told })
}

fn conclude(outcome: &Outcome) -> ExitCode {
    print(io::stdout(), &outcome.stdout);
    print(io::stderr(), &outcome.stderr);
    if outcome.success { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn waited(reached: Option<&Propagation>) -> ExitCode {
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
