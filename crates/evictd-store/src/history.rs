//! What a store knows of itself (R15, R16), beyond its [`evictd_core::history::History`].

use std::fmt;

use crate::error::StoreError;

/// How many rounds' tokens are kept: those of ten seconds of twelve publishers that have four rounds a second each.
pub const ROUND_TOKENS_KEPT: u32 = 512;

/// The key by which a store recognizes what it gave out itself (R16). Drawn when the store is created, and copied with
/// it.
#[derive(Clone, PartialEq, Eq)]
pub struct VoucherKey(pub [u8; 32]);

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
