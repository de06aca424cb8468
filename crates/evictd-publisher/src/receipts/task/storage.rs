//! Final receipts are written to the store, and open requests are read from it.

use std::collections::HashSet;
use std::time::Duration;

use evictd_core::position::LogPosition;
use evictd_core::time::LeaseTime;
use evictd_store::StoreError;
use evictd_store::log::NumberedRequest;
use evictd_store::receipt::FinalReceipt;
use tokio::sync::oneshot;

use super::{Adoption, PAUSE, ReceiptsTask};
use crate::receipts::handle::change;
use crate::receipts::input::NewChanges;

/// How often the store is searched for open requests whose receipts aren't open here.
pub(in crate::receipts) const ADOPT_EVERY: Duration = Duration::from_secs(5);

/// Receipts stored in one transaction.
const BATCH: usize = 256;

/// Open requests read at once.
const PAGE: usize = 1_024;

impl ReceiptsTask {
    pub(super) fn store_receipts(&mut self, now: LeaseTime) {
        if self.state.store_due().is_some_and(|due| now >= due.max(self.work.store_paused_until)) {
            self.start_storing();
        }
    }

    /// Stores final receipts, unless some are being stored. They stay here until that has succeeded.
    pub(super) fn start_storing(&mut self) {
        if self.work.storing.is_some() {
            return;
        }
        let batch = self.state.batch(BATCH);
        let records: Vec<FinalReceipt> = batch.iter().filter_map(|receipt| receipt.to_record()).collect();
        self.work.storing = Some(batch);
        let store = self.store.clone();
        self.start(async move { store.record_receipts(&records).await }, Self::on_stored);
    }

    pub(super) fn on_stored(&mut self, stored: Result<HashSet<String>, StoreError>) {
        let (batch, now) = (self.work.storing.take().unwrap_or_default(), self.begin_step());
        match stored {
            Ok(settled_elsewhere) => self.state.on_stored(&batch, &settled_elsewhere),
            Err(error) => {
                self.shared.metrics.store_failed(&error);
                self.work.store_paused_until = now.after(PAUSE);
            }
        }
    }

    /// Takes over open requests of the store: all of them now and then, and those that a client waits for here as soon as
    /// another publisher has numbered rows. The others are that publisher's: keeping them twice is twice the work.
    pub(super) fn adopt(&mut self, now: LeaseTime) {
        let is_due = now >= self.work.adoption_due;
        if self.work.adoption.is_some() || !(is_due || std::mem::take(&mut self.work.numbered_elsewhere)) {
            return;
        }
        let head = self.shared.head.current();
        if is_due {
            self.work.adoption_due = now.after(ADOPT_EVERY);
        } else if !self.state.waiters.any_waits() {
            // A client that comes to wait later has a change that is numbered later.
            self.work.accounted = self.work.accounted.max(head);
            return;
        }
        self.work.adoption = Some(Adoption { only_awaited: !is_due, head });
        self.read_open_requests(if is_due { LogPosition::ZERO } else { self.work.accounted }, None);
    }

    /// Reads a page of open requests, once the receipts of the last page are open.
    pub(super) fn read_open_requests(&self, after: LogPosition, opened: Option<oneshot::Receiver<()>>) {
        let (store, head) = (self.store.clone(), self.shared.head.clone());
        let read = async move {
            if let Some(opened) = opened {
                opened.await.ok();
            }
            let epoch = head.current().epoch();
            store.open_requests(after, PAGE).await.map(|page| (epoch, page))
        };
        self.start(read, Self::on_open_requests);
    }

    pub(super) fn on_open_requests(&mut self, read: Result<(u32, Vec<NumberedRequest>), StoreError>) {
        let Some(adoption) = self.work.adoption.take() else { return };
        let (epoch, page) = match read {
            Ok(read) => read,
            Err(error) => return self.shared.metrics.store_failed(&error),
        };
        let state = &self.state;
        let is_wanted = |request: &str| {
            !state.looks_after(request) && (!adoption.only_awaited || state.waiters.contains(request))
        };
        let changes = page.iter().filter(|request| is_wanted(&request.request_id)).map(change).collect();
        let (opened, is_open) = oneshot::channel();
        self.open(NewChanges { epoch, changes, opened: Some(opened) });
        match page.last() {
            Some(last) if page.len() == PAGE => {
                self.read_open_requests(last.position, Some(is_open));
                self.work.adoption = Some(adoption);
            }
            _ => self.work.accounted = self.work.accounted.max(adoption.head),
        }
    }
}
