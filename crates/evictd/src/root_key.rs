//! `evictd root-key`: creates, lists and revokes the keys that authorize API calls. Works on the home store directly,
//! so that creating the first root key needs none.

use anyhow::Context as _;
use clap::{Args, Subcommand};
use evictd_cli::print::{OutputFormat, note, print_line, printable};
use evictd_cli::time::{When, format_time};
use evictd_core::ids::{KeyId, WorkspaceId};
use evictd_core::limits::ID_BYTES_MAX;
use evictd_core::time::StoreTime;
use evictd_ops::clock::wall_now;
use evictd_store::OperatorStore;
use evictd_store::operator::{NewRootKey, RootKeyInfo};
use evictd_wire::api::ids;
use evictd_wire::api::secret::Secret;
use serde_json::{Value, json};

use crate::operator::{OperatorArgs, operator};

const DEFAULT_WORKSPACE: &str = "ws_default";

/// The actions that endpoints check. A root key without explicit permissions may do all of them on every API.
const ACTIONS: [&str; 8] = [
    "create_api",
    "read_api",
    "delete_api",
    "create_key",
    "read_key",
    "update_key",
    "delete_key",
    "verify_key",
];

/// The store's limit for a name.
const NAME_BYTES_MAX: usize = 1024;

/// The store's limit for all permissions of a root key, as JSON.
const PERMISSIONS_BYTES_MAX: usize = 65_536;

/// The latest expiry, as for keys: the end of the year 2099. A later one is a slip.
const EXPIRES_MAX: StoreTime = StoreTime(4_102_444_800_000_000);

#[derive(Subcommand, Debug)]
pub(crate) enum RootKeyCommand {
    Create(CreateArgs),
    /// Lists the root keys without their secrets, the newest first.
    List(OperatorArgs),
    Revoke(RevokeArgs),
}

/// Creates a root key and prints it. It cannot be shown again.
///
/// The command works on the home store directly, so the first root key needs none.
#[derive(Args, Debug)]
#[command(after_help = "Examples:\n  evictd root-key create --name=ci --expires=90d\n  \
                        evictd root-key create --name=gateway --permission=api.*.verify_key")]
pub(crate) struct CreateArgs {
    #[command(flatten)]
    operator: OperatorArgs,
    /// The purpose of the root key, for people.
    #[arg(long, value_name = "TEXT")]
    name: Option<String>,
    /// A permission, such as `api.*.verify_key` or `api.api_123.delete_key`; repeatable. Default: all of them.
    #[arg(long = "permission", value_name = "PERMISSION")]
    permissions: Vec<String>,
    /// When it expires: 2027-01-31T12:00:00Z, or a duration from now such as 90d. Default: never.
    #[arg(long, value_name = "TIME")]
    expires: Option<When>,
    /// The workspace of the root key; created if it is new.
    #[arg(long, value_name = "ID", default_value = DEFAULT_WORKSPACE)]
    workspace: String,
}

/// Revokes a root key. Every region stops accepting it within the bound.
///
/// `evictd root-key list` shows the ids.
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  evictd root-key revoke --root-key-id=root_1234abcd")]
pub(crate) struct RevokeArgs {
    #[command(flatten)]
    operator: OperatorArgs,
    /// The root key's id. Not the root key itself.
    #[arg(long, value_name = "ID")]
    root_key_id: String,
}

pub(crate) fn run(command: RootKeyCommand) -> anyhow::Result<()> {
    match command {
        RootKeyCommand::Create(args) => create(args),
        RootKeyCommand::List(args) => list(&args),
        RootKeyCommand::Revoke(args) => revoke(&args),
    }
}

/// The settings of a new root key.
#[derive(Debug)]
pub(crate) struct RootKeySpec {
    workspace: String,
    name: Option<String>,
    /// Empty for all of them.
    permissions: Vec<String>,
    expires_at: Option<StoreTime>,
}

impl RootKeySpec {
    /// A root key that may do everything and never expires.
    pub(crate) fn named(name: &str) -> Self {
        let (workspace, name) = (DEFAULT_WORKSPACE.to_owned(), Some(name.to_owned()));
        Self { workspace, name, permissions: Vec::new(), expires_at: None }
    }

    /// Checks the flags against the store's limits, because the store's own errors name columns and not flags.
    fn checked(
        workspace: String,
        name: Option<String>,
        permissions: Vec<String>,
        expires: Option<When>,
    ) -> anyhow::Result<Self> {
        permissions.iter().try_for_each(|permission| check_permission(permission))?;
        let bytes = serde_json::to_string(&permissions)?.len();
        anyhow::ensure!(
            bytes <= PERMISSIONS_BYTES_MAX,
            "--permission: all together may take {PERMISSIONS_BYTES_MAX} bytes, not {bytes}; `api.*.<action>` covers \
             every API"
        );
        anyhow::ensure!(
            is_id(&workspace),
            "--workspace must consist of at most {ID_BYTES_MAX} letters, digits and `_`, for example \
             {DEFAULT_WORKSPACE}"
        );
        let name = name.filter(|name| !name.is_empty());
        let bytes = name.as_ref().map_or(0, String::len);
        anyhow::ensure!(bytes <= NAME_BYTES_MAX, "--name may be {NAME_BYTES_MAX} bytes long, not {bytes}");
        let expires_at = expires.map(|expires| expires.in_the_future(wall_now())).transpose()?;
        if let Some(late) = expires_at.filter(|expires_at| *expires_at > EXPIRES_MAX) {
            anyhow::bail!(
                "--expires may be in the year 2099 at the latest, not {}; without it the root key never expires",
                format_time(late)
            );
        }
        Ok(Self { workspace, name, permissions, expires_at })
    }
}

pub(crate) async fn create_in(
    store: &dyn OperatorStore,
    spec: RootKeySpec,
) -> anyhow::Result<(KeyId, Secret)> {
    let (secret, start) = ids::new_root_key();
    let id = KeyId::new(ids::new_id(ids::ROOT_KEY));
    let permissions = match spec.permissions.len() {
        0 => ACTIONS.map(|action| format!("api.*.{action}")).to_vec(),
        _ => spec.permissions,
    };
    let root_key = NewRootKey {
        id: id.clone(),
        workspace_id: WorkspaceId::new(spec.workspace),
        hash: ids::hash(secret.expose()),
        start,
        name: spec.name,
        permissions,
        expires_at: spec.expires_at,
    };
    store.create_root_key(&operator(), root_key).await?;
    Ok((id, secret))
}

fn create(args: CreateArgs) -> anyhow::Result<()> {
    let spec = RootKeySpec::checked(args.workspace, args.name, args.permissions, args.expires)?;
    let expires = spec.expires_at.map(StoreTime::as_millis);
    let store = args.operator.store()?;
    let (id, secret) = store.with(async |store| create_in(store, spec).await)?;
    // A relative path may lead to another store than the publisher's.
    note(&format!("stored the root key in {store}"));
    let json = json!({ "rootKeyId": id.as_str(), "rootKey": secret.expose(), "expires": expires });
    args.operator.output.print_secret_line(&json, secret.expose()).with_context(|| {
        let flags = args.operator.config.store_flags();
        format!(
            "the root key {id} was created, but could not be printed and cannot be shown again; revoke it with \
             `evictd root-key revoke --root-key-id={id}{flags}`, and create another one"
        )
    })
}

fn list(args: &OperatorArgs) -> anyhow::Result<()> {
    let keys = args.store()?.with(async |store| Ok(store.root_keys().await?))?;
    if args.output == OutputFormat::Json {
        let rows: Vec<_> = keys.iter().map(json_row).collect();
        return print_line(&serde_json::to_string_pretty(&rows)?);
    }
    let now = wall_now();
    keys.iter().try_for_each(|key| print_line(&row(key, now)))
}

fn json_row(key: &RootKeyInfo) -> Value {
    json!({
        "rootKeyId": key.id.as_str(), "start": key.start, "name": key.name,
        "workspaceId": key.workspace_id.as_str(), "permissions": key.permissions,
        "enabled": key.enabled,
        "createdAt": key.created_at.as_millis(),
        "expires": key.expires_at.map(StoreTime::as_millis),
    })
}

/// `root_1  unkey_abcd...  ws_default  ci  expires 2027-01-31T12:00:00.000Z  api.*.verify_key`. Only direct SQL can
/// disable a root key.
fn row(key: &RootKeyInfo, now: StoreTime) -> String {
    let expiry = match key.expires_at {
        None => "never expires".to_owned(),
        Some(end) if end <= now => format!("expired {}", format_time(end)),
        Some(end) => format!("expires {}", format_time(end)),
    };
    let state = if key.enabled { expiry } else { format!("disabled, {expiry}") };
    let name = key.name.as_deref().unwrap_or("-");
    let (id, start, workspace) = (&key.id, &key.start, &key.workspace_id);
    printable(&format!("{id}  {start}...  {workspace}  {name}  {state}  {}", key.permissions.join(",")))
}

fn revoke(args: &RevokeArgs) -> anyhow::Result<()> {
    anyhow::ensure!(
        !args.root_key_id.starts_with("unkey_"),
        "that is a root key, not its id (root_...), which `evictd root-key list` shows"
    );
    let store = args.operator.store()?;
    let (operator, id) = (operator(), KeyId::new(args.root_key_id.as_str()));
    let found = store.with(async |store| Ok(store.revoke_root_key(&operator, &id).await?))?;
    anyhow::ensure!(
        found,
        "there is no root key {id} in the home store {store}, or it was already revoked; `evictd root-key list` \
         shows the others"
    );
    let request_id = &operator.request_id;
    let json = json!({ "rootKeyId": id.as_str(), "requestId": request_id });
    args.operator.output.print_line(&json, &format!("{id} is revoked  {request_id}"))?;
    if args.operator.output == OutputFormat::Text {
        note(&format!(
            "To see the regions confirm it, use another root key of its workspace:\n  \
             evictd api propagation get-receipt --request-id={request_id}"
        ));
    }
    Ok(())
}

/// Refuses a permission that no endpoint checks, because it would grant nothing.
fn check_permission(text: &str) -> anyhow::Result<()> {
    let parts: Vec<_> = text.split('.').collect();
    let ["api", api, action] = parts[..] else { anyhow::bail!(malformed(text)) };
    anyhow::ensure!(api == "*" || is_id(api), malformed(text));
    anyhow::ensure!(
        ACTIONS.contains(&action),
        "`{text}` has an unknown action: the last part must be one of {}",
        ACTIONS.join(", ")
    );
    Ok(())
}

fn is_id(id: &str) -> bool {
    (1..=ID_BYTES_MAX).contains(&id.len()) && id.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
}

fn malformed(permission: &str) -> String {
    if permission.len() > ID_BYTES_MAX {
        return format!(
            "a permission of {} characters matches no API: an id has {ID_BYTES_MAX} characters at most",
            permission.len()
        );
    }
    format!("`{permission}` is not a permission: write api.<id or *>.<action>, for example api.*.verify_key")
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::home_store::ConfiguredStore;
    use crate::operator::test_args;

    /// The arguments of a root key that may do everything and never expires.
    fn creating(path: &Path) -> CreateArgs {
        let workspace = DEFAULT_WORKSPACE.to_owned();
        CreateArgs {
            operator: test_args(path),
            name: None,
            permissions: Vec::new(),
            expires: None,
            workspace,
        }
    }

    #[test]
    fn root_key_commands_create_no_store() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("evictd.db");
        let listing = || list(&test_args(&path));
        let all_refuse = || {
            let revoking =
                revoke(&RevokeArgs { operator: test_args(&path), root_key_id: "root_1".to_owned() });
            for done in [create(creating(&path)), listing(), revoking] {
                let error = done.unwrap_err().to_string();
                for part in [path.to_str().unwrap(), "start the publisher", "--config", "store.path"] {
                    assert!(error.contains(part), "{error}");
                }
            }
        };
        all_refuse();
        assert!(!path.exists());
        // An empty file does not become one either.
        std::fs::write(&path, "").unwrap();
        all_refuse();
        assert_eq!(path.metadata().unwrap().len(), 0);

        ConfiguredStore::of(&test_args(&path).config).unwrap().with(async |_| Ok(())).unwrap();
        create(creating(&path)).unwrap();
        listing().unwrap();
    }

    #[test]
    fn revoked_root_key_is_gone_from_the_list() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("evictd.db");
        let store = ConfiguredStore::of(&test_args(&path).config).unwrap();
        let (id, _) = store.with(async |store| create_in(store, RootKeySpec::named("doomed")).await).unwrap();
        let revoking = || revoke(&RevokeArgs { operator: test_args(&path), root_key_id: id.to_string() });
        revoking().unwrap();
        let error = revoking().unwrap_err().to_string();
        assert!(error.contains(id.as_str()) && error.contains("root-key list"), "{error}");
        assert_eq!(store.with(async |store| Ok(store.root_keys().await?)).unwrap(), []);
    }

    #[test]
    fn expiry_must_be_between_now_and_2099() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("evictd.db");
        let args = |expires: &str| CreateArgs { expires: Some(expires.parse().unwrap()), ..creating(&path) };
        let store = ConfiguredStore::of(&test_args(&path).config).unwrap();
        let stored = || store.with(async |store| Ok(store.root_keys().await?.len())).unwrap();
        for past in ["2020-01-01T00:00:00Z", "0", "0s"] {
            let error = create(args(past)).unwrap_err().to_string();
            assert!(error.contains("past"), "{error}");
        }
        for far in ["2100-01-01T00:00:00.001Z", "36500d", "9999999999999999"] {
            let error = create(args(far)).unwrap_err().to_string();
            assert!(error.contains("2099"), "{error}");
        }
        assert_eq!(stored(), 0);
        create(args("90d")).unwrap();
        assert_eq!(stored(), 1);
    }

    #[test]
    fn values_beyond_the_stores_limits_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("evictd.db");
        let store = ConfiguredStore::of(&test_args(&path).config).unwrap();
        let named = |name: String| CreateArgs { name: Some(name), ..creating(&path) };
        let acting_for = |workspace: String| CreateArgs { workspace, ..creating(&path) };
        let permitted = |permissions| CreateArgs { permissions, ..creating(&path) };
        let on = |id: &str| format!("api.{id}.verify_key");
        store.with(async |_| Ok(())).unwrap();
        for (args, problem) in [
            (named("n".repeat(1025)), "1024 bytes long, not 1025"),
            (named("\u{e9}".repeat(1000)), "1024 bytes long, not 2000"),
            (acting_for("w".repeat(256)), "--workspace must consist of at most 255"),
            (acting_for(String::new()), "--workspace"),
            (permitted(vec![on(&"a".repeat(256))]), "255 characters at most"),
            (permitted(vec![on(&"a".repeat(200)); 400]), "65536 bytes"),
        ] {
            let error = create(args).unwrap_err().to_string();
            assert!(error.contains(problem) && error.len() < 300, "{error}");
        }
        let longest = CreateArgs {
            name: Some("n".repeat(1024)),
            permissions: vec![on(&"a".repeat(255)); 200],
            ..acting_for("w".repeat(255))
        };
        create(longest).unwrap();
        create(named(String::new())).unwrap();
        let listed = store.with(async |store| Ok(store.root_keys().await?)).unwrap();
        assert_eq!(listed.iter().filter(|key| key.name.is_none()).count(), 1, "an empty name is no name");
        assert_eq!(listed.len(), 2);
    }

    fn listed(expires_at: Option<StoreTime>) -> RootKeyInfo {
        RootKeyInfo {
            id: KeyId::new("root_1"),
            workspace_id: WorkspaceId::new("ws_1"),
            start: "unkey_abcd".to_owned(),
            name: Some("ci".to_owned()),
            permissions: vec!["api.*.verify_key".to_owned(), "api.*.read_key".to_owned()],
            enabled: true,
            created_at: StoreTime(0),
            expires_at,
        }
    }

    #[test]
    fn name_cannot_forge_a_row() {
        let name = Some("a\n\u{1b}[2Kroot_2  unkey_".to_owned());
        let row = row(&RootKeyInfo { name, ..listed(None) }, StoreTime(0));
        assert!(!row.contains(['\n', '\u{1b}']) && row.contains("a\\n\\u001b[2Kroot_2"), "{row}");
    }

    #[test]
    fn list_shows_disabled_root_keys() {
        let off = RootKeyInfo { enabled: false, ..listed(None) };
        assert!(row(&off, StoreTime(0)).contains("  disabled, never expires  "));
        assert_eq!(
            (&json_row(&off)["enabled"], &json_row(&listed(None))["enabled"]),
            (&json!(false), &json!(true))
        );
    }

    #[test]
    fn list_shows_expiries() {
        let key = listed;
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
        for action in ACTIONS {
            check_permission(&format!("api.*.{action}")).unwrap();
        }
        check_permission("api.api_1.delete_key").unwrap();
        let refusal = |text: &str| check_permission(text).unwrap_err().to_string();
        for bad in
            ["", "api", "api.*", "api..verify_key", "key.*.verify_key", "api.*.a.b", "api.a-b.read_key"]
        {
            assert!(refusal(bad).contains("is not a permission"), "{bad}");
        }
        for unknown in ["api.*.fly", "api.*.", "api.*.*", "api.api_1.delete_keys", "api.*.encrypt_key"] {
            let error = refusal(unknown);
            let listed = ACTIONS.iter().all(|action| error.contains(action));
            assert!(error.contains(unknown) && listed, "{error}");
        }
    }
}
