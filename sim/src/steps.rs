//! Verifications and loads under way: the data between two of their steps.

use std::sync::Arc;

use evictd_core::serving::{Candidate, InsertedEntry, LoadedEntry, SettledEntry, VerificationStart};
use evictd_core::time::LeaseTime;

use crate::cached::SimEntry;
use crate::checker::Confirmed;
use crate::node::Nonce;
use crate::rows::KeyNumber;
use crate::time::Moment;

/// How far a verification is: what the core gave it last.
#[derive(Clone, Debug)]
pub enum VerifyStep {
    Begun,
    Clock(LeaseTime),
    Read(VerificationStart),
    Found(Candidate<SimEntry>),
    Judged(Option<Arc<SimEntry>>),
}

/// A verification under way.
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

/// A load under way.
#[derive(Debug)]
pub struct OpenLoad {
    pub nonce: Nonce,
    pub sent_at: LeaseTime,
    pub last_try: bool,
    pub from_replica: bool,
    pub step: Option<LoadStep>,
    pub waiting: Vec<SimVerification>,
}

/// How far a load is that arrived: what the core gave it last.
#[derive(Debug)]
pub enum LoadStep {
    Loaded(LoadedEntry<SimEntry>),
    Inserted(InsertedEntry<SimEntry>),
    Settled(SettledEntry<SimEntry>),
}
