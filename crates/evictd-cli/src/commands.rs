//! The commands of `evictd api`, and the request that each one sends.
//!
//! Limits of texts are left to the server, which has them all.
//!
//! * [`action`]: what a command does, and the flags that commands share.
//! * [`keys`], [`apis`]: the commands of these groups.

mod action;
mod apis;
mod keys;

use clap::{Args, Subcommand};
use evictd_wire::api::requests::GetReceipt;

use crate::settings::ConnectionArgs;
use action::query;

pub(crate) use action::ApiAction;

/// Calls the control API (publisher) and the verify API (agent).
///
/// As in Unkey's command line, a flag with an empty value counts as not given. Of a repeated flag the last value counts;
/// repeated lists are joined.
#[derive(Args, Debug)]
#[command(args_override_self = true, after_help = crate::EXIT_CODES)]
pub struct ApiArgs {
    #[command(subcommand)]
    group: ApiGroup,
    #[command(flatten)]
    connection: ConnectionArgs,
}

#[derive(Subcommand, Debug)]
enum ApiGroup {
    /// Creates, shows, updates, rerolls, verifies and deletes API keys.
    #[command(subcommand)]
    Keys(keys::KeysCommand),
    /// Creates, shows and deletes APIs, the namespaces of keys, and lists their keys.
    #[command(subcommand)]
    Apis(apis::ApisCommand),
    /// Shows how far a change has propagated, region by region.
    #[command(subcommand)]
    Propagation(PropagationCommand),
}

#[derive(Subcommand, Debug)]
enum PropagationCommand {
    #[command(name = "get-receipt")]
    GetReceipt(GetReceiptArgs),
}

/// Shows how far a change has propagated: for each region whether its agents have confirmed it.
///
/// Any root key of the same workspace can be used.
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  evictd api propagation get-receipt --request-id=req_1234abcd")]
struct GetReceiptArgs {
    /// The request that made the change; its answer contained the id.
    #[arg(long, value_name = "ID")]
    request_id: String,
}

impl ApiArgs {
    pub(crate) fn into_action(self) -> anyhow::Result<(ApiAction, ConnectionArgs)> {
        let action = match self.group {
            ApiGroup::Keys(command) => command.into_action(),
            ApiGroup::Apis(command) => command.into_action(),
            ApiGroup::Propagation(PropagationCommand::GetReceipt(args)) => {
                query(GetReceipt::PATH, &GetReceipt { request_id: args.request_id })
            }
        };
        Ok((action?, self.connection))
    }
}

#[cfg(test)]
mod tests;
