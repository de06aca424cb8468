//! `evictd api apis ...`

use clap::{Args, Subcommand};
use evictd_wire::api::requests::{CreateApi, DeleteApi, GetApi, ListKeys};

use super::action::{ApiAction, WaitArgs, change, query};
use crate::call::Repeat;
use crate::usage;

#[derive(Subcommand, Debug)]
pub(super) enum ApisCommand {
    CreateApi(CreateApiArgs),
    GetApi(GetApiArgs),
    DeleteApi(DeleteApiArgs),
    ListKeys(ListKeysArgs),
}

/// Creates an API, a namespace for keys.
///
/// The root key needs api.*.create_api.
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  evictd api apis create-api --name=payments")]
pub(super) struct CreateApiArgs {
    /// A name for people. It need not be unique.
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    name: String,
}

/// Shows an API.
///
/// The root key needs api.*.read_api or api.<api_id>.read_api.
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  evictd api apis get-api --api-id=api_1234abcd")]
pub(super) struct GetApiArgs {
    /// The API's id, which createApi returned.
    #[arg(long, value_name = "ID")]
    api_id: String,
}

/// Deletes an API. Every region stops accepting all of its keys within the bound.
///
/// The server refuses to delete an API that is protected (`evictd delete-protection`). The root key needs
/// api.*.delete_api or api.<api_id>.delete_api.
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  evictd api apis delete-api --api-id=api_1234abcd --wait")]
pub(super) struct DeleteApiArgs {
    /// The API's id, which createApi returned.
    #[arg(long, value_name = "ID")]
    api_id: String,
    #[command(flatten)]
    wait: WaitArgs,
}

/// Lists the keys of an API, a page at a time, ordered by id. The keys themselves are never shown.
///
/// If there are more, the last line shows the --cursor of the next page. The root key needs read_key and read_api,
/// each for every API (api.*.read_key) or for this one (api.<api_id>.read_key).
#[derive(Args, Debug)]
#[command(after_help = "Examples:\n  evictd api apis list-keys --api-id=api_1234abcd --limit=10\n  \
                        evictd api apis list-keys --api-id=api_1234abcd --external-id=user_1 --cursor=key_1234abcd")]
pub(super) struct ListKeysArgs {
    /// The API's id, which createApi returned.
    #[arg(long, value_name = "ID")]
    api_id: String,
    /// The keys per page at most, 1 to 100.
    #[arg(long, value_name = "NUMBER", default_value_t = ListKeys::DEFAULT_LIMIT,
          value_parser = clap::value_parser!(u8).range(1..=100))]
    limit: u8,
    /// The start of the page, as the page before it showed.
    #[arg(long, value_name = "CURSOR")]
    cursor: Option<String>,
    /// Lists only the keys with this external id.
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    external_id: Option<String>,
    /// Accepted for compatibility and ignored: lists always come from the store.
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", hide = true,
          value_parser = usage::switch)]
    revalidate_keys_cache: Option<bool>,
    /// Accepted for compatibility, as long as it is false.
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", hide = true,
          value_parser = usage::switch)]
    decrypt: Option<bool>,
}

impl ApisCommand {
    pub(super) fn into_action(self) -> anyhow::Result<ApiAction> {
        match self {
            Self::CreateApi(CreateApiArgs { name }) => {
                // No agent has cached anything of a new API, so there is nothing to wait for.
                change(CreateApi::PATH, &CreateApi { name }, Repeat::Duplicates, &WaitArgs { wait: None })
            }
            Self::GetApi(GetApiArgs { api_id }) => query(GetApi::PATH, &GetApi { api_id }),
            Self::DeleteApi(DeleteApiArgs { api_id, wait }) => {
                change(DeleteApi::PATH, &DeleteApi { api_id }, Repeat::FindsNothing, &wait)
            }
            Self::ListKeys(args) => {
                usage::must_be_off("--decrypt", args.decrypt)?;
                let ListKeysArgs { api_id, limit, cursor, external_id, .. } = args;
                query(ListKeys::PATH, &ListKeys { api_id, limit, cursor, external_id })
            }
        }
    }
}
