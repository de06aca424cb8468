//! `evictd`: publisher, agent, both in one process for development, and a client of their APIs.
//!
//! Composition only; what the parts do is in their crates.
//!
//! * [`daemon`]: `evictd publisher` and `evictd agent`.
//! * [`dev`]: `evictd dev`, a whole installation in one process.
//! * [`root_key`]: `evictd root-key`.
//! * [`new_epoch`]: `evictd new-epoch`.
//! * [`home_store`]: what these two work on.
//! * [`cli`]: `evictd api`.
//! * [`output_format`]: the flag `--output`.
//! * [`tied`]: children that end with their parent.
//! * [`variables`]: environment variables that are no key's.

mod cli;
mod daemon;
mod dev;
mod home_store;
mod new_epoch;
mod output_format;
mod root_key;
mod tied;
mod variables;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Deleted API keys are forgotten in every region within a proven bound.
#[derive(Parser, Debug)]
#[command(name = "evictd", version, about, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Run the publisher: the home region's control API and log.
    Publisher(daemon::ConfigArgs),
    /// Run an agent: one region's verify API and cache.
    Agent(daemon::ConfigArgs),
    /// Run a publisher, agents and a NATS server in one go, to develop against.
    Dev(dev::DevArgs),
    /// Call the control and verify APIs.
    Api(cli::ApiArgs),
    /// Create and list root keys, directly in the home store.
    #[command(subcommand)]
    RootKey(root_key::RootKeyCommand),
    /// Begin a new epoch, directly in the home store: after it was put back to an older state.
    NewEpoch(new_epoch::NewEpochArgs),
    /// Check a configuration, and print what would be in force; secrets are redacted.
    CheckConfig {
        /// Which daemon's.
        daemon: daemon::Daemon,
        #[command(flatten)]
        config: daemon::ConfigArgs,
    },
    /// Run a program that is told to end when this process's parent ends.
    #[command(hide = true)]
    ExecTied(tied::TiedArgs),
}

fn main() -> ExitCode {
    let args: Vec<_> = std::env::args_os().collect();
    let is_api = args.get(1).is_some_and(|command| command == "api");
    let args = if is_api { cli::normalise(args) } else { args };
    let command = match Cli::try_parse_from(args) {
        Ok(cli) => cli.command,
        Err(error) if is_api => return cli::usage(&error),
        Err(error) => error.exit(),
    };
    let done = match command {
        Command::Api(args) => return cli::run(args),
        Command::Publisher(args) => daemon::run_publisher(&args),
        Command::Agent(args) => daemon::run_agent(&args),
        Command::Dev(args) => dev::run(&args),
        Command::RootKey(command) => root_key::run(command),
        Command::NewEpoch(args) => new_epoch::run(&args),
        Command::CheckConfig { daemon, config } => daemon::check_config(daemon, &config),
        Command::ExecTied(args) => tied::exec(&args),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("evictd: {error:#}");
            ExitCode::FAILURE
        }
    }
}
