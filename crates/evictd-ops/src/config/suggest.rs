//! "Did you mean": the known key that is closest to an unknown one.

/// The key that `unknown` probably stands for: a misspelled one, or one without its section.
pub(super) fn suggest<'a>(unknown: &str, known: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let tolerance = (last(unknown).chars().count() / 2).clamp(1, 3);
    known
        .filter_map(|key| {
            let whole = distance(unknown, key);
            // Without its section a key may be right, but only if no whole one is near.
            let bare = distance(last(unknown), last(key)) + 1;
            (whole.min(bare) <= tolerance).then_some(((whole > tolerance, whole.min(bare)), key))
        })
        .min_by_key(|(far, _)| *far)
        .map(|(_, key)| key)
}

fn last(key: &str) -> &str {
    key.rsplit('.').next().unwrap_or(key)
}

/// Insertions, deletions and replacements that turn `from` into `to`.
pub fn distance(from: &str, to: &str) -> usize {
    let to: Vec<char> = to.chars().collect();
    let mut row: Vec<usize> = (0..=to.len()).collect();
    for (i, a) in from.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, b) in to.iter().enumerate() {
            let replaced = diagonal + usize::from(a != *b);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[to.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    const KNOWN: [&str; 4] = ["listen", "lease", "lease.bound", "bus.urls"];

    fn suggestion(unknown: &str) -> Option<&'static str> {
        suggest(unknown, KNOWN.into_iter())
    }

    #[test]
    fn distances_count_edits() {
        assert_eq!(distance("kitten", "sitting"), 3);
        assert_eq!(distance("", "abc"), 3);
        assert_eq!(distance("same", "same"), 0);
    }

    #[test]
    fn a_misspelled_key_is_recognised() {
        assert_eq!(suggestion("lease.bonud"), Some("lease.bound"));
        assert_eq!(suggestion("lisen"), Some("listen"));
        assert_eq!(suggestion("leese"), Some("lease"));
        assert_eq!(suggestion("bus.url"), Some("bus.urls"));
    }

    #[test]
    fn a_misspelled_section_is_not_taken_for_another_with_the_same_key() {
        let known = ["admin.listen", "http.listen"];
        for unknown in ["htp.listen", "htpp.listen", "hptt.listen"] {
            assert_eq!(suggest(unknown, known.into_iter()), Some("http.listen"), "{unknown}");
        }
        assert_eq!(suggest("xyzzy.listen", known.into_iter()), Some("admin.listen"));
    }

    #[test]
    fn a_key_without_or_in_another_section_is_recognised() {
        assert_eq!(suggestion("bound"), Some("lease.bound"));
        assert_eq!(suggestion("bus.bound"), Some("lease.bound"));
    }

    #[test]
    fn nothing_is_suggested_for_what_resembles_nothing() {
        assert_eq!(suggestion("cache.entries_max"), None);
        assert_eq!(suggestion("x"), None);
    }
}
