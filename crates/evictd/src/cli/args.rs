//! The command tree, and what of Unkey's flag syntax clap has to be taught.

use std::borrow::Cow;
use std::ffi::OsString;
use std::path::PathBuf;

use anyhow::Context as _;
use clap::{Args, Subcommand};
use evictd_ops::config::HumanDuration;
use evictd_wire::api::requests::{CreateApi, CreateKey, DeleteApi, DeleteKey, GetKey, GetReceipt, VerifyKey};
use serde::Serialize;
use serde_json::value::RawValue;

use super::client::{Call, Repeat};
use super::settings::Server;

/// Flags that are complete without a value, so that the argument after them is never theirs.
const SWITCHES: [&str; 5] = ["permanent", "enabled", "wait", "help", "h"];

/// Speaks to the control API (publisher) and the verify API (agent).
#[derive(Args, Debug)]
pub(crate) struct ApiArgs {
    #[command(subcommand)]
    group: Group,
}

#[derive(Subcommand, Debug)]
enum Group {
    /// API keys: create, look up, verify, delete.
    #[command(subcommand)]
    Keys(Keys),
    /// APIs, the namespaces of keys: create, delete.
    #[command(subcommand)]
    Apis(Apis),
    /// Receipts: what became of a change, region by region.
    #[command(subcommand)]
    Propagation(Receipts),
}

#[derive(Subcommand, Debug)]
enum Receipts {
    #[command(name = "get-receipt")]
    Get(GetReceiptArgs),
}

#[derive(Subcommand, Debug)]
enum Keys {
    #[command(name = "create-key")]
    Create(CreateKeyArgs),
    #[command(name = "get-key")]
    Get(GetKeyArgs),
    #[command(name = "verify-key")]
    Verify(VerifyKeyArgs),
    #[command(name = "delete-key")]
    Delete(DeleteKeyArgs),
}

#[derive(Subcommand, Debug)]
enum Apis {
    #[command(name = "create-api")]
    Create(CreateApiArgs),
    #[command(name = "delete-api")]
    Delete(DeleteApiArgs),
}

/// Creates a key. The answer is the only place where the key is ever shown.
///
/// The root key needs api.*.create_key or api.<api_id>.create_key.
#[derive(Args, Debug)]
#[command(
    after_help = "Example:\n  evictd api keys create-key --api-id=api_1234abcd --prefix=prod --name='billing job'"
)]
struct CreateKeyArgs {
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
    #[arg(long, value_name = "BYTES", default_value_t = CreateKey::DEFAULT_BYTE_LENGTH)]
    byte_length: u8,
    /// Metadata as a JSON object, handed to whoever verifies the key.
    #[arg(long, value_name = "JSON")]
    meta_json: Option<String>,
    /// When the key ends, in milliseconds since 1970. Without it the key doesn't end by itself.
    #[arg(long, value_name = "MILLISECONDS")]
    expires: Option<i64>,
    /// Whether the key grants anything from the start.
    #[arg(long, num_args = 0..=1, require_equals = true, default_value_t = true, default_missing_value = "true",
          action = clap::ArgAction::Set, value_name = "BOOL")]
    enabled: bool,
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
struct GetKeyArgs {
    /// The key's id, which createKey returned. Not the key itself.
    #[arg(long, value_name = "ID")]
    key_id: String,
    #[command(flatten)]
    connection: Connection,
}

/// Asks an agent whether a key may be used. Exits with 0 whatever the verdict.
///
/// The root key needs api.*.verify_key or api.<api_id>.verify_key.
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  evictd api keys verify-key --key=prod_1234abcd")]
struct VerifyKeyArgs {
    /// The key itself, as its owner sends it.
    #[arg(long, value_name = "KEY", allow_hyphen_values = true)]
    key: String,
    /// Labels, separated by commas; accepted for compatibility, evictd doesn't analyse them.
    #[arg(long, value_name = "TEXT", value_delimiter = ',')]
    tags: Vec<String>,
    #[command(flatten)]
    connection: Connection,
}

/// Deletes a key. Every region stops accepting it within the bound, 30 seconds unless configured otherwise.
///
/// The root key needs api.*.delete_key or api.<api_id>.delete_key.
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  evictd api keys delete-key --key-id=key_1234abcd")]
struct DeleteKeyArgs {
    /// The key's id, which createKey returned. Not the key itself.
    #[arg(long, value_name = "ID")]
    key_id: String,
    /// Erases hash, name and metadata too, instead of keeping them in the database, marked as deleted. Can't
    /// be undone.
    #[arg(long, num_args = 0..=1, require_equals = true, default_value_t = false, default_missing_value = "true",
          action = clap::ArgAction::Set, value_name = "BOOL")]
    permanent: bool,
    #[command(flatten)]
    follow: Follow,
    #[command(flatten)]
    connection: Connection,
}

/// Creates an API, a namespace for keys.
///
/// The root key needs api.*.create_api.
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  evictd api apis create-api --name=payments")]
struct CreateApiArgs {
    /// A name for people. It needn't be unique.
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    name: String,
    #[command(flatten)]
    connection: Connection,
}

/// Deletes an API. Every region stops accepting its keys, all of them, within the bound.
///
/// The root key needs api.*.delete_api or api.<api_id>.delete_api.
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  evictd api apis delete-api --api-id=api_1234abcd")]
struct DeleteApiArgs {
    /// The API's id, which createApi returned.
    #[arg(long, value_name = "ID")]
    api_id: String,
    #[command(flatten)]
    follow: Follow,
    #[command(flatten)]
    connection: Connection,
}

/// Shows how far a change has come: of each region whether its agents have confirmed it.
///
/// Any root key of the same workspace will do.
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  evictd api propagation get-receipt --request-id=req_1234abcd")]
struct GetReceiptArgs {
    /// The request that made the change, as its answer named it.
    #[arg(long, value_name = "ID")]
    request_id: String,
    #[command(flatten)]
    connection: Connection,
}

/// What every change takes.
#[derive(Args, Debug)]
struct Follow {
    /// Shows how the regions forget the old state one by one, for at most this long (30s if not said). Exits with
    /// 3 if by then not all have confirmed or been fenced, although the change is committed.
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "30s", value_name = "DURATION")]
    wait: Option<HumanDuration>,
}

/// What every command takes.
#[derive(Args, Clone, Default)]
#[command(next_help_heading = "Connection")]
pub(super) struct Connection {
    /// The root key. Safer in $EVICTD_ROOT_KEY (or $UNKEY_ROOT_KEY): other users see command lines.
    #[arg(long, value_name = "KEY", allow_hyphen_values = true)]
    pub(super) root_key: Option<String>,
    /// The server. Else $EVICTD_API_URL, $UNKEY_API_BASE_URL, `api_url` of the file, http://127.0.0.1:7070;
    /// for verify-key $EVICTD_VERIFY_URL, `verify_url` of the file, http://127.0.0.1:7080.
    #[arg(long, value_name = "URL")]
    pub(super) api_url: Option<String>,
    /// A TOML file with `root_key`, `api_url`, `verify_url`. Else $EVICTD_CONFIG, $UNKEY_CONFIG,
    /// ~/.evictd/config.toml, ~/.unkey/config.toml.
    #[arg(long, value_name = "FILE")]
    pub(super) config: Option<PathBuf>,
    /// `json` prints the whole answer. Else $EVICTD_OUTPUT, $UNKEY_OUTPUT.
    #[arg(long, value_name = "FORMAT")]
    pub(super) output: Option<String>,
}

impl std::fmt::Debug for Connection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Connection")
            .field("root_key", &self.root_key.as_ref().map(|_| "[redacted]"))
            .field("api_url", &self.api_url)
            .field("config", &self.config)
            .field("output", &self.output)
            .finish()
    }
}

impl ApiArgs {
    /// The request that carries the command out, and what was said about the connection. Limits are left to
    /// the server, which knows them all.
    pub(super) fn into_call(self) -> anyhow::Result<(Call, Connection)> {
        let (call, connection) = match self.group {
            Group::Keys(Keys::Create(args)) => {
                // The parser's message names a place in the text, never the text.
                let meta = args.meta_json.map(RawValue::from_string).transpose();
                let request = CreateKey {
                    api_id: args.api_id,
                    prefix: args.prefix,
                    name: args.name,
                    byte_length: args.byte_length,
                    meta: meta.context("--meta-json isn't JSON")?,
                    expires: args.expires,
                    enabled: args.enabled,
                };
                (
                    changing(
                        call(CreateKey::PATH, &request, Server::Publisher, Repeat::Duplicates),
                        &args.follow,
                    ),
                    args.connection,
                )
            }
            Group::Keys(Keys::Get(args)) => {
                let request = GetKey { key_id: args.key_id };
                (call(GetKey::PATH, &request, Server::Publisher, Repeat::Harmless), args.connection)
            }
            Group::Keys(Keys::Verify(args)) => {
                let tags = args.tags.into_iter().map(Cow::Owned).collect();
                let request = VerifyKey { key: args.key.into(), tags };
                (call(VerifyKey::PATH, &request, Server::Agent, Repeat::Harmless), args.connection)
            }
            Group::Keys(Keys::Delete(args)) => {
                let request = DeleteKey { key_id: args.key_id, permanent: args.permanent };
                (
                    changing(
                        call(DeleteKey::PATH, &request, Server::Publisher, Repeat::FindsNothing),
                        &args.follow,
                    ),
                    args.connection,
                )
            }
            Group::Propagation(Receipts::Get(args)) => {
                let request = GetReceipt { request_id: args.request_id };
                (call(GetReceipt::PATH, &request, Server::Publisher, Repeat::Harmless), args.connection)
            }
            Group::Apis(Apis::Create(args)) => {
                let request = CreateApi { name: args.name };
                (call(CreateApi::PATH, &request, Server::Publisher, Repeat::Duplicates), args.connection)
            }
            Group::Apis(Apis::Delete(args)) => {
                let request = DeleteApi { api_id: args.api_id };
                (
                    changing(
                        call(DeleteApi::PATH, &request, Server::Publisher, Repeat::FindsNothing),
                        &args.follow,
                    ),
                    args.connection,
                )
            }
        };
        Ok((call?, connection))
    }
}

fn call(
    path: &'static str,
    request: &impl Serialize,
    server: Server,
    repeat: Repeat,
) -> anyhow::Result<Call> {
    Ok(Call { path, body: serde_json::to_vec(request)?, server, repeat, wait: None })
}

/// A change, and whether its way through the regions is to be shown.
fn changing(call: anyhow::Result<Call>, follow: &Follow) -> anyhow::Result<Call> {
    call.map(|call| Call { wait: follow.wait.map(Into::into), ..call })
}

/// Rewrites `-flag` as `--flag`, which Unkey's CLI takes for the same. Apply it to the arguments of
/// `evictd api`, before clap sees them.
///
/// Values stay as they are, and so does everything after `--`.
pub(crate) fn normalise(args: impl IntoIterator<Item = OsString>) -> Vec<OsString> {
    let mut rewritten = Vec::new();
    let mut args = args.into_iter();
    while let Some(arg) = args.next() {
        let Some(flag) = arg.to_str().and_then(long_flag) else {
            let ends_flags = arg == "--";
            rewritten.push(arg);
            if ends_flags {
                break;
            }
            continue;
        };
        let takes_next = !flag.contains('=') && !SWITCHES.contains(&flag);
        rewritten.push(if flag == "h" { "-h".into() } else { format!("--{flag}").into() });
        if takes_next {
            rewritten.extend(args.next());
        }
    }
    rewritten.extend(args);
    rewritten
}

/// The flag without its dashes, one or two.
fn long_flag(arg: &str) -> Option<&str> {
    let flag = arg.strip_prefix("--").or_else(|| arg.strip_prefix('-'))?;
    flag.starts_with(|first: char| first.is_ascii_alphabetic()).then_some(flag)
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory, Parser};

    use super::*;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        api: ApiArgs,
    }

    /// Parses what stands after `evictd api`.
    fn parse(line: &str) -> Result<ApiArgs, clap::Error> {
        let args = std::iter::once("api").chain(line.split_whitespace()).map(OsString::from);
        Cli::try_parse_from(normalise(args)).map(|cli| cli.api)
    }

    fn body(line: &str) -> String {
        let (call, _) = parse(line).unwrap().into_call().unwrap();
        format!("{} {}", call.path, String::from_utf8(call.body).unwrap())
    }

    fn normalised(line: &str) -> String {
        let args = normalise(line.split(' ').map(OsString::from));
        args.iter().map(|arg| arg.to_str().unwrap()).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn the_tree_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn one_dash_is_as_good_as_two() {
        assert_eq!(
            normalised("keys delete-key -key-id=k -permanent"),
            "keys delete-key --key-id=k --permanent"
        );
        assert_eq!(normalised("-key-id k -permanent=false"), "--key-id k --permanent=false");
        assert_eq!(normalised("--key-id k -h"), "--key-id k -h");
    }

    #[test]
    fn values_are_left_alone() {
        assert_eq!(normalised("--name -x -key -y"), "--name -x --key -y");
        assert_eq!(normalised("-permanent -key-id k"), "--permanent --key-id k");
        assert_eq!(normalised("-expires -5"), "--expires -5");
        assert_eq!(normalised("-5 - -- -name"), "-5 - -- -name");
    }

    #[test]
    fn arguments_that_arent_text_pass_through() {
        use std::os::unix::ffi::OsStringExt as _;
        let odd = OsString::from_vec(vec![b'-', 0xff]);
        assert_eq!(normalise([odd.clone()]), [odd]);
    }

    #[test]
    fn switches_are_exactly_the_flags_that_stand_alone() {
        fn collect(command: &clap::Command, found: &mut Vec<String>) {
            for arg in command.get_arguments() {
                if arg.is_require_equals_set() || !arg.get_action().takes_values() {
                    found.extend(arg.get_long().map(str::to_owned));
                }
            }
            command.get_subcommands().for_each(|command| collect(command, found));
        }
        let mut command = Cli::command();
        command.build();
        let mut found = Vec::new();
        collect(&command, &mut found);
        found.sort();
        found.dedup();
        let mut switches: Vec<_> = SWITCHES.into_iter().filter(|name| name.len() > 1).collect();
        switches.sort_unstable();
        assert_eq!(found, switches);
    }

    #[test]
    fn each_command_sends_its_request() {
        for (line, expected) in [
            ("keys delete-key --key-id=k1", r#"/v2/keys.deleteKey {"keyId":"k1","permanent":false}"#),
            (
                "keys delete-key -key-id k1 -permanent",
                r#"/v2/keys.deleteKey {"keyId":"k1","permanent":true}"#,
            ),
            (
                "keys delete-key --permanent=true --key-id k1",
                r#"/v2/keys.deleteKey {"keyId":"k1","permanent":true}"#,
            ),
            (
                "keys delete-key --permanent=false --key-id k1",
                r#"/v2/keys.deleteKey {"keyId":"k1","permanent":false}"#,
            ),
            ("keys get-key --key-id=k1", r#"/v2/keys.getKey {"keyId":"k1"}"#),
            (
                "keys verify-key --key=-abc --tags=a,b",
                r#"/v2/keys.verifyKey {"key":"-abc","tags":["a","b"]}"#,
            ),
            (
                "keys create-key --api-id=a1",
                r#"/v2/keys.createKey {"apiId":"a1","byteLength":16,"enabled":true}"#,
            ),
            (
                r#"keys create-key --api-id=a1 --prefix p --name -n --byte-length 32 --meta-json={"a":1.0} --expires=5 --enabled=false"#,
                concat!(
                    r#"/v2/keys.createKey {"apiId":"a1","prefix":"p","name":"-n","byteLength":32,"#,
                    r#""meta":{"a":1.0},"expires":5,"enabled":false}"#
                ),
            ),
            ("apis create-api --name=payments", r#"/v2/apis.createApi {"name":"payments"}"#),
            ("apis delete-api --api-id=a1", r#"/v2/apis.deleteApi {"apiId":"a1"}"#),
            ("propagation get-receipt --request-id=r1", r#"/v2/propagation.getReceipt {"requestId":"r1"}"#),
        ] {
            assert_eq!(body(line), expected, "{line}");
        }
    }

    #[test]
    fn a_change_can_be_followed_for_a_while() {
        let wait = |line: &str| parse(line).unwrap().into_call().unwrap().0.wait;
        for (line, seconds) in [
            ("keys delete-key --key-id=k1", None),
            ("keys delete-key --key-id=k1 --wait", Some(30)),
            ("keys delete-key -wait -key-id k1", Some(30)),
            ("apis delete-api --wait=5s --api-id=a1", Some(5)),
            ("keys create-key --api-id=a1 --wait=1m", Some(60)),
        ] {
            assert_eq!(wait(line), seconds.map(std::time::Duration::from_secs), "{line}");
        }
    }

    #[test]
    fn wrong_usage_is_refused() {
        for line in [
            "",
            "keys",
            "keys delete-key",
            "keys delete-key k1",
            "keys delete-key --key-id=k1 extra",
            "keys delete-key --key-id=k1 --permanent true",
            "keys delete-key --key-id=k1 --permanent=maybe",
            "keys delete-key --key-id=k1 --wait 5s",
            "keys delete-key --key-id=k1 --wait=5",
            "keys get-key --key-id=k1 --wait",
            "keys verify-key --key=k --credits-json={}",
            "keys create-key --api-id=a1 --byte-length=256",
            "apis list-apis",
        ] {
            assert!(parse(line).is_err(), "{line}");
        }
        assert!(parse("keys create-key --api-id=a1 --meta-json={").unwrap().into_call().is_err());
    }

    #[test]
    fn only_verifications_go_to_the_agent() {
        let server = |line: &str| parse(line).unwrap().into_call().unwrap().0.server;
        assert_eq!(server("keys verify-key --key=k"), Server::Agent);
        assert_eq!(server("keys get-key --key-id=k"), Server::Publisher);
        assert_eq!(server("apis delete-api --api-id=a"), Server::Publisher);
    }

    #[test]
    fn printing_the_arguments_doesnt_show_the_root_key() {
        let args = parse("keys get-key --key-id=k --root-key=unkey_hunter2").unwrap();
        assert!(!format!("{args:?}").contains("hunter2"));
    }
}
