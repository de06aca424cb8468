//! Discovery messages between publishers.

use bytes::Bytes;
use evictd_core::history::RoundToken;
use evictd_core::limits::ID_BYTES_MAX;
use evictd_core::service::{Peer, Query, Standing};
use evictd_core::time::StoreTime;

use crate::codec::{self, DecodeError, field};
use crate::generated as pb;

/// A publisher's description of itself.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PublisherInfo {
    /// Drawn at process start. Answers to it arrive on [`crate::subject::publisher_answers`].
    pub id: u64,
    pub peer: Peer,
    /// The token of its last round, if there was one.
    pub round: Option<RoundToken>,
}

/// A query to all publishers.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PublisherQuery {
    pub nonce: u64,
    pub from: PublisherInfo,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PublisherAnswer {
    pub nonce: u64,
    pub from: PublisherInfo,
}

impl PublisherQuery {
    pub fn new(query: Query, from: PublisherInfo) -> Self {
        let peer = Peer { standing: query.standing, ..from.peer };
        Self { nonce: query.nonce, from: PublisherInfo { peer, ..from } }
    }

    pub fn encode(&self) -> Bytes {
        codec::encode(&pb::PublisherQuery { nonce: self.nonce, peer: Some(introduction_to(&self.from)) })
    }

    pub fn decode(payload: &[u8]) -> Result<Self, DecodeError> {
        let query: pb::PublisherQuery = codec::decode(payload)?;
        Ok(Self { nonce: codec::nonce(query.nonce)?, from: introduction_from(query.peer)? })
    }
}

impl PublisherAnswer {
    pub fn encode(&self) -> Bytes {
        codec::encode(&pb::PublisherAnswer { nonce: self.nonce, peer: Some(introduction_to(&self.from)) })
    }

    pub fn decode(payload: &[u8]) -> Result<Self, DecodeError> {
        let answer: pb::PublisherAnswer = codec::decode(payload)?;
        Ok(Self { nonce: codec::nonce(answer.nonce)?, from: introduction_from(answer.peer)? })
    }
}

fn introduction_to(from: &PublisherInfo) -> pb::Peer {
    let PublisherInfo { id, peer, round } = from;
    pb::Peer {
        id: *id,
        name: peer.publisher.to_string(),
        provenance: Some(codec::provenance_to(peer.provenance)),
        since_unix_us: peer.since.0,
        standing: standing_to(peer.standing).into(),
        round: round.map_or(0, |round| round.0),
    }
}

fn introduction_from(peer: Option<pb::Peer>) -> Result<PublisherInfo, DecodeError> {
    let peer = peer.ok_or(field("peer"))?;
    if peer.id == 0 {
        return Err(field("id"));
    }
    if peer.name.len() > ID_BYTES_MAX {
        return Err(field("name"));
    }
    let standing = standing_from(peer.standing());
    let (id, round) = (peer.id, codec::round(peer.round));
    let provenance = codec::provenance_from(peer.provenance)?;
    let peer = Peer {
        publisher: peer.name.into_boxed_str(),
        provenance,
        since: StoreTime(peer.since_unix_us),
        standing,
    };
    Ok(PublisherInfo { id, peer, round })
}

fn standing_to(standing: Standing) -> pb::Standing {
    match standing {
        Standing::Asking => pb::Standing::Asking,
        Standing::Serving => pb::Standing::Serving,
        Standing::Yielding => pb::Standing::Yielding,
        Standing::Conflicting => pb::Standing::Conflicting,
        Standing::Behind => pb::Standing::Behind,
    }
}

fn standing_from(standing: pb::Standing) -> Standing {
    match standing {
        pb::Standing::Asking => Standing::Asking,
        // An unknown standing might not be harmless.
        pb::Standing::Serving | pb::Standing::Unspecified => Standing::Serving,
        pb::Standing::Yielding => Standing::Yielding,
        pb::Standing::Conflicting => Standing::Conflicting,
        pb::Standing::Behind => Standing::Behind,
    }
}
