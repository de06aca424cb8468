//! `evictd api` against a real deployment, `evictd root-key`, and `evictd check-config`.

use std::fs;
use std::process::Command;

use anyhow::{Context, Result};
use evictd_tests::process::evictd_command;
use serde_json::Value;

use crate::world::{World, plan};

/// The exit code and the output of a command.
pub(crate) struct Outcome {
    pub(crate) exit: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Outcome {
    pub(crate) fn json(&self) -> Result<Value> {
        serde_json::from_str(&self.stdout).with_context(|| format!("no JSON: {}{}", self.stdout, self.stderr))
    }

    /// Asserts that it failed with `words` on standard error, and wrote nothing to standard output.
    pub(crate) fn assert_failed(&self, words: &str) {
        assert_eq!((self.exit, self.stdout.as_str()), (Some(1), ""), "{}", self.stderr);
        assert!(self.stderr.contains(words), "{}", self.stderr);
    }
}

/// Prepares `evictd <line>` with its settings in the environment, as a script would run it.
pub(crate) fn command(world: &World, root_key: &str, line: &str) -> Result<Command> {
    let mut command = evictd_command()?;
    command.args(line.split_ascii_whitespace()).env("HOME", world.dir());
    command.env("EVICTD_ROOT_KEY", root_key);
    command.env("EVICTD_API_URL", format!("http://{}", world.publisher().http));
    command.env("EVICTD_VERIFY_URL", format!("http://{}", world.agent(0).http));
    Ok(command)
}

/// Runs `evictd <line>` until it exits.
pub(crate) fn evictd(world: &World, root_key: &str, line: &str) -> Result<Outcome> {
    let output = command(world, root_key, line)?.output().context("running evictd")?;
    Ok(Outcome {
        exit: output.status.code(),
        stdout: String::from_utf8(output.stdout)?,
        stderr: String::from_utf8(output.stderr)?,
    })
}

#[test]
fn the_command_line_creates_verifies_and_deletes() -> Result<()> {
    let world = World::start(&plan(&["eu"]))?;
    let run = |line: &str| evictd(&world, world.topology.root_key(), &format!("api {line}"));
    let data = |line: &str| -> Result<Value> {
        let outcome = run(&format!("{line} --output=json"))?;
        assert_eq!((outcome.exit, outcome.stderr.as_str()), (Some(0), ""), "{line}");
        let answer = outcome.json()?;
        assert!(answer["meta"]["requestId"].as_str().is_some_and(|id| id.starts_with("req_")), "{answer}");
        Ok(answer["data"].clone())
    };
    let text = |value: &Value| value.as_str().map(str::to_owned).context("not a string");

    let api = text(&data("apis create-api --name=billing")?["apiId"])?;
    let created = data(&format!("keys create-key --api-id={api} --prefix=prod --name=ci"))?;
    let (id, key) = (text(&created["keyId"])?, text(&created["key"])?);
    assert_eq!(data(&format!("keys get-key --key-id={id}"))?["name"], "ci");
    assert_eq!(data(&format!("keys verify-key --key={key}"))?["code"], "VALID");

    // The text output: the request id, the duration and the data.
    let outcome = run(&format!("keys delete-key --key-id={id}"))?;
    assert_eq!((outcome.exit, outcome.stderr.as_str()), (Some(0), ""));
    assert!(outcome.stdout.starts_with("req_") && outcome.stdout.contains(" (took "), "{}", outcome.stdout);
    assert!(outcome.stdout.ends_with("\n\n{}\n"), "{}", outcome.stdout);
    let key = crate::world::Key { id, text: key };
    world.assert_gone(&[&key])?;
    // A negative verdict is not a failure of the command.
    let verify = format!("keys verify-key --key={}", key.text);
    assert_eq!(data(&verify)?["code"], "NOT_FOUND");
    let judged = run(&format!("{verify} --exit-code"))?;
    assert!(judged.exit == Some(4) && judged.stdout.contains("NOT_FOUND"), "{}", judged.stdout);

    // Flags may have one dash, as in Unkey's own command line.
    let other = text(&data(&format!("keys create-key -api-id {api}"))?["keyId"])?;
    data(&format!("keys delete-key -key-id={other} -permanent"))?;
    assert_eq!(world.sql("SELECT count(*) FROM keys WHERE deleted_at_m IS NULL")?, "0");
    data(&format!("apis delete-api --api-id={api}"))?;
    run(&format!("apis delete-api --api-id={api}"))?.assert_failed("Not found");
    Ok(())
}

#[test]
fn errors_go_to_standard_error_and_exit_with_1() -> Result<()> {
    let world = World::start(&plan(&["eu"]))?;
    let key = world.create_key()?;
    let delete = format!("api keys delete-key --key-id={}", key.id);
    let root_key = world.topology.root_key();

    evictd(&world, "unkey_unknown", &delete)?.assert_failed("Authentication failed");
    evictd(&world, &key.text, &delete)?.assert_failed("Authentication failed");
    evictd(&world, "", &delete)?.assert_failed("EVICTD_ROOT_KEY");
    evictd(&world, root_key, "api keys delete-key --key-id=key_unknown")?.assert_failed("Not found");
    evictd(&world, root_key, "api keys delete-key --key-id=k")?.assert_failed("keyId");
    evictd(&world, root_key, "api keys delete-key")?.assert_failed("--key-id");
    evictd(&world, root_key, &format!("{delete} --permanant"))?.assert_failed("--permanent");
    // Usage has one exit code, of all commands.
    for (line, words) in [
        ("", "Usage"),
        ("auth", "Usage"),
        ("auth login --nonsense", "--nonsense"),
        ("root-key create --nonsense", "--nonsense"),
        ("audit extra", "extra"),
        ("check-config nonsense", "publisher"),
        ("delete-key --key-id=k", "`evictd api keys delete-key`"),
    ] {
        evictd(&world, root_key, line)?.assert_failed(words);
    }
    let help = evictd(&world, "", "--help")?;
    assert!(help.exit == Some(0) && help.stdout.contains("Exit codes:"), "{}", help.stdout);
    // The verify URL is an agent's, which has no such endpoint.
    let elsewhere = format!("{delete} --api-url=http://{}", world.agent(0).http);
    evictd(&world, root_key, &elsewhere)?.assert_failed("--api-url");
    world.wait_for_codes(&[&key], "VALID")
}

#[test]
fn root_key_has_only_its_permissions_and_is_shown_once() -> Result<()> {
    let world = World::start(&plan(&["eu"]))?;
    let key = world.create_key()?;
    let config = world.publisher().config.display().to_string();
    let line = format!("root-key create --config={config} --permission=api.*.verify_key --output=json");
    let created = evictd(&world, "", &line)?;
    assert_eq!(created.exit, Some(0), "{}", created.stderr);
    let created = created.json()?;
    let verifier = created["rootKey"].as_str().context("no rootKey")?;

    let verify = format!("api keys verify-key --key={} --output=json", key.text);
    assert_eq!(evictd(&world, verifier, &verify)?.json()?["data"]["code"], "VALID");
    let delete = format!("api keys delete-key --key-id={}", key.id);
    evictd(&world, verifier, &delete)?.assert_failed("delete_key");
    world.wait_for_codes(&[&key], "VALID")?;

    let list = evictd(&world, "", &format!("root-key list --config={config} --output=json"))?;
    assert_eq!(list.json()?.as_array().map(Vec::len), Some(2), "{}", list.stdout);
    assert!(!list.stdout.contains(verifier), "the list shows a root key");
    Ok(())
}

#[test]
fn a_configuration_is_checked_without_showing_its_secrets() -> Result<()> {
    let world = World::start(&plan(&["eu"]))?;
    let nodes = [("publisher", world.publisher()), ("agent", world.agent(0))];
    for (daemon, node) in nodes {
        let line = format!("check-config {daemon} --config={}", node.config.display());
        let checked = evictd(&world, "", &line)?;
        assert_eq!((checked.exit, checked.stderr.as_str()), (Some(0), ""));
        let effective: toml::Table = checked.stdout.parse().context("it prints no TOML")?;
        assert_eq!(effective["http"]["listen"].as_str(), Some(node.http.to_string().as_str()));
        let written: toml::Table = fs::read_to_string(&node.config)?.parse()?;
        let password = written["nats"]["password"].as_str().context("no password in the file")?;
        assert!(!checked.stdout.contains(password), "the password is shown");

        let bad = evictd(&world, "", &format!("{line} --set htp.listen=x --set admin.listen=here"))?;
        bad.assert_failed("htp");
        bad.assert_failed("admin.listen");
    }
    Ok(())
}
