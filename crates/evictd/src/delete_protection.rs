//! `evictd delete-protection`: an API that can't be deleted by mistake. Works on the home store directly, as Unkey's
//! API has no such endpoint either.

use clap::{Args, Subcommand};
use evictd_core::ids::ApiId;
use serde_json::json;

use crate::daemon::ConfigArgs;
use crate::home_store::Place;
use crate::output_format::{OutputFormat, print_line};
use crate::root_key::operator;

#[derive(Subcommand, Debug)]
pub(crate) enum DeleteProtection {
    /// Protects an API from deletion: whoever tries it is refused (412), whatever the root key may do.
    On(ProtectArgs),
    /// Lets an API be deleted again, by whoever may.
    Off(ProtectArgs),
}

#[derive(Args, Debug)]
pub(crate) struct ProtectArgs {
    /// The API's id.
    #[arg(long, value_name = "ID")]
    api_id: String,
    #[command(flatten)]
    config: ConfigArgs,
    /// `json` prints one JSON object.
    #[arg(long, value_name = "FORMAT", default_value = "text")]
    output: OutputFormat,
}

pub(crate) fn run(command: &DeleteProtection) -> anyhow::Result<()> {
    let (args, protect) = match command {
        DeleteProtection::On(args) => (args, true),
        DeleteProtection::Off(args) => (args, false),
    };
    let place = Place::existing(&args.config)?;
    let (operator, api) = (operator(), ApiId::new(args.api_id.as_str()));
    let found = place.with(async |store| Ok(store.protect_api(&operator, &api, protect).await?))?;
    anyhow::ensure!(found, "there is no API {api} in the home store {place}, or it was deleted");
    match args.output {
        OutputFormat::Json => print_line(
            &json!({ "apiId": api.as_str(), "deleteProtection": protect, "requestId": operator.request_id })
                .to_string(),
        ),
        OutputFormat::Text if protect => print_line(&format!("{api} is protected from deletion")),
        OutputFormat::Text => print_line(&format!("{api} can be deleted")),
    }
    Ok(())
}
