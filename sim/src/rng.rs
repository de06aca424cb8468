//! The one source of chance. A seed and a scenario decide everything.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

use crate::time::Micros;

/// Reproducible randomness.
#[derive(Clone, Debug)]
pub struct Dice(ChaCha8Rng);

impl Dice {
    /// `salt` gives each scenario another sequence.
    pub fn new(seed: u64, salt: u64) -> Self {
        let mut bytes = [0; 32];
        bytes[..8].copy_from_slice(&seed.to_le_bytes());
        bytes[8..16].copy_from_slice(&salt.to_le_bytes());
        Self(ChaCha8Rng::from_seed(bytes))
    }

    pub fn any(&mut self) -> u64 {
        self.0.next_u64()
    }

    /// A number below `end`, which must not be zero.
    pub fn below(&mut self, end: u64) -> u64 {
        ((u128::from(self.0.next_u64()) * u128::from(end)) >> 64) as u64
    }

    /// An index below `end`, which must not be zero.
    pub fn index(&mut self, end: usize) -> usize {
        self.below(end as u64) as usize
    }

    /// A number from `low` to `high`, both included.
    pub fn between(&mut self, low: u64, high: u64) -> u64 {
        low + self.below(high - low + 1)
    }

    /// True in `permille` of 1,000 cases.
    pub fn permille(&mut self, permille: u32) -> bool {
        permille > 0 && self.below(1_000) < u64::from(permille)
    }

    pub fn pick<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.index(choices.len())]
    }

    /// A span with a long tail: three quarters lie between half of `usual` and `usual`, a sixteenth is four
    /// times as long or more, and the longest sixteen times.
    pub fn span(&mut self, usual: Micros) -> Micros {
        let bits = self.0.next_u64();
        let doublings = ((bits & 0xffff).leading_zeros() - 48) / 2;
        let fraction = (bits >> 16) & 0xffff;
        let base = usual / 2 + ((usual * fraction) >> 17);
        base << doublings.min(4)
    }
}
