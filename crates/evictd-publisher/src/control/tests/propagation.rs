//! Waits for receipts, and access to receipts.

use super::*;

#[tokio::test]
async fn every_change_honors_a_preference_for_waiting() {
    let home = ControlFixture::new().await;
    let prefer = [JSON_TYPE, "authorization: Bearer root", "prefer: respond-async", "prefer: wait=0"];
    let created = home.post_with(CreateApi::PATH, &prefer, r#"{"name":"payments"}"#).await;
    assert_eq!(created.header("preference-applied"), Some("wait=0"));
    let propagation = &created.json()["meta"]["propagation"];
    assert_eq!((&propagation["state"], &propagation["final"]), (&json!("confirmed"), &json!(true)));
    let api = created.data()["apiId"].as_str().unwrap().to_owned();
    let (key, _) = home.create_key(&api).await;
    for (path, body) in [
        (CreateKey::PATH, json!({ "apiId": api })),
        (UpdateKey::PATH, json!({ "keyId": key, "enabled": false })),
        (RerollKey::PATH, json!({ "keyId": key, "expiration": 0 })),
        (DeleteKey::PATH, json!({ "keyId": key })),
        (DeleteApi::PATH, json!({ "apiId": api })),
    ] {
        let changed = home.post_with(path, &prefer, &body.to_string()).await;
        let meta = &changed.json()["meta"];
        assert_eq!(meta["propagation"]["requestId"], meta["requestId"], "{path}");
        assert_eq!(meta["propagation"]["state"], "pending", "no sequencer runs here");
        assert_eq!(changed.header("preference-applied"), Some("wait=0"));
        changed.data();
    }
}

#[tokio::test]
async fn a_change_that_affects_no_cache_is_confirmed_at_once() {
    let home = ControlFixture::new().await;
    let api = home.create_api("root").await;
    let (key, _) = home.create_key(&api).await;
    let prefer = [JSON_TYPE, "authorization: Bearer root", "prefer: wait=30"];
    let began = std::time::Instant::now();
    let updated = home.post_with(UpdateKey::PATH, &prefer, &json!({ "keyId": key }).to_string()).await;
    let propagation = &updated.json()["meta"]["propagation"];
    assert_eq!((&propagation["state"], &propagation["final"]), (&json!("confirmed"), &json!(true)));
    assert!(began.elapsed() < Duration::from_secs(15), "the wait ended early");
}

#[tokio::test]
async fn other_preferences_get_the_plain_answer() {
    let home = ControlFixture::new().await;
    for prefer in
        ["accept: application/json", "prefer: wait=soon", "prefer: await=3", "prefer: return=minimal"]
    {
        let headers = [JSON_TYPE, "authorization: Bearer root", prefer];
        let answer = home.post_with(CreateApi::PATH, &headers, r#"{"name":"payments"}"#).await;
        assert_eq!((answer.status, answer.header("preference-applied")), (200, None), "{prefer}");
        assert_eq!(answer.json()["meta"].as_object().unwrap().len(), 1, "{}", answer.body);
    }
    let refused = home.call("root", DeleteKey::PATH, &json!({ "keyId": "key_none" })).await;
    refused.refuses(404, "unkey/data/key_not_found");
}

#[tokio::test]
async fn a_wait_is_capped_and_the_answer_names_the_cap() {
    let home = ControlFixture::new().await;
    let headers = [JSON_TYPE, "authorization: Bearer root", "prefer: wait=99999999999999999999999999"];
    let made = home.post_with(CreateApi::PATH, &headers, r#"{"name":"payments"}"#).await;
    assert_eq!(made.header("preference-applied"), Some("wait=60"));
}

#[tokio::test]
async fn a_receipt_is_shown_to_its_workspace_only() {
    let home = ControlFixture::new().await;
    let answer = home.call("root", CreateApi::PATH, &json!({ "name": "payments" })).await;
    let request = json!({ "requestId": answer.request_id() });
    // No permission is needed: any root key of the workspace will do.
    for root in ["root", "poor"] {
        let receipt = home.call(root, GetReceipt::PATH, &request).await.data();
        assert_eq!(
            (&receipt["state"], &receipt["final"], &receipt["regions"]),
            (&json!("confirmed"), &json!(true), &json!([]))
        );
    }
    home.call("foreign", GetReceipt::PATH, &request).await.refuses(404, "evictd/data/receipt_not_found");
    let unknown = json!({ "requestId": "req_unknown" });
    home.call("root", GetReceipt::PATH, &unknown).await.refuses(404, "evictd/data/receipt_not_found");
}
