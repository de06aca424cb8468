//! The database that an agent loads records from with `loads.origin = "postgres"`.

use std::sync::Arc;

use async_trait::async_trait;
use evictd_agent::config::AgentConfig;
use evictd_agent::database::{Database, DatabaseError};
use evictd_core::ids::KeyHash;
use evictd_core::record::Lookup;
use evictd_ops::connection_url::ConnectionUrl;
use evictd_store::StoreError;
use evictd_store::postgres::{PostgresOptions, PostgresReader};
use tokio::sync::OnceCell;

/// Connects at the first lookup, so the agent can start without the database. Until a connection succeeds, each lookup
/// tries again, and the agent loads from the authority.
#[derive(Debug)]
struct ReplicaDatabase {
    options: PostgresOptions,
    reader: OnceCell<PostgresReader>,
}

#[async_trait]
impl Database for ReplicaDatabase {
    async fn lookup(&self, hash: KeyHash) -> Result<Lookup, DatabaseError> {
        let lookup = async {
            let reader =
                self.reader.get_or_try_init(|| PostgresReader::connect(self.options.clone())).await?;
            reader.lookup(hash).await
        };
        lookup.await.map_err(|error| match error {
            StoreError::Corrupt { .. } => DatabaseError::Record(error.into()),
            _ => DatabaseError::Unusable(error.into()),
        })
    }
}

/// Returns the configured database, or `None` if the agent loads records from the authority only.
pub(crate) fn configured(config: &AgentConfig) -> anyhow::Result<Option<Arc<dyn Database>>> {
    if config.database()?.is_none() {
        return Ok(None);
    }
    let source = ConnectionUrl::postgres_source(&config.postgres.url, &config.postgres.url_file);
    let mut options = PostgresOptions::from_source(Arc::new(source))?;
    options.connections = config.postgres.connections;
    options.statement_timeout = config.postgres.timeout.into();
    Ok(Some(Arc::new(ReplicaDatabase { options, reader: OnceCell::new() })))
}

#[cfg(test)]
mod tests {
    use crate::config_args::ConfigArgs;

    use super::*;

    fn agent(settings: &[(&str, &str)]) -> AgentConfig {
        let args =
            settings.iter().fold(ConfigArgs::default(), |args, (key, value)| args.and_set(key, *value));
        args.agent().unwrap().config
    }

    #[test]
    fn agent_uses_a_database_only_if_configured() {
        assert!(configured(&agent(&[])).unwrap().is_none());
        let url = ("postgres.url", "postgres://agent:hunter2@db.internal/evictd");
        let database = configured(&agent(&[("loads.origin", "postgres"), url])).unwrap().unwrap();
        let shown = format!("{database:?}");
        assert!(shown.contains("db.internal") && !shown.contains("hunter2"), "{shown}");
    }

    #[test]
    fn malformed_url_is_refused_at_start() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("url");
        std::fs::write(&file, "mysql://agent:hunter2@db.internal/evictd\n").unwrap();
        let from_file = [("loads.origin", "postgres"), ("postgres.url_file", file.to_str().unwrap())];
        let error = format!("{:#}", configured(&agent(&from_file)).unwrap_err());
        assert!(!error.contains("hunter2"), "{error}");
        std::fs::remove_file(&file).unwrap();
        let error = format!("{:#}", configured(&agent(&from_file)).unwrap_err());
        assert!(error.contains(file.to_str().unwrap()), "{error}");
    }

    #[tokio::test]
    async fn unreachable_database_fails_only_the_load() {
        let unused = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let url = format!("postgres://agent@{unused}/evictd");
        let config = agent(&[("loads.origin", "postgres"), ("postgres.url", &url)]);
        let database = configured(&config).unwrap().unwrap();
        for _ in 0..2 {
            let error = database.lookup(KeyHash([1; 32])).await.unwrap_err().to_string();
            assert!(error.contains("can't be opened"), "{error}");
        }
    }
}
