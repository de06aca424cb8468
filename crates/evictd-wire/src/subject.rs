//! The subjects of the bus. No other module spells one.
//!
//! A request's subject names its requester, so that NATS permissions bind identity (R11, R13). The answer
//! goes only into that requester's inbox.

use std::fmt;

use evictd_core::ids::{AgentName, Region};
use evictd_core::limits::NAME_BYTES_MAX;

/// The live feed, from publishers to agents.
pub const LIVE: &str = "evictd.v1.live";

/// Publishers discover each other here.
pub const PUBLISHERS: &str = "evictd.v1.publishers";

/// The subject of the answer to a publisher's query `nonce`.
pub fn publisher_answer(publisher: u64, nonce: u64) -> String {
    format!("{PUBLISHERS}.{publisher:016x}.{nonce:016x}")
}

/// The subscription that receives every answer to this publisher.
pub fn publisher_answers(publisher: u64) -> String {
    format!("{PUBLISHERS}.{publisher:016x}.*")
}

/// The nonce of the query that a message on `subject` answers.
pub fn answered_nonce(subject: &str) -> Option<u64> {
    u64::from_str_radix(subject.rsplit_once('.')?.1, 16).ok()
}

/// The queue group in which publishers share requests.
pub const AUTHORITY_GROUP: &str = "authority";

evictd_core::labels! {
    /// A kind of message that agents send to publishers.
    pub enum MessageKind {
        /// A query for a proof.
        Probe = "probe",
        /// A query for missed rows.
        Replay = "replay",
        /// A query for a record.
        Lookup = "lookup",
        /// An announcement of progress.
        Applied = "applied",
    }
}

impl MessageKind {
    /// The token in the subject, and the metric label.
    pub fn token(self) -> &'static str {
        self.label()
    }

    /// The subscription of publishers that receives this kind from every agent.
    pub fn wildcard(self) -> String {
        format!("evictd.v1.{}.*.*", self.token())
    }

    /// The subscription, without a queue group, that receives second tries (R14).
    pub fn any_wildcard(self) -> String {
        format!("{}.any", self.wildcard())
    }
}

/// An agent, as its subjects name it.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct Requester {
    pub region: Region,
    pub agent: AgentName,
}

impl Requester {
    /// Rejects names that are not one subject token; see [`check_name`].
    pub fn new(region: &str, agent: &str) -> Result<Self, NameError> {
        check_name(region)?;
        check_name(agent)?;
        Ok(Self { region: Region::new(region), agent: AgentName::new(agent) })
    }

    /// The subject on which this agent sends `kind`.
    pub fn subject(&self, kind: MessageKind) -> String {
        format!("evictd.v1.{}.{}.{}", kind.token(), self.region, self.agent)
    }

    /// The subject that reaches every publisher (R14).
    pub fn subject_any(&self, kind: MessageKind) -> String {
        format!("{}.any", self.subject(kind))
    }

    /// The prefix of every subject that may receive an answer to this agent.
    pub fn inbox_prefix(&self) -> String {
        format!("_INBOX_evictd.{}.{}", self.region, self.agent)
    }

    /// Whether an answer may be sent to `reply` (R13). NATS checks no permission on reply subjects. This check
    /// prevents a confused deputy: the publisher replies only to the requester's own inbox.
    pub fn owns_inbox(&self, reply: &str) -> bool {
        reply
            .strip_prefix(&self.inbox_prefix())
            .and_then(|rest| rest.strip_prefix('.'))
            .is_some_and(|rest| !rest.is_empty() && rest.split('.').all(is_token))
    }

    /// Parses the subject of a message received on [`MessageKind::wildcard`] or [`MessageKind::any_wildcard`].
    pub fn from_subject(subject: &str) -> Option<Self> {
        let mut tokens = subject.strip_prefix("evictd.v1.")?.split('.');
        let (_kind, region, agent) = (tokens.next()?, tokens.next()?, tokens.next()?);
        match (tokens.next(), tokens.next()) {
            (None | Some("any"), None) => Self::new(region, agent).ok(),
            _ => None,
        }
    }
}

/// A region or agent name that can't be part of a subject.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the name `{name}` must be 1 to {NAME_BYTES_MAX} characters of a-z, A-Z, 0-9, `-` and `_`")]
pub struct NameError {
    name: String,
}

/// Checks that a region or agent name is one subject token.
pub fn check_name(name: &str) -> Result<(), NameError> {
    let fits = (1..=NAME_BYTES_MAX).contains(&name.len())
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_');
    if fits { Ok(()) } else { Err(NameError { name: name.chars().take(NAME_BYTES_MAX).collect() }) }
}

impl fmt::Display for Requester {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.region, self.agent)
    }
}

fn is_token(token: &str) -> bool {
    !token.is_empty() && token.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'*' && byte != b'>')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn requester() -> Requester {
        Requester::new("eu-central-1", "a1").unwrap()
    }

    #[test]
    fn subjects_name_their_requester_and_parse_back() {
        assert_eq!(requester().subject(MessageKind::Probe), "evictd.v1.probe.eu-central-1.a1");
        for subject in [requester().subject(MessageKind::Lookup), requester().subject_any(MessageKind::Probe)]
        {
            assert_eq!(Requester::from_subject(&subject), Some(requester()));
        }
        for other in ["evictd.v1.probe.eu", "evictd.v1.probe.eu.a1.b", "evictd.v1.probe.eu.a1.any.x", "x", ""]
        {
            assert_eq!(Requester::from_subject(other), None, "{other}");
        }
    }

    #[test]
    fn only_the_requesters_own_inbox_is_accepted() {
        assert!(requester().owns_inbox("_INBOX_evictd.eu-central-1.a1.x9.probe"));
        for elsewhere in [
            "_INBOX_evictd.eu-central-1.a1",
            "_INBOX_evictd.eu-central-1.a1.",
            "_INBOX_evictd.eu-central-1.a1.x..y",
            "_INBOX_evictd.eu-central-1.a1.>",
            "_INBOX_evictd.eu-central-1.a1.*",
            "_INBOX_evictd.eu-central-1.a11.x",
            "_INBOX_evictd.us-east-1.a1.x",
            "evictd.v1.live",
            "$JS.API.STREAM.DELETE.X",
            "",
        ] {
            assert!(!requester().owns_inbox(elsewhere), "{elsewhere}");
        }
    }

    #[test]
    fn names_that_would_change_a_subject_are_rejected() {
        for name in ["", "a.b", "*", ">", "a b", "é", &"x".repeat(NAME_BYTES_MAX + 1)] {
            assert!(Requester::new(name, "a").is_err(), "{name}");
            assert!(Requester::new("r", name).is_err(), "{name}");
        }
    }
}
