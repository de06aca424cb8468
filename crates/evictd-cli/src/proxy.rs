//! The proxy of a request, from the variables that curl and Go read.
//!
//! ureq takes the proxy of any scheme for all, and no list of exceptions with spaces, networks or bare domains.

use std::fmt;

use anyhow::Context as _;
use evictd_ops::connection_url::ConnectionUrl;
use hyper_util::client::proxy::matcher::Matcher;
use ureq::http::Uri;

use crate::settings::Env;

#[derive(Debug)]
pub(crate) struct HttpProxy {
    server: ureq::Proxy,
    /// The variable that names it.
    variable: &'static str,
}

impl HttpProxy {
    /// Returns the proxy for requests to `url`, if there is one.
    pub(crate) fn of(url: &ConnectionUrl, env: &Env<'_>) -> anyhow::Result<Option<Self>> {
        // A proxy cannot reach this machine's loopback, and must not see the root key.
        if url.is_loopback() {
            return Ok(None);
        }
        let Ok(uri) = url.expose().parse::<Uri>() else { return Ok(None) };
        let is_tls = uri.scheme_str() == Some("https");
        let own: &[&str] = match (is_tls, env.first(&["REQUEST_METHOD"])) {
            (true, _) => &["https_proxy", "HTTPS_PROXY"],
            (false, None) => &["http_proxy", "HTTP_PROXY"],
            // Of a CGI program, clients set HTTP_PROXY with the header `Proxy`.
            (false, Some(_)) => &["http_proxy"],
        };
        let mut variables = own.iter().chain(&["all_proxy", "ALL_PROXY"]);
        let Some((variable, server)) = variables.find_map(|name| Some((*name, env.first(&[name])?))) else {
            return Ok(None);
        };
        let exceptions = env.first(&["no_proxy", "NO_PROXY"]).unwrap_or_default();
        if is_exception(&uri, uri.port_u16().unwrap_or(if is_tls { 443 } else { 80 }), &exceptions) {
            return Ok(None);
        }
        let server = ureq::Proxy::new(server.trim()).ok().with_context(|| {
            format!(
                "{variable} is not the URL of a proxy, such as http://proxy:3128; correct it, or set NO_PROXY"
            )
        })?;
        Ok(Some(Self { server, variable }))
    }

    pub(crate) fn server(&self) -> ureq::Proxy {
        self.server.clone()
    }
}

impl fmt::Display for HttpProxy {
    /// Names the proxy without its user and password.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { server, variable } = self;
        write!(f, "through the proxy {}:{} of {variable}", server.host(), server.port())
    }
}

/// Whether NO_PROXY lists the host: itself, a domain above it, its network, or everything. The entries may have a port.
fn is_exception(uri: &Uri, port: u16, list: &str) -> bool {
    let entries = list.split(|c: char| c == ',' || c.is_whitespace()).filter_map(|entry| {
        let entry = entry.strip_prefix("*.").unwrap_or(entry);
        match entry.rsplit_once(':') {
            // More colons are an IPv6 address, unless brackets are around it.
            Some((host, own)) if !host.contains(':') || host.ends_with(']') => {
                (own.parse() == Ok(port)).then_some(host)
            }
            _ => Some(entry),
        }
    });
    let entries: Vec<_> = entries.map(|entry| entry.trim_matches(['[', ']'])).collect();
    // It has to be given some proxy to be asked about exceptions.
    Matcher::builder().all("http://proxy").no(entries.join(",")).build().intercept(uri).is_none()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The proxy for a URL under these variables, as it is shown.
    fn proxy(url: &str, variables: &[(&str, &str)]) -> anyhow::Result<Option<String>> {
        let lookup =
            |name: &str| variables.iter().find(|(own, _)| *own == name).map(|(_, value)| (*value).to_owned());
        let read_file = |_: &std::path::Path| Err(std::io::ErrorKind::NotFound.into());
        let found =
            HttpProxy::of(&ConnectionUrl::http(url)?, &Env { lookup: &lookup, read_file: &read_file })?;
        Ok(found.map(|proxy| proxy.to_string()))
    }

    const BOTH: [(&str, &str); 2] = [("HTTPS_PROXY", "http://s:1"), ("http_proxy", "h:2")];

    #[test]
    fn each_scheme_has_its_proxy() {
        let found = |url: &str, variables: &[_]| proxy(url, variables).unwrap().unwrap_or_default();
        assert_eq!(found("https://host", &BOTH), "through the proxy s:1 of HTTPS_PROXY");
        assert_eq!(found("http://host", &BOTH), "through the proxy h:2 of http_proxy");
        assert_eq!(found("http://host", &BOTH[..1]), "");
        let all = ("ALL_PROXY", "http://user:hunter2@a");
        assert_eq!(found("http://host", &[BOTH[0], all]), "through the proxy a:80 of ALL_PROXY");
        assert_eq!(found("http://host", &[("HTTP_PROXY", "h"), ("REQUEST_METHOD", "GET")]), "");
        for local in ["http://127.0.0.1:7070", "https://localhost", "http://[::1]:7070"] {
            assert_eq!(found(local, &BOTH), "", "{local}");
        }
    }

    #[test]
    fn no_proxy_is_read_as_by_curl_and_go() {
        let is_direct =
            |url: &str, list: &str| proxy(url, &[BOTH[0], BOTH[1], ("NO_PROXY", list)]).unwrap().is_none();
        for (url, list) in [
            ("https://api.example.com", "example.com"),
            ("https://api.example.com", ".example.com"),
            ("https://api.example.com", "*.example.com"),
            ("https://API.example.com", "api.Example.com"),
            ("https://api.example.com", "internal, api.example.com"),
            ("https://api.example.com", "internal api.example.com"),
            ("https://api.example.com", " *"),
            ("https://api.example.com:8443", "example.com:8443"),
            ("https://api.example.com", "api.example.com:443"),
            ("http://10.1.2.3:7070", "10.0.0.0/8"),
            ("http://10.1.2.3:7070", "192.0.2.1, 10.1.2.3"),
            ("http://10.1.2.3:7070", "10.1.2.3:7070"),
            ("http://[2001:db8::7]:7070", "2001:db8::/32"),
            ("http://[2001:db8::7]:7070", "[2001:db8::7]:7070"),
        ] {
            assert!(is_direct(url, list), "{url} {list}");
        }
        for (url, list) in [
            ("https://api.example.com", ""),
            ("https://api.example.com", "ple.com, xapi.example.com"),
            ("https://api.example.com", "example.com:8443"),
            ("http://10.1.2.3:7070", "11.0.0.0/8,10.1.2"),
            ("http://10.1.2.3:7070", "10.1.2.3:80"),
        ] {
            assert!(!is_direct(url, list), "{url} {list}");
        }
    }

    #[test]
    fn malformed_proxy_is_named_by_its_variable() {
        let error =
            proxy("https://host", &[("https_proxy", "http://user:hunter2@")]).unwrap_err().to_string();
        assert!(error.contains("https_proxy") && !error.contains("hunter2"), "{error}");
    }
}
