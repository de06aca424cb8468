//! `delete-key --key-id=-`: many deletions in one run, and interruptions of it.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::process::{Child, ChildStdout, Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use evictd_tests::wait::{eventually, try_eventually};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::command_line::command;
use crate::world::{Key, SOON, World, plan};

/// A bulk run that reads its list from standard input.
struct Bulk<'a> {
    world: &'a World,
    child: Child,
    stdout: BufReader<ChildStdout>,
    name: &'static str,
}

impl<'a> Bulk<'a> {
    fn start(world: &'a World, name: &'static str, flags: &str, list: &str) -> Result<Self> {
        let line = format!("api keys delete-key --key-id=- {flags}");
        let mut child = command(world, world.topology.root_key(), &line)?
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(File::create(world.dir().join(name))?)
            .spawn()
            .context("running evictd")?;
        child.stdin.take().context("stdin")?.write_all(list.as_bytes())?;
        let stdout = BufReader::new(child.stdout.take().context("stdout")?);
        Ok(Self { world, child, stdout, name })
    }

    /// Standard error so far.
    fn stderr(&self) -> Result<String> {
        Ok(std::fs::read_to_string(self.world.dir().join(self.name))?)
    }

    /// Reads the next line of standard output.
    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        ensure!(self.stdout.read_line(&mut line)? > 0, "the run has exited: {}", self.stderr()?);
        Ok(line.trim_end().to_owned())
    }

    fn interrupt(&self) -> Result<()> {
        let pid = i32::try_from(self.child.id())?;
        Ok(kill_process(Pid::from_raw(pid).context("no process")?, Signal::INT)?)
    }

    /// Waits for the exit: the exit code, the remaining lines, and standard error.
    fn end(mut self) -> Result<(Option<i32>, Vec<String>, String)> {
        let mut rest = String::new();
        self.stdout.read_to_string(&mut rest)?;
        let exit = self.child.wait()?.code();
        Ok((exit, rest.lines().map(str::to_owned).collect(), self.stderr()?))
    }
}

/// Runs a bulk deletion to its exit.
fn delete(world: &World, flags: &str, list: &str) -> Result<(Option<i32>, Vec<String>, String)> {
    Bulk::start(world, "bulk.stderr", flags, list)?.end()
}

fn list_of(keys: &[Key]) -> String {
    keys.iter().fold(String::new(), |list, key| list + &key.id + "\n")
}

/// Returns the result for each key id. Each key must have exactly one line.
fn results(keys: &[Key], lines: &[String]) -> Result<BTreeMap<String, String>> {
    let mut results = BTreeMap::new();
    for line in lines {
        let (id, result) = line.split_once("  ").with_context(|| format!("no result: {line}"))?;
        ensure!(results.insert(id.to_owned(), result.to_owned()).is_none(), "{id} has two lines");
    }
    ensure!(
        results.len() == keys.len() && keys.iter().all(|key| results.contains_key(&key.id)),
        "{results:?}"
    );
    Ok(results)
}

fn count(results: &BTreeMap<String, String>, start: &str) -> usize {
    results.values().filter(|result| result.starts_with(start)).count()
}

fn live_keys(world: &World) -> Result<usize> {
    Ok(world.sql("SELECT count(*) FROM keys WHERE deleted_at_m IS NULL")?.parse()?)
}

/// Failure: an interrupted run leaves keys valid, or can't be repeated.
#[test]
fn bulk_run_is_repeatable_after_a_publisher_restart() -> Result<()> {
    let mut world = World::start(&plan(&["eu"]))?;
    let keys = world.create_keys(500)?;
    let some: Vec<_> = keys.iter().step_by(25).collect();
    world.cache_everywhere(&some)?;
    let list = format!("# leaked\n\n{}{}\n", list_of(&keys), keys[0].id);

    let (exit, lines, stderr) = delete(&world, "", &list)?;
    let first = results(&keys, &lines)?;
    assert_eq!((exit, count(&first, "deleted  req_")), (Some(0), 500), "{stderr}");
    assert_eq!(stderr, "500 keys: 500 deleted, 0 not found, 0 failed, 0 not started\n");
    assert_eq!(live_keys(&world)?, 0);
    world.assert_gone(&some)?;

    world.topology.publisher.restart()?;
    let (exit, lines, stderr) = delete(&world, "", &list)?;
    assert_eq!((exit, count(&results(&keys, &lines)?, "not found")), (Some(0), 500), "{stderr}");
    assert!(stderr.starts_with("500 keys: 0 deleted, 500 not found, 0 failed, 0 not started\n"), "{stderr}");
    let (exit, ..) = delete(&world, "--strict", &list)?;
    assert_eq!(exit, Some(1), "--strict reports keys that were not found");
    world.assert_gone(&some)
}

/// Failure: a run skips the keys whose deletion was in progress when the publisher was killed.
#[test]
fn bulk_run_survives_a_killed_publisher() -> Result<()> {
    let mut world = World::start(&plan(&["eu"]))?;
    let keys = world.create_keys(500)?;
    let mut bulk = Bulk::start(&world, "bulk.stderr", "--concurrency=4", &list_of(&keys))?;
    let mut lines = Vec::new();
    for _ in 0..20 {
        lines.push(bulk.line()?);
    }
    let Bulk { child, stdout, name, .. } = bulk;
    world.topology.publisher.restart()?;
    let (exit, rest, stderr) = Bulk { world: &world, child, stdout, name }.end()?;
    lines.extend(rest);
    let results = results(&keys, &lines)?;
    // A key whose answer was lost was deleted by the first attempt, or by the retry.
    let lost = count(&results, "not found  (an earlier attempt got no answer, and may have deleted it)");
    assert_eq!((exit, count(&results, "deleted  req_") + lost), (Some(0), 500), "{stderr}");
    assert!(lost <= 4, "more than were in progress: {lost}");
    assert_eq!(live_keys(&world)?, 0);
    Ok(())
}

#[test]
fn bulk_run_waits_until_every_region_has_confirmed() -> Result<()> {
    let world = World::start(&plan(&["eu", "us"]))?;
    let keys = world.create_keys(40)?;
    world.cache_everywhere(&keys.iter().collect::<Vec<_>>())?;
    let (some, others) = keys.split_at(20);
    let (exit, lines, stderr) = delete(&world, "--wait", &list_of(some))?;
    let results = results(some, &lines)?;
    let confirmed = results.values().filter(|result| result.contains("  confirmed after ")).count();
    assert_eq!((exit, confirmed), (Some(0), 20), "{results:?} {stderr}");
    // Without a wait: every region has confirmed each deletion.
    world.assert_none_valid(&some.iter().collect::<Vec<_>>())?;

    let (exit, lines, _) = delete(&world, "--wait=20s --output=json", &list_of(others))?;
    assert_eq!((exit, lines.len()), (Some(0), 20));
    for line in &lines {
        let line: Value = serde_json::from_str(line)?;
        assert_eq!(
            (&line["result"], &line["propagation"]["state"]),
            (&"deleted".into(), &"confirmed".into())
        );
        assert!(line["requestId"].as_str().is_some_and(|id| id.starts_with("req_")), "{line}");
    }
    Ok(())
}

#[test]
fn wait_timeout_sets_the_exit_code() -> Result<()> {
    let mut world = World::start(&plan(&["eu"]))?;
    let keys = world.create_keys(5)?;
    world.agent_mut(0).daemon.pause()?;
    let (exit, lines, stderr) = delete(&world, "--wait=300ms", &list_of(&keys))?;
    world.agent_mut(0).daemon.resume()?;
    let results = results(&keys, &lines)?;
    assert!(
        results.values().all(|result| result.starts_with("deleted") && result.ends_with("  pending")),
        "{results:?}"
    );
    assert_eq!(exit, Some(3), "{stderr}");
    assert!(stderr.contains("get-receipt"), "{stderr}");
    Ok(())
}

/// Failure: a wrong file deletes the keys that it happens to name.
#[test]
fn a_list_with_a_wrong_line_deletes_nothing() -> Result<()> {
    let world = World::start(&plan(&["eu"]))?;
    let key = world.create_key()?;
    let (exit, lines, stderr) = delete(&world, "", &format!("{}\nid;name\n\n{}\n-\n", key.id, key.text))?;
    assert_eq!((exit, lines.len()), (Some(1), 0), "{stderr}");
    assert!(
        stderr.starts_with("nothing was deleted: ") && stderr.contains("\n  line 2: id;name"),
        "{stderr}"
    );
    assert!(stderr.contains("\n  line 5: -") && !stderr.contains(&key.text), "{stderr}");
    assert_eq!(live_keys(&world)?, 1);
    Ok(())
}

#[test]
fn one_missing_permission_fails_those_keys_alone() -> Result<()> {
    let world = World::start(&plan(&["eu"]))?;
    let other_api = world.create_api()?;
    let mine = world.create_key()?;
    let other = world.create_key_with(serde_json::json!({ "apiId": other_api }))?;
    let config = world.publisher().config.display().to_string();
    let line = format!("root-key create --config={config} --permission=api.{}.delete_key", world.api);
    let limited = crate::command_line::evictd(&world, "", &line)?.stdout;
    let mut run = command(&world, limited.trim(), "api keys delete-key --key-id=-")?;
    let mut child = run.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    child.stdin.take().context("stdin")?.write_all(list_of(&[mine.clone(), other.clone()]).as_bytes())?;
    let output = child.wait_with_output()?;
    let lines: Vec<_> = String::from_utf8(output.stdout)?.lines().map(str::to_owned).collect();
    let results = results(&[mine.clone(), other.clone()], &lines)?;
    assert!(results[&mine.id].starts_with("deleted  req_"), "{results:?}");
    assert!(results[&other.id].starts_with("failed: Permission denied: "), "{results:?}");
    assert_eq!(output.status.code(), Some(1));
    Ok(())
}

/// Failure: the run drops deletions that the rate limit refused, or Ctrl-C has to wait for the next minute.
#[test]
fn bulk_run_waits_for_the_rate_limit_until_ctrl_c() -> Result<()> {
    let mut world = World::start(&plan(&["eu"]))?;
    let keys = world.create_keys(30)?;
    world.topology.publisher.daemon.set_env("EVICTD_RATE_LIMIT_REQUESTS_PER_MINUTE", "10");
    world.topology.publisher.restart()?;
    let bulk = Bulk::start(&world, "bulk.stderr", "", &list_of(&keys))?;
    eventually("it to report the rate limit", SOON, || {
        bulk.stderr()
            .ok()
            .filter(|stderr| stderr.contains("The server's rate limit is reached; continuing in "))
    })?;
    bulk.interrupt()?;
    let (exit, lines, stderr) = bulk.end()?;
    let results = results(&keys, &lines)?;
    let (deleted, not_started) = (count(&results, "deleted  req_"), count(&results, "not started"));
    assert_eq!((exit, deleted, not_started), (Some(1), 10, 20), "{stderr}");
    assert_eq!(live_keys(&world)?, 20);
    Ok(())
}

/// Failure: after Ctrl-C it is unclear which keys were deleted.
#[test]
fn ctrl_c_finishes_deletions_in_progress_and_lists_the_rest() -> Result<()> {
    let mut world = World::start(&plan(&["eu"]))?;
    let keys = world.create_keys(300)?;
    let mut bulk = Bulk::start(&world, "bulk.stderr", "--concurrency=2", &list_of(&keys))?;
    let mut lines = vec![bulk.line()?];
    let Bulk { child, stdout, name, .. } = bulk;
    // A paused publisher keeps the run from finishing before the signal arrives.
    world.topology.publisher.daemon.pause()?;
    let bulk = Bulk { world: &world, child, stdout, name };
    bulk.interrupt()?;
    eventually("it to acknowledge the signal", SOON, || {
        bulk.stderr().ok().filter(|stderr| stderr.contains("Finishing the deletions in progress.")).map(drop)
    })?;
    let Bulk { child, stdout, name, .. } = bulk;
    world.topology.publisher.daemon.resume()?;
    let (exit, rest, stderr) = Bulk { world: &world, child, stdout, name }.end()?;
    lines.extend(rest);
    let results = results(&keys, &lines)?;
    let (deleted, not_started) = (count(&results, "deleted  req_"), count(&results, "not started"));
    assert_eq!((exit, deleted + not_started), (Some(1), 300), "{stderr}");
    assert_eq!(live_keys(&world)?, not_started, "the lines match the store");
    if not_started == 0 {
        bail!("the run finished before the interrupt");
    }

    let (exit, _, stderr) = delete(&world, "", &list_of(&keys))?;
    assert_eq!(
        (exit, live_keys(&world)?),
        (Some(0), 0),
        "a second run with the same list deletes the rest: {stderr}"
    );
    Ok(())
}

/// A Python program that runs a command in a pseudo-terminal. The first argument is the file for standard input, the
/// others are the command. It copies the terminal's output to standard output, and exits with the command's code.
const TERMINAL: &str = "import os, pty, sys\n\
    child, terminal = pty.fork()\n\
    if child == 0:\n    \
        os.dup2(os.open(sys.argv[1], os.O_RDONLY), 0)\n    \
        os.execv(sys.argv[2], sys.argv[2:])\n\
    while True:\n    \
        try:\n        \
            written = os.read(terminal, 65536)\n    \
        except OSError:\n        \
            break\n    \
        if not written:\n        \
            break\n    \
        os.write(1, written)\n\
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))";

/// The escape sequence that clears the line.
const CLEAR: &str = "\r\x1b[2K";

/// Failure: a terminal shows no progress, or the progress bar stays between the lines or hides them.
#[test]
fn terminal_shows_a_progress_bar_and_then_only_lines() -> Result<()> {
    let mut world = World::start(&plan(&["eu"]))?;
    let keys = world.create_keys(60)?;
    let (list, screen) = (world.dir().join("list"), world.dir().join("screen"));
    std::fs::write(&list, list_of(&keys))?;
    // Without an answer the bar stays empty until the test has read it.
    world.topology.publisher.daemon.pause()?;
    let evictd = command(&world, world.topology.root_key(), "api keys delete-key --key-id=-")?;
    let mut terminal = Command::new("python3");
    terminal.args(["-c", TERMINAL]).arg(&list).arg(evictd.get_program()).args(evictd.get_args());
    for (name, value) in evictd.get_envs() {
        match value {
            Some(value) => terminal.env(name, value),
            None => terminal.env_remove(name),
        };
    }
    let mut run =
        terminal.stdout(File::create(&screen)?).spawn().context("running python3, for a terminal")?;
    let written = || Ok::<_, anyhow::Error>(std::fs::read_to_string(&screen)?);
    let empty = format!("[{}] 0/60", " ".repeat(30));
    try_eventually("an empty bar", SOON, || Ok(written()?.contains(&empty).then_some(())))?;
    world.topology.publisher.daemon.resume()?;
    let exit = run.wait()?.code();

    let written = written()?;
    // A user doesn't see what a cleared line held.
    let mut shown: Vec<_> = written
        .lines()
        .map(|line| line.rsplit(CLEAR).next().unwrap_or_default().trim_end().to_owned())
        .collect();
    assert_eq!(shown.pop().as_deref(), Some("60 keys: 60 deleted, 0 not found, 0 failed, 0 not started"));
    assert_eq!((exit, count(&results(&keys, &shown)?, "deleted  req_")), (Some(0), 60), "{written:?}");
    assert_eq!(live_keys(&world)?, 0);
    Ok(())
}
