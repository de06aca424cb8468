//! `evictd auth login`: stores a root key in the config file, for later commands.
//!
//! As with Unkey's CLI, the key is read without echo, is not verified, and is stored in plain text; only the owner
//! can read the file.

use std::io::{self, BufRead, IsTerminal};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, ensure};
use clap::{Args, Subcommand};
use evictd_wire::api::secret::Secret;
use rustix::termios::{LocalModes, OptionalActions, Termios, tcgetattr, tcsetattr};
use toml_edit::{DocumentMut, value};

use crate::print::{note, print_line, prompt};
use crate::private_file;
use crate::settings::{self, Env};

/// The commands of `evictd auth`.
#[derive(Subcommand, Debug)]
pub enum AuthCommand {
    /// Reads a root key and stores it in the config file, for later commands.
    ///
    /// The key is not shown while it is typed. If standard input is no terminal, it is read from there. The file contains
    /// it in plain text; only you can read the file.
    Login(LoginArgs),
}

/// The flags of `evictd auth login`.
#[derive(Args, Debug)]
#[command(
    args_override_self = true,
    after_help = "Examples:\n  evictd auth login\n  evictd root-key create | evictd auth login"
)]
pub struct LoginArgs {
    /// The config file. Default: $EVICTD_CONFIG, $UNKEY_CONFIG, ~/.evictd/config.toml.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

pub(crate) fn run(command: AuthCommand, env: &Env<'_>) -> anyhow::Result<()> {
    let AuthCommand::Login(args) = command;
    let path = settings::strongest_file(args.config.as_deref(), env)
        .context("no home directory to store the root key in; name a file with --config or EVICTD_CONFIG")?;
    store(&path, &read_root_key()?)?;
    print_line(&format!("Root key stored in {}", path.display()))
}

fn read_root_key() -> anyhow::Result<Secret> {
    let stdin = io::stdin();
    let mut line = String::new();
    if stdin.is_terminal() {
        prompt("Enter your root key: ");
        let hidden = HiddenInput::start().context("cannot switch off the terminal's echo")?;
        let read = stdin.lock().read_line(&mut line);
        drop(hidden);
        note("");
        read
    } else {
        stdin.lock().read_line(&mut line)
    }
    .context("cannot read the root key")?;
    checked(&line)
}

/// Refuses text that cannot be a root key.
fn checked(line: &str) -> anyhow::Result<Secret> {
    let root_key = line.trim();
    ensure!(!root_key.is_empty(), "no root key: nothing was stored");
    ensure!(
        root_key.bytes().all(|byte| byte.is_ascii_graphic()),
        "a root key has neither spaces nor special characters: nothing was stored"
    );
    Ok(Secret::new(root_key))
}

/// Sets `root_key` in the file, and leaves the rest unchanged.
fn store(path: &Path, root_key: &Secret) -> anyhow::Result<()> {
    let shown = path.display();
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
        Err(error) => return Err(error).with_context(|| format!("cannot read {shown}")),
    };
    // The parser's message would show the line, which may contain the root key.
    let parsed = text.parse::<DocumentMut>().ok();
    let mut file = parsed.with_context(|| format!("{shown} is not valid TOML; correct or remove it"))?;
    file["root_key"] = value(root_key.expose());
    private_file::write(path, &file.to_string()).with_context(|| format!("cannot write {shown}"))
}

/// Switches the terminal's echo off until dropped. Shells restore it after a Ctrl-C.
struct HiddenInput(Termios);

impl HiddenInput {
    fn start() -> io::Result<Self> {
        let before = tcgetattr(io::stdin())?;
        let mut hidden = before.clone();
        hidden.local_modes.remove(LocalModes::ECHO);
        tcsetattr(io::stdin(), OptionalActions::Now, &hidden)?;
        Ok(Self(before))
    }
}

impl Drop for HiddenInput {
    fn drop(&mut self) {
        // Switching it off succeeded, so this does too.
        let _ = tcsetattr(io::stdin(), OptionalActions::Now, &self.0);
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn login_changes_only_the_root_key_and_the_mode() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("new/config.toml");
        store(&path, &Secret::new("unkey_1")).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "root_key = \"unkey_1\"\n");

        std::fs::write(&path, "# ours\napi_url = 'http://h'  # home\nroot_key = 'old'\n").unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
        store(&path, &Secret::new("unkey_2")).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        assert_eq!(text, "# ours\napi_url = 'http://h'  # home\nroot_key = \"unkey_2\"\n");
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
    }

    #[test]
    fn broken_file_is_neither_changed_nor_shown() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.toml");
        std::fs::write(&path, "root_key = unkey_hunter2").unwrap();
        let error = format!("{:#}", store(&path, &Secret::new("unkey_1")).unwrap_err());
        assert!(error.contains("config.toml") && !error.contains("hunter2"), "{error}");
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "root_key = unkey_hunter2");
    }

    #[test]
    fn malformed_root_key_is_refused_but_not_shown() {
        assert_eq!(checked(" unkey_1\r\n").unwrap().expose(), "unkey_1");
        for line in ["", "\n", "unkey_a hunter2", "unkey_\u{7}hunter2"] {
            let error = checked(line).unwrap_err().to_string();
            assert!(error.contains("nothing was stored") && !error.contains("hunter2"), "{error}");
        }
    }
}
