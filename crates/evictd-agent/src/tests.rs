//! The whole agent, without a NATS server.

use std::os::unix::fs::FileExt as _;

use evictd_ops::readiness::SETTLES_AFTER;
use tempfile::NamedTempFile;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use super::*;

/// The parts of a hypervisor's clock device that the agent reads: its name, and a marker.
fn clock_device() -> NamedTempFile {
    let file = NamedTempFile::new().unwrap();
    let mut bytes = [0; 0x70];
    bytes[..4].copy_from_slice(b"VCLK");
    file.as_file().write_all_at(&bytes, 0).unwrap();
    file
}

async fn start_with(vm_clock: &str, shutdown: &CancellationToken) -> Result<RunningAgent, AgentStartError> {
    let config = fixture::config(&[
        ("nats.urls", "nats://127.0.0.1:1"),
        ("http.listen", "127.0.0.1:0"),
        ("admin.listen", "127.0.0.1:0"),
        ("lease.vm_clock", vm_clock),
    ]);
    start(config, None, shutdown.clone()).await
}

async fn status(running: &RunningAgent) -> serde_json::Value {
    let mut stream = TcpStream::connect(running.admin).await.unwrap();
    stream.write_all(b"GET /status HTTP/1.1\r\nhost: agent\r\nconnection: close\r\n\r\n").await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    serde_json::from_str(answer.split_once("\r\n\r\n").unwrap().1).unwrap()
}

#[tokio::test]
async fn a_stopped_machine_ends_the_process_with_an_error() {
    let device = clock_device();
    let shutdown = CancellationToken::new();
    let running = start_with(device.path().to_str().unwrap(), &shutdown).await.unwrap();
    assert_eq!(status(&running).await["vmClockWatched"], true);
    device.as_file().write_all_at(&[7], 0x10).unwrap();
    assert_eq!(running.ended().await, Err(TaskFailed { name: "vm_clock" }));
    assert!(shutdown.is_cancelled());
}

#[tokio::test]
async fn a_machine_without_the_device_reports_it_and_runs() {
    for vm_clock in ["", "/no/such/vmclock0"] {
        let shutdown = CancellationToken::new();
        let running = start_with(vm_clock, &shutdown).await.unwrap();
        let status = status(&running).await;
        assert_eq!((&status["vmClockWatched"], &status["mode"]), (&false.into(), &"starting".into()));
        shutdown.cancel();
        assert_eq!(running.ended().await, Ok(()));
    }
}

/// Failure: a load balancer takes all agents of a region out of service, although policy has them answer.
#[tokio::test(start_paused = true)]
async fn without_a_lease_only_a_stale_serving_agent_is_ready() {
    for (policy, of_an_api, is_ready) in [("deny", "serve_stale", false), ("serve_stale", "deny", true)] {
        let settings = [("partition.policy", policy), ("partition.apis.api_1", of_an_api)];
        let parts = AgentParts::new(fixture::config(&settings)).unwrap();
        let lease = parts.lease_condition();
        assert!(!parts.readiness.is_ready(), "it has no records yet");
        lease.met();
        tokio::time::advance(SETTLES_AFTER).await;
        lease.unmet("too old");
        assert_eq!(parts.readiness.is_ready(), is_ready, "{policy}");
    }
}

/// Failure: only client requests reveal that an agent lacks the permission for lookups.
#[tokio::test]
async fn an_agent_is_unready_before_the_first_answer_to_a_lookup() {
    let shutdown = CancellationToken::new();
    let running = start_with("", &shutdown).await.unwrap();
    let waiting: Vec<_> = running.readiness.waiting_for().iter().map(|waiting| waiting.condition).collect();
    for condition in ["nats", "nats_lookups", "lease", "lookups"] {
        assert!(waiting.contains(&condition), "{condition} isn't in {waiting:?}");
    }
    shutdown.cancel();
    assert_eq!(running.ended().await, Ok(()));
}

#[tokio::test]
async fn another_file_in_place_of_the_device_is_rejected() {
    let file = NamedTempFile::new().unwrap();
    let refused = start_with(file.path().to_str().unwrap(), &CancellationToken::new()).await;
    assert!(matches!(refused, Err(AgentStartError::VmClock(VmClockError::Strange { .. }))));
}
