//! The store's history as it was read last: what goes on messages, and how an agent's past is judged (R15, R16).

use std::collections::BTreeMap;
use std::sync::Arc;

use evictd_core::history::{BeginCause, Claim, History, LogToken, Mac, Milestone, Past, Provenance, Voucher};
use evictd_core::position::LogPosition;
use evictd_core::service::Peer;
use evictd_store::history::VoucherKey;
use evictd_store::log::Head;
use evictd_store::{LogStore, StoreError};
use hmac::digest::Key;
use hmac::{Hmac, KeyInit as _, Mac as _};
use parking_lot::Mutex;
use sha2::Sha256;

/// Tokens of the log that are kept in memory: most agents' pasts lie close to the head.
const TOKENS_KEPT_MAX: usize = 4096;

/// Shared by all parts that vouch for the store.
#[derive(Debug)]
pub(crate) struct HomeHistory {
    store: Arc<dyn LogStore>,
    codes: VoucherCodes,
    cached: Mutex<CachedHistory>,
}

#[derive(Debug)]
struct CachedHistory {
    history: Arc<History>,
    head: Head,
    tokens: BTreeMap<LogPosition, LogToken>,
    /// The last voucher of an incarnation that has ended.
    ended: Option<Voucher>,
}

impl HomeHistory {
    pub(crate) async fn read(store: Arc<dyn LogStore>) -> Result<Self, StoreError> {
        let codes = VoucherCodes::new(&store.voucher_key().await?);
        let head = store.head().await?;
        let history = Arc::new(store.history().await?);
        let cached = Mutex::new(CachedHistory { history, head, tokens: BTreeMap::new(), ended: None });
        Ok(Self { store, codes, cached })
    }

    pub(crate) fn history(&self) -> Arc<History> {
        self.cached.lock().history.clone()
    }

    /// Returns the last head that was noted.
    pub(crate) fn head(&self) -> Head {
        self.cached.lock().head
    }

    /// Notes the log's head. Reads the history again if another incarnation has begun.
    pub(crate) async fn note(&self, head: &Head) -> Result<(), StoreError> {
        if self.cached.lock().note(head) {
            return Ok(());
        }
        let history = Arc::new(self.store.history().await?);
        let mut cached = self.cached.lock();
        if cached.head.incarnation != head.incarnation {
            let Head { at, incarnation, token, .. } = cached.head;
            let provenance = Provenance { store: cached.history.store(), incarnation };
            cached.ended = Some(self.codes.vouch(Milestone { provenance, at, token }));
        }
        cached.history = history;
        cached.head = *head;
        cached.note(head);
        Ok(())
    }

    /// Reads head and history again: another publisher may have begun an incarnation.
    pub(crate) async fn reread(&self) -> Result<(), StoreError> {
        self.note(&self.store.head().await?).await
    }

    /// Begins an incarnation, because no other publisher serves the store.
    pub(crate) async fn begin_incarnation(&self) -> Result<(), StoreError> {
        self.note(&self.store.begin_incarnation(BeginCause::Opened, None).await?).await
    }

    /// Records that agents follow `rival` instead: no epoch of this store replaces their past any longer.
    pub(crate) async fn note_yielding(&self, rival: &Peer) -> Result<(), StoreError> {
        let Peer { publisher, provenance, .. } = rival;
        let evidence = format!("store {}, publisher {publisher}", provenance.store);
        self.note(&self.store.begin_incarnation(BeginCause::Yielded, Some(&evidence)).await?).await
    }

    /// Returns the last voucher of the incarnation that has ended since the last call, to be sent to agents.
    pub(crate) fn take_ended(&self) -> Option<Voucher> {
        self.cached.lock().ended.take()
    }

    /// Returns the voucher of `at`, which the transaction that led to `head` has given out.
    pub(crate) fn voucher(&self, head: &Head, at: LogPosition) -> Voucher {
        let store = self.cached.lock().history.store();
        let provenance = Provenance { store, incarnation: head.incarnation };
        self.codes.vouch(Milestone { provenance, at, token: head.token })
    }

    /// Returns whether this store, or a copy of it, has given out a voucher.
    pub(crate) fn is_authentic(&self, voucher: &Voucher) -> bool {
        self.codes.are_over(voucher)
    }

    /// Judges what an agent claims to have seen when the log ends at `head`.
    pub(crate) async fn judge(&self, seen: Option<&Voucher>, head: &Head) -> Result<Claim, StoreError> {
        // An agent that follows no history yet.
        let Some(seen) = seen else { return Ok(Claim::Admitted) };
        let (history, is_authentic, seen) = (self.history(), self.is_authentic(seen), &seen.milestone);
        // A forged claim causes no query.
        let looks = is_authentic && history.judge(seen, head.at) == Past::Known;
        let own = if looks { self.row_token(seen.at).await? } else { None };
        Ok(Claim::new(history.judge_row(seen, head.at, own), is_authentic))
    }

    /// Returns whether the store holds or supersedes by now what it lacked: the newer store was put back, or an operator
    /// has declared this one its successor. Reads the store.
    pub(crate) async fn is_settled(&self, awaited: &Milestone) -> Result<bool, StoreError> {
        let head = self.store.head().await?;
        self.note(&head).await?;
        let own = self.store.row_token(awaited.at).await?;
        Ok(self.history().judge_row(awaited, head.at, own) != Past::Unknown)
    }

    async fn row_token(&self, at: LogPosition) -> Result<Option<LogToken>, StoreError> {
        let cached = self.cached.lock().tokens.get(&at).copied();
        if cached.is_some() {
            return Ok(cached);
        }
        let own = self.store.row_token(at).await?;
        if let Some(own) = own {
            self.cached.lock().keep(at, own);
        }
        Ok(own)
    }
}

impl CachedHistory {
    /// Returns false if the history must be read again.
    fn note(&mut self, head: &Head) -> bool {
        if self.history.current().incarnation != head.incarnation {
            return false;
        }
        if self.head.at <= head.at || self.head.incarnation != head.incarnation {
            self.head = *head;
        } else {
            // The store may have been replaced by an older one, or this head is merely late.
            self.tokens.clear();
        }
        self.keep(head.at, head.token);
        true
    }

    fn keep(&mut self, at: LogPosition, token: LogToken) {
        self.tokens.insert(at, token);
        if self.tokens.len() > TOKENS_KEPT_MAX {
            self.tokens.pop_first();
        }
    }
}

/// The store's own code over milestones (R16).
#[derive(Debug)]
struct VoucherCodes(Hmac<Sha256>);

impl VoucherCodes {
    fn new(key: &VoucherKey) -> Self {
        // A block, as HMAC pads a shorter key.
        let mut block = Key::<Hmac<Sha256>>::default();
        block[..key.0.len()].copy_from_slice(&key.0);
        Self(Hmac::new(&block))
    }

    fn vouch(&self, milestone: Milestone) -> Voucher {
        Voucher { milestone, mac: self.over(&milestone) }
    }

    fn over(&self, milestone: &Milestone) -> Mac {
        let full = self.state(milestone).finalize().into_bytes();
        std::array::from_fn(|index| full[index])
    }

    fn are_over(&self, voucher: &Voucher) -> bool {
        self.state(&voucher.milestone).verify_truncated_left(&voucher.mac).is_ok()
    }

    fn state(&self, milestone: &Milestone) -> Hmac<Sha256> {
        let Milestone { provenance, at, token } = milestone;
        let mut state = self.0.clone();
        state.update(&provenance.store.0.to_be_bytes());
        state.update(&provenance.incarnation.0.to_be_bytes());
        state.update(&at.epoch().to_be_bytes());
        state.update(&at.position().to_be_bytes());
        state.update(&token.0.to_be_bytes());
        state
    }
}

#[cfg(test)]
mod tests {
    use evictd_core::history::{Incarnation, StoreId};

    use super::*;

    fn milestone() -> Milestone {
        let provenance = Provenance { store: StoreId(1), incarnation: Incarnation(2) };
        Milestone { provenance, at: LogPosition::new(3, 4).unwrap(), token: LogToken(5) }
    }

    fn codes(key: u8) -> VoucherCodes {
        VoucherCodes::new(&VoucherKey([key; 32]))
    }

    #[test]
    fn voucher_of_the_same_key_is_recognized() {
        assert!(codes(1).are_over(&codes(1).vouch(milestone())));
        assert!(!codes(2).are_over(&codes(1).vouch(milestone())));
    }

    #[test]
    fn code_covers_every_part_of_the_milestone() {
        let voucher = codes(1).vouch(milestone());
        let changes: [fn(&mut Milestone); 5] = [
            |milestone| milestone.provenance.store = StoreId(9),
            |milestone| milestone.provenance.incarnation = Incarnation(9),
            |milestone| milestone.at = LogPosition::new(4, 4).unwrap(),
            |milestone| milestone.at = LogPosition::new(3, 5).unwrap(),
            |milestone| milestone.token = LogToken(9),
        ];
        for change in changes {
            let mut forged = voucher;
            change(&mut forged.milestone);
            assert!(!codes(1).are_over(&forged), "{forged:?}");
        }
    }
}
