//! What is said of NATS servers that can't be used: in the log, on `/readyz`, and by `check-config --connect`.
//!
//! Each row is a broken set-up with a real server.

use std::fs;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use evictd_tests::http::Client;
use evictd_tests::nats_server::find_or_install;
use evictd_tests::ports;
use evictd_tests::process::{Daemon, Launch, evictd_binary, evictd_command};
use evictd_tests::wait::eventually;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair, date_time_ymd};

use crate::world::SOON;

/// Signs certificates, each in files of its own.
struct TestAuthority {
    issuer: CertifiedIssuer<'static, KeyPair>,
    dir: PathBuf,
}

impl TestAuthority {
    fn new(dir: &Path, name: &str) -> Result<Self> {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate()?)?;
        let dir = dir.join(name);
        fs::create_dir(&dir)?;
        fs::write(dir.join("ca.pem"), issuer.pem())?;
        Ok(Self { issuer, dir })
    }

    fn ca(&self) -> String {
        self.dir.join("ca.pem").display().to_string()
    }

    /// Writes `<file>.pem` and `<file>.key` for `name`, and returns their paths.
    fn sign(&self, file: &str, name: &str, is_expired: bool) -> Result<(String, String)> {
        let mut params = CertificateParams::new([name.to_owned()])?;
        if is_expired {
            (params.not_before, params.not_after) = (date_time_ymd(2020, 1, 1), date_time_ymd(2021, 1, 1));
        }
        let key = KeyPair::generate()?;
        let certificate = params.signed_by(&key, &self.issuer)?;
        let path = |end: &str| self.dir.join(format!("{file}.{end}"));
        fs::write(path("pem"), certificate.pem())?;
        fs::write(path("key"), key.serialize_pem())?;
        Ok((path("pem").display().to_string(), path("key").display().to_string()))
    }
}

/// A broken set-up, and what must be said of it.
struct ConnectionFault {
    name: &'static str,
    /// Lines of the server's configuration, besides its address.
    server: String,
    /// Settings of the agent, besides the server's URL.
    agent: Vec<String>,
    /// Where the agent connects, if not to the server's port for clients.
    port: Option<SocketAddr>,
    said: &'static str,
}

impl ConnectionFault {
    fn new(name: &'static str, server: impl Into<String>, agent: &[String], said: &'static str) -> Self {
        Self { name, server: server.into(), agent: agent.to_vec(), port: None, said }
    }

    /// Starts server and agent, and looks at all three places.
    fn assert_said(&self, dir: &Path) -> Result<()> {
        let dir = dir.join(self.name.replace(' ', "-"));
        fs::create_dir(&dir)?;
        let clients = ports::free()?;
        fs::write(dir.join("nats.conf"), format!("listen: \"{clients}\"\n{}\n", self.server))?;
        let server = Launch::new("nats", find_or_install()?, &dir).args(["-c", "nats.conf"]);
        let mut server = Daemon::start(server)?;
        server.wait_until("listening", SOON, || TcpStream::connect(clients).ok().map(drop))?;

        let (http, admin) = (ports::free()?, ports::free()?);
        let mut settings = vec![
            format!("nats.urls=nats://{}", self.port.unwrap_or(clients)),
            "nats.user=agent".to_owned(),
            "nats.password=secret".to_owned(),
        ];
        settings.extend(self.agent.iter().cloned());
        let checked = settings.clone();
        settings.extend([format!("http.listen={http}"), format!("admin.listen={admin}")]);
        let flags = |settings: &[String]| -> Vec<String> {
            settings.iter().flat_map(|setting| ["--set".to_owned(), setting.clone()]).collect()
        };
        let agent = Launch::new("agent", evictd_binary()?, &dir).args(["agent"]).args(flags(&settings));
        let mut agent = Daemon::start(agent)?;

        let url = format!("http://{admin}/readyz");
        let ready = agent.wait_until(self.said, SOON, || {
            let page = Client::new().get(&url).ok()?.text;
            page.contains(self.said).then_some(())
        });
        let page = || Client::new().get(&url).map(|answer| answer.text).unwrap_or_default();
        ready.with_context(|| format!("{}: /readyz: {}", self.name, page()))?;
        let logged = || agent.stderr().ok()?.contains(self.said).then_some(());
        eventually("the log's line", SOON, logged).with_context(|| agent.log_tail())?;
        let check =
            evictd_command()?.args(["check-config", "agent", "--connect"]).args(flags(&checked)).output()?;
        let said = String::from_utf8(check.stderr)?;
        ensure!(check.status.code() == Some(1) && said.contains(self.said), "{}: {said}", self.name);
        ensure!(!page().contains("secret") && !said.contains("secret"), "{}: a password", self.name);
        Ok(())
    }
}

#[test]
fn each_connection_fault_is_said_by_name() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let [ours, theirs] = [TestAuthority::new(dir.path(), "ours")?, TestAuthority::new(dir.path(), "theirs")?];
    let tls = |(cert, key): (String, String), more: &str| {
        format!("tls {{ cert_file: \"{cert}\", key_file: \"{key}\"{more} }}")
    };
    let good = ours.sign("good", "127.0.0.1", false)?;
    let other_name = ours.sign("other", "nats.example.com", false)?;
    let expired = ours.sign("expired", "127.0.0.1", true)?;
    let (foreign_cert, foreign_key) = theirs.sign("client", "agent", false)?;
    let verified = format!(", ca_file: \"{}\", verify: true", ours.ca());
    let ca = |authority: &TestAuthority| format!("nats.ca_file={}", authority.ca());
    let foreign =
        [ca(&ours), format!("nats.cert_file={foreign_cert}"), format!("nats.key_file={foreign_key}")];
    let login = "authorization { user: agent, password: secret }";
    let leaf = ports::free()?;
    let monitor = ports::free()?;
    let silent = TcpListener::bind("127.0.0.1:0")?;
    let nowhere = ports::free()?;
    let at = |port, fault| ConnectionFault { port: Some(port), ..fault };
    let faults = [
        ConnectionFault::new(
            "wrong CA",
            tls(good.clone(), ""),
            &[ca(&theirs)],
            "isn't signed by the authority in nats.ca_file",
        ),
        ConnectionFault::new("TLS wanted", tls(good.clone(), ""), &[], "the server requires TLS"),
        ConnectionFault::new("no TLS there", login, &[ca(&ours)], "the server speaks no TLS on this port"),
        ConnectionFault::new(
            "no client certificate",
            tls(good.clone(), &verified),
            &[ca(&ours)],
            "client certificate",
        ),
        ConnectionFault::new(
            "foreign client certificate",
            tls(good, &verified),
            &foreign,
            "the server rejected the certificate in nats.cert_file",
        ),
        ConnectionFault::new(
            "another name",
            tls(other_name, ""),
            &[ca(&ours)],
            "isn't for the name in nats.urls",
        ),
        ConnectionFault::new(
            "expired",
            tls(expired, ""),
            &[ca(&ours)],
            "the server's certificate has expired",
        ),
        at(
            leaf,
            ConnectionFault::new(
                "leaf port",
                format!("leafnodes {{ listen: \"{leaf}\" }}"),
                &[],
                "port for other NATS servers",
            ),
        ),
        at(
            monitor,
            ConnectionFault::new("monitor port", format!("http: \"{monitor}\""), &[], "port for clients"),
        ),
        at(silent.local_addr()?, ConnectionFault::new("silent port", "", &[], "port for clients")),
        at(nowhere, ConnectionFault::new("no server", "", &[], "no server listens there")),
        ConnectionFault::new("max_connections", "max_connections: 0", &[], "max_connections"),
        ConnectionFault::new("max_control_line", "max_control_line: 64", &[], "max_control_line"),
        ConnectionFault::new(
            "wrong password",
            "authorization { user: agent, password: another }",
            &[],
            "the server refuses this login",
        ),
    ];
    let wrong: Vec<String> = faults
        .iter()
        .filter_map(|fault| fault.assert_said(dir.path()).err().map(|error| format!("{error:#}")))
        .collect();
    ensure!(wrong.is_empty(), "{}", wrong.join("\n\n"));
    Ok(())
}
