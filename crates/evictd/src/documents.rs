//! `evictd completions` and `evictd man`: what other programs want to know of the command line, out of its own
//! definition.

use std::io::{self, Write as _};
use std::path::PathBuf;

use anyhow::Context as _;
use clap::{Args, Command};
use clap_complete::Shell;

/// Prints completions for a shell.
#[derive(Args, Debug)]
#[command(after_help = "Examples:\n  evictd completions bash > /etc/bash_completion.d/evictd\n  \
                        evictd completions fish > ~/.config/fish/completions/evictd.fish")]
pub(crate) struct CompletionsArgs {
    /// Which shell's.
    shell: Shell,
}

/// Writes the man pages, one of each command; without --dir it prints the first one.
#[derive(Args, Debug)]
#[command(after_help = "Examples:\n  evictd man | man -l -\n  evictd man --dir=/usr/local/share/man/man1")]
pub(crate) struct ManArgs {
    /// The directory, made where there is none.
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
}

pub(crate) fn completions(args: &CompletionsArgs, mut command: Command) -> anyhow::Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut command, "evictd", &mut script);
    printed(&script)
}

pub(crate) fn man(args: &ManArgs, command: Command) -> anyhow::Result<()> {
    let Some(dir) = &args.dir else {
        let mut page = Vec::new();
        clap_mangen::Man::new(command).render(&mut page)?;
        return printed(&page);
    };
    std::fs::create_dir_all(dir)
        .and_then(|()| clap_mangen::generate_to(command, dir))
        .with_context(|| format!("can't write the man pages to {}", dir.display()))
}

/// A reader that went away, such as `head`, is no failure.
fn printed(text: &[u8]) -> anyhow::Result<()> {
    match io::stdout().lock().write_all(text) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(error.into()),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory as _, ValueEnum as _};

    use super::*;
    use crate::Cli;

    /// The names on the way to each command that people see.
    fn paths(command: &Command, above: &[String], found: &mut Vec<Vec<String>>) {
        for command in command.get_subcommands().filter(|command| !command.is_hide_set()) {
            let path = [above, &[command.get_name().to_owned()]].concat();
            paths(command, &path, found);
            found.push(path);
        }
    }

    fn all_paths() -> Vec<Vec<String>> {
        let mut found = Vec::new();
        paths(&Cli::command(), &["evictd".to_owned()], &mut found);
        assert!(found.len() > 20, "{found:?}");
        found
    }

    #[test]
    fn each_command_has_a_man_page() {
        let dir = tempfile::tempdir().unwrap();
        let pages = dir.path().join("man1");
        man(&ManArgs { dir: Some(pages.clone()) }, Cli::command()).unwrap();
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
            clap_complete::generate(*shell, &mut Cli::command(), "evictd", &mut script);
            let script = String::from_utf8(script).unwrap();
            for name in all_paths().iter().filter_map(|path| path.last()) {
                assert!(script.contains(name), "{name} is missing for {shell}");
            }
        }
    }

    #[test]
    fn every_command_and_flag_is_explained_in_sentences() {
        fn check(command: &Command) {
            let about = command.get_about().map(ToString::to_string).unwrap_or_default();
            assert!(is_explained(&about), "{}: {about:?}", command.get_name());
            for arg in
                command.get_arguments().filter(|arg| !["help", "version"].contains(&arg.get_id().as_str()))
            {
                let help =
                    arg.get_long_help().or(arg.get_help()).map(ToString::to_string).unwrap_or_default();
                assert!(is_explained(&help), "{} {}: {help:?}", command.get_name(), arg.get_id());
            }
            command.get_subcommands().filter(|command| !command.is_hide_set()).for_each(check);
        }
        fn is_explained(text: &str) -> bool {
            text.starts_with(|first: char| first.is_uppercase() || first == '`') && text.len() > 10
        }
        check(&Cli::command());
    }
}
