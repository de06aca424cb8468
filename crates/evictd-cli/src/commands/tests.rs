use std::ffi::OsString;
use std::time::Duration;

use clap::{CommandFactory, Parser, Subcommand};

use super::*;
use crate::bulk::BulkDeletion;
use crate::call::{ApiCall, ApiServer};
use crate::usage::{explain as explain_error, normalize};

#[derive(Parser)]
#[command(name = "evictd")]
struct ApiCli {
    #[command(subcommand)]
    command: ApiCommand,
}

#[derive(Subcommand)]
enum ApiCommand {
    Api(Box<ApiArgs>),
}

fn arguments(line: &str) -> Vec<OsString> {
    normalize(
        ["evictd", "api"].into_iter().chain(line.split_whitespace()).map(OsString::from),
        ApiCli::command(),
    )
}

/// Parses the arguments after `evictd api`.
fn parse(line: &str) -> Result<ApiArgs, clap::Error> {
    let ApiCommand::Api(api) = ApiCli::try_parse_from(arguments(line))?.command;
    Ok(*api)
}

/// Returns the explanation of wrong usage, if there is one.
fn explain(line: &str) -> Option<String> {
    explain_error(&parse(line).unwrap_err(), &arguments(line), &ApiCli::command())
}

fn action(line: &str) -> ApiAction {
    parse(line).unwrap_or_else(|error| panic!("{line}: {error}")).into_action().unwrap().0
}

fn call(line: &str) -> (ApiCall, Option<Duration>) {
    match action(line) {
        ApiAction::Call { call, wait } => (call, wait),
        ApiAction::DeleteKeys(deletion) => panic!("{line}: {deletion:?}"),
    }
}

fn body(line: &str) -> String {
    let (call, _) = call(line);
    format!("{} {}", call.path, String::from_utf8(call.body).unwrap())
}

#[test]
fn command_tree_is_valid() {
    ApiCli::command().debug_assert();
}

#[test]
fn each_command_sends_its_request() {
    for (line, expected) in [
        ("keys delete-key --key-id=k1", r#"/v2/keys.deleteKey {"keyId":"k1","permanent":false}"#),
        ("keys delete-key -key-id k1 -permanent", r#"/v2/keys.deleteKey {"keyId":"k1","permanent":true}"#),
        (
            "keys delete-key --permanent=true --key-id k1",
            r#"/v2/keys.deleteKey {"keyId":"k1","permanent":true}"#,
        ),
        (
            "keys delete-key --permanent=false --key-id k1",
            r#"/v2/keys.deleteKey {"keyId":"k1","permanent":false}"#,
        ),
        (
            "keys delete-key --permanent=1 --key-id k1",
            r#"/v2/keys.deleteKey {"keyId":"k1","permanent":true}"#,
        ),
        (
            "keys delete-key --permanent=FALSE --key-id k1",
            r#"/v2/keys.deleteKey {"keyId":"k1","permanent":false}"#,
        ),
        (
            "keys delete-key --permanent= --key-id k1",
            r#"/v2/keys.deleteKey {"keyId":"k1","permanent":false}"#,
        ),
        ("keys delete-key --key-id k1 -key-id=k2", r#"/v2/keys.deleteKey {"keyId":"k2","permanent":false}"#),
        ("keys get-key --key-id=k1", r#"/v2/keys.getKey {"keyId":"k1"}"#),
        ("keys verify-key --key=-abc --tags=a,b", r#"/v2/keys.verifyKey {"key":"-abc","tags":["a","b"]}"#),
        ("keys verify-key --key k --tags=a --tags b", r#"/v2/keys.verifyKey {"key":"k","tags":["a","b"]}"#),
        ("keys verify-key --key k --tags= --permissions=", r#"/v2/keys.verifyKey {"key":"k"}"#),
        (
            "keys verify-key --key=abc --permissions=a.b",
            r#"/v2/keys.verifyKey {"key":"abc","permissions":"a.b"}"#,
        ),
        (
            "keys create-key --api-id=a1",
            r#"/v2/keys.createKey {"apiId":"a1","byteLength":16,"enabled":true}"#,
        ),
        (
            r#"keys create-key --api-id=a1 --prefix p --name -n --byte-length 32 --meta-json={"a":1.0} --expires=4073544000000 --enabled=false --external-id=-u --permissions=b,a"#,
            concat!(
                r#"/v2/keys.createKey {"apiId":"a1","prefix":"p","name":"-n","byteLength":32,"externalId":"-u","#,
                r#""meta":{"a":1.0},"permissions":["b","a"],"expires":4073544000000,"enabled":false}"#
            ),
        ),
        (
            "keys create-key --api-id=a1 --expires=2099-01-31T12:00:00Z --permissions=",
            r#"/v2/keys.createKey {"apiId":"a1","byteLength":16,"expires":4073544000000,"enabled":true}"#,
        ),
        ("keys reroll-key --key-id=k1 --expiration=0", r#"/v2/keys.rerollKey {"keyId":"k1","expiration":0}"#),
        (
            "keys reroll-key --key-id=k1 --expiration=3600000",
            r#"/v2/keys.rerollKey {"keyId":"k1","expiration":3600000}"#,
        ),
        (
            "keys reroll-key --key-id=k1 --expiration 7d",
            r#"/v2/keys.rerollKey {"keyId":"k1","expiration":604800000}"#,
        ),
        ("apis create-api --name=payments", r#"/v2/apis.createApi {"name":"payments"}"#),
        ("apis get-api --api-id=a1", r#"/v2/apis.getApi {"apiId":"a1"}"#),
        ("apis delete-api --api-id=a1", r#"/v2/apis.deleteApi {"apiId":"a1"}"#),
        ("apis list-keys --api-id=a1", r#"/v2/apis.listKeys {"apiId":"a1","limit":100}"#),
        (
            "apis list-keys --api-id=a1 --limit=10 --cursor=key_2 --external-id=u1 --revalidate-keys-cache",
            r#"/v2/apis.listKeys {"apiId":"a1","limit":10,"cursor":"key_2","externalId":"u1"}"#,
        ),
        ("propagation get-receipt --request-id=r1", r#"/v2/propagation.getReceipt {"requestId":"r1"}"#),
    ] {
        assert_eq!(body(line), expected, "{line}");
    }
}

#[test]
fn update_sends_only_what_changes() {
    let updated = |flags: &str| {
        let body = body(&format!("keys update-key --key-id=k1 {flags}"));
        body.strip_prefix(r#"/v2/keys.updateKey {"keyId":"k1","#).unwrap().to_owned()
    };
    for (flags, expected) in [
        ("--name=n", r#""name":"n"}"#),
        ("--clear-name", r#""name":null}"#),
        ("--external-id=u", r#""externalId":"u"}"#),
        ("-clear-external-id", r#""externalId":null}"#),
        (r#"--meta-json={"a":1.0}"#, r#""meta":{"a":1.0}}"#),
        ("--meta-json=null", r#""meta":null}"#),
        ("--clear-meta", r#""meta":null}"#),
        ("--expires=4073544000000", r#""expires":4073544000000}"#),
        ("--clear-expires", r#""expires":null}"#),
        ("--enabled", r#""enabled":true}"#),
        ("--enabled=false", r#""enabled":false}"#),
        ("--permissions=a,b", r#""permissions":["a","b"]}"#),
        ("--permissions=a --permissions b,c", r#""permissions":["a","b","c"]}"#),
        ("--clear-permissions", r#""permissions":[]}"#),
        ("--clear-permissions=T", r#""permissions":[]}"#),
        ("--clear-permissions=0 --name=n", r#""name":"n"}"#),
        // An empty variable of a script takes nothing away.
        ("--permissions= --name=n --external-id= --meta-json= --expires= --enabled=", r#""name":"n"}"#),
        ("--permissions=, --name=n", r#""name":"n"}"#),
        ("--name=a --name=b --enabled --enabled=false", r#""name":"b","enabled":false}"#),
        ("--name=n --clear-expires --enabled=false", r#""name":"n","expires":null,"enabled":false}"#),
    ] {
        assert_eq!(updated(flags), expected, "{flags}");
    }
    for nothing in ["--wait", "--permissions=", "--clear-name=false"] {
        let line = format!("keys update-key --key-id=k1 {nothing}");
        let error = parse(&line).unwrap().into_action().unwrap_err().to_string();
        assert!(error.contains("--clear-name") && error.contains("--clear-permissions"), "{error}");
    }
    for both in [
        "--name=n --clear-name",
        "--external-id=u --clear-external-id",
        "--meta-json={} --clear-meta",
        "--expires=4073544000000 --clear-expires",
        "--permissions=a --clear-permissions",
    ] {
        let line = format!("keys update-key --key-id=k1 {both}");
        let error = parse(&line).unwrap().into_action().unwrap_err().to_string();
        assert!(error.contains("exclude each other"), "{error}");
    }
}

#[test]
fn wait_flag_sets_how_long_to_wait() {
    for (line, seconds) in [
        ("keys delete-key --key-id=k1", None),
        ("keys delete-key --key-id=k1 --wait", Some(30)),
        ("keys delete-key -wait -key-id k1", Some(30)),
        ("apis delete-api --wait=5s --api-id=a1", Some(5)),
        ("keys create-key --api-id=a1 --wait=1m", Some(60)),
        ("keys update-key --key-id=k1 --enabled=false --wait=1m", Some(60)),
        ("keys reroll-key --key-id=k1 --expiration=0 --wait", Some(30)),
    ] {
        let (call, wait) = call(line);
        assert_eq!(wait, seconds.map(Duration::from_secs), "{line}");
        assert_eq!(call.prefer, seconds.map(|_| Duration::ZERO), "{line}");
    }
}

#[test]
fn dash_reads_ids_from_standard_input() {
    let deletion = |line: &str| match action(line) {
        ApiAction::DeleteKeys(deletion) => deletion,
        ApiAction::Call { .. } => panic!("{line}"),
    };
    let plain = BulkDeletion { permanent: false, concurrency: 8, strict: false, wait: None };
    assert_eq!(deletion("keys delete-key --key-id -"), plain);
    assert_eq!(deletion("keys delete-key -key-id=-"), plain);
    let all =
        BulkDeletion { permanent: true, concurrency: 64, strict: true, wait: Some(Duration::from_secs(5)) };
    assert_eq!(deletion("keys delete-key --key-id=- --permanent --concurrency=64 --strict --wait=5s"), all);
    for line in ["keys delete-key --key-id=k1 --strict", "keys delete-key --key-id=k1 --concurrency=2"] {
        let error = parse(line).unwrap().into_action().unwrap_err().to_string();
        assert!(error.contains("--key-id=-"), "{error}");
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
        "keys delete-key --key-id=- --concurrency=0",
        "keys delete-key --key-id=- --concurrency=257",
        "keys get-key --key-id=k1 --wait",
        "keys verify-key --key=k --credits-json={}",
        "keys create-key --api-id=a1 --byte-length=256",
        "keys create-key --api-id=a1 --byte-length=15",
        "apis list-keys --api-id=a1 --limit=0",
        "apis list-keys --api-id=a1 --limit=101",
        "keys create-key --api-id=a1 --expires=tomorrow",
        "keys delete-key --key-id=",
        "keys delete-key --key-id=k1 --permanent=yes",
        "keys delete-key --key-id=k1 --key-id=",
        "keys reroll-key --key-id=k1",
        "keys reroll-key --key-id=k1 --expiration=-5",
        "apis list-keys --api-id=a1 --limit=256",
        "apis list-apis",
    ] {
        assert!(parse(line).is_err(), "{line}");
    }
    assert!(parse("keys create-key --api-id=a1 --meta-json={").unwrap().into_action().is_err());
}

#[test]
fn left_out_flags_and_commands_are_named() {
    for (line, name) in [
        ("keys create-key --api-id=a1 --roles=admin", "--roles"),
        ("keys create-key -api-id a1 -roles admin", "--roles"),
        ("keys update-key --key-id=k1 --credits-json={}", "--credits-json"),
        ("keys update-key --key-id=k1 --refill-interval=daily", "--refill-interval"),
        ("keys verify-key --key=k --migration-id m", "--migration-id"),
        ("identities list-identities", "identities"),
        ("identities", "identities"),
        ("permissions create-permission --name=a --slug=a", "permissions"),
        ("permissions -name list-roles", "permissions"),
        ("ratelimit limit --namespace=n --identifier=i --limit=1 --duration=1000", "ratelimit"),
        ("ratelimit --help", "ratelimit"),
        ("analytics get-verifications --query=q", "analytics"),
    ] {
        let text = explain(line).unwrap_or_else(|| panic!("{line}"));
        assert!(text.starts_with(&format!("evictd leaves out {name}: ")), "{text}");
    }
    for command in [
        "add-permissions",
        "add-roles",
        "migrate-keys",
        "remove-permissions",
        "remove-roles",
        "set-permissions",
        "set-roles",
        "update-credits",
        "whoami",
    ] {
        let text = explain(&format!("keys {command} --key-id=k1")).unwrap_or_else(|| panic!("{command}"));
        assert!(text.starts_with(&format!("evictd leaves out {command}: ")), "{text}");
    }
    assert_eq!(explain("keys create-key --api-id=a1 --rolls=admin"), None);
    assert_eq!(explain("keys create-keys"), None);
}

#[test]
fn left_out_switch_may_be_off() {
    for line in ["keys create-key --api-id=a1", "keys get-key --key-id=k1", "apis list-keys --api-id=a1"] {
        let switch = if line.contains("create-key") { "--recoverable" } else { "--decrypt" };
        assert_eq!(body(&format!("{line} {switch}=false")), body(line));
        for on in [switch.to_owned(), format!("{switch}=true"), switch[1..].to_owned()] {
            let refused = parse(&format!("{line} {on}")).unwrap().into_action().unwrap_err().to_string();
            assert!(refused.starts_with(&format!("evictd leaves out {switch}: ")), "{refused}");
        }
    }
}

#[test]
fn left_out_list_may_be_empty() {
    for line in
        ["keys verify-key --key=k", "keys create-key --api-id=a1", "keys update-key --key-id=k1 --name=n"]
    {
        for empty in ["-ratelimits-json []", "--ratelimits-json=[]", "--ratelimits-json=", "--credits-json="]
        {
            assert_eq!(body(&format!("{line} {empty}")), body(line));
        }
        for full in [r#"[{"name":"x"}]"#, "{}", "null"] {
            let line = format!("{line} --ratelimits-json={full}");
            let refused = parse(&line).unwrap().into_action().unwrap_err().to_string();
            assert!(refused.starts_with("evictd leaves out --ratelimits-json: "), "{refused}");
        }
    }
}

#[test]
fn number_out_of_range_is_refused_with_the_range() {
    let message = |line: &str| parse(line).unwrap_err().to_string();
    assert!(message("keys create-key --api-id=a1 --byte-length=300").contains("16..=255"));
    assert!(message("apis list-keys --api-id=a1 --limit=1000").contains("1..=100"));
}

#[test]
fn past_expiry_is_refused_with_its_meaning() {
    for line in ["keys create-key --api-id=a1", "keys update-key --key-id=k1"] {
        let refused = parse(&format!("{line} --expires=90")).unwrap().into_action().unwrap_err().to_string();
        assert!(refused.contains("1970-01-01T00:00:00.090Z") && refused.contains("90d"), "{refused}");
    }
}

#[test]
fn help_is_an_argument_of_leaf_commands() {
    let help = |line: &str| {
        ApiCli::try_parse_from(arguments(line)).err().map(|error| (error.kind(), error.to_string()))
    };
    for (line, about) in [
        ("keys delete-key help", "Deletes a key, or many"),
        ("apis list-keys help --limit=5", "Lists the keys"),
    ] {
        let (kind, text) = help(line).unwrap();
        assert_eq!(kind, clap::error::ErrorKind::DisplayHelp, "{line}");
        assert!(text.contains(about), "{text}");
    }
    // A value is not rewritten.
    assert_eq!(help("apis create-api --name help"), None);
    assert_eq!(help("keys delete-key --key-id=k1 help").unwrap().0, clap::error::ErrorKind::UnknownArgument);
}

#[test]
fn unknown_output_format_is_refused() {
    for format in ["xml", "JSON"] {
        let error = parse(&format!("keys get-key --key-id=k1 --output={format}")).unwrap_err().to_string();
        assert!(error.contains("--output") && error.contains("possible values: text, json"), "{error}");
    }
}

#[test]
fn switch_value_without_equals_sign_is_explained() {
    for (line, advice) in [
        ("keys delete-key --key-id=k1 --wait 5s", "--wait=5s"),
        ("keys delete-key -wait 5s -key-id=k1", "--wait=5s"),
        ("keys delete-key --key-id=k1 --permanent true", "--permanent=true"),
        ("keys update-key --key-id=k1 --enabled false", "--enabled=false"),
    ] {
        let text = explain(line).unwrap_or_else(|| panic!("{line}"));
        assert!(text.contains(advice), "{text}");
    }
    assert_eq!(explain("keys delete-key --key-id=k1 extra"), None);
}

#[test]
fn exit_code_follows_the_verdict_only_if_requested() {
    for (flag, expected) in
        [("", false), ("--exit-code", true), ("-exit-code=F", false), ("--exit-code=1", true)]
    {
        assert_eq!(call(&format!("keys verify-key --key=k {flag}")).0.exits_with_verdict, expected, "{flag}");
    }
    assert!(parse("keys get-key --key-id=k --exit-code").is_err());
}

#[test]
fn only_verifications_go_to_the_agent() {
    let server = |line: &str| call(line).0.server;
    assert_eq!(server("keys verify-key --key=k"), ApiServer::Agent);
    assert_eq!(server("keys get-key --key-id=k"), ApiServer::Publisher);
    assert_eq!(server("apis delete-api --api-id=a"), ApiServer::Publisher);
}

#[test]
fn debug_output_hides_the_root_key() {
    let args = parse("keys get-key --key-id=k --root-key=unkey_hunter2").unwrap();
    assert!(!format!("{args:?}").contains("hunter2"));
}
