//! Requests for receipts: evictd's own.

use serde::{Deserialize, Serialize};

use super::super::schema::{Field, Schema};
use super::{ApiError, id, read_checked};

/// `propagation.getReceipt`: the progress of a change.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct GetReceipt {
    /// The `requestId` in the answer to the change.
    pub request_id: String,
}

request!(GetReceipt, "/v2/propagation.getReceipt", strict, &[Field::required("requestId", id(3))]);
