//! Names of variants, for metrics, logs and the store.

/// A value of an enum whose variants have a name each. [`labels!`](macro@crate::labels) implements it.
pub trait Label: Copy + 'static {
    /// All values, in the order of [`Label::index`].
    const ALL: &'static [Self];

    fn index(self) -> usize;

    fn label(self) -> &'static str;
}

/// Implements `ALL`, `label`, `from_label` and [`Label`] of an enum without fields from one list, and
/// declares the enum if the list begins with `enum`. The compiler refuses a list that lacks a variant.
#[macro_export]
macro_rules! labels {
    ($type:ident { $($variant:ident = $label:expr),* $(,)? }) => {
        $crate::labels!(@implement pub $type { $($variant = $label),* });
    };
    ($(
        $(#[$attribute:meta])*
        $visibility:vis enum $type:ident {
            $($(#[$variant_attribute:meta])* $variant:ident = $label:expr),* $(,)?
        }
    )+) => {$(
        $(#[$attribute])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
        $visibility enum $type {
            $($(#[$variant_attribute])* $variant),*
        }

        $crate::labels!(@implement $visibility $type { $($variant = $label),* });
    )+};
    (@implement $visibility:vis $type:ident { $($variant:ident = $label:expr),* }) => {
        #[allow(dead_code, unreachable_pub, reason = "not every enum needs all of it")]
        impl $type {
            $visibility const ALL: [Self; [$($label),*].len()] = [$(Self::$variant),*];

            $visibility const fn label(self) -> &'static str {
                match self {
                    $(Self::$variant => $label,)*
                }
            }

            $visibility fn from_label(label: &str) -> Option<Self> {
                Self::ALL.into_iter().find(|it| it.label() == label)
            }
        }

        impl $crate::labels::Label for $type {
            const ALL: &'static [Self] = &Self::ALL;

            fn index(self) -> usize {
                enum Index { $($variant),* }
                match self {
                    $(Self::$variant => Index::$variant as usize,)*
                }
            }

            fn label(self) -> &'static str {
                self.label()
            }
        }
    };
}

#[cfg(test)]
mod tests {
    use super::Label;

    labels! {
        enum Fruit {
            Apple = "apple",
            /// In the middle.
            BloodOrange = "blood orange",
            Cherry = "cherry",
        }
    }

    #[derive(Clone, Copy)]
    enum Berry {
        Blueberry,
        Raspberry,
    }

    labels!(Berry { Raspberry = "raspberry", Blueberry = "blueberry" });

    fn indexed<L: Label>() -> Vec<(usize, &'static str)> {
        L::ALL.iter().map(|value| (value.index(), value.label())).collect()
    }

    #[test]
    fn each_value_has_the_index_and_label_of_the_list() {
        assert_eq!(indexed::<Fruit>(), [(0, "apple"), (1, "blood orange"), (2, "cherry")]);
        assert_eq!(indexed::<Berry>(), [(0, "raspberry"), (1, "blueberry")], "not the order of the enum");
    }
}
