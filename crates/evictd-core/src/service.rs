//! Whether a publisher may vouch for its store: newcomers ask first, and rivals that meet fall silent (R15).
//!
//! Publishers of one history are colleagues, and share the work. Publishers of two histories are rivals: one of
//! them works on a copy, and neither can know which. Who has served without a break goes on, a newcomer yields to
//! it, and two that both served, or that came together, both fall silent: to undo deletions is an operator's
//! decision, never a guess.
//!
//! A rival counts as alive only by its answer to a question of our own, which it gives after a durable round: so a
//! message that was long under way does nothing, and neither does the publisher of a primary that was demoted.

use std::collections::VecDeque;
use std::time::Duration;

use crate::history::{Milestone, Provenance};
use crate::protection::Protection;
use crate::time::{LeaseTime, StoreTime};

/// Whoever was not present for so long is a newcomer: it may have been replaced meanwhile.
pub const ABSENT_AFTER: Duration = Duration::from_secs(2);

/// How long a question to all publishers waits for answers, if there is anybody to answer. Others do a round before
/// they answer.
pub const ANSWER_PATIENCE: Duration = Duration::from_secs(3);

/// The pause between questions to a rival.
const QUERY_SPACING: Duration = Duration::from_secs(1);

/// Questions whose answers still count.
const QUERIES_OPEN_MAX: usize = 4;

/// Another publisher, as it describes itself.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Peer {
    /// Its name, for people.
    pub publisher: Box<str>,
    /// Whom it speaks for.
    pub provenance: Provenance,
    /// When its incarnation began, on its store's clock.
    pub since: StoreTime,
    /// How it stands.
    pub standing: Standing,
}

/// How a publisher stands.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Standing {
    /// It was away, and asks who else is there.
    Asking,
    /// It vouches for its store.
    Serving,
    /// It is silent: a publisher of another history serves.
    Yielding,
    /// It is silent: a publisher of another history served as well, or came at the same time.
    Conflicting,
    /// It is silent: agents have seen what its store doesn't know, so that it is an older copy.
    Behind,
}

impl Standing {
    /// All, for metrics.
    pub const ALL: [Self; 5] = [Self::Asking, Self::Serving, Self::Yielding, Self::Conflicting, Self::Behind];

    /// The metric label.
    pub fn label(self) -> &'static str {
        match self {
            Self::Asking => "asking",
            Self::Serving => "serving",
            Self::Yielding => "yielding",
            Self::Conflicting => "conflicting",
            Self::Behind => "behind",
        }
    }

    /// Whether a rival that stands so must be waited for. One that yields, or that knows itself to be an older
    /// copy, vouches for nothing.
    fn is_alive(self) -> bool {
        matches!(self, Self::Asking | Self::Serving | Self::Conflicting)
    }
}

/// What a publisher can do at the moment.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Connectivity {
    /// It is connected to the bus, and its rounds succeed.
    Connected,
    /// It has no connection to the bus, as far as it knows.
    Disconnected,
    /// Its rounds don't succeed.
    Stalled,
}

/// A question to all publishers; also says how the asking one stands.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Query {
    /// To be repeated by the answers.
    pub nonce: u64,
    /// How the requester stands.
    pub standing: Standing,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
enum ServiceState {
    Asking {
        since: Option<LeaseTime>,
    },
    /// Nobody serves this store, nor another one that answers.
    Alone,
    Serving,
    Silent {
        rival: Peer,
        answered_at: LeaseTime,
        conflict: bool,
    },
    Behind {
        seen: Milestone,
    },
}

/// Whether another history may have been served beside or instead of this one.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Exclusivity {
    /// Not known: the publisher has just started, its rounds have failed, or the bus was silent when it asked.
    Unverified,
    /// No: the bus has carried a question, which was answered, and nothing was missed or received since.
    Verified,
    /// Perhaps: the publisher stood still, or has received another history.
    Doubtful,
}

/// The standing of one publisher, and what it has to ask.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Service {
    bound: Duration,
    /// Others may share the store, so that starting a publisher begins no incarnation.
    is_shared: bool,
    state: ServiceState,
    present_at: LeaseTime,
    polled_at: LeaseTime,
    connectivity: Connectivity,
    exclusivity: Exclusivity,
    /// When the watch was lost last and no other history was served any more.
    exclusive_since: Option<LeaseTime>,
    /// The newest questions, oldest first, and when they were sent.
    queries: VecDeque<(u64, LeaseTime)>,
    next_nonce: u64,
}

impl Service {
    /// A newcomer to a store that others may share, or not. `nonce` seeds the numbers of its questions and should be
    /// random. A rival counts as gone when it didn't answer for `bound`.
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
            queries: VecDeque::new(),
            next_nonce: nonce.max(1),
        }
    }

    /// How this publisher stands.
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

    /// The past that this publisher's store doesn't know.
    pub fn unknown_past(&self) -> Option<&Milestone> {
        match &self.state {
            ServiceState::Behind { seen } => Some(seen),
            _ => None,
        }
    }

    /// Whether it may vouch at `now`: whoever stood still asks before it answers, also if nothing has told it yet.
    pub fn may_vouch(&self, now: LeaseTime) -> bool {
        self.state == ServiceState::Serving
            && (now.since(self.present_at) < ABSENT_AFTER || !Protection::NewcomersAsk.holds())
    }

    /// Whether receipts may become final at `now`: agents follow this store, or none. Also while it is cut off from the
    /// bus, or no outage of that would let them. But not when it has only just started, stood still or stalled, until it
    /// knows that no other took its place meanwhile (G4).
    pub fn may_finalize(&self, now: LeaseTime) -> bool {
        let is_cut_off =
            self.connectivity == Connectivity::Disconnected && now.since(self.polled_at) < ABSENT_AFTER;
        self.may_vouch(now)
            || self.exclusivity == Exclusivity::Verified && is_cut_off
            || !Protection::SilentPublishersHoldReceipts.holds()
    }

    /// When this publisher served again after another may have taken its place, if that ever happened. Agents may have
    /// leases of that other one for a bound from then on, and stand in its roster only.
    pub fn exclusive_since(&self) -> Option<LeaseTime> {
        self.exclusive_since
    }

    /// To be called several times in [`ABSENT_AFTER`]. Returns a question to send.
    pub fn poll(&mut self, connectivity: Connectivity, now: LeaseTime) -> Option<Query> {
        self.connectivity = connectivity;
        let stood_still = now.since(std::mem::replace(&mut self.polled_at, now)) >= ABSENT_AFTER;
        // Of one that asks, too: answers that came while it stood still may not have been looked at yet.
        if now.since(self.present_at) >= ABSENT_AFTER {
            match self.exclusivity {
                _ if stood_still => self.exclusivity = Exclusivity::Doubtful,
                // While its rounds fail, it still receives what others send.
                Exclusivity::Verified if connectivity == Connectivity::Stalled => {
                    self.exclusivity = Exclusivity::Unverified
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
                Some(self.ask(now))
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
                Some(self.ask(now))
            }
            ServiceState::Silent { .. } => self.ask_spaced(now),
            ServiceState::Alone | ServiceState::Serving | ServiceState::Behind { .. } => None,
        }
    }

    /// It was cut off, or stalled: it is a newcomer again if it served. One that is silent stays so.
    pub fn mark_absent(&mut self) {
        if matches!(self.state, ServiceState::Serving | ServiceState::Asking { .. } | ServiceState::Alone)
            && Protection::NewcomersAsk.holds()
        {
            self.state = ServiceState::Asking { since: None };
            // What they found out may not hold any more.
            self.queries.clear();
        }
    }

    /// Nobody else is there to answer the question with this number.
    pub fn on_no_responders(&mut self, nonce: u64, now: LeaseTime) {
        if self.is_open(nonce, now) && matches!(self.state, ServiceState::Asking { .. }) {
            if self.exclusivity == Exclusivity::Doubtful {
                self.exclusive_since = Some(now);
            }
            self.exclusivity = Exclusivity::Verified;
            self.serve_alone();
        }
    }

    /// Whether it serves as soon as an incarnation begins in its store. No colleague serves that, so it may be a physical
    /// copy, whose incarnation is that of the original: then rows of the one would count as rows of the other.
    pub fn wants_incarnation(&self) -> bool {
        self.state == ServiceState::Alone
    }

    /// An incarnation has begun, because this publisher wanted one.
    pub fn on_incarnation_begun(&mut self) {
        if self.state == ServiceState::Alone {
            self.state = ServiceState::Serving;
        }
    }

    /// A colleague's answer: one that serves has met no rival.
    pub fn on_same_history(&mut self, nonce: u64, standing: Standing, now: LeaseTime) {
        if self.is_open(nonce, now)
            && matches!(self.state, ServiceState::Asking { .. } | ServiceState::Alone)
            && standing == Standing::Serving
        {
            // That one has kept watch meanwhile.
            (self.state, self.exclusivity) = (ServiceState::Serving, Exclusivity::Verified);
        }
    }

    /// A rival's answer.
    pub fn on_rival(&mut self, nonce: u64, peer: Peer, now: LeaseTime) {
        if !self.is_open(nonce, now) || !peer.standing.is_alive() {
            return;
        }
        let conflict = match &self.state {
            ServiceState::Behind { .. } => return,
            // It was there first; but of two that come together neither was, and one may have noticed already.
            ServiceState::Asking { .. } | ServiceState::Alone => {
                matches!(peer.standing, Standing::Asking | Standing::Conflicting)
            }
            // It is the newcomer, and yields.
            ServiceState::Serving if peer.standing == Standing::Asking => return,
            ServiceState::Serving if !Protection::RivalsFallSilent.holds() => return,
            ServiceState::Serving => true,
            ServiceState::Silent { conflict, .. } => *conflict,
        };
        self.state = ServiceState::Silent { rival: peer, answered_at: now, conflict };
        self.exclusivity = Exclusivity::Doubtful;
    }

    /// Something came from another history: a tick, or a rival's question. It may be old; its publisher is asked.
    pub fn on_foreign(&mut self, now: LeaseTime) -> Option<Query> {
        match self.state {
            ServiceState::Serving => self.ask_spaced(now),
            ServiceState::Asking { .. } | ServiceState::Alone => {
                // It may be gone by the time that this one is answered.
                self.exclusivity = Exclusivity::Doubtful;
                None
            }
            ServiceState::Silent { .. } | ServiceState::Behind { .. } => None,
        }
    }

    /// An agent has proved a past that the store doesn't know.
    pub fn on_unknown_past(&mut self, seen: Milestone) {
        self.state = ServiceState::Behind { seen };
        self.exclusivity = Exclusivity::Doubtful;
    }

    /// The store knows that past now, or an operator has declared it superseded.
    pub fn on_past_resolved(&mut self) {
        if matches!(self.state, ServiceState::Behind { .. }) {
            self.state = ServiceState::Asking { since: None };
        }
    }

    /// The same at another reading of the clock, its questions numbered from 1: for checkers, to which services that
    /// behave alike have to be equal.
    #[cfg(feature = "fork")]
    #[must_use]
    pub fn rebased(mut self, now: LeaseTime, to: LeaseTime) -> Self {
        // Nothing depends on how much older than this anything is.
        let oldest = self.bound.max(ANSWER_PATIENCE);
        let rebase = |at: LeaseTime| to.before(now.since(at).min(oldest));
        self.present_at = rebase(self.present_at);
        self.polled_at = rebase(self.polled_at);
        // Of interest to receipts only.
        self.exclusive_since = None;
        let lasting = ANSWER_PATIENCE.max(QUERY_SPACING);
        self.queries.retain(|(_, at)| now.since(*at) < lasting);
        self.queries = (1..).zip(&self.queries).map(|(nonce, (_, at))| (nonce, rebase(*at))).collect();
        self.next_nonce = self.queries.len() as u64 + 1;
        match &mut self.state {
            ServiceState::Asking { since } => *since = since.map(rebase),
            ServiceState::Silent { answered_at, .. } => *answered_at = rebase(*answered_at),
            ServiceState::Alone | ServiceState::Serving | ServiceState::Behind { .. } => {}
        }
        self
    }

    /// The number of the newest question.
    #[cfg(feature = "fork")]
    pub fn newest_query(&self) -> Option<u64> {
        self.queries.back().map(|(nonce, _)| *nonce)
    }

    fn serve_alone(&mut self) {
        let begins = self.is_shared && Protection::LoneNewcomersBegin.holds();
        self.state = if begins { ServiceState::Alone } else { ServiceState::Serving };
    }

    fn ask_spaced(&mut self, now: LeaseTime) -> Option<Query> {
        let asked = self.queries.back().is_some_and(|(_, at)| now.since(*at) < QUERY_SPACING);
        (!asked).then(|| self.ask(now))
    }

    fn ask(&mut self, now: LeaseTime) -> Query {
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
    fn receipts_are_held_until_a_newcomer_has_asked() {
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
    fn receipts_end_during_a_cut_and_not_after_a_pause() {
        let mut service = serving();
        for tenth in 1..600 {
            service.poll(Connectivity::Disconnected, ms(tenth * 100));
            assert!(service.may_finalize(ms(tenth * 100)));
        }
        assert!(!service.may_finalize(ms(63_000)), "it stood still, and nothing has told it yet");
        service.poll(Connectivity::Disconnected, ms(63_000));
        assert!(!service.may_finalize(ms(63_000)));
        let query = service.poll(Connectivity::Connected, ms(63_100)).unwrap();
        assert!(!service.may_finalize(ms(63_100)));
        service.on_no_responders(query.nonce, ms(63_101));
        assert!(service.may_finalize(ms(63_101)));
    }

    #[test]
    fn receipts_end_when_a_cut_comes_back_before_the_answer() {
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
        assert!(!service.may_finalize(ms(3_200)), "agents have seen more");
    }

    #[test]
    fn receipts_are_held_while_rounds_fail() {
        let mut service = serving();
        for tenth in 1..30 {
            service.poll(Connectivity::Stalled, ms(tenth * 100));
        }
        assert!(!service.may_finalize(ms(2_900)), "a copy may have found nobody who answers");
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
        assert!(!service.may_finalize(ms(3_100)), "connected again, it asks first");
        service.on_rival(query.nonce, rival(Standing::Serving), ms(3_200));
        for second in 4..33 {
            service.poll(Connectivity::Connected, ms(second * 1_000));
            assert!(!service.may_finalize(ms(second * 1_000)));
        }
        for second in 33..90 {
            service.poll(Connectivity::Disconnected, ms(second * 1_000));
            assert!(
                !service.may_finalize(ms(second * 1_000)),
                "cut off, and nobody knows whether that is gone"
            );
        }
    }

    #[test]
    fn rival_that_is_received_while_rounds_fail_is_a_lost_watch() {
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
    fn silence_is_no_proof_that_the_bus_has_carried_the_question() {
        let mut service = serving();
        assert!(
            service.poll(Connectivity::Connected, ms(60_000)).is_some(),
            "it stood still, and its connection is dead"
        );
        service.poll(Connectivity::Connected, ms(61_500));
        service.poll(Connectivity::Connected, ms(63_000));
        assert!(service.may_vouch(ms(63_000)));
        service.poll(Connectivity::Disconnected, ms(64_000));
        service.poll(Connectivity::Disconnected, ms(65_500));
        assert!(!service.may_finalize(ms(65_500)), "now it knows that it is cut off");
    }

    #[test]
    fn watch_is_regained_when_nobody_answers_after_a_pause() {
        let mut service = serving();
        assert_eq!(service.exclusive_since(), None, "it has just started");
        let query = service.poll(Connectivity::Connected, ms(60_000)).unwrap();
        service.on_no_responders(query.nonce, ms(60_001));
        assert_eq!(
            service.exclusive_since(),
            Some(ms(60_001)),
            "another may have served, and ended just now"
        );

        let mut service = serving();
        let query = service.poll(Connectivity::Connected, ms(60_000)).unwrap();
        service.on_same_history(query.nonce, Standing::Serving, ms(60_001));
        assert_eq!(service.exclusive_since(), None, "a colleague has kept watch");

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
        assert!(service.may_vouch(ms(101)), "a colleague's incarnation goes on");
    }

    #[test]
    fn watch_is_regained_before_the_incarnation_begins() {
        let mut service = Service::new(BOUND, true, 1, ms(0));
        let query = service.poll(Connectivity::Connected, ms(60_000)).unwrap();
        service.on_no_responders(query.nonce, ms(60_001));
        for tenth in 1..30 {
            service.poll(Connectivity::Disconnected, ms(60_000 + tenth * 100));
        }
        assert!(!service.may_vouch(ms(62_900)) && service.may_finalize(ms(62_900)));
        assert_eq!(service.exclusive_since(), Some(ms(60_001)), "so the bound counts from there");
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
    fn newcomer_without_others_serves_at_once() {
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
    fn newcomer_that_is_not_connected_goes_on_asking() {
        let mut service = newcomer();
        for at in [0, 1_000, 5_000] {
            assert_eq!(service.poll(Connectivity::Disconnected, ms(at)), None);
        }
        assert!(service.poll(Connectivity::Connected, ms(6_000)).is_some());
        assert_eq!(service.standing(), Standing::Asking);
    }

    #[test]
    fn colleague_that_serves_ends_the_wait() {
        let mut service = newcomer();
        let query = service.poll(Connectivity::Connected, ms(0)).unwrap();
        service.on_same_history(query.nonce, Standing::Asking, ms(5));
        assert_eq!(service.standing(), Standing::Asking);
        service.on_same_history(query.nonce, Standing::Serving, ms(5));
        assert_eq!(service.standing(), Standing::Serving);
    }

    #[test]
    fn newcomer_yields_until_its_rival_has_been_gone_for_a_bound() {
        let mut service = newcomer();
        let query = service.poll(Connectivity::Connected, ms(0)).unwrap();
        service.on_rival(query.nonce, rival(Standing::Serving), ms(10));
        assert_eq!(service.standing(), Standing::Yielding);
        let again = service.poll(Connectivity::Connected, ms(1_000)).unwrap();
        assert_eq!(again.standing, Standing::Yielding);
        service.on_rival(again.nonce, rival(Standing::Serving), ms(1_010));
        for at in (2_000..31_000).step_by(1_000) {
            assert!(service.poll(Connectivity::Connected, ms(at)).is_some());
            assert_eq!(service.standing(), Standing::Yielding);
        }
        let last = service.poll(Connectivity::Connected, ms(31_010)).unwrap();
        assert_eq!(last.standing, Standing::Asking);
        service.on_no_responders(last.nonce, ms(31_010));
        assert_eq!(service.standing(), Standing::Serving);
    }

    /// Failure: of two that come together, the one that gets its answer second yields. The other takes that for gone, and
    /// serves a bound later, so that chance has decided which store is followed.
    #[test]
    fn two_that_come_together_both_fall_silent() {
        for standing in [Standing::Asking, Standing::Conflicting] {
            let mut service = newcomer();
            let query = service.poll(Connectivity::Connected, ms(0)).unwrap();
            service.on_rival(query.nonce, rival(standing), ms(10));
            assert_eq!(service.standing(), Standing::Conflicting);
        }
    }

    #[test]
    fn two_that_served_both_fall_silent() {
        let mut service = serving();
        let query = service.on_foreign(ms(1_500)).unwrap();
        assert!(service.may_vouch(ms(1_500)), "a message alone does nothing");
        service.on_rival(query.nonce, rival(Standing::Serving), ms(1_510));
        assert_eq!(service.standing(), Standing::Conflicting);
        assert_eq!(service.rival(), Some(&rival(Standing::Serving)));
    }

    /// Whoever asks is the newcomer, and yields to the one that serves.
    #[test]
    fn silent_rivals_and_newcomers_keep_nobody_from_serving() {
        for standing in [Standing::Yielding, Standing::Behind, Standing::Asking] {
            let mut service = serving();
            let query = service.on_foreign(ms(1_500)).unwrap();
            service.on_rival(query.nonce, rival(standing), ms(1_510));
            assert_eq!(service.standing(), Standing::Serving);
        }
    }

    #[test]
    fn old_answers_do_nothing() {
        let mut service = serving();
        let query = service.on_foreign(ms(1_500)).unwrap();
        service.on_rival(query.nonce.wrapping_add(7), rival(Standing::Serving), ms(1_510));
        assert_eq!(service.standing(), Standing::Serving);
    }

    #[test]
    fn publisher_that_stood_still_asks_before_it_answers() {
        let mut service = serving();
        assert!(!service.may_vouch(ms(2_000)), "before anything has told it");
        assert!(service.poll(Connectivity::Connected, ms(2_000)).is_some());
        assert_eq!(service.standing(), Standing::Asking);
    }

    /// Failure: a newcomer freezes right after its question, and takes the answers that it hasn't read for silence.
    #[test]
    fn newcomer_that_stood_still_while_it_asked_asks_again() {
        let mut service = newcomer();
        let first = service.poll(Connectivity::Connected, ms(0)).unwrap();
        let second = service.poll(Connectivity::Connected, ms(3_500)).unwrap();
        assert_ne!(first.nonce, second.nonce);
        assert_eq!(service.standing(), Standing::Asking);
        service.on_rival(second.nonce, rival(Standing::Serving), ms(3_510));
        assert_eq!(service.standing(), Standing::Yielding);
    }

    #[test]
    fn publisher_that_was_cut_off_asks_before_it_answers() {
        let mut service = serving();
        service.mark_absent();
        assert_eq!(service.standing(), Standing::Asking);
        assert!(service.poll(Connectivity::Connected, ms(100)).is_some());
    }

    #[test]
    fn older_copy_stays_silent_until_its_past_is_settled() {
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
