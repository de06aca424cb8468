//! Requests about changes that were made: evictd's own.

use serde::{Deserialize, Serialize};

use super::super::schema::{Field, Schema};
use super::{ApiError, id, parse};

/// `propagation.getReceipt`: how far has a change come?
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct GetReceipt {
    /// The request that made it, as its answer named it.
    pub request_id: String,
}

impl GetReceipt {
    /// The endpoint.
    pub const PATH: &'static str = "/v2/propagation.getReceipt";

    const SCHEMA: Schema = Schema::strict(Self::PATH, &[Field::required("requestId", id(3))]);

    /// Reads and checks a body; the error names everything that is wrong with it.
    pub fn parse(body: &[u8]) -> Result<Self, ApiError> {
        parse(&Self::SCHEMA, body)
    }
}
