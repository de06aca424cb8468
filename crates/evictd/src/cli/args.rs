//! The command tree: groups, and what their commands have in common.
//!
//! * [`keys`], [`apis`]: the commands of these groups.

mod apis;
mod keys;

use std::convert::Infallible;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::{Args, Subcommand};
use evictd_ops::config::HumanDuration;
use evictd_wire::api::requests::GetReceipt;
use serde::Serialize;

use super::bulk::Order;
use super::client::{Call, Repeat};
use super::settings::Server;
use crate::output_format::OutputFormat;

/// Speaks to the control API (publisher) and the verify API (agent).
#[derive(Args, Debug)]
pub(crate) struct ApiArgs {
    #[command(subcommand)]
    group: Group,
}

#[derive(Subcommand, Debug)]
enum Group {
    /// Creates, shows, changes, replaces, verifies and deletes API keys.
    #[command(subcommand)]
    Keys(keys::Keys),
    /// Creates, shows and deletes APIs, the namespaces of keys, and lists their keys.
    #[command(subcommand)]
    Apis(apis::Apis),
    /// Shows what became of a change, region by region.
    #[command(subcommand)]
    Propagation(Receipts),
}

#[derive(Subcommand, Debug)]
enum Receipts {
    #[command(name = "get-receipt")]
    Get(GetReceiptArgs),
}

/// Shows how far a change has come: of each region whether its agents have confirmed it.
///
/// Any root key of the same workspace will do.
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  evictd api propagation get-receipt --request-id=req_1234abcd")]
struct GetReceiptArgs {
    /// The request that made the change, as its answer named it.
    #[arg(long, value_name = "ID")]
    request_id: String,
    #[command(flatten)]
    connection: Connection,
}

/// What every change takes.
#[derive(Args, Debug)]
struct Follow {
    /// Shows how the regions forget the old state one by one, for at most this long (30s if not said). Exits with
    /// 3 if by then some region has neither confirmed nor elapsed, although the change is committed.
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "30s", value_name = "DURATION")]
    wait: Option<HumanDuration>,
}

/// What every command takes.
#[derive(Args, Clone, Default)]
#[command(next_help_heading = "Connection")]
pub(super) struct Connection {
    /// The root key. Safer in $EVICTD_ROOT_KEY (or $UNKEY_ROOT_KEY): other users see command lines.
    #[arg(long, value_name = "KEY", allow_hyphen_values = true)]
    pub(super) root_key: Option<String>,
    /// The server. Else $EVICTD_API_URL, $UNKEY_API_BASE_URL, `api_url` of the file, http://127.0.0.1:7070;
    /// for verify-key $EVICTD_VERIFY_URL, `verify_url` of the file, then the API URL of environment or file,
    /// http://127.0.0.1:7080.
    #[arg(long, value_name = "URL")]
    pub(super) api_url: Option<String>,
    /// A TOML file with `root_key`, `api_url`, `verify_url`. Else $EVICTD_CONFIG, $UNKEY_CONFIG,
    /// ~/.evictd/config.toml, ~/.unkey/config.toml.
    #[arg(long, value_name = "FILE")]
    pub(super) config: Option<PathBuf>,
    /// `json` prints the whole answer. Else $EVICTD_OUTPUT, $UNKEY_OUTPUT.
    #[arg(long, value_name = "FORMAT")]
    pub(super) output: Option<OutputFormat>,
}

impl std::fmt::Debug for Connection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Connection")
            .field("root_key", &self.root_key.as_ref().map(|_| "[redacted]"))
            .field("api_url", &self.api_url)
            .field("config", &self.config)
            .field("output", &self.output)
            .finish()
    }
}

/// Words between commas; none if there is nothing.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
struct Words(Vec<String>);

impl FromStr for Words {
    type Err = Infallible;

    fn from_str(text: &str) -> Result<Self, Infallible> {
        let words = text.split(',').map(str::trim).filter(|word| !word.is_empty());
        Ok(Self(words.map(str::to_owned).collect()))
    }
}

/// What a command comes to.
#[derive(Debug)]
pub(super) enum Job {
    /// One request, and how long the change that it makes is followed through the regions.
    Call {
        /// The request.
        call: Call,
        /// How long; `None` if not at all.
        follow: Option<Duration>,
    },
    /// Deletions of all the keys that standard input names.
    DeleteKeys(Order),
}

impl ApiArgs {
    /// What to do, and what was said about the connection. Limits of texts are left to the server, which knows them all.
    pub(super) fn into_job(self) -> anyhow::Result<(Job, Connection)> {
        match self.group {
            Group::Keys(keys) => keys.into_job(),
            Group::Apis(apis) => apis.into_job(),
            Group::Propagation(Receipts::Get(args)) => {
                let request = GetReceipt { request_id: args.request_id };
                let job = asking(GetReceipt::PATH, &request, Server::Publisher)?;
                Ok((job, args.connection))
            }
        }
    }
}

/// A question.
fn asking(path: &'static str, request: &impl Serialize, server: Server) -> anyhow::Result<Job> {
    let body = serde_json::to_vec(request)?;
    let call = Call { path, body, server, repeat: Repeat::Harmless, prefer: None };
    Ok(Job::Call { call, follow: None })
}

/// A change, which may be followed on its way through the regions.
fn changing(
    path: &'static str,
    request: &impl Serialize,
    repeat: Repeat,
    follow: &Follow,
) -> anyhow::Result<Job> {
    let follow = follow.wait.map(Duration::from);
    // What is known at once comes with the answer; the rest is asked for, region by region.
    let prefer = follow.map(|_| Duration::ZERO);
    let call = Call { path, body: serde_json::to_vec(request)?, server: Server::Publisher, repeat, prefer };
    Ok(Job::Call { call, follow })
}

#[cfg(test)]
mod tests;
