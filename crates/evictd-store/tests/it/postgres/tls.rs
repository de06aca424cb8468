//! TLS to the server, for publishers and for agents that read the database themselves.

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;

use evictd_core::ids::KeyHash;
use evictd_store::postgres::{PostgresReader, PostgresStore};
use evictd_store::{HomeStore, StoreError};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair, date_time_ymd};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::crypto::ring::default_provider;
use tokio_rustls::rustls::pki_types::PrivateKeyDer;

use super::{between, connect, database, options, populated};
use crate::fixture::run_round;

/// Who vouches for servers, and where clients find that.
struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
    file: PathBuf,
}

impl Authority {
    fn new(file: PathBuf) -> Self {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, file.to_string_lossy());
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        fs::write(&file, issuer.pem()).unwrap();
        Self { issuer, file }
    }

    /// Vouches for a server of that name.
    fn server(&self, name: &str) -> TlsAcceptor {
        self.server_with(&CertificateParams::new([name.to_owned()]).unwrap())
    }

    fn server_with(&self, params: &CertificateParams) -> TlsAcceptor {
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.issuer);
        let config = ServerConfig::builder_with_provider(Arc::new(default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(
                vec![certificate.unwrap().der().clone()],
                PrivateKeyDer::try_from(key.serialize_der()).unwrap(),
            );
        TlsAcceptor::from(Arc::new(config.unwrap()))
    }

    fn url(&self, port: u16, home: &str) -> String {
        let (database, ca) = (database(home), self.file.display());
        format!("postgres://evictd@127.0.0.1:{port}/{database}?sslmode=verify-full&sslrootcert={ca}")
    }
}

/// The causes that a publisher and an agent report, both refused with this advice.
async fn refusals(url: &str, expected: &str) -> [String; 2] {
    let publisher = PostgresStore::connect(options(url)).await.unwrap_err();
    let agent = PostgresReader::connect(options(url)).await.unwrap_err();
    [publisher, agent].map(|error| {
        let StoreError::Open { advice, source, .. } = error else { panic!("{error:?}") };
        assert!(advice.contains(expected), "{advice}: {source:?}");
        source.to_string()
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn tls_needs_the_right_authority_and_the_servers_name() {
    let fixture = populated(1).await;
    let plain = evictd_postgres_server::shared().unwrap().port();
    let directory = tempfile::tempdir().unwrap();
    let authority = Authority::new(directory.path().join("ca.pem"));
    let another = Authority::new(directory.path().join("another.pem"));

    let port = between::encrypted(plain, authority.server("127.0.0.1")).await;
    let url = authority.url(port, &fixture.url);
    let store = connect(&url).await;
    run_round(&store, &[]).await;
    store.close().await;
    let reader = PostgresReader::connect(options(&url)).await.unwrap();
    reader.lookup(KeyHash([1; 32])).await.unwrap();

    for message in refusals(&another.url(port, &fixture.url), "authority in sslrootcert").await {
        assert!(message.contains("UnknownIssuer"), "{message}");
    }
    let mut expired = CertificateParams::new(["127.0.0.1".to_owned()]).unwrap();
    (expired.not_before, expired.not_after) = (date_time_ymd(2020, 1, 1), date_time_ymd(2021, 1, 1));
    let port = between::encrypted(plain, authority.server_with(&expired)).await;
    for message in refusals(&authority.url(port, &fixture.url), "has expired").await {
        assert!(message.contains("expired"), "{message}");
    }
    let port = between::encrypted(plain, authority.server("db.elsewhere.example")).await;
    for message in refusals(&authority.url(port, &fixture.url), "isn't for the host").await {
        assert!(message.contains("not valid for name"), "{message}");
    }
    for message in refusals(&format!("{}?sslmode=require", fixture.url), "speaks no TLS").await {
        assert!(message.contains("does not support TLS"), "{message}");
    }
    for message in refusals(&authority.url(plain, &fixture.url), "speaks no TLS").await {
        assert!(message.contains("does not support TLS"), "{message}");
    }
}
