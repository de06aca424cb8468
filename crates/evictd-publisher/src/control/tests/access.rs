//! The order of checks, and permissions.

use super::*;

const INVALID: &str = "unkey/application/invalid_input";
const MALFORMED: &str = "unkey/authentication/malformed";
const FORBIDDEN: &str = "unkey/authorization/insufficient_permissions";

#[tokio::test]
async fn a_bad_request_is_refused_before_the_root_key_is_looked_up() {
    let home = ControlFixture::new().await;
    // The store is closed.
    home.store.close().await;
    for path in endpoints() {
        let good = good_body(path).to_string();
        for (headers, r#type) in [
            (&[JSON_TYPE][..], INVALID),
            (&[JSON_TYPE, "authorization: Bearer "], MALFORMED),
            (&[JSON_TYPE, "authorization: Basic cm9vdA=="], MALFORMED),
            (&[JSON_TYPE, "authorization: bearer root"], MALFORMED),
            (&[JSON_TYPE, "authorization: Bearer root", "authorization: Bearer root"], MALFORMED),
        ] {
            home.post_with(path, headers, &good).await.refuses(400, r#type);
        }
        for body in ["", "{", "[]", "{}", r#"{"keyId":7,"apiId":7,"name":7}"#] {
            let answer = home.post_with(path, &[JSON_TYPE, "authorization: Bearer unknown"], body).await;
            answer.refuses(400, INVALID);
            assert!(!answer.json()["error"]["errors"].as_array().unwrap().is_empty(), "{path} {body}");
        }
        // The form of the header is looked at after the body.
        let basic = [JSON_TYPE, "authorization: Basic cm9vdA=="];
        home.post_with(path, &basic, "{").await.refuses(400, INVALID);
        home.call("root", path, &good_body(path)).await.refuses(500, "unkey/application/service_unavailable");
    }
}

/// Whether the header is there is looked at before the body, as by Unkey's validator.
#[tokio::test]
async fn a_missing_authorization_is_refused_before_the_body() {
    let home = ControlFixture::new().await;
    home.store.close().await;
    for path in endpoints() {
        let good = good_body(path).to_string();
        for headers in
            [&[JSON_TYPE][..], &[JSON_TYPE, "authorization:"], &[JSON_TYPE, "authorization:  "], &[]]
        {
            for body in [&*good, "{", ""] {
                let answer = home.post_with(path, &[headers, &["accept: */*"]].concat(), body).await;
                answer.refuses(400, INVALID);
                assert_eq!(answer.content_type(), "application/json");
                let error = &answer.json()["error"];
                assert_eq!(error["detail"], "Authorization header for 'bearer' scheme");
                let expected = json!([{
                    "location": "security",
                    "message": "Authorization header was not found",
                    "fix": "Add an 'Authorization' header to this request",
                }]);
                assert_eq!(error["errors"], expected, "{path} {headers:?} {body}");
            }
        }
        let unread = home.send(&format!("POST {path} HTTP/1.1"), &["content-length: 99999999"], "").await;
        unread.refuses(400, INVALID);
    }
}

#[tokio::test]
async fn unknown_members_are_refused_where_unkey_refuses_them() {
    let home = ControlFixture::new().await;
    for path in endpoints() {
        let mut body = good_body(path);
        body["unknown"] = json!(1);
        let answer = home.call("unknown", path, &body).await;
        match path {
            RerollKey::PATH => answer.refuses(401, "unkey/authentication/key_not_found"),
            _ => answer.refuses(400, INVALID),
        }
    }
}

#[tokio::test]
async fn unsupported_properties_are_refused_by_name() {
    let home = ControlFixture::new().await;
    for (path, field, value) in [
        (CreateKey::PATH, "ratelimits", json!([{ "name": "requests" }])),
        (CreateKey::PATH, "credits", json!({ "remaining": 5 })),
        (CreateKey::PATH, "recoverable", json!(true)),
        (CreateKey::PATH, "roles", json!(["admin"])),
        (UpdateKey::PATH, "ratelimits", json!([{ "name": "requests" }])),
        (UpdateKey::PATH, "credits", json!({ "remaining": 5 })),
        (UpdateKey::PATH, "roles", json!(["admin"])),
        (GetKey::PATH, "decrypt", json!(true)),
        (ListKeys::PATH, "decrypt", json!(true)),
        (VerifyKey::PATH, "credits", json!({ "cost": 1 })),
        (VerifyKey::PATH, "ratelimits", json!([{ "name": "requests" }])),
        (VerifyKey::PATH, "migrationId", json!("m_1")),
        (VerifyKey::PATH, "keyspaces", json!(["ks_1"])),
        (VerifyKey::PATH, "keyspaces", json!([])),
    ] {
        let mut body = good_body(path);
        body[field] = value;
        let answer = home.call("root", path, &body).await;
        answer.refuses(400, INVALID);
        let message = answer.json()["error"]["errors"][0]["message"].to_string();
        assert!(message.contains(field) && message.contains("not supported"), "{message}");
    }
}

#[tokio::test]
async fn a_root_key_that_may_not_act_is_refused_everywhere() {
    let home = ControlFixture::new().await;
    for text in ["deleted", "disabled", "expired", "ended"] {
        home.root_key(text, "ws_1", &ALL).await;
    }
    home.root_key("switched_off", "ws_off", &ALL).await;
    home.root_key("deleted_there", "ws_off", &ALL).await;
    home.sql("UPDATE root_keys SET deleted_at_m = 1 WHERE id = 'root_deleted'").await;
    home.sql("UPDATE root_keys SET deleted_at_m = 1 WHERE id = 'root_deleted_there'").await;
    home.sql("UPDATE root_keys SET enabled = 0 WHERE id = 'root_disabled'").await;
    home.sql("UPDATE root_keys SET expired = 1 WHERE id = 'root_expired'").await;
    home.sql("UPDATE root_keys SET expires = 1 WHERE id = 'root_ended'").await;
    home.sql("UPDATE workspaces SET enabled = 0 WHERE id = 'ws_off'").await;
    let api = home.create_api("root").await;
    let (_, ordinary) = home.create_key(&api).await;
    for path in endpoints() {
        for (text, status, r#type) in [
            ("unknown", 401, "unkey/authentication/key_not_found"),
            (&ordinary, 401, "unkey/authentication/key_not_found"),
            ("deleted", 401, "unkey/authentication/key_not_found"),
            ("deleted_there", 401, "unkey/authentication/key_not_found"),
            ("disabled", 403, "unkey/authorization/key_disabled"),
            ("switched_off", 403, "unkey/authorization/workspace_disabled"),
            ("expired", 403, "unkey/authorization/forbidden"),
            ("ended", 403, "unkey/authorization/forbidden"),
        ] {
            home.call(text, path, &good_body(path)).await.refuses(status, r#type);
        }
    }
}

/// The error of an endpoint for a caller without its right, and for ids that don't exist for the caller.
struct Rules {
    path: &'static str,
    rights: &'static [&'static str],
    forbidden: Denial,
    absent: Denial,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Denial {
    Forbidden,
    NoApi,
    NoKey,
    /// A verification is always answered.
    NotFound,
}

impl Denial {
    fn check(self, answer: &ControlResponse) {
        match self {
            Self::Forbidden => answer.refuses(403, FORBIDDEN),
            Self::NoApi => answer.refuses(404, "unkey/data/api_not_found"),
            Self::NoKey => answer.refuses(404, "unkey/data/key_not_found"),
            Self::NotFound => assert_eq!(answer.data(), json!({ "valid": false, "code": "NOT_FOUND" })),
        }
    }
}

const RULES: [Rules; 9] = {
    use Denial::{Forbidden, NoApi, NoKey, NotFound};
    [
        // A caller that may not read or delete an API learns nothing about it ...
        Rules { path: GetApi::PATH, rights: &["read_api"], forbidden: Forbidden, absent: NoApi },
        // ... to one that may not list or create keys, it doesn't exist ...
        Rules { path: ListKeys::PATH, rights: &["read_key", "read_api"], forbidden: NoApi, absent: NoApi },
        Rules { path: CreateKey::PATH, rights: &["create_key"], forbidden: NoApi, absent: NoApi },
        // ... and a key must exist before anything about it can be forbidden.
        Rules { path: GetKey::PATH, rights: &["read_key"], forbidden: Forbidden, absent: NoKey },
        Rules { path: UpdateKey::PATH, rights: &["update_key"], forbidden: Forbidden, absent: NoKey },
        Rules { path: RerollKey::PATH, rights: &["create_key"], forbidden: Forbidden, absent: NoKey },
        Rules { path: VerifyKey::PATH, rights: &["verify_key"], forbidden: NotFound, absent: NotFound },
        Rules { path: DeleteKey::PATH, rights: &["delete_key"], forbidden: Forbidden, absent: NoKey },
        Rules { path: DeleteApi::PATH, rights: &["delete_api"], forbidden: Forbidden, absent: NoApi },
    ]
};

/// The body of a request about this key of this API.
fn about(path: &str, api: &str, (key, text): &(String, String)) -> Value {
    let mut body = good_body(path);
    for (member, value) in [("apiId", api), ("keyId", key.as_str()), ("key", text.as_str())] {
        if body.get(member).is_some() {
            body[member] = json!(value);
        }
    }
    body
}

#[tokio::test]
async fn each_endpoint_requires_its_right_on_that_api_or_on_all() {
    let home = ControlFixture::new().await;
    for Rules { path, rights, .. } in RULES {
        for scope in ["one", "all"] {
            let api = home.create_api("root").await;
            let key = home.create_key(&api).await;
            let target = if scope == "one" { &*api } else { "*" };
            let rights: Vec<String> = rights.iter().map(|right| format!("api.{target}.{right}")).collect();
            let rights: Vec<&str> = rights.iter().map(String::as_str).collect();
            let root = format!("{}_{scope}", path.rsplit('.').next().unwrap());
            home.root_key(&root, "ws_1", &rights).await;
            let answer = home.call(&root, path, &about(path, &api, &key)).await;
            assert_eq!(answer.status, 200, "{path}: {}", answer.body);
            if path == VerifyKey::PATH {
                assert_eq!(answer.data()["code"], "VALID");
            }
        }
    }
}

#[tokio::test]
async fn no_other_right_will_do() {
    let home = ControlFixture::new().await;
    let (api, other) = (home.create_api("root").await, home.create_api("root").await);
    let key = home.create_key(&api).await;
    let elsewhere: Vec<String> = ALL.iter().map(|right| right.replace('*', &other)).collect();
    let elsewhere: Vec<&str> = elsewhere.iter().map(String::as_str).collect();
    home.root_key("elsewhere", "ws_1", &elsewhere).await;
    home.root_key("literal", "ws_1", &["*", "api.*.*", "api.*", "delete_key"]).await;
    for Rules { path, rights, forbidden, .. } in RULES {
        for right in rights {
            // Everything but this one.
            let others: Vec<&str> =
                ALL.iter().copied().filter(|have| !have.ends_with(&format!(".{right}"))).collect();
            let root = format!("{}_without_{right}", path.rsplit('.').next().unwrap());
            home.root_key(&root, "ws_1", &others).await;
            forbidden.check(&home.call(&root, path, &about(path, &api, &key)).await);
        }
        for root in ["poor", "elsewhere", "literal"] {
            forbidden.check(&home.call(root, path, &about(path, &api, &key)).await);
        }
    }
    assert_eq!(home.verify("root", &key.1).await["valid"], true, "nothing has happened to it");
}

#[tokio::test]
async fn foreign_deleted_and_unknown_ids_get_the_same_error() {
    let home = ControlFixture::new().await;
    let api = home.create_api("root").await;
    let key = home.create_key(&api).await;
    let deleted = home.create_key(&api).await;
    home.delete_key("root", &deleted.0).await.data();
    let deleted_api = home.create_api("root").await;
    let in_deleted_api = home.create_key(&deleted_api).await;
    home.delete_api("root", &deleted_api).await.data();
    for Rules { path, absent, .. } in RULES {
        let mut errors = std::collections::HashSet::new();
        let about_keys = matches!(absent, Denial::NoKey | Denial::NotFound);
        for answer in [
            home.call("root", path, &good_body(path)).await,
            home.call("foreign", path, &about(path, &api, &key)).await,
            home.call("root", path, &about(path, &deleted_api, &in_deleted_api)).await,
            if about_keys {
                home.call("root", path, &about(path, &api, &deleted)).await
            } else {
                home.call("foreign", path, &about(path, &deleted_api, &in_deleted_api)).await
            },
        ] {
            absent.check(&answer);
            errors.insert((answer.json()["error"].to_string(), answer.json()["data"].to_string()));
        }
        assert_eq!(errors.len(), 1, "{path}: {errors:?}");
    }
}

#[tokio::test]
async fn without_the_right_no_endpoint_reveals_an_api() {
    let home = ControlFixture::new().await;
    let api = home.create_api("root").await;
    for path in [GetApi::PATH, DeleteApi::PATH, ListKeys::PATH, CreateKey::PATH] {
        let mut answers = Vec::new();
        for id in ["api_none_such_here", &api] {
            let answer = home.call("poor", path, &json!({ "apiId": id })).await;
            answers.push(answer.json()["error"].to_string().replace(id, "api"));
        }
        assert_eq!(answers[0], answers[1], "{path}");
    }
}

#[tokio::test]
async fn a_missing_right_is_named() {
    let home = ControlFixture::new().await;
    let api = home.create_api("root").await;
    let key = home.create_key(&api).await;
    for Rules { path, rights, forbidden, .. } in RULES {
        if forbidden == Denial::Forbidden {
            let [right] = rights else { panic!("one right each") };
            let answer = home.call("poor", path, &about(path, &api, &key)).await;
            let detail = format!("Missing one of these permissions: api.*.{right} or api.{api}.{right}");
            assert_eq!(answer.json()["error"]["detail"], detail, "{path}");
        }
    }
}

#[tokio::test]
async fn apis_are_created_only_by_a_right_on_all_of_them() {
    let home = ControlFixture::new().await;
    home.root_key("narrow", "ws_1", &["api.api_1.create_api", "api.*.*"]).await;
    for root in ["poor", "narrow"] {
        let answer = home.call(root, CreateApi::PATH, &json!({ "name": "payments" })).await;
        answer.refuses(403, FORBIDDEN);
        assert_eq!(answer.json()["error"]["detail"], "Missing permission: 'api.*.create_api'");
    }
}
