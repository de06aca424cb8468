//! `evictd delete-protection`: protects an API from deletion by mistake. Works on the home store directly, because
//! Unkey's API has no endpoint for it.

use clap::{Args, Subcommand};
use evictd_core::ids::ApiId;
use serde_json::json;

use crate::operator::{OperatorArgs, operator};

#[derive(Subcommand, Debug)]
pub(crate) enum DeleteProtection {
    /// Protects an API from deletion: deleting it answers 412, whatever the root key's permissions.
    On(ProtectArgs),
    /// Allows the deletion of an API again.
    Off(ProtectArgs),
}

#[derive(Args, Debug)]
pub(crate) struct ProtectArgs {
    /// The API's id.
    #[arg(long, value_name = "ID")]
    api_id: String,
    #[command(flatten)]
    operator: OperatorArgs,
}

pub(crate) fn run(command: &DeleteProtection) -> anyhow::Result<()> {
    let (args, protect) = match command {
        DeleteProtection::On(args) => (args, true),
        DeleteProtection::Off(args) => (args, false),
    };
    let store = args.operator.store()?;
    let (operator, api) = (operator(), ApiId::new(args.api_id.as_str()));
    let found = store.with(async |store| Ok(store.protect_api(&operator, &api, protect).await?))?;
    anyhow::ensure!(found, "there is no API {api} in the home store {store}, or it was deleted");
    let json =
        json!({ "apiId": api.as_str(), "deleteProtection": protect, "requestId": operator.request_id });
    let state = if protect { "is protected from deletion" } else { "can be deleted" };
    args.operator.output.print_line(&json, &format!("{api} {state}"))
}
