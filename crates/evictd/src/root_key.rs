//! `evictd root-key`: who may call the APIs. Works on the home store directly, also beside a running
//! publisher, so that the first root key needs none.

use clap::{Args, Subcommand};
use evictd_core::ids::{KeyId, WorkspaceId};
use evictd_core::time::StoreTime;
use evictd_store::HomeStore;
use evictd_store::change::{NewRootKey, Operator, RootKeyInfo};
use evictd_wire::api::ids;
use evictd_wire::api::secret::Secret;
use serde_json::{Value, json};

use crate::daemon::ConfigArgs;
use crate::home_store::Place;
use crate::output_format::{OutputFormat, print_line};
use crate::when::{self, When};

/// The workspace of those who don't ask for one.
const DEFAULT_WORKSPACE: &str = "ws_default";

/// What a root key may do unless told otherwise: everything, on every API.
const ALL_PERMISSIONS: [&str; 8] = [
    "api.*.create_api",
    "api.*.read_api",
    "api.*.delete_api",
    "api.*.create_key",
    "api.*.read_key",
    "api.*.update_key",
    "api.*.delete_key",
    "api.*.verify_key",
];

#[derive(Subcommand, Debug)]
pub(crate) enum RootKeyCommand {
    Create(CreateArgs),
    List(ListArgs),
    Revoke(RevokeArgs),
}

/// Creates a root key and prints it. It can't be shown again.
///
/// It works on the home store itself, so the first root key needs none.
#[derive(Args, Debug)]
#[command(after_help = "Examples:\n  evictd root-key create --name=ci --expires=90d\n  \
                        evictd root-key create --name=gateway --permission=api.*.verify_key")]
pub(crate) struct CreateArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// What it is for, in your own words.
    #[arg(long, value_name = "TEXT")]
    name: Option<String>,
    /// What it may do, such as `api.*.verify_key` or `api.api_123.delete_key`; repeatable. Everything, if not said.
    #[arg(long = "permission", value_name = "PERMISSION")]
    permissions: Vec<String>,
    /// When it ends: 2027-01-31T12:00:00Z, or a span from now such as 90d. Without it it doesn't end by itself.
    #[arg(long, value_name = "TIME")]
    expires: Option<When>,
    /// The workspace it acts for; created when new.
    #[arg(long, value_name = "ID", default_value = DEFAULT_WORKSPACE)]
    workspace: String,
    /// `json` prints one JSON object.
    #[arg(long, value_name = "FORMAT", default_value = "text")]
    output: OutputFormat,
}

/// Lists the root keys, without their secrets, the newest first.
#[derive(Args, Debug)]
pub(crate) struct ListArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// `json` prints one JSON array.
    #[arg(long, value_name = "FORMAT", default_value = "text")]
    output: OutputFormat,
}

/// Revokes a root key. Every region stops accepting it within the bound.
///
/// Which ones there are, `evictd root-key list` tells.
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  evictd root-key revoke --root-key-id=root_1234abcd")]
pub(crate) struct RevokeArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// The root key's id. Not the root key itself.
    #[arg(long, value_name = "ID")]
    root_key_id: String,
    /// `json` prints one JSON object.
    #[arg(long, value_name = "FORMAT", default_value = "text")]
    output: OutputFormat,
}

pub(crate) fn run(command: RootKeyCommand) -> anyhow::Result<()> {
    match command {
        RootKeyCommand::Create(args) => create(args),
        RootKeyCommand::List(args) => list(&args),
        RootKeyCommand::Revoke(args) => revoke(&args),
    }
}

/// What a root key is to be.
#[derive(Debug)]
pub(crate) struct Wish {
    /// What it acts for.
    pub(crate) workspace: String,
    /// What it is for.
    pub(crate) name: Option<String>,
    /// What it may do; everything, if there is nothing.
    pub(crate) permissions: Vec<String>,
    /// When it ends.
    pub(crate) expires_at: Option<StoreTime>,
}

impl Wish {
    /// One that may do everything, for ever.
    pub(crate) fn named(name: &str) -> Self {
        let (workspace, name) = (DEFAULT_WORKSPACE.to_owned(), Some(name.to_owned()));
        Self { workspace, name, permissions: Vec::new(), expires_at: None }
    }
}

/// Creates a root key.
pub(crate) async fn create_in(store: &dyn HomeStore, wish: Wish) -> anyhow::Result<(KeyId, Secret)> {
    let (secret, start) = ids::new_root_key();
    let id = KeyId::new(ids::new_id(ids::ROOT_KEY));
    let permissions = match wish.permissions.len() {
        0 => ALL_PERMISSIONS.map(str::to_owned).to_vec(),
        _ => wish.permissions,
    };
    let root_key = NewRootKey {
        id: id.clone(),
        workspace_id: WorkspaceId::new(wish.workspace),
        hash: ids::hash(secret.expose()),
        start,
        name: wish.name,
        permissions,
        expires_at: wish.expires_at,
    };
    store.create_root_key(&operator(), root_key).await?;
    Ok((id, secret))
}

/// Who works on the store, for the audit records.
pub(crate) fn operator() -> Operator {
    let user = ["SUDO_USER", "USER", "LOGNAME"].into_iter().find_map(|name| std::env::var(name).ok());
    let name = user.filter(|user| !user.is_empty()).unwrap_or_else(|| "operator".to_owned());
    Operator { name, request_id: ids::new_id(ids::REQUEST) }
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
    let now = when::now();
    let expires_at = args.expires.map(|expires| expires.after(now));
    if let Some(expires_at) = expires_at.filter(|expires_at| *expires_at <= now) {
        anyhow::bail!("--expires lies in the past: {}", when::written(expires_at));
    }
    let place = Place::of(&args.config)?;
    let wish = Wish { workspace: args.workspace, name: args.name, permissions: args.permissions, expires_at };
    let (id, secret) = place.with(async |store| create_in(store, wish).await)?;
    // A relative path may have led elsewhere than to the publisher's store.
    eprintln!("stored the root key in {place}");
    match args.output {
        OutputFormat::Json => print_line(
            &json!({
                "rootKeyId": id.as_str(), "rootKey": secret.expose(),
                "expires": expires_at.map(StoreTime::as_millis),
            })
            .to_string(),
        ),
        OutputFormat::Text => print_line(secret.expose()),
    }
    Ok(())
}

fn list(args: &ListArgs) -> anyhow::Result<()> {
    let keys = Place::existing(&args.config)?.with(async |store| Ok(store.root_keys().await?))?;
    if args.output == OutputFormat::Json {
        let rows: Vec<_> = keys.iter().map(json_row).collect();
        print_line(&serde_json::to_string_pretty(&rows)?);
        return Ok(());
    }
    let now = when::now();
    for key in &keys {
        print_line(&row(key, now));
    }
    Ok(())
}

fn json_row(key: &RootKeyInfo) -> Value {
    json!({
        "rootKeyId": key.id.as_str(), "start": key.start, "name": key.name,
        "workspaceId": key.workspace_id.as_str(), "permissions": key.permissions,
        "createdAt": key.created_at.as_millis(),
        "expires": key.expires_at.map(StoreTime::as_millis),
    })
}

/// `root_1  unkey_abcd...  ws_default  ci  expires 2027-01-31T12:00:00.000Z  api.*.verify_key`
fn row(key: &RootKeyInfo, now: StoreTime) -> String {
    let end = match key.expires_at {
        None => "never expires".to_owned(),
        Some(end) if end <= now => format!("expired {}", when::written(end)),
        Some(end) => format!("expires {}", when::written(end)),
    };
    let name = key.name.as_deref().unwrap_or("-");
    format!(
        "{}  {}...  {}  {name}  {end}  {}",
        key.id,
        key.start,
        key.workspace_id,
        key.permissions.join(",")
    )
}

fn revoke(args: &RevokeArgs) -> anyhow::Result<()> {
    anyhow::ensure!(
        !args.root_key_id.starts_with("unkey_"),
        "that is a root key and not the id of one (root_...), which `evictd root-key list` tells"
    );
    let place = Place::existing(&args.config)?;
    let (operator, id) = (operator(), KeyId::new(args.root_key_id.as_str()));
    let found = place.with(async |store| Ok(store.revoke_root_key(&operator, &id).await?))?;
    anyhow::ensure!(
        found,
        "there is no root key {id} in the home store {place}, or it was revoked before; `evictd root-key list` \
         tells which there are"
    );
    let request_id = &operator.request_id;
    match args.output {
        OutputFormat::Json => {
            print_line(&json!({ "rootKeyId": id.as_str(), "requestId": request_id }).to_string());
        }
        OutputFormat::Text => {
            print_line(&format!("{id} is revoked  {request_id}"));
            eprintln!(
                "See how the regions learn of it, with another root key of its workspace:\n  \
                 evictd api propagation get-receipt --request-id={request_id}"
            );
        }
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

        let place = Place::of(&config()).unwrap();
        place.with(async |store| create_in(store, Wish::named("first")).await).unwrap();
        listing().unwrap();
    }

    #[test]
    fn a_root_key_is_revoked_once_and_then_listed_no_more() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("evictd.db");
        let config = || ConfigArgs::default().and_set("store.path", path.display().to_string());
        let place = Place::of(&config()).unwrap();
        let (id, _) = place.with(async |store| create_in(store, Wish::named("doomed")).await).unwrap();
        let revoking = || {
            let (root_key_id, output) = (id.to_string(), OutputFormat::Json);
            revoke(&RevokeArgs { config: config(), root_key_id, output })
        };
        revoking().unwrap();
        let error = revoking().unwrap_err().to_string();
        assert!(error.contains(id.as_str()) && error.contains("root-key list"), "{error}");
        assert_eq!(place.with(async |store| Ok(store.root_keys().await?)).unwrap(), []);
    }

    #[test]
    fn an_end_in_the_past_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("evictd.db");
        let args = |expires: &str| CreateArgs {
            config: ConfigArgs::default().and_set("store.path", path.display().to_string()),
            name: None,
            permissions: Vec::new(),
            expires: Some(expires.parse().unwrap()),
            workspace: DEFAULT_WORKSPACE.to_owned(),
            output: OutputFormat::Json,
        };
        for past in ["2020-01-01T00:00:00Z", "0", "0s"] {
            let error = create(args(past)).unwrap_err().to_string();
            assert!(error.contains("past"), "{error}");
        }
        assert!(!path.exists());
        create(args("90d")).unwrap();
    }

    #[test]
    fn the_list_tells_when_each_ends() {
        let key = |expires_at| RootKeyInfo {
            id: KeyId::new("root_1"),
            workspace_id: WorkspaceId::new("ws_1"),
            start: "unkey_abcd".to_owned(),
            name: Some("ci".to_owned()),
            permissions: vec!["api.*.verify_key".to_owned(), "api.*.read_key".to_owned()],
            created_at: StoreTime(0),
            expires_at,
        };
        let end = StoreTime::from_millis(1_769_860_800_000);
        for (expires_at, now, expected) in [
            (None, end, "never expires"),
            (Some(end), StoreTime(0), "expires 2026-01-31T12:00:00.000Z"),
            (Some(end), end, "expired 2026-01-31T12:00:00.000Z"),
        ] {
            assert_eq!(
                row(&key(expires_at), now),
                format!("root_1  unkey_abcd...  ws_1  ci  {expected}  api.*.verify_key,api.*.read_key")
            );
        }
        assert_eq!(json_row(&key(Some(end)))["expires"], 1_769_860_800_000_i64);
        assert!(json_row(&key(None))["expires"].is_null());
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
