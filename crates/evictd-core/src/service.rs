//! Whether a publisher may vouch for its store (R15).
//!
//! Publishers of one history share the work. Publishers of two histories are rivals: one of them
//! works on a copy, and neither can decide which. A publisher that has served without a break goes
//! on, and a newcomer yields to it. If both served, or both are newcomers, both fall silent: only
//! an operator may decide to undo deletions.
//!
//! A newcomer queries the other publishers before it serves. A rival counts as alive only by its
//! answer to a query of this publisher, which it gives after a durable round. So a delayed message
//! has no effect, nor has the publisher of a demoted primary.

use std::collections::VecDeque;
use std::time::Duration;

use crate::history::{Milestone, Provenance};
use crate::protection::Protection;
use crate::time::{LeaseTime, StoreTime};

/// A publisher that was absent for so long is a newcomer: another one may have replaced it.
pub const ABSENT_AFTER: Duration = Duration::from_secs(2);

/// How long a query waits for answers, unless there are no responders. Publishers finish a round
/// before they answer.
pub const ANSWER_PATIENCE: Duration = Duration::from_secs(3);

/// The pause between queries to a rival.
const QUERY_SPACING: Duration = Duration::from_secs(1);

/// Queries whose answers still count.
const QUERIES_OPEN_MAX: usize = 4;

/// Another publisher, as it describes itself.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Peer {
    /// For people.
    pub publisher: Box<str>,
    pub provenance: Provenance,
    /// When its incarnation began.
    pub since: StoreTime,
    pub standing: Standing,
}

/// The role of a publisher among others.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Standing {
    /// It was absent, and queries the others.
    Asking,
    /// It vouches for its store.
    Serving,
    /// It is silent: a publisher of another history serves.
    Yielding,
    /// It is silent: a publisher of another history served as well, or is a newcomer as well.
    Conflicting,
    /// It is silent: agents have seen what its store lacks, so the store is an older copy.
    Behind,
}

labels!(Standing {
    Asking = "asking",
    Serving = "serving",
    Yielding = "yielding",
    Conflicting = "conflicting",
    Behind = "behind",
});

impl Standing {
    /// Whether a rival in this role must be waited for. One that yields or is behind vouches for
    /// nothing.
    fn is_alive(self) -> bool {
        matches!(self, Self::Asking | Self::Serving | Self::Conflicting)
    }
}

/// Whether a publisher can receive and answer at the moment.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Connectivity {
    /// It is connected to the bus, and its rounds succeed.
    Connected,
    /// It has no connection to the bus.
    Disconnected,
    /// Its rounds fail.
    Stalled,
}

/// A query to all publishers.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Query {
    /// Repeated by the answers.
    pub nonce: u64,
    /// That of the requester.
    pub standing: Standing,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
enum ServiceState {
    Asking {
        since: Option<LeaseTime>,
    },
    /// No publisher serves this store, and no rival answers.
    Alone,
    Serving,
    Silent {
        rival: Peer,
        /// When the first rival answered.
        since: LeaseTime,
        answered_at: LeaseTime,
        conflict: bool,
    },
    Behind {
        seen: Milestone,
    },
}

/// Whether only this history was served, and no other one beside or instead of it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Exclusivity {
    /// The publisher has just started, its rounds have failed, or the bus was silent at its query.
    Unverified,
    /// The bus has carried a query and its answer. Since then, nothing was missed, and no rival
    /// received.
    Verified,
    /// The publisher was frozen, or has received another history.
    Doubtful,
}

/// The role of one publisher, and its queries.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Service {
    bound: Duration,
    /// Others may share the store, so starting a publisher begins no incarnation.
    is_shared: bool,
    state: ServiceState,
    present_at: LeaseTime,
    polled_at: LeaseTime,
    connectivity: Connectivity,
    exclusivity: Exclusivity,
    /// When this history was again the only one, after that was doubtful.
    exclusive_since: Option<LeaseTime>,
    /// A rival that is silent for this publisher, and when it answered last.
    silent_rival: Option<(Peer, LeaseTime)>,
    /// The newest queries, oldest first, and when they were sent.
    queries: VecDeque<(u64, LeaseTime)>,
    next_nonce: u64,
}

impl Service {
    /// A newcomer. A rival counts as gone after it hasn't answered for `bound`. `is_shared`: other
    /// publishers may share the store. `nonce` is the number of the first query, and should be
    /// random.
    pub fn new(bound: Duration, is_shared: bool, nonce: u64, now: LeaseTime) -> Self {
        let state = ServiceState::Asking { since: None };
        Self {
            bound,
            is_shared,
            state,
            present_at: now,
            polled_at: now,
            connectivity: Connectivity::Disconnected,
            exclusivity: Exclusivity::Unverified,
            exclusive_since: None,
            silent_rival: None,
            queries: VecDeque::new(),
            next_nonce: nonce.max(1),
        }
    }

    pub fn standing(&self) -> Standing {
        match &self.state {
            ServiceState::Asking { .. } | ServiceState::Alone => Standing::Asking,
            ServiceState::Serving => Standing::Serving,
            ServiceState::Silent { conflict: false, .. } => Standing::Yielding,
            ServiceState::Silent { conflict: true, .. } => Standing::Conflicting,
            ServiceState::Behind { .. } => Standing::Behind,
        }
    }

    /// The rival that this publisher is silent for.
    pub fn rival(&self) -> Option<&Peer> {
        match &self.state {
            ServiceState::Silent { rival, .. } => Some(rival),
            _ => None,
        }
    }

    /// The rival that is silent because this publisher serves, or because its store is an older copy.
    pub fn silent_rival(&self, now: LeaseTime) -> Option<&Peer> {
        let (rival, answered_at) = self.silent_rival.as_ref()?;
        (now.since(*answered_at) < self.bound && self.state == ServiceState::Serving).then_some(rival)
    }

    /// The rival that this publisher has yielded to for a bound. Agents follow that one. So an epoch
    /// that began in this publisher's store before must not replace what they have seen
    /// ([`BeginCause::Yielded`](crate::history::BeginCause::Yielded)).
    ///
    /// During a fail-over, the publisher of the old primary may answer for a moment. So a shorter
    /// time doesn't count.
    pub fn yielded_to(&self) -> Option<&Peer> {
        match &self.state {
            ServiceState::Silent { rival, since, answered_at, conflict: false } => {
                (answered_at.since(*since) >= self.bound).then_some(rival)
            }
            _ => None,
        }
    }

    /// Counts the time of [`Self::yielded_to`] anew, because an incarnation has begun in the store.
    pub fn restart_yielding(&mut self, now: LeaseTime) {
        if let ServiceState::Silent { since, answered_at, .. } = &mut self.state {
            *since = now.max(*answered_at);
        }
    }

    /// The past that this publisher's store lacks.
    pub fn unknown_past(&self) -> Option<&Milestone> {
        match &self.state {
            ServiceState::Behind { seen } => Some(seen),
            _ => None,
        }
    }

    /// Whether it may vouch at `now`. Not after it was frozen: it queries first, even if
    /// [`Self::poll`] hasn't noticed yet.
    pub fn may_vouch(&self, now: LeaseTime) -> bool {
        self.state == ServiceState::Serving
            && (now.since(self.present_at) < ABSENT_AFTER || !Protection::NewcomersAsk.holds())
    }

    /// Whether receipts may become final at `now`, because agents follow this store or none (G4).
    ///
    /// They may also while the publisher is cut off from the bus; otherwise no receipt would become
    /// final during an outage. They may not after it started, was frozen or stalled, until it has
    /// verified that no other publisher took its place.
    pub fn may_finalize(&self, now: LeaseTime) -> bool {
        let is_cut_off =
            self.connectivity == Connectivity::Disconnected && now.since(self.polled_at) < ABSENT_AFTER;
        self.may_vouch(now)
            || self.exclusivity == Exclusivity::Verified && is_cut_off
            || !Protection::SilentPublishersHoldReceipts.holds()
    }

    /// When this history was again the only one, after another publisher may have taken this one's
    /// place. Agents may hold leases of the other one for a bound from then on, and may be missing
    /// in the roster.
    pub fn exclusive_since(&self) -> Option<LeaseTime> {
        self.exclusive_since
    }

    /// Call it several times in [`ABSENT_AFTER`]. Returns a query to send.
    pub fn poll(&mut self, connectivity: Connectivity, now: LeaseTime) -> Option<Query> {
        self.connectivity = connectivity;
        let was_frozen = now.since(std::mem::replace(&mut self.polled_at, now)) >= ABSENT_AFTER;
        // Also while it queries: answers that arrived while it was frozen may not have been read
        // yet.
        if now.since(self.present_at) >= ABSENT_AFTER {
            match self.exclusivity {
                _ if was_frozen => self.exclusivity = Exclusivity::Doubtful,
                // It still receives messages while its rounds fail.
                Exclusivity::Verified if connectivity == Connectivity::Stalled => {
                    self.exclusivity = Exclusivity::Unverified;
                }
                _ => {}
            }
            self.mark_absent();
        }
        if connectivity != Connectivity::Connected {
            return None;
        }
        self.present_at = now;
        match &self.state {
            ServiceState::Asking { since: None } if Protection::NewcomersAsk.holds() => {
                self.state = ServiceState::Asking { since: Some(now) };
                Some(self.query(now))
            }
            ServiceState::Asking { since } => {
                if since.is_none_or(|since| now.since(since) >= ANSWER_PATIENCE) {
                    if self.exclusivity == Exclusivity::Doubtful {
                        (self.exclusivity, self.exclusive_since) = (Exclusivity::Unverified, Some(now));
                    }
                    self.serve_alone();
                }
                None
            }
            ServiceState::Silent { answered_at, .. } if now.since(*answered_at) >= self.bound => {
                self.state = ServiceState::Asking { since: Some(now) };
                Some(self.query(now))
            }
            ServiceState::Silent { .. } => self.query_spaced(now),
            ServiceState::Alone | ServiceState::Serving | ServiceState::Behind { .. } => None,
        }
    }

    /// It was cut off, or stalled: a publisher that served is a newcomer again. A silent one stays
    /// silent.
    pub fn mark_absent(&mut self) {
        if matches!(self.state, ServiceState::Serving | ServiceState::Asking { .. } | ServiceState::Alone)
            && Protection::NewcomersAsk.holds()
        {
            self.state = ServiceState::Asking { since: None };
            // Their answers are out of date.
            self.queries.clear();
        }
    }

    /// The bus has no other publisher to answer the query with this number.
    pub fn on_no_responders(&mut self, nonce: u64, now: LeaseTime) {
        if self.is_open(nonce, now) && matches!(self.state, ServiceState::Asking { .. }) {
            if self.exclusivity == Exclusivity::Doubtful {
                self.exclusive_since = Some(now);
            }
            self.exclusivity = Exclusivity::Verified;
            self.serve_alone();
        }
    }

    /// Whether it serves as soon as an incarnation begins in its store. No other publisher serves
    /// that store, so it may be a physical copy with the incarnation of the original. Then rows of
    /// the one would count as rows of the other.
    pub fn wants_incarnation(&self) -> bool {
        self.state == ServiceState::Alone
    }

    /// An incarnation has begun, as [`Self::wants_incarnation`] requested.
    pub fn on_incarnation_begun(&mut self) {
        if self.state == ServiceState::Alone {
            self.state = ServiceState::Serving;
        }
    }

    /// The answer of a publisher of the same history: if that one serves, it has met no rival.
    pub fn on_same_history(&mut self, nonce: u64, standing: Standing, now: LeaseTime) {
        if self.is_open(nonce, now)
            && matches!(self.state, ServiceState::Asking { .. } | ServiceState::Alone)
            && standing == Standing::Serving
        {
            // The other one served without a break.
            (self.state, self.exclusivity) = (ServiceState::Serving, Exclusivity::Verified);
        }
    }

    /// A rival's answer.
    pub fn on_rival(&mut self, nonce: u64, peer: Peer, now: LeaseTime) {
        if !self.is_open(nonce, now) {
            return;
        }
        if !peer.standing.is_alive() {
            self.silent_rival = Some((peer, now));
            return;
        }
        let (conflict, since) = match &self.state {
            ServiceState::Behind { .. } => return,
            // The rival was first, unless it is a newcomer too. Of two newcomers, one may have
            // noticed the conflict already.
            ServiceState::Asking { .. } | ServiceState::Alone => {
                (matches!(peer.standing, Standing::Asking | Standing::Conflicting), now)
            }
            // The rival is the newcomer, and yields.
            ServiceState::Serving if peer.standing == Standing::Asking => return,
            ServiceState::Serving if !Protection::RivalsFallSilent.holds() => return,
            ServiceState::Serving => (true, now),
            ServiceState::Silent { conflict, since, .. } => (*conflict, *since),
        };
        self.state = ServiceState::Silent { rival: peer, since, answered_at: now, conflict };
        self.exclusivity = Exclusivity::Doubtful;
    }

    /// A message of another history arrived: a tick, or a rival's query. It may be old, so the
    /// publisher queries the rival.
    pub fn on_foreign(&mut self, now: LeaseTime) -> Option<Query> {
        match self.state {
            ServiceState::Serving => self.query_spaced(now),
            ServiceState::Asking { .. } | ServiceState::Alone => {
                // The rival may be gone before this publisher's query reaches it.
                self.exclusivity = Exclusivity::Doubtful;
                None
            }
            ServiceState::Silent { .. } | ServiceState::Behind { .. } => None,
        }
    }

    /// An agent has proved a past that the store lacks.
    pub fn on_unknown_past(&mut self, seen: Milestone) {
        self.state = ServiceState::Behind { seen };
        self.exclusivity = Exclusivity::Doubtful;
    }

    /// The store has that past now, or an operator has declared it superseded.
    pub fn on_past_resolved(&mut self) {
        if matches!(self.state, ServiceState::Behind { .. }) {
            self.state = ServiceState::Asking { since: None };
        }
    }

    /// Makes values that behave alike equal, for model checking: moves it to another reading of the
    /// clock, and numbers its queries from 1.
    #[cfg(feature = "fork")]
    #[must_use]
    pub fn rebased(mut self, now: LeaseTime, to: LeaseTime) -> Self {
        // Greater ages make no difference.
        let oldest = self.bound.max(ANSWER_PATIENCE);
        let rebase = |at: LeaseTime| to.before(now.since(at).min(oldest));
        self.present_at = rebase(self.present_at);
        self.polled_at = rebase(self.polled_at);
        // Receipts depend on the one, and no decision on the other.
        (self.exclusive_since, self.silent_rival) = (None, None);
        let lasting = ANSWER_PATIENCE.max(QUERY_SPACING);
        self.queries.retain(|(_, at)| now.since(*at) < lasting);
        self.queries = (1..).zip(&self.queries).map(|(nonce, (_, at))| (nonce, rebase(*at))).collect();
        self.next_nonce = self.queries.len() as u64 + 1;
        match &mut self.state {
            ServiceState::Asking { since } => *since = since.map(rebase),
            ServiceState::Silent { since, answered_at, .. } => {
                (*since, *answered_at) = (rebase(*since), rebase(*answered_at));
            }
            ServiceState::Alone | ServiceState::Serving | ServiceState::Behind { .. } => {}
        }
        self
    }

    #[cfg(feature = "fork")]
    pub fn newest_query(&self) -> Option<u64> {
        self.queries.back().map(|(nonce, _)| *nonce)
    }

    fn serve_alone(&mut self) {
        let begins = self.is_shared && Protection::LoneNewcomersBegin.holds();
        self.state = if begins { ServiceState::Alone } else { ServiceState::Serving };
    }

    fn query_spaced(&mut self, now: LeaseTime) -> Option<Query> {
        let just_sent = self.queries.back().is_some_and(|(_, at)| now.since(*at) < QUERY_SPACING);
        (!just_sent).then(|| self.query(now))
    }

    fn query(&mut self, now: LeaseTime) -> Query {
        let nonce = self.next_nonce;
        self.next_nonce = nonce.wrapping_add(1).max(1);
        if self.queries.len() == QUERIES_OPEN_MAX {
            self.queries.pop_front();
        }
        self.queries.push_back((nonce, now));
        Query { nonce, standing: self.standing() }
    }

    fn is_open(&self, nonce: u64, now: LeaseTime) -> bool {
        self.queries.iter().any(|(open, at)| *open == nonce && now.since(*at) < ANSWER_PATIENCE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::history::{Incarnation, LogToken, StoreId};
    use crate::position::LogPosition;

    const BOUND: Duration = Duration::from_secs(30);

    fn ms(ms: u64) -> LeaseTime {
        LeaseTime(1_000_000_000 + ms * 1_000)
    }

    fn newcomer() -> Service {
        Service::new(BOUND, false, 1, ms(0))
    }

    fn serving() -> Service {
        let mut service = newcomer();
        let query = service.poll(Connectivity::Connected, ms(0)).unwrap();
        service.on_no_responders(query.nonce, ms(0));
        assert_eq!(service.standing(), Standing::Serving);
        service
    }

    fn rival(standing: Standing) -> Peer {
        let provenance = Provenance { store: StoreId(1), incarnation: Incarnation(9) };
        Peer { publisher: "host-1".into(), provenance, since: StoreTime(0), standing }
    }

    #[test]
    fn receipts_are_held_until_a_newcomer_has_queried() {
        let mut service = newcomer();
        for tenth in 0..600 {
            service.poll(Connectivity::Disconnected, ms(tenth * 100));
            assert!(!service.may_finalize(ms(tenth * 100)), "it never served");
        }
        let query = service.poll(Connectivity::Connected, ms(60_000)).unwrap();
        assert!(!service.may_finalize(ms(60_000)));
        service.on_no_responders(query.nonce, ms(60_001));
        assert!(service.may_finalize(ms(60_001)));
    }

    #[test]
    fn receipts_end_while_cut_off_but_not_after_a_pause() {
        let mut service = serving();
        for tenth in 1..600 {
            service.poll(Connectivity::Disconnected, ms(tenth * 100));
            assert!(service.may_finalize(ms(tenth * 100)));
        }
        assert!(!service.may_finalize(ms(63_000)), "it was frozen, and hasn't noticed yet");
        service.poll(Connectivity::Disconnected, ms(63_000));
        assert!(!service.may_finalize(ms(63_000)));
        let query = service.poll(Connectivity::Connected, ms(63_100)).unwrap();
        assert!(!service.may_finalize(ms(63_100)));
        service.on_no_responders(query.nonce, ms(63_101));
        assert!(service.may_finalize(ms(63_101)));
    }

    #[test]
    fn receipts_end_during_a_second_cut_before_the_answer() {
        let mut service = serving();
        service.poll(Connectivity::Disconnected, ms(1_900));
        service.poll(Connectivity::Disconnected, ms(3_000));
        service.mark_absent();
        service.poll(Connectivity::Connected, ms(3_100)).unwrap();
        assert!(!service.may_finalize(ms(3_100)));
        service.poll(Connectivity::Disconnected, ms(3_200));
        assert!(service.may_finalize(ms(3_200)));
        let provenance = Provenance { store: StoreId(1), incarnation: Incarnation(9) };
        service.on_unknown_past(Milestone { provenance, at: LogPosition::ZERO, token: LogToken(0) });
        assert!(!service.may_finalize(ms(3_200)), "agents have seen more than the store has");
    }

    #[test]
    fn receipts_are_held_while_rounds_fail() {
        let mut service = serving();
        for tenth in 1..30 {
            service.poll(Connectivity::Stalled, ms(tenth * 100));
        }
        assert!(!service.may_finalize(ms(2_900)), "a copy may have had no answer to its query");
        service.poll(Connectivity::Disconnected, ms(3_000));
        assert!(!service.may_finalize(ms(3_000)));
        let query = service.poll(Connectivity::Connected, ms(3_100)).unwrap();
        service.on_no_responders(query.nonce, ms(3_200));
        assert!(service.may_finalize(ms(3_200)));
    }

    #[test]
    fn receipts_are_held_while_another_history_may_be_followed() {
        let mut service = serving();
        service.poll(Connectivity::Disconnected, ms(1_900));
        service.poll(Connectivity::Disconnected, ms(3_000));
        assert!(service.may_finalize(ms(3_000)), "cut off");
        let query = service.poll(Connectivity::Connected, ms(3_100)).unwrap();
        assert!(!service.may_finalize(ms(3_100)), "connected again, it queries first");
        service.on_rival(query.nonce, rival(Standing::Serving), ms(3_200));
        for second in 4..33 {
            service.poll(Connectivity::Connected, ms(second * 1_000));
            assert!(!service.may_finalize(ms(second * 1_000)));
        }
        for second in 33..90 {
            service.poll(Connectivity::Disconnected, ms(second * 1_000));
            assert!(!service.may_finalize(ms(second * 1_000)), "cut off, the rival may still serve");
        }
    }

    #[test]
    fn rival_received_while_rounds_fail_makes_exclusivity_doubtful() {
        for is_received in [true, false] {
            let mut service = serving();
            for tenth in 1..100 {
                service.poll(Connectivity::Stalled, ms(tenth * 100));
            }
            assert!(!service.may_finalize(ms(9_900)));
            if is_received {
                assert_eq!(service.on_foreign(ms(9_900)), None);
            }
            let query = service.poll(Connectivity::Connected, ms(10_000)).unwrap();
            service.on_no_responders(query.nonce, ms(10_001));
            assert_eq!(service.exclusive_since(), is_received.then_some(ms(10_001)));
            assert!(service.may_finalize(ms(10_001)));
        }
    }

    #[test]
    fn silence_does_not_verify_exclusivity() {
        let mut service = serving();
        assert!(
            service.poll(Connectivity::Connected, ms(60_000)).is_some(),
            "it was frozen, and its connection is dead"
        );
        service.poll(Connectivity::Connected, ms(61_500));
        service.poll(Connectivity::Connected, ms(63_000));
        assert!(service.may_vouch(ms(63_000)));
        service.poll(Connectivity::Disconnected, ms(64_000));
        service.poll(Connectivity::Disconnected, ms(65_500));
        assert!(!service.may_finalize(ms(65_500)), "it has noticed that it is cut off");
    }

    #[test]
    fn exclusivity_counts_from_an_unanswered_query_after_a_pause() {
        let mut service = serving();
        assert_eq!(service.exclusive_since(), None, "it has just started");
        let query = service.poll(Connectivity::Connected, ms(60_000)).unwrap();
        service.on_no_responders(query.nonce, ms(60_001));
        assert_eq!(
            service.exclusive_since(),
            Some(ms(60_001)),
            "another publisher may have served until just now"
        );

        let mut service = serving();
        let query = service.poll(Connectivity::Connected, ms(60_000)).unwrap();
        service.on_same_history(query.nonce, Standing::Serving, ms(60_001));
        assert_eq!(service.exclusive_since(), None, "the other publisher served without a break");

        let mut service = serving();
        for tenth in 1..300 {
            service.poll(Connectivity::Disconnected, ms(tenth * 100));
        }
        let query = service.poll(Connectivity::Connected, ms(30_000)).unwrap();
        service.on_no_responders(query.nonce, ms(30_001));
        assert_eq!(service.exclusive_since(), None, "it was only cut off");
    }

    #[test]
    fn lone_newcomer_to_a_shared_store_waits_for_an_incarnation() {
        let mut service = Service::new(BOUND, true, 1, ms(0));
        service.on_incarnation_begun();
        let query = service.poll(Connectivity::Connected, ms(0)).unwrap();
        service.on_no_responders(query.nonce, ms(1));
        assert!(service.wants_incarnation() && !service.may_vouch(ms(1)));
        service.on_incarnation_begun();
        assert!(!service.wants_incarnation() && service.may_vouch(ms(1)));

        service.mark_absent();
        let query = service.poll(Connectivity::Connected, ms(100)).unwrap();
        service.on_same_history(query.nonce, Standing::Serving, ms(101));
        assert!(service.may_vouch(ms(101)), "the other publisher's incarnation goes on");
    }

    #[test]
    fn exclusivity_counts_from_before_the_incarnation() {
        let mut service = Service::new(BOUND, true, 1, ms(0));
        let query = service.poll(Connectivity::Connected, ms(60_000)).unwrap();
        service.on_no_responders(query.nonce, ms(60_001));
        for tenth in 1..30 {
            service.poll(Connectivity::Disconnected, ms(60_000 + tenth * 100));
        }
        assert!(!service.may_vouch(ms(62_900)) && service.may_finalize(ms(62_900)));
        assert_eq!(service.exclusive_since(), Some(ms(60_001)), "the bound counts from there");
    }

    #[test]
    fn rival_that_answers_late_keeps_a_lone_newcomer_silent() {
        let mut service = Service::new(BOUND, true, 1, ms(0));
        let query = service.poll(Connectivity::Connected, ms(0)).unwrap();
        service.on_no_responders(query.nonce, ms(1));
        service.on_rival(query.nonce, rival(Standing::Serving), ms(2));
        service.on_incarnation_begun();
        assert_eq!(service.standing(), Standing::Yielding);
    }

    #[test]
    fn lone_newcomer_serves_at_once() {
        let mut service = newcomer();
        assert!(!service.may_vouch(ms(0)));
        let query = service.poll(Connectivity::Connected, ms(0)).unwrap();
        service.on_no_responders(query.nonce, ms(0));
        assert!(service.may_vouch(ms(1)));
    }

    #[test]
    fn newcomer_serves_when_only_frozen_publishers_are_there() {
        let mut service = newcomer();
        service.poll(Connectivity::Connected, ms(0)).unwrap();
        for at in [900, 1_800, 2_700] {
            assert_eq!(service.poll(Connectivity::Connected, ms(at)), None);
            assert!(!service.may_vouch(ms(at)));
        }
        service.poll(Connectivity::Connected, ms(3_000));
        assert!(service.may_vouch(ms(3_000)));
    }

    #[test]
    fn disconnected_newcomer_queries_once_connected() {
        let mut service = newcomer();
        for at in [0, 1_000, 5_000] {
            assert_eq!(service.poll(Connectivity::Disconnected, ms(at)), None);
        }
        assert!(service.poll(Connectivity::Connected, ms(6_000)).is_some());
        assert_eq!(service.standing(), Standing::Asking);
    }

    #[test]
    fn serving_publisher_of_the_same_history_ends_the_wait() {
        let mut service = newcomer();
        let query = service.poll(Connectivity::Connected, ms(0)).unwrap();
        service.on_same_history(query.nonce, Standing::Asking, ms(5));
        assert_eq!(service.standing(), Standing::Asking);
        service.on_same_history(query.nonce, Standing::Serving, ms(5));
        assert_eq!(service.standing(), Standing::Serving);
    }

    #[test]
    fn serving_publisher_names_the_rival_that_yields_to_it() {
        let mut service = serving();
        let query = service.on_foreign(ms(1_000)).unwrap();
        service.on_rival(query.nonce, rival(Standing::Yielding), ms(1_010));
        assert_eq!(service.standing(), Standing::Serving);
        assert_eq!(service.silent_rival(ms(31_009)), Some(&rival(Standing::Yielding)));
        assert_eq!(service.silent_rival(ms(31_010)), None, "it hasn't answered for a bound");
    }

    #[test]
    fn yielding_counts_once_the_rival_has_answered_for_a_bound() {
        let mut service = newcomer();
        let mut query = service.poll(Connectivity::Connected, ms(0)).unwrap();
        for at in (0..30_000).step_by(1_000) {
            service.on_rival(query.nonce, rival(Standing::Serving), ms(at));
            assert_eq!(service.yielded_to(), None);
            query = service.poll(Connectivity::Connected, ms(at + 1_000)).unwrap();
        }
        service.on_rival(query.nonce, rival(Standing::Serving), ms(30_000));
        assert_eq!(service.yielded_to(), Some(&rival(Standing::Serving)));
        service.poll(Connectivity::Connected, ms(60_000));
        assert_eq!(service.yielded_to(), None, "it queries again");
    }

    #[test]
    fn newcomer_yields_until_its_rival_is_gone_for_a_bound() {
        let mut service = newcomer();
        let query = service.poll(Connectivity::Connected, ms(0)).unwrap();
        service.on_rival(query.nonce, rival(Standing::Serving), ms(10));
        assert_eq!(service.standing(), Standing::Yielding);
        let again = service.poll(Connectivity::Connected, ms(1_000)).unwrap();
        assert_eq!(again.standing, Standing::Yielding);
        service.on_rival(again.nonce, rival(Standing::Serving), ms(1_010));
        assert_eq!(service.yielded_to(), None, "it answered for a second, as during a fail-over");
        for at in (2_000..31_000).step_by(1_000) {
            assert!(service.poll(Connectivity::Connected, ms(at)).is_some());
            assert_eq!(service.standing(), Standing::Yielding);
        }
        let last = service.poll(Connectivity::Connected, ms(31_010)).unwrap();
        assert_eq!(last.standing, Standing::Asking);
        service.on_no_responders(last.nonce, ms(31_010));
        assert_eq!(service.standing(), Standing::Serving);
    }

    /// Failure: of two newcomers, the one that gets its answer second yields. The other one takes
    /// it for gone, and serves a bound later, so chance has decided which store is followed.
    #[test]
    fn newcomers_that_meet_both_fall_silent() {
        for standing in [Standing::Asking, Standing::Conflicting] {
            let mut service = newcomer();
            let query = service.poll(Connectivity::Connected, ms(0)).unwrap();
            service.on_rival(query.nonce, rival(standing), ms(10));
            assert_eq!(service.standing(), Standing::Conflicting);
        }
    }

    #[test]
    fn serving_rivals_both_fall_silent() {
        let mut service = serving();
        let query = service.on_foreign(ms(1_500)).unwrap();
        assert!(service.may_vouch(ms(1_500)), "a message alone does nothing");
        service.on_rival(query.nonce, rival(Standing::Serving), ms(1_510));
        assert_eq!(service.standing(), Standing::Conflicting);
        assert_eq!(service.rival(), Some(&rival(Standing::Serving)));
    }

    /// The rival that queries is the newcomer, and yields.
    #[test]
    fn silent_rivals_and_newcomers_do_not_stop_a_publisher() {
        for standing in [Standing::Yielding, Standing::Behind, Standing::Asking] {
            let mut service = serving();
            let query = service.on_foreign(ms(1_500)).unwrap();
            service.on_rival(query.nonce, rival(standing), ms(1_510));
            assert_eq!(service.standing(), Standing::Serving);
        }
    }

    #[test]
    fn answers_to_unknown_queries_are_ignored() {
        let mut service = serving();
        let query = service.on_foreign(ms(1_500)).unwrap();
        service.on_rival(query.nonce.wrapping_add(7), rival(Standing::Serving), ms(1_510));
        assert_eq!(service.standing(), Standing::Serving);
    }

    #[test]
    fn publisher_that_was_frozen_queries_before_it_serves() {
        let mut service = serving();
        assert!(!service.may_vouch(ms(2_000)), "before it has noticed");
        assert!(service.poll(Connectivity::Connected, ms(2_000)).is_some());
        assert_eq!(service.standing(), Standing::Asking);
    }

    /// Failure: a newcomer freezes right after its query, and takes the answers that it hasn't read
    /// for silence.
    #[test]
    fn newcomer_frozen_during_its_query_sends_another() {
        let mut service = newcomer();
        let first = service.poll(Connectivity::Connected, ms(0)).unwrap();
        let second = service.poll(Connectivity::Connected, ms(3_500)).unwrap();
        assert_ne!(first.nonce, second.nonce);
        assert_eq!(service.standing(), Standing::Asking);
        service.on_rival(second.nonce, rival(Standing::Serving), ms(3_510));
        assert_eq!(service.standing(), Standing::Yielding);
    }

    #[test]
    fn publisher_that_was_cut_off_queries_before_it_serves() {
        let mut service = serving();
        service.mark_absent();
        assert_eq!(service.standing(), Standing::Asking);
        assert!(service.poll(Connectivity::Connected, ms(100)).is_some());
    }

    #[test]
    fn older_copy_stays_silent_until_its_past_is_resolved() {
        let mut service = serving();
        let provenance = Provenance { store: StoreId(1), incarnation: Incarnation(9) };
        let seen = Milestone { provenance, at: LogPosition::ZERO, token: LogToken(0) };
        service.on_unknown_past(seen);
        service.mark_absent();
        assert_eq!(service.poll(Connectivity::Connected, ms(90_000)), None);
        assert_eq!(service.unknown_past(), Some(&seen));
        service.on_past_resolved();
        assert!(service.poll(Connectivity::Connected, ms(90_000)).is_some());
    }
}
