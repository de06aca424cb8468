//! Names of variants, for metrics, logs and the store.

/// Implements `ALL`, `label` and `from_label` of an enum without fields from one list. The compiler
/// refuses a list that lacks a variant.
macro_rules! labels {
    ($type:ident { $($variant:ident = $label:literal),* $(,)? }) => {
        impl $type {
            pub const ALL: [Self; [$($label),*].len()] = [$(Self::$variant),*];

            pub fn label(self) -> &'static str {
                match self {
                    $(Self::$variant => $label,)*
                }
            }

            pub fn from_label(label: &str) -> Option<Self> {
                Self::ALL.into_iter().find(|it| it.label() == label)
            }
        }
    };
}
