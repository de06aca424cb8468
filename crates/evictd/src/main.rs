//! `evictd`: publisher, agent, both in one process for development, operator commands, and a client of their APIs.
//!
//! Composition only: this crate joins configuration, store, daemons and command line, whose work is in their crates.
//!
//! * [`daemon`]: `evictd publisher`, `evictd agent`, `evictd check-config`.
//! * [`dev`]: `evictd dev`, a whole installation in one process; [`nats_server`]: its NATS server.
//! * [`evictd_cli`]: `evictd api` and `evictd auth`.
//! * [`root_key`], [`audit`], [`delete_protection`], [`new_epoch`], [`epochs`]: operator commands, which open the home
//!   store directly; [`operator`]: what they share.
//! * [`migrate`]: `evictd migrate`.
//! * [`documents`]: `evictd completions` and `evictd man`.
//! * [`config_args`]: the flags that name a configuration; [`variables`]: misspelled environment variables.
//! * [`home_store`]: the configured home store; [`replica`]: the database that an agent may load records from.
//! * [`runtime`], [`tied`]: the async runtime, and child processes that end with their parent.

// These macros panic when their stream can't be written.
#![warn(clippy::print_stdout, clippy::print_stderr)]

mod audit;
mod config_args;
mod daemon;
mod delete_protection;
mod dev;
mod documents;
mod epochs;
mod home_store;
mod migrate;
mod nats_server;
mod new_epoch;
mod operator;
mod replica;
mod root_key;
mod runtime;
mod tied;
#[cfg(test)]
mod units;
mod variables;

use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};
use evictd_cli::print::print_line;
use evictd_ops::logging;

use config_args::ConfigArgs;

/// Evicts deleted API keys from every region within a proven bound.
#[derive(Parser, Debug)]
#[command(name = "evictd", version, about, max_term_width = 100, after_help = evictd_cli::EXIT_CODES)]
struct EvictdArgs {
    #[command(subcommand)]
    command: EvictdCommand,
}

#[derive(Subcommand, Debug)]
enum EvictdCommand {
    /// Runs the publisher: the home region's control API and log. Migrates the home store's schema first.
    Publisher(ConfigArgs),
    /// Runs an agent: one region's verify API and cache.
    Agent(ConfigArgs),
    /// Runs a publisher, agents and a NATS server in one process, for development.
    Dev(dev::DevArgs),
    /// Calls the control and verify APIs.
    Api(evictd_cli::ApiArgs),
    /// Stores the root key for later calls.
    #[command(subcommand)]
    Auth(evictd_cli::AuthCommand),
    /// Creates, lists and revokes root keys, directly in the home store.
    #[command(subcommand)]
    RootKey(root_key::RootKeyCommand),
    Audit(audit::AuditArgs),
    /// Protects an API from deletion, or removes the protection, directly in the home store.
    #[command(subcommand)]
    DeleteProtection(delete_protection::DeleteProtection),
    /// Migrates the home store's schema, as the publisher does when it starts.
    Migrate(ConfigArgs),
    /// Begins a new epoch, directly in the home store: after the store was restored to an older state.
    NewEpoch(new_epoch::NewEpochArgs),
    Epochs(epochs::EpochsArgs),
    /// Checks a configuration and prints the effective values, with secrets redacted.
    CheckConfig {
        /// The daemon that the configuration is for.
        daemon: daemon::DaemonKind,
        /// Also connects to the NATS servers and the database, and reports those that cannot be used.
        #[arg(long)]
        connect: bool,
        #[command(flatten)]
        config: ConfigArgs,
    },
    /// Prints the version, as --version does.
    Version,
    Completions(documents::CompletionsArgs),
    Man(documents::ManArgs),
    /// Runs a program that is killed when this process's parent exits.
    #[command(hide = true)]
    ExecTied(tied::TiedArgs),
}

fn main() -> ExitCode {
    let args = evictd_cli::normalize(std::env::args_os(), EvictdArgs::command());
    let command = match EvictdArgs::try_parse_from(&args) {
        Ok(args) => args.command,
        Err(error) => return evictd_cli::report_usage(&error, &args, &EvictdArgs::command()),
    };
    let result = match command {
        EvictdCommand::Api(args) => return evictd_cli::run(args),
        EvictdCommand::Publisher(args) => daemon::run_publisher(&args),
        EvictdCommand::Agent(args) => daemon::run_agent(&args),
        EvictdCommand::Dev(args) => dev::run(&args),
        EvictdCommand::Auth(command) => evictd_cli::auth(command),
        EvictdCommand::RootKey(command) => root_key::run(command),
        EvictdCommand::Audit(args) => audit::run(args),
        EvictdCommand::DeleteProtection(command) => delete_protection::run(&command),
        EvictdCommand::Migrate(config) => migrate::run(&config),
        EvictdCommand::NewEpoch(args) => new_epoch::run(&args),
        EvictdCommand::Epochs(args) => epochs::run(&args),
        EvictdCommand::CheckConfig { daemon, connect, config } => {
            daemon::check_config(daemon, connect, &config)
        }
        EvictdCommand::Version => print_line(EvictdArgs::command().render_version().trim_end()),
        EvictdCommand::Completions(args) => documents::completions(&args, EvictdArgs::command()),
        EvictdCommand::Man(args) => documents::man(&args, EvictdArgs::command()),
        EvictdCommand::ExecTied(args) => tied::exec(&args),
    };
    match result {
        Ok(()) => {
            logging::flush(logging::FLUSH_LIMIT);
            ExitCode::SUCCESS
        }
        Err(error) => {
            logging::fatal("evictd", &format!("{error:#}"));
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::ValueEnum as _;
    use clap_complete::Shell;

    use super::*;

    /// Collects the path of each visible command.
    fn paths(command: &clap::Command, above: &[String], found: &mut Vec<Vec<String>>) {
        for command in command.get_subcommands().filter(|command| !command.is_hide_set()) {
            let path = [above, &[command.get_name().to_owned()]].concat();
            paths(command, &path, found);
            found.push(path);
        }
    }

    fn all_paths() -> Vec<Vec<String>> {
        let mut found = Vec::new();
        paths(&EvictdArgs::command(), &["evictd".to_owned()], &mut found);
        assert!(found.len() > 20, "{found:?}");
        found
    }

    #[test]
    fn each_command_has_a_man_page() {
        let dir = tempfile::tempdir().unwrap();
        let pages = dir.path().join("man1");
        let args = ["evictd", "man", "--dir", pages.to_str().unwrap()];
        let EvictdCommand::Man(args) = EvictdArgs::parse_from(args).command else {
            panic!("another command")
        };
        documents::man(&args, EvictdArgs::command()).unwrap();
        let mut expected: Vec<_> = all_paths().iter().map(|path| format!("{}.1", path.join("-"))).collect();
        expected.push("evictd.1".to_owned());
        expected.sort();
        let mut written: Vec<_> = std::fs::read_dir(&pages)
            .unwrap()
            .map(|page| page.unwrap().file_name().into_string().unwrap())
            .collect();
        written.sort();
        assert_eq!(written, expected);
        let page = std::fs::read_to_string(pages.join("evictd-api-keys-delete-key.1")).unwrap();
        assert!(page.contains("standard input") && page.contains(r"\-\-concurrency"), "{page}");
    }

    #[test]
    fn each_shell_completes_each_command() {
        for shell in Shell::value_variants() {
            let mut script = Vec::new();
            clap_complete::generate(*shell, &mut EvictdArgs::command(), "evictd", &mut script);
            let script = String::from_utf8(script).unwrap();
            for name in all_paths().iter().filter_map(|path| path.last()) {
                assert!(script.contains(name), "{name} is missing for {shell}");
            }
        }
    }

    #[test]
    fn each_command_and_flag_has_a_help_sentence() {
        fn check(command: &clap::Command) {
            let about = command.get_about().map(ToString::to_string).unwrap_or_default();
            assert!(is_sentence(&about), "{}: {about:?}", command.get_name());
            for arg in
                command.get_arguments().filter(|arg| !["help", "version"].contains(&arg.get_id().as_str()))
            {
                let help =
                    arg.get_long_help().or(arg.get_help()).map(ToString::to_string).unwrap_or_default();
                assert!(is_sentence(&help), "{} {}: {help:?}", command.get_name(), arg.get_id());
            }
            command.get_subcommands().filter(|command| !command.is_hide_set()).for_each(check);
        }
        fn is_sentence(text: &str) -> bool {
            text.starts_with(|first: char| first.is_uppercase() || first == '`') && text.len() > 10
        }
        check(&EvictdArgs::command());
    }
}
