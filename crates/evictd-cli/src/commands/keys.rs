//! `evictd api keys ...`

use std::borrow::Cow;

use anyhow::{Context as _, bail, ensure};
use clap::{Args, Subcommand};
use evictd_ops::clock::wall_now;
use evictd_wire::api::requests::{CreateKey, DeleteKey, GetKey, Patch, RerollKey, UpdateKey, VerifyKey};
use serde_json::value::RawValue;

use super::action::{ApiAction, CommaList, WaitArgs, change, query};
use crate::bulk::{self, BulkDeletion};
use crate::call::{ApiCall, ApiServer, Repeat};
use crate::time::{TimeSpan, When};
use crate::usage;

/// The id that means standard input.
const STDIN: &str = "-";

const RATELIMITS: &str = "--ratelimits-json";

#[derive(Subcommand, Debug)]
pub(super) enum KeysCommand {
    #[command(name = "create-key")]
    Create(CreateKeyArgs),
    #[command(name = "get-key")]
    Get(GetKeyArgs),
    #[command(name = "update-key")]
    Update(UpdateKeyArgs),
    #[command(name = "reroll-key")]
    Reroll(RerollKeyArgs),
    #[command(name = "verify-key")]
    Verify(VerifyKeyArgs),
    #[command(name = "delete-key")]
    Delete(DeleteKeyArgs),
}

/// The settings of a key.
#[derive(Args, Debug)]
struct KeyFields {
    /// A name for people.
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    name: Option<String>,
    /// The key's owner in your own terms, such as the id of a user.
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    external_id: Option<String>,
    /// Metadata as a JSON object. The answer to each verification contains it.
    #[arg(long, value_name = "JSON")]
    meta_json: Option<String>,
    /// The key's permissions in your own terms, separated by commas; repeatable.
    #[arg(long, value_name = "PERMISSIONS")]
    permissions: Vec<CommaList>,
    /// When the key expires: 2027-01-31T12:00:00Z, milliseconds since 1970, or a duration from now such as 90d.
    #[arg(long, value_name = "TIME")]
    expires: Option<When>,
    /// Whether the key can be used. A disabled key can be enabled again; a deleted one cannot.
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL",
          value_parser = usage::switch)]
    enabled: Option<bool>,
    /// Accepted for compatibility, as long as it is empty.
    #[arg(long, value_name = "JSON", hide = true)]
    ratelimits_json: Option<String>,
}

/// Creates a key. Only the answer ever shows the key itself.
///
/// The key is enabled and never expires unless flags say otherwise. The root key needs api.*.create_key or
/// api.<api_id>.create_key.
#[derive(Args, Debug)]
#[command(
    after_help = "Example:\n  evictd api keys create-key --api-id=api_1234abcd --prefix=prod --name='billing job' \
                  --expires=90d"
)]
pub(super) struct CreateKeyArgs {
    /// The API that the key belongs to.
    #[arg(long, value_name = "ID")]
    api_id: String,
    /// The beginning of the key, before an underscore.
    #[arg(long, value_name = "TEXT")]
    prefix: Option<String>,
    /// The number of random bytes in the key, 16 to 255.
    #[arg(long, value_name = "BYTES", default_value_t = CreateKey::DEFAULT_BYTE_LENGTH,
          value_parser = clap::value_parser!(u8).range(16..=255))]
    byte_length: u8,
    #[command(flatten)]
    fields: KeyFields,
    /// Accepted for compatibility, as long as it is false.
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", hide = true,
          value_parser = usage::switch)]
    recoverable: Option<bool>,
    #[command(flatten)]
    wait: WaitArgs,
}

/// Shows the settings of a key, never the key itself.
///
/// The root key needs api.*.read_key or api.<api_id>.read_key.
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  evictd api keys get-key --key-id=key_1234abcd")]
pub(super) struct GetKeyArgs {
    /// The key's id, which createKey returned. Not the key itself.
    #[arg(long, value_name = "ID")]
    key_id: String,
    /// Accepted for compatibility, as long as it is false.
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", hide = true,
          value_parser = usage::switch)]
    decrypt: Option<bool>,
}

/// Updates settings of a key; those without a flag keep their value. Every region uses the new ones within the bound.
///
/// --meta-json and --permissions replace all metadata and all permissions. A flag with an empty value counts as not
/// given; the --clear flags remove what is there. An expiry in the future revives an expired
/// key. The root key needs api.*.update_key or api.<api_id>.update_key.
#[derive(Args, Debug)]
#[command(
    after_help = "Examples:\n  evictd api keys update-key --key-id=key_1234abcd --enabled=false --wait\n  \
                        evictd api keys update-key --key-id=key_1234abcd --permissions=files.read,files.write --clear-expires"
)]
pub(super) struct UpdateKeyArgs {
    /// The key's id, which createKey returned. Not the key itself.
    #[arg(long, value_name = "ID")]
    key_id: String,
    #[command(flatten)]
    fields: KeyFields,
    /// Removes the name.
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL",
          value_parser = usage::switch)]
    clear_name: Option<bool>,
    /// Removes the owner.
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL",
          value_parser = usage::switch)]
    clear_external_id: Option<bool>,
    /// Removes the metadata, as --meta-json=null does.
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL",
          value_parser = usage::switch)]
    clear_meta: Option<bool>,
    /// Removes the expiry: the key is valid until it is deleted.
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL",
          value_parser = usage::switch)]
    clear_expires: Option<bool>,
    /// Removes all permissions.
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL",
          value_parser = usage::switch)]
    clear_permissions: Option<bool>,
    #[command(flatten)]
    wait: WaitArgs,
}

/// Replaces a key with a new one that has the same settings. Only the answer ever shows the new key; the old one
/// expires after --expiration.
///
/// The root key needs api.*.create_key or api.<api_id>.create_key.
#[derive(Args, Debug)]
#[command(after_help = "Examples:\n  evictd api keys reroll-key --key-id=key_1234abcd --expiration=24h\n  \
                        evictd api keys reroll-key --key-id=key_1234abcd --expiration=0 --wait")]
pub(super) struct RerollKeyArgs {
    /// The id of the key to replace, which createKey returned. Not the key itself.
    #[arg(long, value_name = "ID")]
    key_id: String,
    /// How long the old key remains valid: a duration such as 24h or 7d, or milliseconds. 0 ends it at once; other
    /// values are rounded up to the end of the minute.
    #[arg(long, value_name = "DURATION")]
    expiration: TimeSpan,
    #[command(flatten)]
    wait: WaitArgs,
}

/// Verifies a key at an agent. Without --exit-code, exits with 0 whatever the verdict.
///
/// The root key needs api.*.verify_key or api.<api_id>.verify_key.
#[derive(Args, Debug)]
#[command(after_help = "Examples:\n  evictd api keys verify-key --key=prod_1234abcd\n  \
                        evictd api keys verify-key --key=prod_1234abcd --permissions='files.read AND (admin OR files.write)'")]
pub(super) struct VerifyKeyArgs {
    /// The key itself, as its owner sends it.
    #[arg(long, value_name = "KEY", allow_hyphen_values = true)]
    key: String,
    /// The permissions that the key must have: names, AND, OR and parentheses. If it lacks them, the verdict is
    /// INSUFFICIENT_PERMISSIONS.
    #[arg(long, value_name = "QUERY")]
    permissions: Option<String>,
    /// Labels, separated by commas; repeatable. Accepted for compatibility; evictd does not analyze them.
    #[arg(long, value_name = "LABELS")]
    tags: Vec<CommaList>,
    /// Exits with 4 if the key is not valid.
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL",
          value_parser = usage::switch)]
    exit_code: Option<bool>,
    /// Accepted for compatibility, as long as it is empty.
    #[arg(long, value_name = "JSON", hide = true)]
    ratelimits_json: Option<String>,
}

/// Deletes a key, or many. Every region stops accepting it within the bound, 30 seconds unless configured otherwise.
///
/// With --key-id=- the ids are read from standard input, one per line; blank lines and comments (# ...) are skipped.
/// All lines are checked before the first deletion. Standard output gets a line per id: `deleted`, `not found`,
/// `failed: ...` or `not started`. A missing key is no failure, so that the same list can be run again until all keys
/// are deleted; missing keys are counted separately, because an id may be mistyped. Exits with 1 if a deletion failed
/// or was not started. Ctrl-C finishes the deletions in progress.
///
/// The root key needs api.*.delete_key or api.<api_id>.delete_key.
#[derive(Args, Debug)]
#[command(after_help = "Examples:\n  evictd api keys delete-key --key-id=key_1234abcd\n  \
                        evictd api keys delete-key --key-id=- --wait < leaked-keys.txt")]
pub(super) struct DeleteKeyArgs {
    /// The key's id, which createKey returned, not the key itself; or - to read many from standard input.
    #[arg(long, value_name = "ID", allow_hyphen_values = true)]
    key_id: String,
    /// Also erases hash, name and metadata, which the database otherwise keeps, marked as deleted. Cannot be undone.
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL",
          value_parser = usage::switch)]
    permanent: Option<bool>,
    /// With --key-id=-: the number of deletions in progress at once (default 8).
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(u16).range(1..=256))]
    concurrency: Option<u16>,
    /// With --key-id=-: exits with 1 also if a key was not found.
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL",
          value_parser = usage::switch)]
    strict: Option<bool>,
    #[command(flatten)]
    wait: WaitArgs,
}

impl KeysCommand {
    pub(super) fn into_action(self) -> anyhow::Result<ApiAction> {
        match self {
            Self::Create(args) => args.into_action(),
            Self::Get(args) => {
                usage::must_be_off("--decrypt", args.decrypt)?;
                query(GetKey::PATH, &GetKey { key_id: args.key_id })
            }
            Self::Update(args) => args.into_action(),
            Self::Reroll(args) => {
                let expiration = u64::try_from(args.expiration.0.as_millis()).unwrap_or(u64::MAX);
                let request = RerollKey { key_id: args.key_id, expiration };
                change(RerollKey::PATH, &request, Repeat::Duplicates, &args.wait)
            }
            Self::Verify(args) => {
                usage::must_be_empty(RATELIMITS, args.ratelimits_json.as_deref())?;
                let tags = CommaList::joined(args.tags).into_iter().map(Cow::Owned).collect();
                let permissions = args.permissions.map(Cow::Owned);
                let request = VerifyKey { key: args.key.into(), tags, permissions };
                let call = ApiCall {
                    server: ApiServer::Agent,
                    exits_with_verdict: args.exit_code.unwrap_or(false),
                    ..ApiCall::new(VerifyKey::PATH, &request, Repeat::Harmless)?
                };
                Ok(ApiAction::Call { call, wait: None })
            }
            Self::Delete(args) => args.into_action(),
        }
    }
}

impl CreateKeyArgs {
    fn into_action(self) -> anyhow::Result<ApiAction> {
        let fields = self.fields;
        usage::must_be_off("--recoverable", self.recoverable)?;
        usage::must_be_empty(RATELIMITS, fields.ratelimits_json.as_deref())?;
        let request = CreateKey {
            api_id: self.api_id,
            prefix: self.prefix,
            name: fields.name,
            byte_length: self.byte_length,
            external_id: fields.external_id,
            meta: fields.meta_json.map(json).transpose()?,
            permissions: CommaList::joined(fields.permissions),
            expires: fields.expires.map(expiry).transpose()?,
            enabled: fields.enabled.unwrap_or(true),
        };
        change(CreateKey::PATH, &request, Repeat::Duplicates, &self.wait)
    }
}

impl UpdateKeyArgs {
    fn into_action(self) -> anyhow::Result<ApiAction> {
        let fields = self.fields;
        usage::must_be_empty(RATELIMITS, fields.ratelimits_json.as_deref())?;
        let meta = match patch("meta-json", "meta", fields.meta_json, self.clear_meta)? {
            Patch::Set(text) => match json(text)? {
                meta if meta.get() == "null" => Patch::Clear,
                meta => Patch::Set(meta),
            },
            Patch::Clear => Patch::Clear,
            Patch::Keep => Patch::Keep,
        };
        let permissions = Some(CommaList::joined(fields.permissions)).filter(|list| !list.is_empty());
        let expires = fields.expires.map(expiry).transpose()?;
        let request = UpdateKey {
            key_id: self.key_id,
            name: patch("name", "name", fields.name, self.clear_name)?,
            external_id: patch("external-id", "external-id", fields.external_id, self.clear_external_id)?,
            meta,
            expires: patch("expires", "expires", expires, self.clear_expires)?,
            enabled: fields.enabled,
            permissions: match patch("permissions", "permissions", permissions, self.clear_permissions)? {
                Patch::Keep => None,
                Patch::Clear => Some(Vec::new()),
                Patch::Set(list) => Some(list),
            },
        };
        let is_empty = request.name.is_keep()
            && request.external_id.is_keep()
            && request.meta.is_keep()
            && request.expires.is_keep()
            && request.enabled.is_none()
            && request.permissions.is_none();
        ensure!(
            !is_empty,
            "nothing to update; use --name, --external-id, --meta-json, --permissions, --expires, --enabled, or one of \
             --clear-name, --clear-external-id, --clear-meta, --clear-permissions, --clear-expires"
        );
        change(UpdateKey::PATH, &request, Repeat::Harmless, &self.wait)
    }
}

impl DeleteKeyArgs {
    fn into_action(self) -> anyhow::Result<ApiAction> {
        let permanent = self.permanent.unwrap_or(false);
        if self.key_id == STDIN {
            return Ok(ApiAction::DeleteKeys(BulkDeletion {
                permanent,
                concurrency: self.concurrency.map_or(bulk::DEFAULT_CONCURRENCY, usize::from),
                strict: self.strict.unwrap_or(false),
                wait: self.wait.wait.map(Into::into),
            }));
        }
        ensure!(
            self.concurrency.is_none() && self.strict != Some(true),
            "--concurrency and --strict are for many keys, whose ids --key-id=- reads from standard input"
        );
        let request = DeleteKey { key_id: self.key_id, permanent };
        change(DeleteKey::PATH, &request, Repeat::FindsNothing, &self.wait)
    }
}

/// Parses `--meta-json`. The parser's message has a place in the text, never the text.
fn json(text: String) -> anyhow::Result<Box<RawValue>> {
    RawValue::from_string(text).context("--meta-json is not JSON")
}

/// Returns the expiry by this machine's clock. The API accepts one in the past; on a command line it is a slip.
fn expiry(when: When) -> anyhow::Result<i64> {
    Ok(when.in_the_future(wall_now())?.as_millis())
}

/// Joins a flag and the switch that clears what it sets.
fn patch<T>(flag: &str, cleared: &str, set: Option<T>, clear: Option<bool>) -> anyhow::Result<Patch<T>> {
    match (set, clear == Some(true)) {
        (Some(_), true) => bail!("--{flag} and --clear-{cleared} exclude each other; use one of them"),
        (Some(value), false) => Ok(Patch::Set(value)),
        (None, true) => Ok(Patch::Clear),
        (None, false) => Ok(Patch::Keep),
    }
}
