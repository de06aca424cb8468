//! [`Random`]: reproducible randomness, for tests that break things in random order.

use anyhow::{Context, Result};

/// The environment variable with the seed of a run to repeat. A failure prints the seed.
pub const SEED_VARIABLE: &str = "EVICTD_TEST_SEED";

/// A pseudorandom sequence, which depends only on its seed (SplitMix64).
#[derive(Clone, Debug)]
pub struct Random {
    seed: u64,
    state: u64,
}

impl Random {
    /// Returns the sequence of `seed`.
    pub fn new(seed: u64) -> Self {
        Self { seed, state: seed }
    }

    /// Returns a sequence with the seed of [`SEED_VARIABLE`] if set, else with a random seed.
    pub fn draw() -> Result<Self> {
        let seed = match std::env::var(SEED_VARIABLE) {
            Ok(seed) => seed.parse().with_context(|| format!("{SEED_VARIABLE} is no number: {seed}"))?,
            Err(_) => getrandom::u64().context("drawing a seed")?,
        };
        Ok(Self::new(seed))
    }

    /// Runs `story` with a random sequence and a list of events. An error shows the events and how to repeat the run.
    pub fn lived_through(story: impl FnOnce(&mut Self, &mut Vec<String>) -> Result<()>) -> Result<()> {
        let (mut random, mut events) = (Self::draw()?, Vec::new());
        let outcome = story(&mut random, &mut events);
        outcome.with_context(|| format!("{}\n{}", events.join("\n"), random.how_to_repeat()))
    }

    /// Returns the setting that repeats this run. Errors must show it.
    pub fn how_to_repeat(&self) -> String {
        format!("to repeat this run: {SEED_VARIABLE}={}", self.seed)
    }

    /// Returns a number below `end`, which must not be 0.
    pub fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }

    /// Puts `items` in another order.
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            items.swap(last, self.below(last + 1));
        }
    }

    fn next(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.state;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn order_depends_only_on_the_seed() {
        let order = |seed| {
            let mut items: Vec<u32> = (0..50).collect();
            Random::new(seed).shuffle(&mut items);
            items
        };
        assert_eq!(order(7), order(7));
        assert_ne!(order(7), order(8));
        let mut sorted = order(7);
        sorted.sort_unstable();
        assert_eq!(sorted, (0..50).collect::<Vec<_>>(), "nothing is lost or doubled");
    }
}
