//! What a store keeps about itself besides its [`evictd_core::history::History`] (R15, R16).

use std::fmt;

use crate::error::StoreError;
use crate::rows::Columns;

/// How many rounds' tokens are kept: ten seconds of twelve publishers with four rounds a second each.
pub const ROUND_TOKENS_KEPT: u32 = 512;

/// The key with which a store recognizes its own vouchers (R16). Drawn when the store is created, and copied with it.
#[derive(Clone, PartialEq, Eq)]
pub struct VoucherKey(pub [u8; 32]);

impl VoucherKey {
    pub(crate) fn read(row: Option<&impl Columns>) -> Result<Self, StoreError> {
        let key = row.map_or(Ok(None), |row| row.optional_bytes("key"))?;
        key.and_then(|key| key.try_into().ok()).map(Self).ok_or_else(|| StoreError::Corrupt {
            what: "voucher key",
            value: "absent or too short".to_owned(),
        })
    }
}

impl fmt::Debug for VoucherKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("VoucherKey(..)")
    }
}

/// A random number that isn't 0.
pub(crate) fn draw() -> Result<u64, StoreError> {
    let drawn = getrandom::u64().map_err(|error| StoreError::Database {
        action: "draw a random number",
        source: std::io::Error::from(error).into(),
    })?;
    Ok(drawn.max(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_voucher_key_is_not_printed() {
        assert_eq!(format!("{:?}", VoucherKey([7; 32])), "VoucherKey(..)");
    }
}
