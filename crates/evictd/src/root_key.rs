//! `evictd root-key`: who may call the APIs. Works on the home store directly, also beside a running
//! publisher, so that the first root key needs none.

use clap::{Args, Subcommand};
use evictd_core::ids::{KeyId, WorkspaceId};
use evictd_store::HomeStore;
use evictd_store::change::NewRootKey;
use evictd_store::sqlite::SqliteStore;
use evictd_wire::api::ids;
use evictd_wire::api::secret::Secret;
use serde_json::json;

use crate::daemon::ConfigArgs;
use crate::home_store;
use crate::output_format::{OutputFormat, print_line};

/// The workspace of those who don't ask for one.
const DEFAULT_WORKSPACE: &str = "ws_default";

/// What a root key may do unless told otherwise: everything, on every API.
const ALL_PERMISSIONS: [&str; 7] = [
    "api.*.create_api",
    "api.*.read_api",
    "api.*.delete_api",
    "api.*.create_key",
    "api.*.read_key",
    "api.*.delete_key",
    "api.*.verify_key",
];

#[derive(Subcommand, Debug)]
pub(crate) enum RootKeyCommand {
    /// Create a root key and print it; it can't be shown again.
    Create(CreateArgs),
    /// List root keys, without their secrets.
    List(ListArgs),
}

#[derive(Args, Debug)]
pub(crate) struct CreateArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// What it is for.
    #[arg(long)]
    name: Option<String>,
    /// Permission, such as `api.*.verify_key` or `api.api_123.delete_key`; repeatable. Default: all.
    #[arg(long = "permission", value_name = "PERMISSION")]
    permissions: Vec<String>,
    /// The workspace it acts for; created when new.
    #[arg(long, default_value = DEFAULT_WORKSPACE)]
    workspace: String,
    /// `json` for one JSON object.
    #[arg(long, value_name = "FORMAT", default_value = "text")]
    output: OutputFormat,
}

#[derive(Args, Debug)]
pub(crate) struct ListArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// `json` for one JSON array.
    #[arg(long, value_name = "FORMAT", default_value = "text")]
    output: OutputFormat,
}

pub(crate) fn run(command: RootKeyCommand) -> anyhow::Result<()> {
    match command {
        RootKeyCommand::Create(args) => create(args),
        RootKeyCommand::List(args) => list(&args),
    }
}

/// Creates a root key with all permissions, or those given.
pub(crate) async fn create_in(
    store: &SqliteStore,
    workspace: &str,
    name: Option<String>,
    permissions: Vec<String>,
) -> anyhow::Result<(KeyId, Secret)> {
    let (secret, start) = ids::new_root_key();
    let id = KeyId::new(ids::new_id(ids::ROOT_KEY));
    let permissions = match permissions.len() {
        0 => ALL_PERMISSIONS.map(str::to_owned).to_vec(),
        _ => permissions,
    };
    let root_key = NewRootKey {
        id: id.clone(),
        workspace_id: WorkspaceId::new(workspace),
        hash: ids::hash(secret.expose()),
        start,
        name,
        permissions,
        expires_at: None,
    };
    store.create_root_key(root_key).await?;
    Ok((id, secret))
}

fn create(args: CreateArgs) -> anyhow::Result<()> {
    for permission in &args.permissions {
        anyhow::ensure!(
            is_permission(permission),
            "`{permission}` is not a permission: write api.<id or *>.<action>, for example api.*.verify_key"
        );
    }
    anyhow::ensure!(
        !args.workspace.is_empty() && args.workspace.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_'),
        "the workspace must consist of letters, digits and `_`, for example {DEFAULT_WORKSPACE}"
    );
    let path = home_store::path(&args.config)?;
    let (id, secret) = home_store::with(&path, async |store| {
        create_in(store, &args.workspace, args.name, args.permissions).await
    })?;
    // A relative path may have led elsewhere than to the publisher's store.
    eprintln!("stored the root key in {}", path.display());
    match args.output {
        OutputFormat::Json => {
            print_line(&json!({ "rootKeyId": id.as_str(), "rootKey": secret.expose() }).to_string());
        }
        OutputFormat::Text => print_line(secret.expose()),
    }
    Ok(())
}

fn list(args: &ListArgs) -> anyhow::Result<()> {
    let path = home_store::existing_path(&args.config)?;
    let keys = home_store::with(&path, async |store| Ok(store.root_keys().await?))?;
    if args.output == OutputFormat::Json {
        let rows: Vec<_> = keys
            .iter()
            .map(|key| {
                json!({
                    "rootKeyId": key.id.as_str(), "start": key.start, "name": key.name,
                    "workspaceId": key.workspace_id.as_str(), "permissions": key.permissions,
                    "createdAt": key.created_at.as_millis(),
                    "expires": key.expires_at.map(evictd_core::time::StoreTime::as_millis),
                })
            })
            .collect();
        print_line(&serde_json::to_string_pretty(&rows)?);
        return Ok(());
    }
    for key in keys {
        let name = key.name.as_deref().unwrap_or("-");
        print_line(&format!(
            "{}  {}...  {}  {}  {}",
            key.id,
            key.start,
            key.workspace_id,
            name,
            key.permissions.join(",")
        ));
    }
    Ok(())
}

fn is_permission(text: &str) -> bool {
    let mut parts = text.split('.');
    let token = |part: Option<&str>| {
        part.is_some_and(|part| {
            !part.is_empty() && part.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
        })
    };
    let api = parts.next() == Some("api");
    let target = parts.next();
    api && (target == Some("*") || token(target)) && token(parts.next()) && parts.next().is_none()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listing_root_keys_creates_no_store() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("evictd.db");
        let config = || ConfigArgs::default().and_set("store.path", path.display().to_string());
        let listing = || list(&ListArgs { config: config(), output: OutputFormat::Json });

        let error = listing().unwrap_err().to_string();
        assert!(
            error.contains(&path.display().to_string()) && error.contains("start the publisher"),
            "{error}"
        );
        assert!(!path.exists());

        home_store::with(&path, async |store| create_in(store, DEFAULT_WORKSPACE, None, Vec::new()).await)
            .unwrap();
        listing().unwrap();
    }

    #[test]
    fn permissions_are_checked_before_they_are_stored() {
        for good in ALL_PERMISSIONS.iter().chain(&["api.api_1.delete_key"]) {
            assert!(is_permission(good), "{good}");
        }
        for bad in ["", "api", "api.*", "api.*.", "api..verify_key", "key.*.verify", "api.*.a.b", "api.a-b.c"]
        {
            assert!(!is_permission(bad), "{bad}");
        }
    }
}
