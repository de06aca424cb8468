//! `evictd api apis ...`

use clap::{Args, Subcommand};
use evictd_wire::api::requests::{CreateApi, DeleteApi, GetApi, ListKeys};

use super::super::client::Repeat;
use super::super::settings::Server;
use super::super::usage;
use super::{Connection, Follow, Job, asking, changing};

#[derive(Subcommand, Debug)]
pub(super) enum Apis {
    #[command(name = "create-api")]
    Create(CreateApiArgs),
    #[command(name = "get-api")]
    Get(GetApiArgs),
    #[command(name = "delete-api")]
    Delete(DeleteApiArgs),
    #[command(name = "list-keys")]
    ListKeys(ListKeysArgs),
}

/// Creates an API, a namespace for keys.
///
/// The root key needs api.*.create_api.
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  evictd api apis create-api --name=payments")]
pub(super) struct CreateApiArgs {
    /// A name for people. It needn't be unique.
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    name: String,
    #[command(flatten)]
    connection: Connection,
}

/// Shows what is known of an API.
///
/// The root key needs api.*.read_api or api.<api_id>.read_api.
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  evictd api apis get-api --api-id=api_1234abcd")]
pub(super) struct GetApiArgs {
    /// The API's id, which createApi returned.
    #[arg(long, value_name = "ID")]
    api_id: String,
    #[command(flatten)]
    connection: Connection,
}

/// Deletes an API. Every region stops accepting its keys, all of them, within the bound.
///
/// An API that is protected from deletion (`evictd delete-protection`) is refused. The root key needs
/// api.*.delete_api or api.<api_id>.delete_api.
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  evictd api apis delete-api --api-id=api_1234abcd --wait")]
pub(super) struct DeleteApiArgs {
    /// The API's id, which createApi returned.
    #[arg(long, value_name = "ID")]
    api_id: String,
    #[command(flatten)]
    follow: Follow,
    #[command(flatten)]
    connection: Connection,
}

/// Lists the keys of an API, a page at a time, in the order of their ids. No key itself is ever shown.
///
/// If there are more, the last line says with which --cursor to go on. The root key needs read_key and read_api,
/// each for every API (api.*.read_key) or for this one (api.<api_id>.read_key).
#[derive(Args, Debug)]
#[command(after_help = "Examples:\n  evictd api apis list-keys --api-id=api_1234abcd --limit=10\n  \
                        evictd api apis list-keys --api-id=api_1234abcd --external-id=user_1 --cursor=key_1234abcd")]
pub(super) struct ListKeysArgs {
    /// The API's id, which createApi returned.
    #[arg(long, value_name = "ID")]
    api_id: String,
    /// How many keys a page holds at most, 1 to 100.
    #[arg(long, value_name = "NUMBER", default_value_t = ListKeys::DEFAULT_LIMIT,
          value_parser = clap::value_parser!(u8).range(1..=100))]
    limit: u8,
    /// Where to go on, as the page before said.
    #[arg(long, value_name = "CURSOR")]
    cursor: Option<String>,
    /// Lists only the keys that belong to this external id.
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    external_id: Option<String>,
    /// Accepted for compatibility and ignored: lists always come from the store.
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL",
          hide = true)]
    revalidate_keys_cache: Option<bool>,
    /// Accepted for compatibility, as long as it is false.
    #[arg(long, num_args = 0..=1, require_equals = true, default_value_t = false, default_missing_value = "true",
          action = clap::ArgAction::Set, value_name = "BOOL", hide = true)]
    decrypt: bool,
    #[command(flatten)]
    connection: Connection,
}

impl Apis {
    pub(super) fn into_job(self) -> anyhow::Result<(Job, Connection)> {
        Ok(match self {
            Self::Create(args) => {
                let request = CreateApi { name: args.name };
                let follow = Follow { wait: None };
                (changing(CreateApi::PATH, &request, Repeat::Duplicates, &follow)?, args.connection)
            }
            Self::Get(args) => {
                let request = GetApi { api_id: args.api_id };
                (asking(GetApi::PATH, &request, Server::Publisher)?, args.connection)
            }
            Self::Delete(args) => {
                let request = DeleteApi { api_id: args.api_id };
                let job = changing(DeleteApi::PATH, &request, Repeat::FindsNothing, &args.follow)?;
                (job, args.connection)
            }
            Self::ListKeys(args) => {
                usage::must_be_off("--decrypt", args.decrypt)?;
                let request = ListKeys {
                    api_id: args.api_id,
                    limit: args.limit,
                    cursor: args.cursor,
                    external_id: args.external_id,
                };
                (asking(ListKeys::PATH, &request, Server::Publisher)?, args.connection)
            }
        })
    }
}
