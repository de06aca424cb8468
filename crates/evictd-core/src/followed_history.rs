//! Which history an agent follows (R15).
//!
//! Two copies of a store may publish on one bus. An agent keeps to its history while that one is
//! alive. It changes to another one only by the answer to a probe of its own: a publisher answers
//! only if its store has the past that the probe proves, or if an operator declared that the store
//! supersedes that past.

use std::time::Duration;

use crate::history::{Provenance, StoreId, Voucher};
use crate::lease::Bound;
use crate::protection::Protection;
use crate::time::LeaseTime;

/// After so long without a message, an agent takes its history for over. Publishers send one every
/// second.
const SILENCE_MAX: Duration = Duration::from_secs(2);

/// What a message of the live feed means for an agent.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FeedSource {
    /// It is of the history that the agent follows.
    Own,
    /// Ignored: the agent follows another history, which is alive.
    Rival,
    /// Ignored, but the agent's own history is silent, or it follows none yet: the answer to a
    /// probe may change that.
    Candidate,
    /// Ignored: the agent's configuration names another store.
    Excluded,
}

/// What the answer to a probe means for an agent.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum AnswerSource {
    /// It is of the history that the agent follows.
    Own,
    /// The agent follows none yet.
    First,
    /// The agent's own history is over, and the answer is of one that includes or supersedes it.
    Successor,
    /// Ignored.
    Rival,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct Own {
    /// The furthest that was received of it: what a probe proves.
    voucher: Voucher,
    voucher_at: LeaseTime,
    /// The furthest that was received as an answer to a probe.
    confirmed: Voucher,
    /// When the last message of it arrived that wasn't old; the clock's start if a publisher
    /// announced its end.
    received_at: LeaseTime,
}

impl Own {
    fn is_of_epoch(&self, voucher: &Voucher) -> bool {
        voucher.milestone.at.epoch() == self.voucher.milestone.at.epoch()
    }
}

/// The history that one agent follows.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct FollowedHistory {
    /// The only store that may be followed, if one is configured.
    pinned: Option<StoreId>,
    silence: Duration,
    own: Option<Own>,
}

impl FollowedHistory {
    /// Follows no history yet, and never one of another store than `pinned`.
    pub fn new(bound: Bound, pinned: Option<StoreId>) -> Self {
        Self { pinned, silence: SILENCE_MAX.min(bound.bound() / 4), own: None }
    }

    pub fn provenance(&self) -> Option<Provenance> {
        self.own.map(|own| own.voucher.milestone.provenance)
    }

    /// What a probe proves to have seen (R16).
    pub fn voucher(&self) -> Option<Voucher> {
        self.own.map(|own| own.voucher)
    }

    /// The same, as far as an answer confirmed it: it can't be forged.
    pub fn confirmed(&self) -> Option<Voucher> {
        self.own.map(|own| own.confirmed)
    }

    /// Whether messages of `provenance` count. An agent that follows no history yet accepts any: it
    /// caches nothing, and no publisher vouches for it.
    pub fn follows(&self, provenance: Provenance) -> bool {
        let follows = self.provenance().is_none_or(|own| own == provenance) && !self.is_excluded(provenance);
        follows || !Protection::ForeignHistoriesMoveNothing.holds()
    }

    /// Takes in a message of the live feed.
    pub fn on_feed(&mut self, voucher: &Voucher, now: LeaseTime) -> FeedSource {
        let provenance = voucher.milestone.provenance;
        if self.is_excluded(provenance) {
            FeedSource::Excluded
        } else if self.own.is_some() && self.follows(provenance) {
            // An epoch belongs to one incarnation.
            if self.own.is_some_and(|own| !own.is_of_epoch(voucher))
                && Protection::OlderEpochsMoveNothing.holds()
            {
                return FeedSource::Rival;
            }
            self.receive(voucher, now);
            FeedSource::Own
        } else if self.is_alive(now) {
            FeedSource::Rival
        } else {
            FeedSource::Candidate
        }
    }

    /// Takes in the answer to a probe. On [`AnswerSource::First`] and [`AnswerSource::Successor`]
    /// the caller checks the answer, and then calls [`FollowedHistory::follow`].
    pub fn on_answer(&mut self, voucher: &Voucher, now: LeaseTime) -> AnswerSource {
        let provenance = voucher.milestone.provenance;
        if self.is_excluded(provenance) {
            return AnswerSource::Rival;
        }
        match self.provenance() {
            None => AnswerSource::First,
            Some(own) if own == provenance => {
                self.receive(voucher, now);
                self.confirm(voucher, now);
                AnswerSource::Own
            }
            Some(_) if self.is_alive(now) && Protection::OwnHistoryComesFirst.holds() => AnswerSource::Rival,
            Some(_) => AnswerSource::Successor,
        }
    }

    pub fn follow(&mut self, voucher: Voucher, now: LeaseTime) {
        self.own = Some(Own { voucher, voucher_at: now, confirmed: voucher, received_at: now });
    }

    /// Goes back to the answer to a probe that was sent at `sent_at`, if the live feed claimed more
    /// before that: every position that existed then is at or below the answer. Returns whether it
    /// did.
    pub fn retract(&mut self, answer: &Voucher, sent_at: LeaseTime) -> bool {
        let Some(own) = &mut self.own else { return false };
        let is_forged = own.voucher.milestone.at > answer.milestone.at && own.voucher_at < sent_at;
        if is_forged {
            own.voucher = *answer;
        }
        is_forged
    }

    /// A publisher announced that this incarnation ended: the next one may follow at once. Returns
    /// whether that is new.
    pub fn on_end(&mut self, provenance: Provenance) -> bool {
        let own = self.own.as_mut().filter(|own| own.voucher.milestone.provenance == provenance);
        own.is_some_and(|own| std::mem::take(&mut own.received_at) != LeaseTime::default())
    }

    /// Makes values that behave alike equal, for model checking: how long the own history has been
    /// silent doesn't matter once it counts as over.
    #[cfg(any(test, feature = "fork"))]
    #[must_use]
    pub(crate) fn rebased(mut self, now: LeaseTime) -> Self {
        let is_alive = self.is_alive(now);
        if let Some(own) = self.own.as_mut().filter(|_| !is_alive) {
            own.received_at = LeaseTime::default();
        }
        self
    }

    fn receive(&mut self, voucher: &Voucher, now: LeaseTime) {
        let Some(own) = &mut self.own else { return };
        let is_own =
            own.is_of_epoch(voucher) && voucher.milestone.provenance == own.voucher.milestone.provenance;
        // A lower position may have been delayed for long: it doesn't show that the history is
        // alive.
        if !is_own || voucher.milestone.at < own.voucher.milestone.at {
            return;
        }
        own.received_at = own.received_at.max(now);
        if voucher.milestone.at > own.voucher.milestone.at {
            (own.voucher, own.voucher_at) = (*voucher, now);
        }
    }

    fn confirm(&mut self, voucher: &Voucher, now: LeaseTime) {
        let Some(own) = &mut self.own else { return };
        own.received_at = own.received_at.max(now);
        if own.is_of_epoch(voucher) && voucher.milestone.at > own.confirmed.milestone.at {
            own.confirmed = *voucher;
        }
    }

    fn is_excluded(&self, provenance: Provenance) -> bool {
        self.pinned.is_some_and(|pinned| pinned != provenance.store)
    }

    fn is_alive(&self, now: LeaseTime) -> bool {
        self.own.is_some_and(|own| now.since(own.received_at) < self.silence)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::history::{Incarnation, LogToken, Milestone};
    use crate::position::LogPosition;

    fn ms(ms: u64) -> LeaseTime {
        LeaseTime(1_000_000_000 + ms * 1_000)
    }

    fn voucher(store: u64, incarnation: u64, position: u64) -> Voucher {
        let provenance = Provenance { store: StoreId(store), incarnation: Incarnation(incarnation) };
        let at = LogPosition::new(1, position).unwrap();
        Voucher { milestone: Milestone { provenance, at, token: LogToken(position) }, mac: [0; 16] }
    }

    fn followed_history(pinned: Option<StoreId>) -> FollowedHistory {
        let bound = Bound::new(Duration::from_secs(30), Duration::from_secs(3)).unwrap();
        FollowedHistory::new(bound, pinned)
    }

    fn follower_of_1() -> FollowedHistory {
        let mut followed_history = followed_history(None);
        assert_eq!(followed_history.on_feed(&voucher(1, 1, 5), ms(0)), FeedSource::Candidate);
        assert_eq!(followed_history.on_answer(&voucher(1, 1, 5), ms(0)), AnswerSource::First);
        followed_history.follow(voucher(1, 1, 5), ms(0));
        followed_history
    }

    #[test]
    fn rival_is_ignored_while_the_own_history_is_alive() {
        let mut followed_history = follower_of_1();
        assert_eq!(followed_history.on_feed(&voucher(1, 2, 9), ms(1_900)), FeedSource::Rival);
        assert_eq!(followed_history.on_answer(&voucher(1, 2, 9), ms(1_900)), AnswerSource::Rival);
        assert_eq!(followed_history.on_feed(&voucher(1, 1, 6), ms(1_950)), FeedSource::Own);
        assert_eq!(followed_history.on_answer(&voucher(1, 2, 9), ms(3_900)), AnswerSource::Rival);
        assert_eq!(followed_history.voucher(), Some(voucher(1, 1, 6)));
    }

    #[test]
    fn successor_takes_over_once_the_own_history_is_silent() {
        let mut followed_history = follower_of_1();
        assert_eq!(followed_history.on_feed(&voucher(1, 2, 9), ms(2_000)), FeedSource::Candidate);
        assert_eq!(followed_history.on_answer(&voucher(1, 2, 9), ms(2_000)), AnswerSource::Successor);
        assert!(
            followed_history.follows(voucher(1, 1, 5).milestone.provenance),
            "until the caller follows the successor"
        );
        followed_history.follow(voucher(1, 2, 9), ms(2_000));
        assert!(!followed_history.follows(voucher(1, 1, 5).milestone.provenance));
    }

    /// Failure: delayed messages of a publisher that is gone arrive one after another, and no
    /// successor is ever followed.
    #[test]
    fn late_messages_do_not_keep_a_history_alive() {
        let mut followed_history = follower_of_1();
        for late in [500, 1_000, 1_500, 2_000] {
            assert_eq!(followed_history.on_feed(&voucher(1, 1, 4), ms(late)), FeedSource::Own);
        }
        assert_eq!(followed_history.on_answer(&voucher(1, 2, 9), ms(2_000)), AnswerSource::Successor);
        // An idle publisher repeats its head.
        assert_eq!(followed_history.on_feed(&voucher(1, 1, 5), ms(2_100)), FeedSource::Own);
        assert_eq!(followed_history.on_answer(&voucher(1, 2, 9), ms(3_900)), AnswerSource::Rival);
    }

    #[test]
    fn successor_of_an_ended_history_is_followed_at_once() {
        let mut followed_history = follower_of_1();
        followed_history.on_end(voucher(1, 2, 0).milestone.provenance);
        assert_eq!(followed_history.on_answer(&voucher(1, 2, 9), ms(1)), AnswerSource::Rival);
        followed_history.on_end(voucher(1, 1, 0).milestone.provenance);
        assert_eq!(followed_history.on_answer(&voucher(1, 2, 9), ms(1)), AnswerSource::Successor);
    }

    #[test]
    fn pinned_agent_follows_its_store_alone() {
        let mut followed_history = followed_history(Some(StoreId(7)));
        assert_eq!(followed_history.on_feed(&voucher(1, 1, 5), ms(0)), FeedSource::Excluded);
        assert_eq!(followed_history.on_answer(&voucher(1, 1, 5), ms(0)), AnswerSource::Rival);
        assert_eq!(followed_history.on_answer(&voucher(7, 1, 5), ms(0)), AnswerSource::First);
    }

    #[test]
    fn incarnation_keeps_its_epoch() {
        let mut followed_history = follower_of_1();
        let mut forged = voucher(1, 1, 0);
        forged.milestone.at = LogPosition::new(2, 0).unwrap();
        assert_eq!(followed_history.on_feed(&forged, ms(1)), FeedSource::Rival);
        assert_eq!(followed_history.voucher(), Some(voucher(1, 1, 5)));
    }

    #[test]
    fn answer_to_a_later_probe_corrects_the_live_feed() {
        let mut followed_history = follower_of_1();
        followed_history.on_feed(&voucher(1, 1, 900), ms(10));
        assert!(!followed_history.retract(&voucher(1, 1, 6), ms(10)), "it may be from after the probe");
        assert!(followed_history.retract(&voucher(1, 1, 6), ms(11)));
        assert_eq!(followed_history.voucher(), Some(voucher(1, 1, 6)));
    }

    #[test]
    fn voucher_is_the_furthest_received() {
        let mut followed_history = follower_of_1();
        followed_history.on_feed(&voucher(1, 1, 9), ms(1));
        followed_history.on_feed(&voucher(1, 1, 7), ms(2));
        assert_eq!(followed_history.voucher(), Some(voucher(1, 1, 9)));
    }
}
