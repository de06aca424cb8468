//! Lookups for agents that read the database themselves: the primary, or a standby near them that streams from it.

use std::sync::Arc;

use evictd_core::ids::KeyHash;
use evictd_core::record::Lookup;

use super::connections::Lane;
use super::{PostgresOptions, is_current, records, schema};
use crate::error::StoreError;

/// Reads what a verification needs, and nothing else. The user needs SELECT on `log_head`, `keys`, `root_keys`,
/// `apis`, `workspaces` and `_sqlx_migrations`.
#[derive(Debug)]
pub struct PostgresReader {
    lookups: Lane,
}

impl PostgresReader {
    /// Connects. [`StoreError::NotMigrated`] if the schema isn't this version's.
    pub async fn connect(options: PostgresOptions) -> Result<Self, StoreError> {
        let mut connection = options.open().await?;
        let options = schema::pin_to_home(&mut connection, options).await?;
        if !is_current(&mut connection, &options).await? {
            return Err(StoreError::NotMigrated { place: options.place() });
        }
        schema::assert_complete(&mut connection, &options).await?;
        let size = options.connections.max(1);
        Ok(Self { lookups: Lane::new(&Arc::new(options), size) })
    }

    /// What `hash` stands for, with the head of the log in the same snapshot (R6): a standby that lags says so.
    /// [`StoreError::NotAReplica`] from any other copy.
    pub async fn lookup(&self, hash: KeyHash) -> Result<Lookup, StoreError> {
        records::lookup_in_replica(&self.lookups, hash).await
    }

    /// Waits for lookups under way, then disconnects. Later ones fail.
    pub async fn close(&self) {
        self.lookups.close().await;
    }
}
