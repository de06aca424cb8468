//! What the endpoints about APIs do.

use evictd_core::record::RecordState;

use super::*;

#[tokio::test]
async fn deleting_an_api_deletes_all_keys_with_one_log_row() {
    let home = ControlFixture::new().await;
    let api = home.create_api("root").await;
    let mut keys = Vec::new();
    for _ in 0..3 {
        keys.push(home.create_key(&api).await);
    }
    home.news().await;
    assert_eq!(home.delete_api("root", &api).await.data(), json!({}));
    assert_eq!(home.news().await, [(Scope::Api(ApiId::new(api.as_str())), Cause::Deleted)]);
    for (id, text) in keys {
        assert_eq!(home.key_record(&text).await.state, RecordState::Deleted);
        home.get_key("root", &id).await.refuses(404, "unkey/data/key_not_found");
        home.delete_key("root", &id).await.refuses(404, "unkey/data/key_not_found");
    }
    home.delete_api("root", &api).await.refuses(404, "unkey/data/api_not_found");
}

#[tokio::test]
async fn a_protected_api_refuses_its_deletion() {
    let home = ControlFixture::new().await;
    let api = home.create_api("root").await;
    let (_, text) = home.create_key(&api).await;
    home.sql("UPDATE apis SET delete_protection = 1").await;
    home.news().await;

    let answer = home.delete_api("root", &api).await;
    answer.refuses(412, "unkey/application/protected_resource");
    assert_eq!(answer.json()["error"]["title"], "Resource is protected");
    assert_eq!(answer.content_type(), "application/json");
    assert_eq!(home.news().await, []);
    assert_eq!(home.key_record(&text).await.state, RecordState::Active);

    home.delete_api("poor", &api).await.refuses(403, "unkey/authorization/insufficient_permissions");
    home.delete_api("foreign", &api).await.refuses(404, "unkey/data/api_not_found");
    home.sql("UPDATE apis SET deleted_at_m = 1").await;
    home.delete_api("root", &api).await.refuses(404, "unkey/data/api_not_found");
}

#[tokio::test]
async fn an_api_is_shown_with_id_and_name() {
    let home = ControlFixture::new().await;
    let api = home.create_api("root").await;
    assert!(api.starts_with("api_"), "{api}");
    let shown = home.call("root", GetApi::PATH, &json!({ "apiId": api })).await.data();
    assert_eq!(shown, json!({ "id": api, "name": "payments" }));
}

/// The keys of a page, and where it goes on.
async fn page(home: &ControlFixture, body: &Value) -> (Vec<String>, Option<String>) {
    let answer = home.call("root", ListKeys::PATH, body).await;
    let keys = answer.data();
    let keys = keys.as_array().unwrap().iter().map(|key| key["keyId"].as_str().unwrap().to_owned());
    let pagination = answer.json()["pagination"].clone();
    let cursor = pagination["cursor"].as_str().map(str::to_owned);
    assert_eq!(pagination["hasMore"], cursor.is_some(), "{pagination}");
    (keys.collect(), cursor)
}

#[tokio::test]
async fn keys_of_an_api_are_listed_in_pages_by_id() {
    let home = ControlFixture::new().await;
    let (api, other) = (home.create_api("root").await, home.create_api("root").await);
    let mut ids = Vec::new();
    for _ in 0..7 {
        ids.push(home.create_key(&api).await.0);
    }
    ids.sort();
    home.create_key(&other).await;
    let (deleted, _) = home.create_key(&api).await;
    home.delete_key("root", &deleted).await.data();

    assert_eq!(page(&home, &json!({ "apiId": api })).await, (ids.clone(), None));
    let (mut listed, mut cursor) = page(&home, &json!({ "apiId": api, "limit": 3 })).await;
    assert_eq!(cursor.as_ref(), ids.get(3), "the first key of the next page");
    while let Some(from) = cursor {
        let (more, next) = page(&home, &json!({ "apiId": api, "limit": 3, "cursor": from })).await;
        listed.extend(more);
        cursor = next;
    }
    assert_eq!(listed, ids);
    let whole = json!({ "apiId": api, "limit": 7, "decrypt": false, "revalidateKeysCache": true });
    assert_eq!(page(&home, &whole).await, (ids, None), "exactly full is not more");
}

/// Failure: a job that pages through all keys sends a broken cursor, and silently gets the first page again.
#[tokio::test]
async fn an_unreadable_cursor_is_refused() {
    let home = ControlFixture::new().await;
    let (api, other) = (home.create_api("root").await, home.create_api("root").await);
    let (key, _) = home.create_key(&api).await;
    home.create_key(&other).await;
    home.sql("UPDATE keys SET id = 'by-hand' WHERE id = (SELECT max(id) FROM keys)").await;
    let (by_hand, elsewhere) = if page(&home, &json!({ "apiId": api })).await.0 == ["by-hand"] {
        (&api, &other)
    } else {
        (&other, &api)
    };
    for cursor in ["garbage", "!!", "key-1", "eyJpZCI6MX0=", "\u{e4}", " ", "key_", &key.replace('_', "-")] {
        let answer = home.call("root", ListKeys::PATH, &json!({ "apiId": api, "cursor": cursor })).await;
        answer.refuses(400, "unkey/application/invalid_input");
        assert_eq!(answer.json()["error"]["errors"][0]["location"], "/properties/cursor", "{cursor}");
    }
    // Direct SQL can store any id, which is the cursor of its own API only.
    let list = |api: &str, cursor: &str| json!({ "apiId": api, "cursor": cursor });
    assert_eq!(page(&home, &list(by_hand, "by-hand")).await.0, ["by-hand"]);
    let refused = home.call("root", ListKeys::PATH, &list(elsewhere, "by-hand")).await;
    refused.refuses(400, "unkey/application/invalid_input");
    // The key of a cursor may be gone when the next page is requested. As for Unkey, an empty cursor is none.
    for fine in ["key_zzzz", "key_1234abcd", ""] {
        home.call("root", ListKeys::PATH, &list(&api, fine)).await.data();
    }
}

#[tokio::test]
async fn an_id_that_no_api_can_have_is_not_found() {
    let home = ControlFixture::new().await;
    for id in ["api-x", "a", " ", "\u{e4}", "api_1\u{0}", "'--", &"x".repeat(5000)] {
        let answer = home.call("root", ListKeys::PATH, &json!({ "apiId": id })).await;
        answer.refuses(404, "unkey/data/api_not_found");
    }
    let empty = home.call("root", ListKeys::PATH, &json!({ "apiId": "" })).await;
    empty.refuses(400, "unkey/application/invalid_input");
    let errors = &empty.json()["error"]["errors"];
    assert_eq!(
        (errors.as_array().unwrap().len(), &errors[0]["location"]),
        (1, &json!("/properties/apiId/minLength"))
    );
}

#[tokio::test]
async fn a_list_can_be_of_one_owner_and_matches_get_key() {
    let home = ControlFixture::new().await;
    let api = home.create_api("root").await;
    home.create_key(&api).await;
    let body = json!({
        "apiId": api, "externalId": "user_1", "name": "billing", "meta": { "plan": "pro" },
        "permissions": ["read", "write"], "prefix": "prod",
    });
    let (own, text) = home.create_key_with(&body).await;
    let list = json!({ "apiId": api, "externalId": "user_1" });
    let answer = home.call("root", ListKeys::PATH, &list).await;
    assert_eq!(answer.data(), json!([home.get_key("root", &own).await.data()]));
    assert!(!answer.body.contains(&text[9..]), "the key itself is never shown again");
    let other_owner = json!({ "apiId": api, "externalId": "user_2" });
    assert_eq!(home.call("root", ListKeys::PATH, &other_owner).await.data(), json!([]));
}
