//! The client side of the command line: `evictd api` and `evictd auth`, with the commands, flags and output of
//! Unkey's CLI. It calls the HTTP APIs of publisher and agent, and opens no store and no bus.
//!
//! It differs from Unkey's in one respect that matters to scripts: errors go to standard error, so that a pipe
//! never takes one for a result. Like Unkey's, it exits with 1 on every failure, wrong usage included. It exits
//! with 3 if a change succeeded, but `--wait` ended before each region had confirmed or elapsed, and with 4 if
//! `verify-key --exit-code` found that the key isn't valid.
//!
//! In reading order:
//!
//! * [`commands`]: the command tree, and the request of each command.
//! * [`mod@usage`]: the parts of Unkey's flag syntax that clap lacks, and what is left out of it.
//! * [`settings`]: root key, URL and output format, from flags, environment and files.
//! * [`call`]: a request, and when it is sent again; [`http`]: sending it; [`proxy`]: through which proxy.
//! * [`render`]: what is printed of an answer.
//! * [`wait`]: `--wait`, the propagation of a change through the regions.
//! * [`bulk`]: many deletions at once.
//! * [`login`]: `evictd auth login`, which stores the root key.
//! * [`mod@print`], [`time`], [`private_file`]: output, times and secret files, for the other commands of `evictd` too.

// These macros panic when their stream can't be written.
#![warn(clippy::print_stdout, clippy::print_stderr)]

mod bulk;
mod call;
mod commands;
mod http;
mod login;
pub mod print;
pub mod private_file;
mod proxy;
mod render;
mod settings;
pub mod time;
mod usage;
mod wait;

use std::ffi::OsString;
use std::io::{self, IsTerminal};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use evictd_wire::api::propagation::Propagation;
use indicatif::ProgressDrawTarget;

use call::{ApiAnswer, ApiCall, ApiServer, SentCall};
use commands::ApiAction;
use http::HttpTransport;
use print::{note, print, print_styled};
use render::Printout;
use settings::{ClientSettings, Env};
use wait::WaitDisplay;

pub use commands::ApiArgs;
pub use login::AuthCommand;
pub use usage::{EXIT_CODES, normalize};

/// Runs an `evictd api` command and prints its result.
pub fn run(args: ApiArgs) -> ExitCode {
    match execute(args, &Env::of_process()) {
        Ok(code) => code,
        Err(error) => {
            note(&format!("{error:#}"));
            ExitCode::FAILURE
        }
    }
}

/// Prints what is wrong with a command of `tree`, or the requested help. Exits with 1 on wrong usage, as on any failure
/// and as Unkey's command line does; clap itself would exit with 2.
pub fn report_usage(error: &clap::Error, args: &[OsString], tree: &clap::Command) -> ExitCode {
    if let Some(explanation) = usage::explain(error, args, tree) {
        note(&format!("error: {explanation}"));
        return ExitCode::FAILURE;
    }
    print::usage(error, 1)
}

/// Runs an `evictd auth` command.
pub fn auth(command: AuthCommand) -> anyhow::Result<()> {
    login::run(command, &Env::of_process())
}

fn execute(args: ApiArgs, env: &Env<'_>) -> anyhow::Result<ExitCode> {
    let (action, connection) = args.into_action()?;
    match action {
        ApiAction::Call { call, wait } => {
            let settings = ClientSettings::resolve(&connection, call.server, env)?;
            let colors = env.first(&["NO_COLOR"]).is_none();
            send_one(&call, wait, &settings, colors)
        }
        ApiAction::DeleteKeys(deletion) => {
            bulk::run(&deletion, &ClientSettings::resolve(&connection, ApiServer::Publisher, env)?)
        }
    }
}

/// Sends one request and prints its result. After a change, waits for the regions if requested.
fn send_one(
    call: &ApiCall,
    wait: Option<Duration>,
    settings: &ClientSettings,
    colors: bool,
) -> anyhow::Result<ExitCode> {
    let started = Instant::now();
    let mut transport = HttpTransport::new(settings);
    let mut sent = call::send(&mut transport, call);
    let took = started.elapsed();
    let printout = render::render(call, settings, &sent, took);
    let answer = sent.result.as_ref().ok().filter(|_| printout.is_success).cloned();
    if call.exits_with_verdict && answer.as_ref().is_some_and(|answer| !render::is_valid_key(answer)) {
        return conclude(call, &sent, &printout).map(|_| ExitCode::from(usage::NOT_VALID));
    }
    let Some((limit, answer)) = wait.zip(answer) else { return conclude(call, &sent, &printout) };
    let receipt = if settings.json {
        let display = &mut WaitDisplay::Silent;
        let receipt = wait::wait_for_regions(&mut transport, &answer, limit, display, &mut |_| {});
        if let Some(body) = receipt.as_ref().and_then(|receipt| wait::with_receipt(&answer, receipt)) {
            sent.result = Ok(ApiAnswer { body, ..answer });
        }
        conclude(call, &sent, &render::render(call, settings, &sent, took))?;
        receipt
    } else {
        // Printed first, because the change is committed whatever the wait shows.
        conclude(call, &sent, &printout)?;
        let mut display = if io::stdout().is_terminal() {
            WaitDisplay::live(ProgressDrawTarget::stdout(), colors)
        } else {
            WaitDisplay::lines()
        };
        let mut printed = Ok(());
        let print = &mut |text: &str| {
            if printed.is_ok() {
                printed = print_styled(io::stdout(), text);
            }
        };
        let receipt = wait::wait_for_regions(&mut transport, &answer, limit, &mut display, print);
        printed.context(print::UNPRINTED)?;
        receipt
    };
    Ok(conclude_wait(receipt.as_ref()))
}

/// Prints the result. If it holds a secret that cannot be shown again, even a closed pipe is a failure.
fn conclude(call: &ApiCall, sent: &SentCall, printout: &Printout) -> anyhow::Result<ExitCode> {
    if let Some(key_id) = sent.result.as_ref().ok().and_then(|answer| render::created_key(call, answer)) {
        print::write(io::stdout(), &printout.stdout).with_context(|| {
            format!(
                "the key {key_id} was created, but could not be printed and cannot be shown again; delete it with \
                 `evictd api keys delete-key --key-id={key_id}`, and create another one"
            )
        })?;
    } else {
        print(io::stdout(), &printout.stdout).context(print::UNPRINTED)?;
    }
    // The exit code stands for what can't be printed here.
    drop(print(io::stderr(), &printout.stderr));
    Ok(if printout.is_success { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn conclude_wait(receipt: Option<&Propagation>) -> ExitCode {
    if let Some(warning) = receipt.and_then(wait::warning) {
        drop(print(io::stderr(), &warning));
    }
    if receipt.is_some_and(wait::is_proven) { ExitCode::SUCCESS } else { ExitCode::from(wait::UNPROVEN) }
}
