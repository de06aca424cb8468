//! Prints a configuration without its secrets.

use toml::{Table, Value};

/// What stands in for a secret.
const REDACTED: &str = "[redacted]";

/// The effective configuration as TOML. Values of keys whose last segment is or ends with `password`,
/// `secret` or `token` are redacted, and so are passwords inside URLs.
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

/// An empty value is shown as it is: that nothing is set is no secret, and worth knowing.
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

/// Replaces the password of every `scheme://user:password@host` in a text.
pub(super) fn mask_urls(text: &str) -> String {
    let Some((before, after)) = text.split_once("://") else { return text.to_owned() };
    let authority_ends = after.find(['/', '?', '#', ' ', ',']).unwrap_or(after.len());
    // A password may hold an unescaped @, so that the last one counts.
    let masked = match after[..authority_ends].rsplit_once('@') {
        Some((user_info, host)) => match user_info.split_once(':') {
            Some((user, _)) => format!("{user}:{REDACTED}@{host}"),
            None => after[..authority_ends].to_owned(),
        },
        None => after[..authority_ends].to_owned(),
    };
    format!("{before}://{masked}{}", mask_urls(&after[authority_ends..]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_are_redacted_and_the_rest_is_not() {
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

    #[test]
    fn only_passwords_inside_urls_are_masked() {
        assert_eq!(mask_urls("no url at all: a@b"), "no url at all: a@b");
        assert_eq!(mask_urls("nats://host:4222/x@y"), "nats://host:4222/x@y");
        assert_eq!(mask_urls("nats://user@host"), "nats://user@host");
        assert_eq!(mask_urls("a://u:p@h, b://v:q@i"), "a://u:[redacted]@h, b://v:[redacted]@i");
        assert_eq!(mask_urls("a://u:p@ss@h/d"), "a://u:[redacted]@h/d");
    }
}
