//! Local verifications.

use super::*;

#[tokio::test]
async fn a_verification_at_home_is_as_new_as_the_store() {
    let home = ControlFixture::new().await;
    let api = home.create_api("root").await;
    let body = json!({
        "apiId": api, "name": "billing", "externalId": "user_1", "meta": { "plan": "pro" }, "permissions": ["read"],
    });
    let (id, text) = home.create_key_with(&body).await;
    let identity = ids::identity(&WorkspaceId::new("ws_1"), "user_1");
    assert_eq!(
        home.verify("root", &text).await,
        json!({
            "valid": true, "code": "VALID", "keyId": id, "name": "billing", "meta": { "plan": "pro" },
            "enabled": true, "permissions": ["read"], "identity": { "id": identity, "externalId": "user_1" },
        })
    );
    for (update, code) in [
        (json!({ "enabled": false }), "DISABLED"),
        (json!({ "enabled": true, "expires": 1 }), "EXPIRED"),
        (json!({ "expires": null }), "VALID"),
    ] {
        home.update_key("root", &id, update).await.data();
        let verified = home.verify("root", &text).await;
        assert_eq!((&verified["code"], &verified["valid"]), (&json!(code), &json!(code == "VALID")));
    }
    home.delete_key("root", &id).await.data();
    assert_eq!(home.verify("root", &text).await, json!({ "valid": false, "code": "NOT_FOUND" }));
}

#[tokio::test]
async fn a_permission_query_is_checked_against_the_key() {
    let home = ControlFixture::new().await;
    let api = home.create_api("root").await;
    let (id, text) = home.create_key_with(&json!({ "apiId": api, "permissions": ["read", "docs.*"] })).await;
    let verify = async |root: &str, key: &str, query: &str| {
        let body = json!({ "key": key, "permissions": query, "tags": ["route=/pay"] });
        home.call(root, VerifyKey::PATH, &body).await
    };
    for (query, code) in [
        ("read", "VALID"),
        ("docs.* AND (write OR read)", "VALID"),
        ("docs.write", "INSUFFICIENT_PERMISSIONS"),
        ("read and write", "INSUFFICIENT_PERMISSIONS"),
    ] {
        assert_eq!(verify("root", &text, query).await.data()["code"], code, "{query}");
    }
    // An error of the query is reported only to root keys that may verify the key.
    let syntax = "user/bad_request/permissions_query_syntax_error";
    verify("root", &text, "read AND").await.refuses(400, syntax);
    let not_found = json!({ "valid": false, "code": "NOT_FOUND" });
    for (root, key) in [("root", "unknown"), ("poor", &*text), ("foreign", &*text)] {
        assert_eq!(verify(root, key, "read AND").await.data(), not_found, "{root}");
    }
    // The key's own state precedes its permissions.
    home.update_key("root", &id, json!({ "enabled": false })).await.data();
    assert_eq!(verify("root", &text, "write").await.data()["code"], "DISABLED");
}

#[tokio::test]
async fn a_root_key_is_none_that_can_be_verified() {
    let home = ControlFixture::new().await;
    assert_eq!(home.verify("root", "root").await, json!({ "valid": false, "code": "NOT_FOUND" }));
}

#[tokio::test]
async fn a_verification_without_a_recent_round_is_refused() {
    let home = ControlFixture::that_trusts(Duration::ZERO, HttpLimits::default(), &[], &[]).await;
    let api = home.create_api("root").await;
    let (id, text) = home.create_key(&api).await;
    for key in [&*text, "unknown"] {
        let answer = home.call("root", VerifyKey::PATH, &json!({ "key": key })).await;
        answer.refuses(503, "unkey/application/service_unavailable");
        assert_eq!(answer.json()["error"]["title"], "Service Unavailable");
        let detail = answer.json()["error"]["detail"].to_string();
        assert!(detail.contains("ask an agent, or try again"), "{detail}");
    }
    // Endpoints that need no proof are answered.
    home.get_key("root", &id).await.data();
    home.delete_key("root", &id).await.data();
}

#[tokio::test]
async fn an_expiry_of_zero_has_passed_and_is_omitted_from_answers() {
    let home = ControlFixture::new().await;
    let api = home.create_api("root").await;
    for zero in ["0", "-0"] {
        let body = format!(r#"{{"apiId":"{api}","expires":{zero}}}"#);
        let headers = ["authorization: Bearer root", "content-type: application/json"];
        let (id, text) = id_and_text(&home.post_with(CreateKey::PATH, &headers, &body).await.data());
        assert_eq!(
            home.verify("root", &text).await,
            json!({ "valid": false, "code": "EXPIRED", "keyId": id, "enabled": true })
        );
        assert_eq!(home.key_record(&text).await.expires_at.map(|end| end.0), Some(0), "agents get it");
        let shown = home.get_key("root", &id).await.data();
        assert_eq!(shown.get("expires"), None, "{shown}");
        let listed = home.call("root", ListKeys::PATH, &json!({ "apiId": api })).await.data();
        assert!(listed.as_array().unwrap().contains(&shown), "{listed}");
        // It is an expiry: removing it makes the key live again.
        home.update_key("root", &id, json!({ "expires": null })).await.data();
        assert_eq!(home.verify("root", &text).await["code"], "VALID");
        home.update_key("root", &id, json!({ "expires": 0 })).await.data();
        assert_eq!(home.verify("root", &text).await["code"], "EXPIRED");
    }
}
