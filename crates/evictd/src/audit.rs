//! `evictd audit`: shows who changed what, from the home store directly.

use std::fmt::Write as _;

use clap::Args;
use evictd_cli::print::{OutputFormat, print_line, printable};
use evictd_cli::time::{When, format_time};
use evictd_core::ids::WorkspaceId;
use evictd_ops::clock::wall_now;
use evictd_store::audit::{AuditQuery, AuditRecord};
use serde::Serialize;

use crate::operator::OperatorArgs;

/// Shows who changed what: every change of a key, an API or a root key, the newest first.
///
/// The record of a request is written in the transaction of its change. The record of a change by direct SQL is written
/// when the change gets its position in the log, without an author. Records contain ids, never keys, and remain after a
/// permanent deletion. `--output=json` prints an object per line, with the field names of Unkey's audit log, and
/// `peer_ip`, the other end of the connection.
#[derive(Args, Debug)]
#[command(
    after_help = "Examples:\n  evictd audit --since=24h\n  evictd audit --key-id=key_1234abcd --output=json\n  \
                        evictd audit --request-id=req_1234abcd"
)]
pub(crate) struct AuditArgs {
    #[command(flatten)]
    operator: OperatorArgs,
    /// Shows only changes of this key.
    #[arg(long, value_name = "ID", group = "target")]
    key_id: Option<String>,
    /// Shows only changes of this API, and of its keys where their record names it.
    #[arg(long, value_name = "ID", group = "target")]
    api_id: Option<String>,
    /// Shows only changes of this root key.
    #[arg(long, value_name = "ID", group = "target")]
    root_key_id: Option<String>,
    /// Shows only changes by this request.
    #[arg(long, value_name = "ID")]
    request_id: Option<String>,
    /// Shows only changes in this workspace.
    #[arg(long, value_name = "ID")]
    workspace: Option<String>,
    /// Shows only changes since a time: 2027-01-31T12:00:00Z, milliseconds since 1970, or a duration such as 24h or 7d.
    #[arg(long, value_name = "TIME")]
    since: Option<When>,
    /// Shows at most this many, the newest.
    #[arg(long, value_name = "NUMBER", default_value_t = 100)]
    limit: usize,
}

/// A record in JSON.
#[derive(Serialize)]
struct RecordLine<'a> {
    event_id: &'a str,
    time: i64,
    #[serde(skip_serializing_if = "Option::is_none")]
    workspace_id: Option<&'a str>,
    event: &'a str,
    description: &'a str,
    actor: RecordActor<'a>,
    #[serde(skip_serializing_if = "Option::is_none")]
    remote_ip: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    peer_ip: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    user_agent: Option<&'a str>,
    targets: Vec<RecordTarget<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    correlation_id: Option<&'a str>,
}

#[derive(Serialize)]
struct RecordActor<'a> {
    r#type: &'a str,
    id: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<&'a str>,
}

#[derive(Serialize)]
struct RecordTarget<'a> {
    r#type: &'a str,
    id: &'a str,
}

pub(crate) fn run(args: AuditArgs) -> anyhow::Result<()> {
    let store = args.operator.store()?;
    let query = AuditQuery {
        workspace_id: args.workspace.map(WorkspaceId::new),
        target: args.key_id.or(args.api_id).or(args.root_key_id),
        request_id: args.request_id,
        since: args.since.map(|since| since.before(wall_now())),
        limit: args.limit,
    };
    for record in store.with(async |store| Ok(store.audit(&query).await?))? {
        print_line(&match args.operator.output {
            OutputFormat::Json => serde_json::to_string(&RecordLine::new(&record))?,
            OutputFormat::Text => text(&record),
        })?;
    }
    Ok(())
}

impl<'a> RecordLine<'a> {
    fn new(record: &'a AuditRecord) -> Self {
        let target = |target: &'a evictd_store::audit::AuditTarget| RecordTarget {
            r#type: &target.kind,
            id: &target.id,
        };
        Self {
            event_id: &record.event_id,
            time: record.time.as_millis(),
            workspace_id: record.workspace_id.as_ref().map(WorkspaceId::as_str),
            event: &record.event,
            description: &record.description,
            actor: RecordActor {
                r#type: &record.actor_type,
                id: &record.actor_id,
                name: record.actor_name.as_deref(),
            },
            remote_ip: record.remote_ip.as_deref(),
            peer_ip: record.peer_ip.as_deref(),
            user_agent: record.user_agent.as_deref(),
            targets: record.targets.iter().map(target).collect(),
            correlation_id: record.request_id.as_deref(),
        }
    }
}

/// `2026-08-21T12:34:56.789Z  key.delete  Deleted key key_1  by rootkey root_1 (ci) from 10.0.0.1  req_1`
fn text(record: &AuditRecord) -> String {
    let mut text = format!(
        "{}  {:15}  {}  by {} {}",
        format_time(record.time),
        record.event,
        record.description,
        record.actor_type,
        record.actor_id
    );
    // Writing to a String cannot fail.
    if let Some(name) = &record.actor_name {
        let _ = write!(text, " ({name})");
    }
    if let Some(ip) = &record.remote_ip {
        let _ = write!(text, " from {ip}");
    }
    if let Some(peer) = record.peer_ip.as_ref().filter(|peer| Some(*peer) != record.remote_ip.as_ref()) {
        let _ = write!(text, " through {}", printable(peer));
    }
    if let Some(request_id) = &record.request_id {
        let _ = write!(text, "  {request_id}");
    }
    printable(&text)
}

#[cfg(test)]
mod tests {
    use evictd_core::time::StoreTime;
    use evictd_store::audit::AuditTarget;

    use super::*;

    fn record() -> AuditRecord {
        AuditRecord {
            event_id: "log_1".to_owned(),
            time: StoreTime::from_millis(1_787_315_696_789),
            workspace_id: Some(WorkspaceId::new("ws_1")),
            event: "key.delete".to_owned(),
            description: "Deleted key key_1".to_owned(),
            actor_type: "rootkey".to_owned(),
            actor_id: "root_1".to_owned(),
            actor_name: Some("ci\u{1b}[31m".to_owned()),
            remote_ip: Some("10.0.0.1".to_owned()),
            peer_ip: Some("10.0.0.1".to_owned()),
            user_agent: Some("evictd/0.1.0".to_owned()),
            targets: vec![AuditTarget { kind: "key".to_owned(), id: "key_1".to_owned() }],
            request_id: Some("req_1".to_owned()),
        }
    }

    #[test]
    fn text_is_a_line_per_record() {
        assert_eq!(
            text(&record()),
            "2026-08-21T12:34:56.789Z  key.delete       Deleted key key_1  by rootkey root_1 (ci\\u001b[31m) from \
             10.0.0.1  req_1"
        );
        let proxied = AuditRecord { peer_ip: Some("10.9.9.9".to_owned()), ..record() };
        assert!(text(&proxied).ends_with(" from 10.0.0.1 through 10.9.9.9  req_1"));
        let plain =
            AuditRecord { actor_name: None, remote_ip: None, peer_ip: None, request_id: None, ..record() };
        assert!(text(&plain).ends_with("Deleted key key_1  by rootkey root_1"));
    }

    #[test]
    fn json_has_unkeys_field_names() {
        assert_eq!(
            serde_json::to_string(&RecordLine::new(&record())).unwrap(),
            concat!(
                r#"{"event_id":"log_1","time":1787315696789,"workspace_id":"ws_1","event":"key.delete","#,
                r#""description":"Deleted key key_1","#,
                r#""actor":{"type":"rootkey","id":"root_1","name":"ci\u001b[31m"},"#,
                r#""remote_ip":"10.0.0.1","peer_ip":"10.0.0.1","user_agent":"evictd/0.1.0","#,
                r#""targets":[{"type":"key","id":"key_1"}],"correlation_id":"req_1"}"#
            )
        );
    }
}
