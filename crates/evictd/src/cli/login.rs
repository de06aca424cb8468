//! `evictd auth login`: keeps a root key in the config file, so that later commands find it.
//!
//! As with Unkey's, the key is asked for without showing it, isn't tried out, and lies in the file as it is; the
//! file is its owner's alone.

use std::io::{self, BufRead, IsTerminal, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, ensure};
use clap::{Args, Subcommand};
use evictd_wire::api::secret::Secret;
use rustix::termios::{LocalModes, OptionalActions, Termios, tcgetattr, tcsetattr};
use toml_edit::{DocumentMut, value};

use super::settings::{self, Surroundings};
use crate::private_file;

#[derive(Subcommand, Debug)]
pub(crate) enum AuthCommand {
    Login(LoginArgs),
}

/// Asks for a root key and keeps it in the config file, for all later commands.
///
/// The key isn't shown while it is typed. It is read from standard input where that is no terminal. It lies in the
/// file as it is; nobody but you can read the file.
#[derive(Args, Debug)]
#[command(after_help = "Examples:\n  evictd auth login\n  evictd root-key create | evictd auth login")]
pub(crate) struct LoginArgs {
    /// The file. Else $EVICTD_CONFIG, $UNKEY_CONFIG, ~/.evictd/config.toml.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

pub(super) fn run(command: AuthCommand, surroundings: &Surroundings<'_>) -> anyhow::Result<()> {
    let AuthCommand::Login(args) = command;
    let path = settings::first_file(args.config.as_deref(), surroundings).context(
        "there is no home directory to keep the root key in: name a file with --config or EVICTD_CONFIG",
    )?;
    let root_key = ask()?;
    keep(&path, &root_key)?;
    println!("Root key stored in {}", path.display());
    Ok(())
}

fn ask() -> anyhow::Result<Secret> {
    let stdin = io::stdin();
    let mut line = String::new();
    if stdin.is_terminal() {
        eprint!("Enter your root key: ");
        io::stderr().flush()?;
        let hidden = Hidden::start().context("can't hide what is typed")?;
        let read = stdin.lock().read_line(&mut line);
        drop(hidden);
        eprintln!();
        read
    } else {
        stdin.lock().read_line(&mut line)
    }
    .context("can't read the root key")?;
    checked(&line)
}

/// What can't be a root key isn't stored.
fn checked(line: &str) -> anyhow::Result<Secret> {
    let root_key = line.trim();
    ensure!(!root_key.is_empty(), "no root key was given: nothing was stored");
    ensure!(
        root_key.bytes().all(|byte| byte.is_ascii_graphic()),
        "a root key has neither spaces nor special characters: nothing was stored"
    );
    Ok(Secret::new(root_key))
}

/// Sets `root_key` in the file, and leaves the rest of it as it is.
fn keep(path: &Path, root_key: &Secret) -> anyhow::Result<()> {
    let shown = path.display();
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
        Err(error) => return Err(error).with_context(|| format!("can't read {shown}")),
    };
    // The parser's error shows the line it fails at, which may be the root key's.
    let parsed = text.parse::<DocumentMut>().ok();
    let mut file = parsed.with_context(|| format!("{shown} isn't valid TOML: correct or remove it"))?;
    file["root_key"] = value(root_key.expose());
    private_file::directory(path)
        .and_then(|()| private_file::write(path, &file.to_string()))
        .with_context(|| format!("can't write {shown}"))
}

/// The terminal shows nothing of what is typed, until this is dropped. (A Ctrl-C meanwhile leaves it so; shells
/// put it right.)
struct Hidden(Termios);

impl Hidden {
    fn start() -> io::Result<Self> {
        let before = tcgetattr(io::stdin())?;
        let mut hidden = before.clone();
        hidden.local_modes.remove(LocalModes::ECHO);
        tcsetattr(io::stdin(), OptionalActions::Now, &hidden)?;
        Ok(Self(before))
    }
}

impl Drop for Hidden {
    fn drop(&mut self) {
        // It was possible a moment ago.
        let _ = tcsetattr(io::stdin(), OptionalActions::Now, &self.0);
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn a_root_key_is_kept_for_its_owner_alone_and_the_rest_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("new/config.toml");
        keep(&path, &Secret::new("unkey_1")).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "root_key = \"unkey_1\"\n");

        std::fs::write(&path, "# ours\napi_url = 'http://h'  # home\nroot_key = 'old'\n").unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
        keep(&path, &Secret::new("unkey_2")).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        assert_eq!(text, "# ours\napi_url = 'http://h'  # home\nroot_key = \"unkey_2\"\n");
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
    }

    #[test]
    fn a_broken_file_is_left_alone_and_not_shown() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.toml");
        std::fs::write(&path, "root_key = unkey_hunter2").unwrap();
        let error = format!("{:#}", keep(&path, &Secret::new("unkey_1")).unwrap_err());
        assert!(error.contains("config.toml") && !error.contains("hunter2"), "{error}");
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "root_key = unkey_hunter2");
    }

    #[test]
    fn what_cant_be_a_root_key_is_refused_without_showing_it() {
        assert_eq!(checked(" unkey_1\r\n").unwrap().expose(), "unkey_1");
        for line in ["", "\n", "unkey_a hunter2", "unkey_\u{7}hunter2"] {
            let error = checked(line).unwrap_err().to_string();
            assert!(error.contains("nothing was stored") && !error.contains("hunter2"), "{error}");
        }
    }
}
