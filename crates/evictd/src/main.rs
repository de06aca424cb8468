//! `evictd`: publisher, agent, both in one process for development, and a client of their APIs.
//!
//! Composition only; what the parts do is in their crates.
//!
//! * [`daemon`]: `evictd publisher` and `evictd agent`.
//! * [`dev`]: `evictd dev`, a whole installation in one process.
//! * [`cli`]: `evictd api` and `evictd auth`.
//! * [`root_key`]: `evictd root-key`.
//! * [`audit`]: `evictd audit`.
//! * [`delete_protection`]: `evictd delete-protection`.
//! * [`migrate`]: `evictd migrate`.
//! * [`new_epoch`]: `evictd new-epoch`.
//! * [`home_store`]: what those five and the publisher work on; [`replica`]: what an agent may read of it.
//! * [`documents`]: `evictd completions` and `evictd man`.
//! * [`output_format`]: the flag `--output`.
//! * [`when`]: times and spans on the command line.
//! * [`private_file`]: files that hold secrets.
//! * [`tied`]: children that end with their parent.
//! * [`variables`]: environment variables that are no key's.

mod audit;
mod cli;
mod daemon;
mod delete_protection;
mod dev;
mod documents;
mod epochs;
mod home_store;
mod migrate;
mod new_epoch;
mod output_format;
mod private_file;
mod replica;
mod root_key;
mod tied;
mod variables;
mod when;

use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};

/// Deleted API keys are forgotten in every region within a proven bound.
#[derive(Parser, Debug)]
#[command(name = "evictd", version, about, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Runs the publisher: the home region's control API and log. Brings the home store's schema up to date first.
    Publisher(daemon::ConfigArgs),
    /// Runs an agent: one region's verify API and cache.
    Agent(daemon::ConfigArgs),
    /// Runs a publisher, agents and a NATS server in one go, to develop against.
    Dev(dev::DevArgs),
    /// Calls the control and verify APIs.
    Api(cli::ApiArgs),
    /// Keeps the root key for later calls.
    #[command(subcommand)]
    Auth(cli::AuthCommand),
    /// Creates, lists and revokes root keys, directly in the home store.
    #[command(subcommand)]
    RootKey(root_key::RootKeyCommand),
    Audit(audit::AuditArgs),
    /// Protects an API from deletion, or lifts that, directly in the home store.
    #[command(subcommand)]
    DeleteProtection(delete_protection::DeleteProtection),
    /// Brings the home store's schema up to date, as the publisher does when it starts.
    Migrate(daemon::ConfigArgs),
    /// Begins a new epoch, directly in the home store: after it was put back to an older state.
    NewEpoch(new_epoch::NewEpochArgs),
    Epochs(epochs::EpochsArgs),
    /// Checks a configuration, and prints what would be in force; secrets are redacted.
    CheckConfig {
        /// Which daemon's.
        daemon: daemon::Daemon,
        #[command(flatten)]
        config: daemon::ConfigArgs,
    },
    /// Prints the version, as --version does.
    Version,
    Completions(documents::CompletionsArgs),
    Man(documents::ManArgs),
    /// Runs a program that is told to end when this process's parent ends.
    #[command(hide = true)]
    ExecTied(tied::TiedArgs),
}

fn main() -> ExitCode {
    let args: Vec<_> = std::env::args_os().collect();
    let is_api = args.get(1).is_some_and(|command| command == "api");
    let args = if is_api { cli::normalise(args) } else { args };
    let args = cli::asking_for_help(args, Cli::command());
    let command = match Cli::try_parse_from(&args) {
        Ok(cli) => cli.command,
        Err(error) if is_api => return cli::usage(&error, &args),
        Err(error) => error.exit(),
    };
    let done = match command {
        Command::Api(args) => return cli::run(args),
        Command::Publisher(args) => daemon::run_publisher(&args),
        Command::Agent(args) => daemon::run_agent(&args),
        Command::Dev(args) => dev::run(&args),
        Command::Auth(command) => cli::auth(command),
        Command::RootKey(command) => root_key::run(command),
        Command::Audit(args) => audit::run(args),
        Command::DeleteProtection(command) => delete_protection::run(&command),
        Command::Migrate(config) => migrate::run(&config),
        Command::NewEpoch(args) => new_epoch::run(&args),
        Command::Epochs(args) => epochs::run(&args),
        Command::CheckConfig { daemon, config } => daemon::check_config(daemon, &config),
        Command::Version => {
            output_format::print_line(Cli::command().render_version().trim_end());
            Ok(())
        }
        Command::Completions(args) => documents::completions(&args, Cli::command()),
        Command::Man(args) => documents::man(&args, Cli::command()),
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
