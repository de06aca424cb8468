//! "Did you mean": the known key that is closest to an unknown one.

use strsim::levenshtein;

/// The key that `unknown` probably stands for: a misspelled one, or one without its section.
pub(super) fn suggest<'a>(unknown: &str, known: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let tolerance = (last(unknown).chars().count() / 2).clamp(1, 3);
    known
        .filter_map(|key| {
            let whole = levenshtein(unknown, key);
            // A key without its section may be right, but only if no whole key is close.
            let bare = levenshtein(last(unknown), last(key)) + 1;
            (whole.min(bare) <= tolerance).then_some(((whole > tolerance, whole.min(bare)), key))
        })
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, key)| key)
}

fn last(key: &str) -> &str {
    key.rsplit('.').next().unwrap_or(key)
}

#[cfg(test)]
mod tests {
    use super::*;

    const KNOWN: [&str; 4] = ["listen", "lease", "lease.bound", "bus.urls"];

    fn suggestion(unknown: &str) -> Option<&'static str> {
        suggest(unknown, KNOWN.into_iter())
    }

    #[test]
    fn misspelled_key_is_recognized() {
        assert_eq!(suggestion("lease.bonud"), Some("lease.bound"));
        assert_eq!(suggestion("lisen"), Some("listen"));
        assert_eq!(suggestion("leese"), Some("lease"));
        assert_eq!(suggestion("bus.url"), Some("bus.urls"));
    }

    #[test]
    fn misspelled_section_isnt_taken_for_another_one() {
        let known = ["admin.listen", "http.listen"];
        for unknown in ["htp.listen", "htpp.listen", "hptt.listen"] {
            assert_eq!(suggest(unknown, known.into_iter()), Some("http.listen"), "{unknown}");
        }
        assert_eq!(suggest("xyzzy.listen", known.into_iter()), Some("admin.listen"));
    }

    #[test]
    fn key_with_no_or_another_section_is_recognized() {
        assert_eq!(suggestion("bound"), Some("lease.bound"));
        assert_eq!(suggestion("bus.bound"), Some("lease.bound"));
    }

    #[test]
    fn nothing_is_suggested_for_a_stranger() {
        assert_eq!(suggestion("cache.entries_max"), None);
        assert_eq!(suggestion("x"), None);
    }
}
