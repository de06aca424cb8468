//! Lookups for agents that read the database themselves: the primary, or a streaming standby near them.

use std::sync::Arc;

use evictd_core::ids::KeyHash;
use evictd_core::record::Lookup;

use super::lanes::Lane;
use super::migrations::is_current;
use super::options::PostgresOptions;
use super::{lookups, schema};
use crate::error::StoreError;

/// Reads what verifications need. The user needs SELECT on `log_head`, `keys`, `root_keys`, `apis`, `workspaces` and
/// `_sqlx_migrations`.
#[derive(Debug)]
pub struct PostgresReader {
    lane: Lane,
}

impl PostgresReader {
    /// Connects. Returns [`StoreError::NotMigrated`] if the schema isn't this version's.
    pub async fn connect(options: PostgresOptions) -> Result<Self, StoreError> {
        let mut connection = options.open().await?;
        let options = schema::pin_to_home(&mut connection, options).await?;
        if !is_current(&mut connection, &options).await? {
            return Err(StoreError::NotMigrated { place: options.place() });
        }
        schema::assert_complete(&mut connection, &options).await?;
        let size = options.connections.max(1);
        Ok(Self { lane: Lane::new(&Arc::new(options), size) })
    }

    /// Returns the record with this hash, and the head from the same snapshot (R6), which shows how far a standby lags.
    /// Returns [`StoreError::NotAReplica`] for any other copy of the store.
    pub async fn lookup(&self, hash: KeyHash) -> Result<Lookup, StoreError> {
        lookups::lookup_in_replica(&self.lane, hash).await
    }

    /// Waits for running lookups, then disconnects. Later lookups fail.
    pub async fn close(&self) {
        self.lane.close().await;
    }
}
