//! `evictd root-key`: who may call the APIs. Works on the home store directly, also beside a running
//! publisher, so that the first root key needs none.

use clap::{Args, Subcommand};
use evictd_core::ids::{KeyId, WorkspaceId};
use evictd_core::limits::ID_BYTES_MAX;
use evictd_core::time::StoreTime;
use evictd_ops::clock::wall_now;
use evictd_store::OperatorStore;
use evictd_store::operator::{NewRootKey, Operator, RootKeyInfo};
use evictd_wire::api::ids;
use evictd_wire::api::secret::Secret;
use serde_json::{Value, json};

use crate::daemon::ConfigArgs;
use crate::home_store::Place;
use crate::output_format::{OutputFormat, print_line, shown};
use crate::when::{self, When};

/// The workspace of those who don't ask for one.
const DEFAULT_WORKSPACE: &str = "ws_default";

/// All that an endpoint asks for. A root key may do all of it on every API, unless told otherwise.
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

/// The longest name that the store takes, in bytes.
const NAME_BYTES_MAX: usize = 1024;

/// All permissions of a root key, in bytes as JSON, that the store takes.
const PERMISSIONS_BYTES_MAX: usize = 65_536;

/// The latest end, as for keys: the year 2099 is over. What lies behind it is a slip.
const EXPIRES_MAX: StoreTime = StoreTime(4_102_444_800_000_000);

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

    /// One as an operator says it, within the limits of the store, whose own refusal names its columns.
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
            "--permission: all together may take {PERMISSIONS_BYTES_MAX} bytes, not {bytes}; `api.*.<action>` stands \
             for every API"
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
                "--expires may lie in the year 2099 at most, and not at {}; without it the root key doesn't end by \
                 itself",
                when::written(late)
            );
        }
        Ok(Self { workspace, name, permissions, expires_at })
    }
}

/// Creates a root key.
pub(crate) async fn create_in(store: &dyn OperatorStore, wish: Wish) -> anyhow::Result<(KeyId, Secret)> {
    let (secret, start) = ids::new_root_key();
    let id = KeyId::new(ids::new_id(ids::ROOT_KEY));
    let permissions = match wish.permissions.len() {
        0 => ACTIONS.map(|action| format!("api.*.{action}")).to_vec(),
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
    let wish = Wish::checked(args.workspace, args.name, args.permissions, args.expires)?;
    let expires_at = wish.expires_at;
    let place = Place::existing(&args.config)?;
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
    let now = wall_now();
    for key in &keys {
        print_line(&row(key, now));
    }
    Ok(())
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

/// `root_1  unkey_abcd...  ws_default  ci  expires 2027-01-31T12:00:00.000Z  api.*.verify_key`, and whether it is
/// switched off, which it is only by direct SQL.
fn row(key: &RootKeyInfo, now: StoreTime) -> String {
    let end = match key.expires_at {
        None => "never expires".to_owned(),
        Some(end) if end <= now => format!("expired {}", when::written(end)),
        Some(end) => format!("expires {}", when::written(end)),
    };
    let end = if key.enabled { end } else { format!("disabled, {end}") };
    let name = key.name.as_deref().unwrap_or("-");
    let row = format!(
        "{}  {}...  {}  {name}  {end}  {}",
        key.id,
        key.start,
        key.workspace_id,
        key.permissions.join(",")
    );
    shown(&row)
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

/// A permission that nothing asks for would be a right that its owner only seems to have.
fn check_permission(text: &str) -> anyhow::Result<()> {
    let parts: Vec<_> = text.split('.').collect();
    let ["api", api, action] = parts[..] else { anyhow::bail!(malformed(text)) };
    anyhow::ensure!(api == "*" || is_id(api), malformed(text));
    anyhow::ensure!(
        ACTIONS.contains(&action),
        "`{text}` names no action that evictd knows: the last part must be one of {}",
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
            "a permission of {} characters names no API: an id has {ID_BYTES_MAX} characters at most",
            permission.len()
        );
    }
    format!("`{permission}` is not a permission: write api.<id or *>.<action>, for example api.*.verify_key")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A command for everything, without an end.
    fn creating(config: ConfigArgs) -> CreateArgs {
        let (workspace, output) = (DEFAULT_WORKSPACE.to_owned(), OutputFormat::Json);
        CreateArgs { config, name: None, permissions: Vec::new(), expires: None, workspace, output }
    }

    #[test]
    fn no_command_about_root_keys_makes_a_store() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("evictd.db");
        let config = || ConfigArgs::default().and_set("store.path", path.display().to_string());
        let listing = || list(&ListArgs { config: config(), output: OutputFormat::Json });
        let all_refuse = || {
            let (root_key_id, output) = ("root_1".to_owned(), OutputFormat::Json);
            let revoking = revoke(&RevokeArgs { config: config(), root_key_id, output });
            for done in [create(creating(config())), listing(), revoking] {
                let error = done.unwrap_err().to_string();
                for part in [path.to_str().unwrap(), "start the publisher", "--config", "store.path"] {
                    assert!(error.contains(part), "{error}");
                }
            }
        };
        all_refuse();
        assert!(!path.exists());
        // Nor does an empty file, or another program's, become one.
        std::fs::write(&path, "").unwrap();
        all_refuse();
        assert_eq!(path.metadata().unwrap().len(), 0);

        Place::of(&config()).unwrap().with(async |_| Ok(())).unwrap();
        create(creating(config())).unwrap();
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
        let config = || ConfigArgs::default().and_set("store.path", path.display().to_string());
        let args =
            |expires: &str| CreateArgs { expires: Some(expires.parse().unwrap()), ..creating(config()) };
        let place = Place::of(&config()).unwrap();
        let stored = || place.with(async |store| Ok(store.root_keys().await?.len())).unwrap();
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
    fn what_the_store_would_refuse_is_refused_before_with_its_limit() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("evictd.db");
        let config = || ConfigArgs::default().and_set("store.path", path.display().to_string());
        let place = Place::of(&config()).unwrap();
        let named = |name: String| CreateArgs { name: Some(name), ..creating(config()) };
        let acting_for = |workspace: String| CreateArgs { workspace, ..creating(config()) };
        let permitted = |permissions| CreateArgs { permissions, ..creating(config()) };
        let on = |id: &str| format!("api.{id}.verify_key");
        place.with(async |_| Ok(())).unwrap();
        for (args, told) in [
            (named("n".repeat(1025)), "1024 bytes long, not 1025"),
            (named("\u{e9}".repeat(1000)), "1024 bytes long, not 2000"),
            (acting_for("w".repeat(256)), "--workspace must consist of at most 255"),
            (acting_for(String::new()), "--workspace"),
            (permitted(vec![on(&"a".repeat(256))]), "255 characters at most"),
            (permitted(vec![on(&"a".repeat(200)); 400]), "65536 bytes"),
        ] {
            let error = create(args).unwrap_err().to_string();
            assert!(error.contains(told) && error.len() < 300, "{error}");
        }
        let longest = CreateArgs {
            name: Some("n".repeat(1024)),
            permissions: vec![on(&"a".repeat(255)); 200],
            ..acting_for("w".repeat(255))
        };
        create(longest).unwrap();
        create(named(String::new())).unwrap();
        let listed = place.with(async |store| Ok(store.root_keys().await?)).unwrap();
        assert_eq!(listed.iter().filter(|key| key.name.is_none()).count(), 1, "an empty name is none");
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
    fn a_name_forges_no_row_of_the_list() {
        let name = Some("a\n\u{1b}[2Kroot_2  unkey_".to_owned());
        let row = row(&RootKeyInfo { name, ..listed(None) }, StoreTime(0));
        assert!(!row.contains(['\n', '\u{1b}']) && row.contains("a\u{fffd}\u{fffd}[2Kroot_2"), "{row}");
    }

    #[test]
    fn the_list_tells_which_are_switched_off() {
        let off = RootKeyInfo { enabled: false, ..listed(None) };
        assert!(row(&off, StoreTime(0)).contains("  disabled, never expires  "));
        assert_eq!(
            (&json_row(&off)["enabled"], &json_row(&listed(None))["enabled"]),
            (&json!(false), &json!(true))
        );
    }

    #[test]
    fn the_list_tells_when_each_ends() {
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
            let told = refusal(unknown);
            let listed = ACTIONS.iter().all(|action| told.contains(action));
            assert!(told.contains(unknown) && listed, "{told}");
        }
    }
}
