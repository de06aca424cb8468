//! `evictd completions` and `evictd man`: generated from the definition of the command line.

use std::path::PathBuf;

use anyhow::Context as _;
use clap::{Args, Command};
use clap_complete::Shell;
use evictd_cli::print::print_bytes;

/// Prints completions for a shell.
#[derive(Args, Debug)]
#[command(after_help = "Examples:\n  evictd completions bash > /etc/bash_completion.d/evictd\n  \
                        evictd completions fish > ~/.config/fish/completions/evictd.fish")]
pub(crate) struct CompletionsArgs {
    /// The shell to complete commands in.
    shell: Shell,
}

/// Writes the man pages, one per command. Without --dir it prints the first one.
#[derive(Args, Debug)]
#[command(after_help = "Examples:\n  evictd man | man -l -\n  evictd man --dir=/usr/local/share/man/man1")]
pub(crate) struct ManArgs {
    /// The directory; created if it is missing.
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
}

pub(crate) fn completions(args: &CompletionsArgs, mut command: Command) -> anyhow::Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut command, "evictd", &mut script);
    print_bytes(&script)
}

pub(crate) fn man(args: &ManArgs, command: Command) -> anyhow::Result<()> {
    let Some(dir) = &args.dir else {
        let mut page = Vec::new();
        clap_mangen::Man::new(command).render(&mut page)?;
        return print_bytes(&page);
    };
    std::fs::create_dir_all(dir)
        .and_then(|()| clap_mangen::generate_to(command, dir))
        .with_context(|| format!("cannot write the man pages to {}", dir.display()))
}
