//! The receipt of a request.

use evictd_ops::http::Reply;
use evictd_wire::api::error::{ApiError, ErrorKind};
use evictd_wire::api::requests::GetReceipt;

use super::caller::Caller;
use crate::receipts::ReceiptView;

/// Any root key of the workspace may read its receipts: they hold ids only.
pub(super) async fn get_receipt(caller: &Caller<'_>, request: GetReceipt) -> Result<Reply, ApiError> {
    let view = caller.api.receipts.view(&caller.root.workspace_id, &request.request_id).await;
    match view.map_err(|error| caller.api.store_failed(&error))? {
        Some(ReceiptView::Open(propagation)) => Ok(caller.call.success(propagation)),
        Some(ReceiptView::Stored(body)) => Ok(caller.call.success(body)),
        None => Err(ApiError::new(
            ErrorKind::ReceiptNotFound,
            "This workspace has carried out no request with this id",
        )),
    }
}
