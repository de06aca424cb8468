//! The network side of [`Transport`]: HTTP, and how far a failed request came.

use std::io::{self, Read};
use std::time::{Duration, Instant};

use evictd_wire::api::error::JSON;
use evictd_wire::api::prefer::{self, PREFER};
use ureq::SendBody;

use crate::call::{ApiAnswer, ApiCall, Delivery, NoAnswer, RETRY_LIMIT, Transport};
use crate::print::note;
use crate::proxy::HttpProxy;
use crate::settings::ClientSettings;

const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(30);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// How long retries stay silent. Ten silent seconds look like a hang.
const SILENT_FOR: Duration = Duration::from_secs(1);

pub(crate) struct HttpTransport<'a> {
    agent: ureq::Agent,
    settings: &'a ClientSettings,
    started: Instant,
    has_reported_retries: bool,
}

impl<'a> HttpTransport<'a> {
    /// Connects at the first attempt.
    pub(crate) fn new(settings: &'a ClientSettings) -> Self {
        let config = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .timeout_global(Some(ATTEMPT_TIMEOUT))
            .timeout_connect(Some(CONNECT_TIMEOUT))
            .proxy(settings.proxy.as_ref().map(HttpProxy::server))
            .accept(JSON)
            .user_agent(concat!("evictd/", env!("CARGO_PKG_VERSION")));
        let agent = config.build().new_agent();
        Self { agent, settings, started: Instant::now(), has_reported_retries: false }
    }
}

impl Transport for HttpTransport<'_> {
    fn attempt(&mut self, call: &ApiCall) -> Result<ApiAnswer, NoAnswer> {
        let mut request = self
            .agent
            .post(format!("{}{}", self.settings.url, call.path))
            .header("Content-Type", JSON)
            .header("Content-Length", call.body.len())
            .header("Authorization", format!("Bearer {}", self.settings.root_key.expose()));
        if let Some(prefer) = call.prefer {
            request = request.header(PREFER, prefer::applied(prefer));
        }
        let mut body = TrackedBody { unread: &call.body, is_read: false };
        let response = request.send(SendBody::from_reader(&mut body));
        let mut response = response.map_err(|error| no_answer(&error, body.is_read))?;
        let status = response.status().as_u16();
        let retry_after =
            response.headers().get("retry-after").and_then(|value| seconds(value.to_str().ok()?));
        let body = response.body_mut().read_to_vec().map_err(|error| no_answer(&error, true))?;
        Ok(ApiAnswer { status, body, retry_after })
    }

    fn elapsed(&self) -> Duration {
        self.started.elapsed()
    }

    fn pause(&mut self, pause: Duration, cause: &str) {
        if !self.has_reported_retries && self.started.elapsed() > SILENT_FOR {
            self.has_reported_retries = true;
            note(&format!("{} {cause}; retrying for up to {} s", self.settings.url, RETRY_LIMIT.as_secs()));
        }
        self.rest(pause);
    }

    fn rest(&mut self, pause: Duration) -> bool {
        std::thread::sleep(pause);
        true
    }
}

/// Parses `Retry-After` in seconds, the form that APIs send. The other form is a date.
fn seconds(retry_after: &str) -> Option<Duration> {
    retry_after.trim().parse().ok().map(Duration::from_secs)
}

/// A request body that notes when it is read. ureq reads it once the connection is established and the headers are
/// sent; its errors do not tell whether they came before that. Without the body, a server carries nothing out.
struct TrackedBody<'a> {
    unread: &'a [u8],
    is_read: bool,
}

impl Read for TrackedBody<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.is_read = true;
        self.unread.read(buffer)
    }
}

fn no_answer(error: &ureq::Error, is_body_read: bool) -> NoAnswer {
    let delivery = match error {
        _ if is_body_read => Delivery::Unknown,
        ureq::Error::BadUri(_) | ureq::Error::Http(_) => Delivery::Unsendable,
        _ => Delivery::NotSent,
    };
    let cause = match error {
        // The message of rustls names neither TLS nor the server.
        ureq::Error::Io(error) if !is_body_read && error.kind() == io::ErrorKind::InvalidData => {
            format!("the TLS handshake failed; is it an http:// URL? ({error})")
        }
        ureq::Error::Io(error) => error.to_string(),
        other => other.to_string(),
    };
    NoAnswer { delivery, cause }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead as _, BufReader, Read as _, Write as _};
    use std::net::TcpListener;

    use evictd_ops::connection_url::ConnectionUrl;
    use evictd_wire::api::secret::Secret;

    use super::*;
    use crate::call::{ApiServer, Repeat, SentCall, send};
    use crate::render;
    use crate::settings::Env;

    fn call(repeat: Repeat) -> ApiCall {
        ApiCall::new("/v2/test", &serde_json::json!({}), repeat).unwrap()
    }

    #[test]
    fn unsendable_request_is_not_retried_nor_shown() {
        for (url, root_key) in [("http://a b", "unkey_hunter2"), ("http://127.0.0.1:1", "unkey_\nhunter2")] {
            let settings = ClientSettings { root_key: Secret::new(root_key), ..settings(url.to_owned()) };
            let sent = send(&mut HttpTransport::new(&settings), &call(Repeat::Harmless));
            let lost = sent.result.unwrap_err();
            assert_eq!(lost.delivery, Delivery::Unsendable, "{lost:?}");
            assert!(!lost.cause.contains("hunter2"), "{lost:?}");
        }
    }

    fn settings(url: String) -> ClientSettings {
        ClientSettings {
            root_key: Secret::new("unkey_1"),
            url,
            server: ApiServer::Publisher,
            json: false,
            proxy: None,
        }
    }

    #[test]
    fn request_has_the_expected_form() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let settings = settings(format!("http://{}", listener.local_addr().unwrap()));
        let server = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut reader = BufReader::new(stream.try_clone().unwrap());
            let mut head = String::new();
            while !head.ends_with("\r\n\r\n") {
                assert_ne!(reader.read_line(&mut head).unwrap(), 0);
            }
            let mut body = [0; 2];
            reader.read_exact(&mut body).unwrap();
            stream
                .write_all(
                    b"HTTP/1.1 429 Too Many Requests\r\nRetry-After: 7\r\nContent-Length: 3\r\n\r\nabc",
                )
                .unwrap();
            (head.to_ascii_lowercase(), body)
        });
        let held = ApiCall { prefer: Some(Duration::from_secs(5)), ..call(Repeat::Harmless) };
        let answer = HttpTransport::new(&settings).attempt(&held).unwrap();
        let retry_after = Some(Duration::from_secs(7));
        assert_eq!(answer, ApiAnswer { status: 429, body: b"abc".to_vec(), retry_after });
        let (head, body) = server.join().unwrap();
        assert_eq!(&body, b"{}");
        assert!(head.starts_with("post /v2/test http/1.1\r\n"), "{head}");
        for header in [
            "authorization: bearer unkey_1",
            "content-type: application/json",
            "accept: application/json",
            "prefer: wait=5",
        ] {
            assert!(head.contains(&format!("\r\n{header}\r\n")), "{head}");
        }
    }

    #[test]
    fn retry_after_is_read_if_it_is_a_number() {
        assert_eq!(seconds(" 12 "), Some(Duration::from_secs(12)));
        for other in ["", "-1", "1.5", "Wed, 21 Oct 2026 07:28:00 GMT"] {
            assert_eq!(seconds(other), None, "{other}");
        }
    }

    #[test]
    fn refused_connection_sent_nothing() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let settings = settings(format!("http://{}", listener.local_addr().unwrap()));
        drop(listener);
        let lost = HttpTransport::new(&settings).attempt(&call(Repeat::Harmless)).unwrap_err();
        assert_eq!(lost.delivery, Delivery::NotSent, "{lost:?}");
    }

    /// Failure: a variable names a proxy that is down, and the message blames the server.
    #[test]
    fn failure_names_the_proxy() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let proxy = listener.local_addr().unwrap();
        drop(listener);
        let lookup = |name: &str| (name == "http_proxy").then(|| format!("http://user:hunter2@{proxy}"));
        let env = Env { lookup: &lookup, read_file: &|_| Err(io::ErrorKind::NotFound.into()) };
        let url = ConnectionUrl::http("http://server.invalid:7070").unwrap();
        let settings =
            ClientSettings { proxy: HttpProxy::of(&url, &env).unwrap(), ..settings(url.expose().to_owned()) };
        let call = call(Repeat::Duplicates);
        let lost = HttpTransport::new(&settings).attempt(&call).unwrap_err();
        assert_eq!(lost.delivery, Delivery::NotSent, "{lost:?}");
        let sent = SentCall { result: Err(lost), is_maybe_done: false };
        let problem = render::problem(&call, &settings, &sent).unwrap();
        let named = format!("(through the proxy {proxy} of http_proxy)");
        assert!(problem.contains(&named) && !problem.contains("hunter2"), "{problem}");
    }

    #[test]
    fn unresolved_host_sent_nothing() {
        let lost =
            HttpTransport::new(&settings("http://nope.invalid".into())).attempt(&call(Repeat::Duplicates));
        assert_eq!(lost.unwrap_err().delivery, Delivery::NotSent);
    }

    #[test]
    fn failed_tls_handshake_sent_nothing() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let settings = settings(format!("https://{}", listener.local_addr().unwrap()));
        let server = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            stream.write_all(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n").unwrap();
            drop(stream.shutdown(std::net::Shutdown::Write));
            io::copy(&mut stream, &mut io::sink()).unwrap_or_default()
        });
        let lost = HttpTransport::new(&settings).attempt(&call(Repeat::Duplicates)).unwrap_err();
        server.join().unwrap();
        assert_eq!(lost.delivery, Delivery::NotSent, "{lost:?}");
        assert!(lost.cause.contains("http://"), "{lost:?}");
    }

    #[test]
    fn reused_connection_can_lose_a_request() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let settings = settings(format!("http://{}", listener.local_addr().unwrap()));
        let server = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut reader = BufReader::new(stream.try_clone().unwrap());
            for answer in ["HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", ""] {
                let mut head = String::new();
                while !head.ends_with("\r\n\r\n") {
                    assert_ne!(reader.read_line(&mut head).unwrap(), 0, "the connection is used once more");
                }
                reader.read_exact(&mut [0; 2]).unwrap();
                stream.write_all(answer.as_bytes()).unwrap();
            }
        });
        let mut http = HttpTransport::new(&settings);
        http.attempt(&call(Repeat::Duplicates)).unwrap();
        let lost = http.attempt(&call(Repeat::Duplicates)).unwrap_err();
        server.join().unwrap();
        assert_eq!(lost.delivery, Delivery::Unknown, "{lost:?}");
    }

    #[test]
    fn closed_connection_leaves_delivery_unknown() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let settings = settings(format!("http://{}", listener.local_addr().unwrap()));
        let server = std::thread::spawn(move || {
            let (stream, _) = listener.accept().unwrap();
            BufReader::new(stream).read_line(&mut String::new()).unwrap();
        });
        let lost = HttpTransport::new(&settings).attempt(&call(Repeat::Harmless)).unwrap_err();
        server.join().unwrap();
        assert_eq!(lost.delivery, Delivery::Unknown, "{lost:?}");
    }
}
