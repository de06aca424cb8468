//! Prints a configuration without its secrets.

use toml::{Table, Value};

use crate::connection_url::{REDACTED, mask_urls};

/// Prints the effective configuration as TOML. Values of keys that end with `password`, `secret` or `token` are redacted,
/// and so are passwords inside URLs.
pub fn print_effective(effective: &Table) -> String {
    // Serializing a table of plain values to a String can't fail.
    toml::to_string(&redacted(effective)).unwrap_or_default()
}

fn redacted(table: &Table) -> Table {
    table
        .iter()
        .map(|(key, value)| {
            let value = if is_secret(key) { hide(value) } else { hide_in_urls(value) };
            (key.clone(), value)
        })
        .collect()
}

/// Whether the value of a key must never be shown.
pub(super) fn is_secret(key: &str) -> bool {
    let last = key.rsplit('.').next().unwrap_or(key);
    ["password", "secret", "token"].iter().any(|end| last.ends_with(end))
}

/// An empty value is shown: that nothing is set is no secret, and worth knowing.
fn hide(value: &Value) -> Value {
    match value {
        Value::String(text) if text.is_empty() => value.clone(),
        Value::Array(items) if items.is_empty() => value.clone(),
        _ => Value::from(REDACTED),
    }
}

fn hide_in_urls(value: &Value) -> Value {
    match value {
        Value::String(text) => Value::String(mask_urls(text)),
        Value::Array(items) => Value::Array(items.iter().map(hide_in_urls).collect()),
        Value::Table(table) => Value::Table(redacted(table)),
        plain => plain.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_secrets_are_redacted() {
        let effective: Table = r#"
            listen = "127.0.0.1:7080"
            [bus]
            urls = ["nats://a:4222"]
            password = "hunter2"
            password_file = "/run/secrets/nats"
            nkey_secret = "SUAHUNTER2"
            token = ""
            [store]
            url = "postgres://evictd:hunter2@db/evictd"
        "#
        .parse()
        .unwrap();
        let printed = print_effective(&effective);
        assert!(!printed.to_lowercase().contains("hunter2"), "{printed}");
        let reread: Table = printed.parse().unwrap();
        assert_eq!(reread["listen"], effective["listen"]);
        assert_eq!(reread["bus"]["password"].as_str(), Some("[redacted]"));
        assert_eq!(reread["bus"]["nkey_secret"].as_str(), Some("[redacted]"));
        assert_eq!(reread["bus"]["token"].as_str(), Some(""), "not set is worth knowing");
        assert_eq!(reread["bus"]["password_file"], effective["bus"]["password_file"]);
        assert_eq!(reread["store"]["url"].as_str(), Some("postgres://evictd:[redacted]@db/evictd"));
    }
}
