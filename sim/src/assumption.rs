//! What the guarantees assume of their surroundings, one by one, so that each can be lacking.
//!
//! No code protects against their absence, so these are no protections of the core: a world is set up without
//! one ([`crate::scenario::Settings::lacking`]), and a promise must break in it.

use evictd_core::rules::Rule;

/// Something that `docs/proof.md` assumes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Assumption {
    /// A2: the lease clock goes on while the machine sleeps.
    ClocksCountSuspension,
}

impl Assumption {
    /// The rule that rests on it.
    pub fn rule(self) -> Rule {
        match self {
            Self::ClocksCountSuspension => Rule::R8,
        }
    }
}
