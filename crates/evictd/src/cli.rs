//! `evictd api ...`: the control and verify APIs from the command line, with the commands, flags and output
//! of Unkey's CLI.
//!
//! It differs from Unkey's where scripts gain: errors go to standard error instead of standard output, so
//! that a pipe never takes one for a result. Like Unkey's, it exits with 1 on every failure, wrong usage
//! included.
//!
//! * [`args`]: the command tree, and what of Unkey's flag syntax clap has to be taught.
//! * [`settings`]: where the root key and the URL come from.
//! * [`client`]: sending, and sending again.
//! * [`output`]: what is printed.

mod args;
mod client;
mod output;
mod settings;

use std::io::{self, Write};
use std::process::ExitCode;
use std::time::Instant;

pub(crate) use args::{ApiArgs, normalise};
use output::Outcome;
use settings::{Settings, Surroundings};

/// Carries out one `evictd api` command and prints what came of it.
pub(crate) fn run(args: ApiArgs) -> ExitCode {
    match execute(args, &Surroundings::of_process()) {
        Ok(outcome) => {
            print(io::stdout(), &outcome.stdout);
            print(io::stderr(), &outcome.stderr);
            if outcome.success { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
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

fn execute(args: ApiArgs, surroundings: &Surroundings<'_>) -> anyhow::Result<Outcome> {
    let (call, connection) = args.into_call()?;
    let settings = Settings::resolve(&connection, call.server, surroundings)?;
    let started = Instant::now();
    let mut live = client::Http::new(&settings);
    let result = client::send(&mut live, &call);
    Ok(output::outcome(&call, &settings, result, started.elapsed()))
}

/// A reader that went away, such as `head`, is no failure of the command.
fn print(mut to: impl Write, text: &str) {
    let _ = to.write_all(text.as_bytes()).and_then(|()| to.flush());
}
