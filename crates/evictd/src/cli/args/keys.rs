//! `evictd api keys ...`

use std::borrow::Cow;

use anyhow::{Context as _, ensure};
use clap::{Args, Subcommand};
use evictd_core::time::StoreTime;
use evictd_ops::clock::wall_now;
use evictd_wire::api::requests::{CreateKey, DeleteKey, GetKey, Patch, RerollKey, UpdateKey, VerifyKey};
use serde_json::value::RawValue;

use super::super::bulk::{self, Order};
use super::super::client::Repeat;
use super::super::settings::Server;
use super::super::usage;
use super::{Connection, Follow, Job, Words, asking, changing};
use crate::when::{Span, When};

/// What stands for standard input in the place of an id.
const STDIN: &str = "-";

/// What evictd has none of, so that an empty list is all that it may say.
const RATELIMITS: &str = "--ratelimits-json";

#[derive(Subcommand, Debug)]
pub(super) enum Keys {
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

/// Creates a key. The answer is the only place where the key is ever shown.
///
/// The root key needs api.*.create_key or api.<api_id>.create_key.
#[derive(Args, Debug)]
#[command(
    after_help = "Example:\n  evictd api keys create-key --api-id=api_1234abcd --prefix=prod --name='billing job' \
                  --expires=90d"
)]
pub(super) struct CreateKeyArgs {
    /// The API that the key belongs to.
    #[arg(long, value_name = "ID")]
    api_id: String,
    /// What the key starts with, before an underscore.
    #[arg(long, value_name = "TEXT")]
    prefix: Option<String>,
    /// A name for people.
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    name: Option<String>,
    /// How many random bytes the key holds, 16 to 255.
    #[arg(long, value_name = "BYTES", default_value_t = CreateKey::DEFAULT_BYTE_LENGTH,
          value_parser = clap::value_parser!(u8).range(16..=255))]
    byte_length: u8,
    /// Whom the key belongs to, in your own words, such as the id of a user.
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    external_id: Option<String>,
    /// Metadata as a JSON object, handed to whoever verifies the key.
    #[arg(long, value_name = "JSON")]
    meta_json: Option<String>,
    /// What the key may do, in your own words, separated by commas.
    #[arg(long, value_name = "PERMISSIONS", default_value = "", hide_default_value = true)]
    permissions: Words,
    /// When the key ends: 2027-01-31T12:00:00Z, milliseconds since 1970, or a span from now such as 90d. Without
    /// it the key doesn't end by itself.
    #[arg(long, value_name = "TIME")]
    expires: Option<When>,
    /// Whether the key grants anything from the start.
    #[arg(long, num_args = 0..=1, require_equals = true, default_value_t = true, default_missing_value = "true",
          action = clap::ArgAction::Set, value_name = "BOOL")]
    enabled: bool,
    /// Accepted for compatibility, as long as it is false.
    #[arg(long, num_args = 0..=1, require_equals = true, default_value_t = false, default_missing_value = "true",
          action = clap::ArgAction::Set, value_name = "BOOL", hide = true)]
    recoverable: bool,
    /// Accepted for compatibility, as long as it is empty.
    #[arg(long, value_name = "JSON", hide = true)]
    ratelimits_json: Option<String>,
    #[command(flatten)]
    follow: Follow,
    #[command(flatten)]
    connection: Connection,
}

/// Shows what is known of a key, never the key itself.
///
/// The root key needs api.*.read_key or api.<api_id>.read_key.
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  evictd api keys get-key --key-id=key_1234abcd")]
pub(super) struct GetKeyArgs {
    /// The key's id, which createKey returned. Not the key itself.
    #[arg(long, value_name = "ID")]
    key_id: String,
    /// Accepted for compatibility, as long as it is false.
    #[arg(long, num_args = 0..=1, require_equals = true, default_value_t = false, default_missing_value = "true",
          action = clap::ArgAction::Set, value_name = "BOOL", hide = true)]
    decrypt: bool,
    #[command(flatten)]
    connection: Connection,
}

/// Changes a key's settings. What isn't said stays as it is; every region learns the rest within the bound.
///
/// A setting is taken away with its --clear flag. The root key needs api.*.update_key or
/// api.<api_id>.update_key.
#[derive(Args, Debug)]
#[command(
    after_help = "Examples:\n  evictd api keys update-key --key-id=key_1234abcd --enabled=false --wait\n  \
                        evictd api keys update-key --key-id=key_1234abcd --permissions=files.read,files.write --clear-expires"
)]
#[expect(clippy::struct_excessive_bools, reason = "each is a flag of its own")]
pub(super) struct UpdateKeyArgs {
    /// The key's id, which createKey returned. Not the key itself.
    #[arg(long, value_name = "ID")]
    key_id: String,
    /// A name for people.
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    name: Option<String>,
    /// Takes the name away.
    #[arg(long, conflicts_with = "name")]
    clear_name: bool,
    /// Whom the key belongs to, in your own words, such as the id of a user.
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    external_id: Option<String>,
    /// Lets the key belong to nobody.
    #[arg(long, conflicts_with = "external_id")]
    clear_external_id: bool,
    /// All of the metadata as a JSON object, handed to whoever verifies the key; `null` takes it away.
    #[arg(long, value_name = "JSON")]
    meta_json: Option<String>,
    /// Takes the metadata away.
    #[arg(long, conflicts_with = "meta_json")]
    clear_meta: bool,
    /// All that the key may do, in your own words, separated by commas. Nothing if empty: --permissions=
    #[arg(long, value_name = "PERMISSIONS")]
    permissions: Option<Words>,
    /// When the key ends: 2027-01-31T12:00:00Z, milliseconds since 1970, or a span from now such as 90d. One in
    /// the future makes a key that has expired live again.
    #[arg(long, value_name = "TIME")]
    expires: Option<When>,
    /// Lets the key go on until it is deleted.
    #[arg(long, conflicts_with = "expires")]
    clear_expires: bool,
    /// Whether the key grants anything. A key that is switched off can be switched on again; a deleted one can't.
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL")]
    enabled: Option<bool>,
    /// Accepted for compatibility, as long as it is empty.
    #[arg(long, value_name = "JSON", hide = true)]
    ratelimits_json: Option<String>,
    #[command(flatten)]
    follow: Follow,
    #[command(flatten)]
    connection: Connection,
}

/// Replaces a key by a new one with the same settings. The answer is the only place where the new key is ever
/// shown; the old one ends after --expiration.
///
/// The root key needs api.*.create_key or api.<api_id>.create_key.
#[derive(Args, Debug)]
#[command(after_help = "Examples:\n  evictd api keys reroll-key --key-id=key_1234abcd --expiration=24h\n  \
                        evictd api keys reroll-key --key-id=key_1234abcd --expiration=0 --wait")]
pub(super) struct RerollKeyArgs {
    /// The id of the key to replace, which createKey returned. Not the key itself.
    #[arg(long, value_name = "ID")]
    key_id: String,
    /// How long the old key goes on: a span such as 24h or 7d, or milliseconds. 0 ends it at once; anything else
    /// is rounded up to the end of the minute.
    #[arg(long, value_name = "SPAN")]
    expiration: Span,
    #[command(flatten)]
    follow: Follow,
    #[command(flatten)]
    connection: Connection,
}

/// Asks an agent whether a key may be used. Exits with 0 whatever the verdict.
///
/// The root key needs api.*.verify_key or api.<api_id>.verify_key.
#[derive(Args, Debug)]
#[command(after_help = "Examples:\n  evictd api keys verify-key --key=prod_1234abcd\n  \
                        evictd api keys verify-key --key=prod_1234abcd --permissions='files.read AND (admin OR files.write)'")]
pub(super) struct VerifyKeyArgs {
    /// The key itself, as its owner sends it.
    #[arg(long, value_name = "KEY", allow_hyphen_values = true)]
    key: String,
    /// What the key has to be allowed to do: permissions, AND, OR and parentheses. Without them the verdict is
    /// INSUFFICIENT_PERMISSIONS.
    #[arg(long, value_name = "QUERY")]
    permissions: Option<String>,
    /// Labels, separated by commas; accepted for compatibility, evictd doesn't analyse them.
    #[arg(long, value_name = "LABELS", default_value = "", hide_default_value = true)]
    tags: Words,
    /// Accepted for compatibility, as long as it is empty.
    #[arg(long, value_name = "JSON", hide = true)]
    ratelimits_json: Option<String>,
    #[command(flatten)]
    connection: Connection,
}

/// Deletes a key, or many. Every region stops accepting it within the bound, 30 seconds unless configured otherwise.
///
/// With --key-id=- the ids are read from standard input, one a line; blank lines and comments (# ...) are skipped.
/// All lines are checked before anything is deleted. Each id gets a line on standard output: `deleted`, `not
/// found`, `failed: ...` or `not started`. A key that isn't there is no failure, so that the same list can be run
/// again until all are gone; it is counted apart, as it may be a typing error. Exits with 1 if any failed or wasn't
/// started. Ctrl-C finishes what is under way.
///
/// The root key needs api.*.delete_key or api.<api_id>.delete_key.
#[derive(Args, Debug)]
#[command(after_help = "Examples:\n  evictd api keys delete-key --key-id=key_1234abcd\n  \
                        evictd api keys delete-key --key-id=- --wait < leaked-keys.txt")]
pub(super) struct DeleteKeyArgs {
    /// The key's id, which createKey returned, not the key itself; or - to read many from standard input.
    #[arg(long, value_name = "ID", allow_hyphen_values = true)]
    key_id: String,
    /// Erases hash, name and metadata too, instead of keeping them in the database, marked as deleted. Can't
    /// be undone.
    #[arg(long, num_args = 0..=1, require_equals = true, default_value_t = false, default_missing_value = "true",
          action = clap::ArgAction::Set, value_name = "BOOL")]
    permanent: bool,
    /// With --key-id=-: how many deletions are under way at once, 8 if not said.
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(u16).range(1..=256))]
    concurrency: Option<u16>,
    /// With --key-id=-: exits with 1 also if a key was not found.
    #[arg(long)]
    strict: bool,
    #[command(flatten)]
    follow: Follow,
    #[command(flatten)]
    connection: Connection,
}

impl Keys {
    pub(super) fn into_job(self) -> anyhow::Result<(Job, Connection)> {
        match self {
            Self::Create(args) => args.into_job(),
            Self::Get(args) => {
                usage::must_be_off("--decrypt", args.decrypt)?;
                let request = GetKey { key_id: args.key_id };
                Ok((asking(GetKey::PATH, &request, Server::Publisher)?, args.connection))
            }
            Self::Update(args) => args.into_job(),
            Self::Reroll(args) => {
                let expiration = u64::try_from(args.expiration.0.as_millis()).unwrap_or(u64::MAX);
                let request = RerollKey { key_id: args.key_id, expiration };
                let job = changing(RerollKey::PATH, &request, Repeat::Duplicates, &args.follow)?;
                Ok((job, args.connection))
            }
            Self::Verify(args) => {
                usage::must_be_empty(RATELIMITS, args.ratelimits_json.as_deref())?;
                let tags = args.tags.0.into_iter().map(Cow::Owned).collect();
                let permissions = args.permissions.map(Cow::Owned);
                let request = VerifyKey { key: args.key.into(), tags, permissions };
                Ok((asking(VerifyKey::PATH, &request, Server::Agent)?, args.connection))
            }
            Self::Delete(args) => args.into_job(),
        }
    }
}

impl CreateKeyArgs {
    fn into_job(self) -> anyhow::Result<(Job, Connection)> {
        usage::must_be_off("--recoverable", self.recoverable)?;
        usage::must_be_empty(RATELIMITS, self.ratelimits_json.as_deref())?;
        let request = CreateKey {
            api_id: self.api_id,
            prefix: self.prefix,
            name: self.name,
            byte_length: self.byte_length,
            external_id: self.external_id,
            meta: self.meta_json.map(json).transpose()?,
            permissions: self.permissions.0,
            expires: self.expires.map(expiry).transpose()?,
            enabled: self.enabled,
        };
        let job = changing(CreateKey::PATH, &request, Repeat::Duplicates, &self.follow)?;
        Ok((job, self.connection))
    }
}

impl UpdateKeyArgs {
    fn into_job(self) -> anyhow::Result<(Job, Connection)> {
        usage::must_be_empty(RATELIMITS, self.ratelimits_json.as_deref())?;
        let meta = match self.meta_json.map(json).transpose()? {
            Some(meta) if meta.get() == "null" => Patch::Clear,
            meta => patch(meta, self.clear_meta),
        };
        let request = UpdateKey {
            key_id: self.key_id,
            name: patch(self.name, self.clear_name),
            external_id: patch(self.external_id, self.clear_external_id),
            meta,
            expires: patch(self.expires.map(expiry).transpose()?, self.clear_expires),
            enabled: self.enabled,
            permissions: self.permissions.map(|permissions| permissions.0),
        };
        let nothing = request.name.is_keep()
            && request.external_id.is_keep()
            && request.meta.is_keep()
            && request.expires.is_keep()
            && request.enabled.is_none()
            && request.permissions.is_none();
        ensure!(
            !nothing,
            "say what to change: --name, --external-id, --meta-json, --permissions, --expires, --enabled, or one of \
             --clear-name, --clear-external-id, --clear-meta, --clear-expires"
        );
        let job = changing(UpdateKey::PATH, &request, Repeat::Harmless, &self.follow)?;
        Ok((job, self.connection))
    }
}

impl DeleteKeyArgs {
    fn into_job(self) -> anyhow::Result<(Job, Connection)> {
        if self.key_id == STDIN {
            let order = Order {
                permanent: self.permanent,
                concurrency: self.concurrency.map_or(bulk::DEFAULT_CONCURRENCY, usize::from),
                strict: self.strict,
                wait: self.follow.wait.map(Into::into),
            };
            return Ok((Job::DeleteKeys(order), self.connection));
        }
        ensure!(
            self.concurrency.is_none() && !self.strict,
            "--concurrency and --strict are for many keys, whose ids --key-id=- reads from standard input"
        );
        let request = DeleteKey { key_id: self.key_id, permanent: self.permanent };
        let job = changing(DeleteKey::PATH, &request, Repeat::FindsNothing, &self.follow)?;
        Ok((job, self.connection))
    }
}

/// The parser's message names a place in the text, never the text.
fn json(text: String) -> anyhow::Result<Box<RawValue>> {
    RawValue::from_string(text).context("--meta-json isn't JSON")
}

/// By this machine's clock. The API takes times that have passed; on a command line they are slips.
fn expiry(when: When) -> anyhow::Result<i64> {
    Ok(StoreTime::as_millis(when.in_the_future(wall_now())?))
}

fn patch<T>(set: Option<T>, clear: bool) -> Patch<T> {
    match set {
        Some(value) => Patch::Set(value),
        None if clear => Patch::Clear,
        None => Patch::Keep,
    }
}
