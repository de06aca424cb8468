//! The ids of the guarantees, and of the rules that they rest on.
//!
//! The same ids are in assertions, in the checkers of simulator and model, in
//! `evictd_invariant_violations_total{id}`, and in ARCHITECTURE.md.

use std::fmt;

use crate::labels::Label;

macro_rules! rules {
    ($($id:ident = $statement:literal,)*) => {
        /// A guarantee (G), or a rule of the protocol that it rests on (R).
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
        pub enum Rule { $($id,)* }

        impl Rule {
            pub const ALL: [Self; [$($statement),*].len()] = [$(Self::$id),*];

            /// The metric label, such as `G1`.
            pub fn id(self) -> &'static str {
                match self { $(Self::$id => stringify!($id),)* }
            }

            pub fn statement(self) -> &'static str {
                match self { $(Self::$id => $statement,)* }
            }
        }

        impl Label for Rule {
            const ALL: &'static [Self] = &Self::ALL;

            fn index(self) -> usize {
                self as usize
            }

            fn label(self) -> &'static str {
                self.id()
            }
        }
    };
}

rules! {
    G1 = "no answer is based on a state older than the bound",
    G2 = "after a confirmation no later verification is answered from before it",
    G3 = "a change that was reported as successful is durable and gets its position in the log",
    G4 = "a receipt is true, and is final within the bound",
    G5 = "an agent without a proof reports it",
    R1 = "every committed change gets one position, and positions are dense",
    R2 = "a new epoch begins when, and only when, the store may have gone back",
    R3 = "triggers feed the log with every change of what a verification reads",
    R4 = "success is reported only after a durable commit",
    R5 = "apply always, advance contiguously; a missing row never means no change",
    R6 = "an entry is served only if it is as new as every floor that it depends on",
    R7 = "a proof dates from before its probe, and counts once its head is applied",
    R8 = "an entry without a read or a proof within the bound is not served",
    R9 = "readers read clock, deadline, entry, floors; writers write in the other order",
    R10 = "a load answers the verifications that may share it, and is cached if it meets the floors now",
    R11 = "an instance is in the roster before its first lease",
    R12 = "a receipt is final when every instance confirmed, or a bound after the commit",
    R13 = "answers go to the requester's inbox, and count only if they match an open request",
    R14 = "a publisher that can't answer stays silent, and a second try reaches all publishers",
    R15 = "a publisher vouches only for pasts that its store's history holds",
    R16 = "what an agent has seen counts only with the store's own code over it",
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.id())
    }
}
