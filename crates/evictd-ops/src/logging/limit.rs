//! Limits on log lines that a peer can cause again and again.
//!
//! The operator needs the first lines of each kind, and a sign that it goes on. A stranger must not fill the disk.

use std::collections::HashMap;
use std::hash::Hash;
use std::time::Duration;

use evictd_core::time::LeaseTime;
use parking_lot::Mutex;

use crate::clock;

/// Each kind may log [`LogLimit::per_window`] lines in this time.
pub const WINDOW: Duration = Duration::from_secs(30);

/// Kinds that are remembered at once. Lines of further ones are not logged: sources can be invented.
const KINDS_MAX: usize = 1024;

/// Returns whether the line of this place in the code is to be logged: `per_window` times in [`WINDOW`] for each source.
/// The source is anything with a `Display`, `""` if there is only one.
#[macro_export]
macro_rules! log_limit {
    ($per_window:expr, $source:expr) => {{
        static LIMIT: std::sync::LazyLock<$crate::logging::LogLimit<String>> =
            std::sync::LazyLock::new(|| $crate::logging::LogLimit::new($per_window));
        LIMIT.admit($source.to_string())
    }};
}

/// Decides which lines are logged. A kind is what the line is about, with its source if there are several.
#[derive(Debug)]
pub struct LogLimit<K> {
    per_window: u32,
    state: Mutex<LimitState<K>>,
}

#[derive(Debug)]
struct LimitState<K> {
    series: HashMap<K, LogSeries>,
    /// Lines of kinds beyond [`KINDS_MAX`].
    unlogged: u64,
}

/// The lines of one kind since its window began.
#[derive(Debug)]
struct LogSeries {
    began: LeaseTime,
    logged: u32,
    unlogged: u64,
}

impl<K: Eq + Hash> LogLimit<K> {
    /// Admits `per_window` lines of each kind in [`WINDOW`].
    pub fn new(per_window: u32) -> Self {
        let state = LimitState { series: HashMap::new(), unlogged: 0 };
        Self { per_window, state: Mutex::new(state) }
    }

    /// Returns whether a line of this kind is to be logged. If so, it says how many weren't since the last one.
    pub fn admit(&self, kind: K) -> Option<Unlogged> {
        self.admit_at(kind, clock::lease_now())
    }

    fn admit_at(&self, kind: K, now: LeaseTime) -> Option<Unlogged> {
        let mut state = self.state.lock();
        let LimitState { series, unlogged } = &mut *state;
        if !series.contains_key(&kind) && series.len() >= KINDS_MAX {
            series.retain(|_, series| {
                let is_current = now.since(series.began) < WINDOW;
                *unlogged += if is_current { 0 } else { series.unlogged };
                is_current
            });
            if series.len() >= KINDS_MAX {
                *unlogged += 1;
                return None;
            }
        }
        let new = LogSeries { began: now, logged: 0, unlogged: 0 };
        let series = series.entry(kind).or_insert(new);
        if now.since(series.began) >= WINDOW {
            (series.began, series.logged) = (now, 0);
        }
        if series.logged >= self.per_window {
            series.unlogged += 1;
            return None;
        }
        series.logged += 1;
        Some(Unlogged(std::mem::take(&mut series.unlogged) + std::mem::take(unlogged)))
    }

    /// Returns how many lines were not logged, nor counted in a line yet. The windows go on: what alternately fails and
    /// works must not fill the log either.
    pub fn take_unlogged(&self) -> Unlogged {
        let mut state = self.state.lock();
        let others = std::mem::take(&mut state.unlogged);
        Unlogged(
            others
                + state.series.values_mut().map(|series| std::mem::take(&mut series.unlogged)).sum::<u64>(),
        )
    }
}

/// How many lines were not logged before this one. As a field of a line it is left out if there are none.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Unlogged(u64);

impl Unlogged {
    /// The field's value.
    pub fn field(self) -> Option<u64> {
        (self.0 > 0).then_some(self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> LeaseTime {
        LeaseTime::default().after(Duration::from_secs(seconds))
    }

    #[test]
    fn each_kind_has_its_own_window() {
        let limit = LogLimit::new(1);
        assert_eq!(limit.admit_at("a", at(0)), Some(Unlogged(0)));
        for now in 1..30 {
            assert_eq!(limit.admit_at("a", at(now)), None);
        }
        assert_eq!(limit.admit_at("b", at(29)), Some(Unlogged(0)));
        assert_eq!(limit.admit_at("a", at(30)), Some(Unlogged(29)), "what was left out is counted");
        assert_eq!(limit.admit_at("a", at(60)), Some(Unlogged(0)));
    }

    #[test]
    fn burst_of_one_kind_is_logged_up_to_its_limit() {
        let limit = LogLimit::new(3);
        let logged = (0..10).filter(|_| limit.admit_at("a", at(1)).is_some()).count();
        assert_eq!((logged, limit.take_unlogged()), (3, Unlogged(7)));
        assert_eq!(limit.take_unlogged().field(), None);
        assert_eq!(limit.admit_at("a", at(2)), None, "the window goes on");
    }

    #[test]
    fn invented_kinds_neither_log_nor_grow_without_limit() {
        let limit = LogLimit::new(1);
        let logged = (0..10 * KINDS_MAX).filter(|kind| limit.admit_at(*kind, at(0)).is_some()).count();
        assert_eq!((logged, limit.state.lock().series.len()), (KINDS_MAX, KINDS_MAX));
        assert_eq!(limit.admit_at(usize::MAX, at(30)), Some(Unlogged(9 * KINDS_MAX as u64)));
        assert_eq!(limit.state.lock().series.len(), 1);
    }
}
