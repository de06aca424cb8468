//! Each API operation from the command line, and its output.

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::command_line::evictd;
use crate::world::{World, plan};

/// Runs `evictd api <line> --output=json`, which must succeed. Returns the answer's `data`.
fn data(world: &World, line: &str) -> Result<Value> {
    Ok(whole(world, line)?["data"].clone())
}

/// Like [`data`], but returns the whole answer.
fn whole(world: &World, line: &str) -> Result<Value> {
    let line = format!("api {line} --output=json");
    let outcome = evictd(world, world.topology.root_key(), &line)?;
    ensure!(outcome.exit == Some(0), "{line}: {}", outcome.stderr);
    outcome.json()
}

fn text(value: &Value) -> Result<String> {
    value.as_str().map(str::to_owned).context("not a string")
}

#[test]
fn every_key_setting_is_created_shown_changed_and_cleared() -> Result<()> {
    let world = World::start(&plan(&["eu"]))?;
    let create = format!(
        "keys create-key --api-id={} --prefix=prod --name=ci --byte-length=32 --external-id=user_1 \
         --meta-json={{\"plan\":1.50}} --permissions=files.write,files.read --expires=2099-01-31T12:00:00Z",
        world.api
    );
    let id = text(&data(&world, &create)?["keyId"])?;
    let get = format!("keys get-key --key-id={id}");
    let shown = data(&world, &get)?;
    assert!(shown["start"].as_str().is_some_and(|start| start.starts_with("prod_")), "{shown}");
    assert_eq!(shown["name"], "ci");
    assert_eq!(shown["identity"]["externalId"], "user_1");
    assert_eq!(shown["meta"].to_string(), r#"{"plan":1.5}"#);
    assert_eq!(shown["permissions"], json!(["files.read", "files.write"]));
    assert_eq!(shown["expires"], 4_073_544_000_000_i64);

    let update = |flags: &str| data(&world, &format!("keys update-key --key-id={id} {flags}"));
    assert_eq!(update("--name=cd --permissions=files.read --enabled=false")?, json!({}));
    let changed = data(&world, &get)?;
    assert_eq!((&changed["name"], &changed["enabled"]), (&json!("cd"), &json!(false)));
    assert_eq!(changed["permissions"], json!(["files.read"]));
    assert_eq!(
        (&changed["meta"], &changed["expires"]),
        (&shown["meta"], &shown["expires"]),
        "these fields were not in the request"
    );

    update(
        "--clear-name --clear-external-id --meta-json=null --clear-expires --clear-permissions --enabled",
    )?;
    let bare = data(&world, &get)?;
    for member in ["name", "identity", "meta", "expires", "permissions"] {
        assert!(bare[member].is_null(), "{member} is left: {bare}");
    }
    assert_eq!(bare["enabled"], true);
    Ok(())
}

#[test]
fn key_is_verified_against_a_permission_query() -> Result<()> {
    let world = World::start(&plan(&["eu"]))?;
    let key = world.create_key_with(json!({ "permissions": ["files.read"] }))?;
    world.wait_for_codes(&[&key], "VALID")?;
    let code = |query: &str| -> Result<Value> {
        let mut line =
            crate::command_line::command(&world, world.topology.root_key(), "api keys verify-key")?;
        line.args(["--output=json", &format!("--key={}", key.text), &format!("--permissions={query}")]);
        let answer: Value = serde_json::from_slice(&line.output()?.stdout)?;
        Ok(answer["data"]["code"].clone())
    };
    assert_eq!(code("files.read")?, "VALID");
    assert_eq!(code("files.write OR (files.read AND files.read)")?, "VALID");
    assert_eq!(code("files.read AND files.write")?, "INSUFFICIENT_PERMISSIONS");
    let wrong = format!("api keys verify-key --key={} --permissions=files.read)", key.text);
    evictd(&world, world.topology.root_key(), &wrong)?.assert_failed("permission");
    Ok(())
}

#[test]
fn rerolled_key_has_a_successor_and_an_expiry() -> Result<()> {
    let world = World::start(&plan(&["eu"]))?;
    let (old, slow) = (world.create_key()?, world.create_key()?);
    world.cache_everywhere(&[&old, &slow])?;
    let reroll = |id: &str, span: &str| {
        whole(&world, &format!("keys reroll-key --key-id={id} --expiration={span} --wait"))
    };
    let answer = reroll(&old.id, "0")?;
    assert_eq!(answer["meta"]["propagation"]["state"], "confirmed");
    let new = text(&answer["data"]["key"])?;
    let code = |key: &str| Ok(data(&world, &format!("keys verify-key --key={key}"))?["code"].clone());
    let codes: [Result<Value>; 2] = [code(&old.text), code(&new)];
    for (code, expected) in codes.into_iter().zip(["EXPIRED", "VALID"]) {
        assert_eq!(code?, expected);
    }
    reroll(&slow.id, "1h")?;
    world.wait_for_codes(&[&slow], "VALID")?;
    let expires = data(&world, &format!("keys get-key --key-id={}", slow.id))?["expires"].clone();
    assert!(expires.is_i64(), "{expires}");
    Ok(())
}

#[test]
fn a_list_is_printed_a_page_at_a_time() -> Result<()> {
    let world = World::start(&plan(&["eu"]))?;
    let mut ids: Vec<_> = world.create_keys(5)?.into_iter().map(|key| key.id).collect();
    ids.sort();
    let mine = world.create_key_with(json!({ "externalId": "user_1" }))?.id;

    let list = format!("api apis list-keys --api-id={} --limit=4", world.api);
    let (mut listed, mut cursor) = (Vec::new(), String::new());
    for page in 0..2 {
        let outcome = evictd(&world, world.topology.root_key(), &format!("{list}{cursor}"))?;
        assert_eq!((outcome.exit, outcome.stderr.as_str()), (Some(0), ""));
        let lines: Vec<_> = outcome.stdout.lines().collect();
        assert!(
            lines[0].starts_with("req_") && lines[0].ends_with("ms)") && lines[1].is_empty(),
            "{lines:?}"
        );
        listed.extend(outcome.stdout.split('"').filter(|word| word.starts_with("key_")).map(str::to_owned));
        let more = lines.last().and_then(|line| line.strip_prefix("more: "));
        assert_eq!(more.is_some(), page == 0, "{}", outcome.stdout);
        if let Some(more) = more {
            // The cursor is the next page's first id. Unlike the ids above, it isn't quoted.
            cursor = format!(" {more}");
        }
    }
    let mut all = ids.clone();
    all.push(mine.clone());
    all.sort();
    assert_eq!(listed, all);

    let page = whole(&world, &format!("apis list-keys --api-id={} --external-id=user_1", world.api))?;
    assert_eq!(page["data"].as_array().map(Vec::len), Some(1), "{page}");
    assert_eq!((&page["data"][0]["keyId"], &page["pagination"]["hasMore"]), (&json!(mine), &json!(false)));
    Ok(())
}

#[test]
fn an_api_is_shown_with_its_name() -> Result<()> {
    let world = World::start(&plan(&["eu"]))?;
    let shown = data(&world, &format!("apis get-api --api-id={}", world.api))?;
    assert_eq!(shown, json!({ "id": world.api, "name": "payments" }));
    evictd(&world, world.topology.root_key(), "api apis get-api --api-id=api_unknown")?
        .assert_failed("Not found");
    Ok(())
}

#[test]
fn unsupported_and_malformed_flags_are_explained() -> Result<()> {
    let world = World::start(&plan(&["eu"]))?;
    let key = world.create_key()?;
    let run = |line: &str| evictd(&world, world.topology.root_key(), line);
    let create = format!("api keys create-key --api-id={}", world.api);
    run(&format!("{create} --roles=admin"))?.assert_failed("evictd leaves out --roles: ");
    run(&format!("{create} -ratelimits-json=[{{}}]"))?.assert_failed("evictd leaves out --ratelimits-json: ");
    run(&format!("{create} --byte-length=300"))?.assert_failed("16..=255");
    run(&format!("{create} --expires=90"))?.assert_failed("1970-01-01T00:00:00.090Z");
    run("api keys whoami")?.assert_failed("evictd leaves out whoami: ");
    run(&format!("api keys delete-key --key-id={} --wait 5s", key.id))?.assert_failed("--wait=5s");
    run(&format!("api keys update-key --key-id={}", key.id))?.assert_failed("--clear-name");
    world.wait_for_codes(&[&key], "VALID")
}

/// Failure: a setup made for Unkey sets one URL, and `verify-key` sends the root key to a local default URL instead.
#[test]
fn unkeys_base_url_is_used_for_verification_too() -> Result<()> {
    let world = World::start(&plan(&["eu"]))?;
    let key = world.create_key()?;
    let line = format!("api keys verify-key --key={} --ratelimits-json=[] --output=json", key.text);
    let mut command = crate::command_line::command(&world, world.topology.root_key(), &line)?;
    command.env_remove("EVICTD_VERIFY_URL").env_remove("EVICTD_API_URL");
    let publisher = format!("http://{}", world.publisher().http);
    let output = command.env("UNKEY_API_BASE_URL", publisher).output()?;
    let answer: Value = serde_json::from_slice(&output.stdout)
        .with_context(|| String::from_utf8_lossy(&output.stderr).into_owned())?;
    assert_eq!(answer["data"]["code"], "VALID");
    Ok(())
}

#[test]
fn help_and_version_work_as_subcommands() -> Result<()> {
    use evictd_tests::process::evictd_command;

    let output_of = |words: &[&str]| -> Result<String> {
        let output = evictd_command()?.args(words).output()?;
        ensure!(output.status.success(), "{words:?}: {}", String::from_utf8_lossy(&output.stderr));
        Ok(String::from_utf8(output.stdout)?)
    };
    for words in [["api", "keys", "delete-key", "help"].as_slice(), &["root-key", "create", "help"]] {
        assert!(output_of(words)?.contains("Usage: evictd "), "{words:?}");
    }
    assert_eq!(output_of(&["version"])?, output_of(&["--version"])?);
    Ok(())
}

/// Failure: with a mistyped host, the error suggests that a resource may have been created.
#[test]
fn request_that_was_never_sent_is_not_reported_as_created() -> Result<()> {
    let world = World::start(&plan(&["eu"]))?;
    for url in ["http://nope.invalid".to_owned(), format!("https://{}", world.publisher().http)] {
        let line = format!("api apis create-api --name=x --api-url={url}");
        let outcome = evictd(&world, world.topology.root_key(), &line)?;
        outcome.assert_failed("Is `evictd publisher` running there?");
        assert!(!outcome.stderr.contains("created"), "{}", outcome.stderr);
    }
    Ok(())
}

/// Failure: a deletion that no agent received looks confirmed.
#[test]
fn change_without_any_agent_prints_a_warning() -> Result<()> {
    let mut world = World::start(&plan(&["eu"]))?;
    let key = world.create_key()?;
    // The publisher must not find the killed agent in the roster.
    world.agent_mut(0).daemon.kill()?;
    world.topology.publisher.daemon.kill()?;
    world.sql("DELETE FROM roster")?;
    world.topology.publisher.restart()?;
    let line = format!("api keys delete-key --key-id={} --wait=5s", key.id);
    let outcome = evictd(&world, world.topology.root_key(), &line)?;
    assert_eq!(outcome.exit, Some(0), "the deletion is in force: {}{}", outcome.stdout, outcome.stderr);
    assert!(outcome.stderr.starts_with("warning: the publisher has no agent"), "{}", outcome.stderr);
    assert!(!outcome.stdout.contains("\nconfirmed"), "{}", outcome.stdout);
    Ok(())
}

#[test]
fn stored_root_key_is_used_unless_another_one_is_given() -> Result<()> {
    use std::io::Write as _;
    use std::process::Stdio;

    let world = World::start(&plan(&["eu"]))?;
    let mut login = crate::command_line::command(&world, "", "auth login")?;
    let mut login = login.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    writeln!(login.stdin.take().context("stdin")?, "{}", world.topology.root_key())?;
    let output = login.wait_with_output()?;
    let file = world.dir().join(".evictd/config.toml");
    assert!(output.status.success());
    assert_eq!(String::from_utf8(output.stdout)?, format!("Root key stored in {}\n", file.display()));

    let get = format!("api apis get-api --api-id={}", world.api);
    assert_eq!(evictd(&world, "", &get)?.exit, Some(0));
    evictd(&world, "unkey_another", &get)?.assert_failed("Authentication failed");
    Ok(())
}
