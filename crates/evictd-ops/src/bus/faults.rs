//! What is wrong with a connection to NATS, said in words that name the setting to correct.
//!
//! The client reports most faults as an I/O error with the text of another library. Each entry of the table was seen
//! with a real server; `tests/tests/e2e/connection_faults.rs` repeats them.

use super::BusConfig;

/// The settings that change what a fault means.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub(super) struct TlsSettings {
    has_ca: bool,
    has_certificate: bool,
}

impl TlsSettings {
    pub(super) fn of(config: &BusConfig) -> Self {
        Self { has_ca: !config.ca_file.is_empty(), has_certificate: !config.cert_file.is_empty() }
    }

    /// Describes an error of the client, or of the server in the client's words.
    pub(super) fn explain(self, error: &str) -> String {
        let error = ["nats: ", "IO error: ", "TLS error: ", "DNS error: ", "nats: "]
            .iter()
            .fold(error, |error, prefix| error.strip_prefix(prefix).unwrap_or(error));
        match self.advice(&error.to_lowercase()) {
            Some(advice) => format!("{advice} ({error})"),
            None => error.to_owned(),
        }
    }

    fn advice(self, error: &str) -> Option<&'static str> {
        let has = |parts: &[&str]| parts.iter().any(|part| error.contains(part));
        Some(if has(&["unknownissuer", "badsignature", "platform certs"]) {
            if self.has_ca {
                "the server's certificate isn't signed by the authority in nats.ca_file"
            } else {
                "the server requires TLS, and no authority that this machine knows signed its certificate; set \
                 nats.ca_file"
            }
        } else if has(&["not valid for name", "notvalidforname"]) {
            "the server's certificate isn't for the name in nats.urls"
        } else if has(&["certificate expired", "invalid peer certificate: expired"]) {
            "the server's certificate has expired"
        } else if has(&["not valid yet", "notvalidyet"]) {
            "the server's certificate isn't valid yet; is this machine's clock right?"
        } else if has(&["certificaterequired", "certificate required"]) {
            "the server requires a client certificate; set nats.cert_file and nats.key_file"
        } else if has(&["received fatal alert"]) && self.has_certificate {
            "the server rejected the certificate in nats.cert_file"
        } else if has(&["received fatal alert"]) {
            "the server rejected the TLS connection; does it require a client certificate (nats.cert_file)?"
        } else if has(&["corrupt message", "invalidcontenttype"]) {
            "the server speaks no TLS on this port, which nats.ca_file, nats.cert_file or a tls:// URL requires"
        } else if has(&["leafnode port", "leaf node port", "route port", "gateway port"]) {
            "this is a port for other NATS servers; nats.urls must name the one for clients"
        } else if has(&["expected info, got nothing", "invalid server operation", "http/1.", "parsing"]) {
            "no NATS server for clients listens on this port"
        } else if has(&["maximum connections exceeded", "maximum account active connections"]) {
            "the server has as many connections as its max_connections allows"
        } else if has(&["maximum control line"]) {
            "the server's max_control_line is too short for this client; raise it, 4096 is the default"
        } else if has(&["maximum subscriptions"]) {
            "the server's max_subscriptions is too low for this client"
        } else if has(&["authorization violation"]) {
            "the server refuses this login; check nats.user and its password, or nats.credentials_file"
        } else if has(&["failed signing nonce", "no such file"]) {
            "the login can't be read; check nats.password_file or nats.credentials_file"
        } else if has(&["connection refused"]) {
            "no server listens there"
        } else if has(&["timed out"]) {
            "no answer; is it a NATS server's port for clients, and is the way to it open?"
        } else if has(&["lookup address", "dns error", "no addresses"]) {
            "the name in nats.urls can't be resolved"
        } else {
            return None;
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn same_error_means_another_setting_with_an_authority() {
        let error = "IO error: invalid peer certificate: UnknownIssuer";
        let explained = |has_ca| TlsSettings { has_ca, has_certificate: false }.explain(error);
        assert!(explained(true).contains("isn't signed by the authority in nats.ca_file"));
        assert!(explained(false).contains("set nats.ca_file"));
        assert!(
            explained(true).ends_with("(invalid peer certificate: UnknownIssuer)"),
            "{}",
            explained(true)
        );
    }

    #[test]
    fn unknown_errors_stay_as_they_are() {
        assert_eq!(TlsSettings::default().explain("nats: out of cheese"), "out of cheese");
    }
}
