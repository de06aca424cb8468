//! The names of what is promised and of what keeps the promise.
//!
//! The same ids stand in assertions, in the simulator's and the model's checkers, in
//! `evictd_invariant_violations_total{id}`, and in ARCHITECTURE.md.

use std::fmt;

/// A guarantee (G) or a rule of the protocol that it rests on (R).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[allow(missing_docs, reason = "`statement` says what each is")]
pub enum Rule {
    G1,
    G2,
    G3,
    G4,
    G5,
    R1,
    R2,
    R3,
    R4,
    R5,
    R6,
    R7,
    R8,
    R9,
    R10,
    R11,
    R12,
    R13,
    R14,
    R15,
    R16,
}

impl Rule {
    /// All of them, guarantees first.
    pub const ALL: [Self; 21] = [
        Self::G1,
        Self::G2,
        Self::G3,
        Self::G4,
        Self::G5,
        Self::R1,
        Self::R2,
        Self::R3,
        Self::R4,
        Self::R5,
        Self::R6,
        Self::R7,
        Self::R8,
        Self::R9,
        Self::R10,
        Self::R11,
        Self::R12,
        Self::R13,
        Self::R14,
        Self::R15,
        Self::R16,
    ];

    /// `G1`, `R14`: the metric label.
    pub fn id(self) -> &'static str {
        match self {
            Self::G1 => "G1",
            Self::G2 => "G2",
            Self::G3 => "G3",
            Self::G4 => "G4",
            Self::G5 => "G5",
            Self::R1 => "R1",
            Self::R2 => "R2",
            Self::R3 => "R3",
            Self::R4 => "R4",
            Self::R5 => "R5",
            Self::R6 => "R6",
            Self::R7 => "R7",
            Self::R8 => "R8",
            Self::R9 => "R9",
            Self::R10 => "R10",
            Self::R11 => "R11",
            Self::R12 => "R12",
            Self::R13 => "R13",
            Self::R14 => "R14",
            Self::R15 => "R15",
            Self::R16 => "R16",
        }
    }

    /// What it says, in one sentence.
    pub fn statement(self) -> &'static str {
        match self {
            Self::G1 => "no answer is based on a state older than the bound",
            Self::G2 => "after a confirmation no later verification is answered from before it",
            Self::G3 => "a change that was answered with success is durable and gets its place in the log",
            Self::G4 => "a receipt says only what is true, and is final within the bound",
            Self::G5 => "an agent without proof says so",
            Self::R1 => "every committed change gets one position, and positions are dense",
            Self::R2 => "a new epoch begins when, and only when, the store may have gone back",
            Self::R3 => "triggers feed the log with every change of what a verification reads",
            Self::R4 => "success is answered only after a durable commit",
            Self::R5 => "apply always, advance contiguously; absent never means nothing",
            Self::R6 => "an entry is servable when it is as new as every floor that it depends on",
            Self::R7 => "a proof dates from before its question, and counts once its head is applied",
            Self::R8 => "what nobody has vouched for within the bound is not answered from",
            Self::R9 => "readers read clock, deadline, entry, floors; writers write in the other order",
            Self::R10 => "a load answers those who may have it, and is cached if it meets the floors now",
            Self::R11 => "an instance is in the roster before its first lease",
            Self::R12 => "a receipt is final when every instance confirmed, or a bound after the commit",
            Self::R13 => "answers go into the asker's inbox, and count only if they match a question",
            Self::R14 => "a publisher that can't answer keeps silent, and a second try reaches all",
            Self::R15 => "a publisher vouches only for pasts that its store's history holds",
            Self::R16 => "what an agent has seen counts only with the store's own code over it",
        }
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.id())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_id_is_listed_once_and_in_order() {
        assert!(Rule::ALL.is_sorted());
        let names: Vec<String> = Rule::ALL.iter().map(|rule| format!("{rule:?}")).collect();
        assert!(names.iter().zip(Rule::ALL).all(|(name, rule)| name == rule.id()));
    }
}
