//! Verifications and loads under way: the data between two of their steps.

use std::sync::Arc;

use evictd_core::serving::{Candidate, InsertedEntry, LoadedEntry, SettledEntry, VerificationStart};
use evictd_core::time::LeaseTime;

use crate::cached::SimEntry;
use crate::checker::Confirmed;
use crate::node::Nonce;
use crate::rows::KeyNumber;
use crate::time::Moment;

/// The last step of a verification.
#[derive(Clone, Debug)]
pub enum VerifyStep {
    Begun,
    Clock(LeaseTime),
    Read(VerificationStart),
    Found(Candidate<SimEntry>),
    Judged(Option<Arc<SimEntry>>),
}

#[derive(Clone, Debug)]
pub struct SimVerification {
    pub key: KeyNumber,
    /// When it began: for the checker.
    pub started: Moment,
    /// What the agent had confirmed then: for the checker.
    pub confirmed: Confirmed,
    /// What it builds on, from when it was read.
    pub began: Option<VerificationStart>,
    pub step: VerifyStep,
    /// Loads that it waited for.
    pub loads: u8,
}

#[derive(Debug, Default)]
pub struct OpenLoad {
    pub nonce: Nonce,
    pub sent_at: LeaseTime,
    pub last_try: bool,
    pub from_replica: bool,
    pub step: Option<LoadStep>,
    pub waiting: Vec<SimVerification>,
}

/// The last step of an answered load.
#[derive(Debug)]
pub enum LoadStep {
    Loaded(LoadedEntry<SimEntry>),
    Inserted(InsertedEntry<SimEntry>),
    Settled(SettledEntry<SimEntry>),
}
