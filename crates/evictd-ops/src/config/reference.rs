//! The reference page of a daemon's configuration, made from its documented default file.

use std::fmt::Write as _;

use toml_edit::{DocumentMut, Item, RawString, Table};

use super::env_name;

/// Renders a default file as Markdown: a table per section with each key, its default, its environment variable, and
/// the comment right above it. A section's own comment becomes its introduction.
///
/// A default file that isn't TOML yields a page that says so. Loading it fails, too.
pub fn reference(title: &str, defaults: &str) -> String {
    let mut page = format!("# {title}\n");
    match defaults.parse::<DocumentMut>() {
        Ok(document) => section(&mut page, "", document.as_table()),
        // Writing to a String can't fail, here and below.
        Err(error) => drop(write!(page, "\nThe default file can't be read: {}\n", error.message())),
    }
    page
}

fn section(page: &mut String, path: &str, table: &Table) {
    let keys: Vec<_> = table.iter().filter(|(_, item)| !item.is_table()).collect();
    if !path.is_empty() {
        let _ = write!(page, "\n## `[{path}]`\n");
        let introduction = comment(table.decor().prefix());
        if !introduction.is_empty() {
            let _ = write!(page, "\n{introduction}\n");
        }
    }
    if !keys.is_empty() {
        page.push_str("\n| key | default | environment variable | what |\n|---|---|---|---|\n");
    }
    for (key, item) in keys {
        let full = join(path, key);
        let what = table.key(key).map(|key| comment(key.leaf_decor().prefix())).unwrap_or_default();
        let (default, variable) = (cell(&default(item)), env_name(&full));
        let _ = writeln!(page, "| `{full}` | `{default}` | `{variable}` | {} |", cell(&what));
    }
    for (key, item) in table {
        if let Some(inner) = item.as_table() {
            section(page, &join(path, key), inner);
        }
    }
}

pub(super) fn join(path: &str, key: &str) -> String {
    if path.is_empty() { key.to_owned() } else { format!("{path}.{key}") }
}

/// The value on one line, without the comment behind it.
fn default(item: &Item) -> String {
    let value = item.as_value().map(|value| value.clone().decorated("", "").to_string());
    value.unwrap_or_default().split_whitespace().collect::<Vec<_>>().join(" ")
}

/// The comment lines right above an item. An empty line ends them, so that the head of a file or of a group isn't taken
/// for the explanation of its first key.
fn comment(prefix: Option<&RawString>) -> String {
    let lines: Vec<&str> = prefix.and_then(RawString::as_str).unwrap_or_default().lines().collect();
    let above = lines.iter().rposition(|line| !line.trim_start().starts_with('#')).map_or(0, |gap| gap + 1);
    let texts = lines[above..].iter().map(|line| line.trim_start().trim_start_matches('#').trim());
    texts.collect::<Vec<_>>().join(" ")
}

fn cell(text: &str) -> String {
    text.replace('|', "\\|")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn page_is_made_from_the_default_file() {
        let defaults = r#"# The agent's defaults: every key there is.

# Where verifications
# are answered.
listen = "127.0.0.1:7080" # a note

# How long an answer may be trusted
# without proof.
[lease]
# The promise.
bound = "30s"

# deny | serve_stale
partition_policy = "deny"
[bus.tls]
urls = [
    "a",
    "b",
]
"#;
        assert_eq!(
            reference("Agent", defaults),
            r#"# Agent

| key | default | environment variable | what |
|---|---|---|---|
| `listen` | `"127.0.0.1:7080"` | `EVICTD_LISTEN` | Where verifications are answered. |

## `[lease]`

How long an answer may be trusted without proof.

| key | default | environment variable | what |
|---|---|---|---|
| `lease.bound` | `"30s"` | `EVICTD_LEASE_BOUND` | The promise. |
| `lease.partition_policy` | `"deny"` | `EVICTD_LEASE_PARTITION_POLICY` | deny \| serve_stale |

## `[bus]`

## `[bus.tls]`

| key | default | environment variable | what |
|---|---|---|---|
| `bus.tls.urls` | `[ "a", "b", ]` | `EVICTD_BUS_TLS_URLS` |  |
"#
        );
    }
}
