//! What is shared between threads: the standard atomics and mutex, and loom's where a model checker
//! runs every interleaving of them (`--cfg loom`).

#[cfg(not(loom))]
mod used {
    pub(crate) use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
    pub(crate) use std::sync::{Mutex, MutexGuard, PoisonError};
}

#[cfg(loom)]
mod used {
    pub(crate) use std::sync::PoisonError;

    pub(crate) use loom::sync::atomic::{AtomicBool, AtomicU64, Ordering};
    pub(crate) use loom::sync::{Mutex, MutexGuard};
}

use std::ops::DerefMut;

pub(crate) use used::{AtomicBool, AtomicU64, Ordering};
use used::{MutexGuard, PoisonError};

/// A mutex that a panic doesn't poison: a task that panics ends the process.
#[derive(Debug)]
pub struct Mutex<T>(used::Mutex<T>);

impl<T> Mutex<T> {
    pub(crate) fn new(value: T) -> Self {
        Self(used::Mutex::new(value))
    }

    /// Waits for it and locks it.
    pub fn lock(&self) -> impl DerefMut<Target = T> + '_ {
        let guard: MutexGuard<'_, T> = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        guard
    }
}
