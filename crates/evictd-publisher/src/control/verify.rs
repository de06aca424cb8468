//! Local verifications: slower than an agent's, always from the store, and only with a recent round as proof.

use evictd_ops::clock;
use evictd_ops::http::Reply;
use evictd_wire::api::error::{ApiError, ErrorKind};
use evictd_wire::api::ids::hash;
use evictd_wire::api::requests::VerifyKey;
use evictd_wire::api::verification::{judge, visible};

use super::caller::Caller;

pub(super) async fn verify(caller: &Caller<'_>, request: VerifyKey<'_>) -> Result<Reply, ApiError> {
    if !caller.api.freshness.is_fresh().await {
        let detail = "This publisher can't prove that its store is up to date; ask an agent, or try again";
        return Err(ApiError::new(ErrorKind::TryLater, detail));
    }
    let found =
        caller.records().lookup(hash(&request.key)).await.map_err(|error| caller.api.store_failed(&error))?;
    let key = visible(&caller.root, &found.record);
    let (_, data) = judge(key, &request, clock::wall_now())?;
    Ok(caller.call.success(data))
}
