//! How much a workspace may request.

use super::*;

const LIMITED: &str = "user/too_many_requests/workspace_rate_limited";

fn limit_headers(answer: &ControlResponse) -> [Option<&str>; 4] {
    ["ratelimit-limit", "ratelimit-remaining", "ratelimit-reset", "retry-after"]
        .map(|name| answer.header(name))
}

#[tokio::test]
async fn a_workspace_over_its_limit_is_refused_for_all_root_keys() {
    let home = ControlFixture::with(HttpLimits::default(), &[("ws_1", RequestLimit::PerMinute(3))]).await;
    // A request that was refused before authentication doesn't count, and gets no headers.
    for (root, body, status) in [("root", json!({}), 400), ("unknown", json!({ "keyId": "key_none" }), 401)] {
        let answer = home.call(root, GetKey::PATH, &body).await;
        assert_eq!((answer.status, limit_headers(&answer)), (status, [None; 4]));
    }
    // Whatever becomes of them: a success, a missing right, something unknown.
    let answers = [
        home.call("root", CreateApi::PATH, &json!({ "name": "payments" })).await,
        home.call("poor", CreateApi::PATH, &json!({ "name": "payments" })).await,
        home.get_key("root", "key_none").await,
    ];
    for (answer, (status, remaining)) in answers.iter().zip([(200, "2"), (403, "1"), (404, "0")]) {
        assert_eq!(answer.status, status);
        let [limit, left, reset, retry] = limit_headers(answer);
        assert_eq!((limit, left, retry), (Some("3"), Some(remaining), None));
        assert!((1..=60).contains(&reset.unwrap().parse::<u64>().unwrap()), "{reset:?}");
    }
    for root in ["root", "poor"] {
        let answer = home.get_key(root, "key_none").await;
        answer.refuses(429, LIMITED);
        // The one error that an SDK understands in this type only.
        assert_eq!(answer.content_type(), "application/problem+json");
        let detail = "The workspace exceeded its API rate limit of 3/1m0s";
        assert_eq!(answer.json()["error"]["detail"], detail);
        let [limit, left, reset, retry] = limit_headers(&answer);
        assert_eq!((limit, left, reset), (Some("3"), Some("0"), retry));
        assert!((1..=60).contains(&retry.unwrap().parse::<u64>().unwrap()), "{retry:?}");
    }
    let answer = home.get_key("foreign", "key_none").await;
    assert_eq!((answer.status, limit_headers(&answer)), (404, [None; 4]), "another workspace has no limit");
}

#[tokio::test]
async fn a_workspace_with_a_limit_of_zero_is_always_refused() {
    let home = ControlFixture::with(HttpLimits::default(), &[("ws_1", RequestLimit::PerMinute(0))]).await;
    for path in endpoints() {
        let answer = home.call("root", path, &good_body(path)).await;
        answer.refuses(429, LIMITED);
        assert_eq!(limit_headers(&answer), [None; 4]);
    }
    assert_eq!(home.send(&format!("GET {LIVENESS_PATH} HTTP/1.1"), &[], "").await.status, 200);
}

#[tokio::test]
async fn requests_refused_after_authentication_count() {
    let home = ControlFixture::with(HttpLimits::default(), &[("ws_1", RequestLimit::PerMinute(9))]).await;
    let api = home.create_api("root").await;
    let (_, text) = home.create_key(&api).await;
    // The last that any check before the endpoint's own refuses.
    let refused = home.call("root", VerifyKey::PATH, &json!({ "key": "" })).await;
    assert_eq!((refused.status, limit_headers(&refused)), (400, [None; 4]));
    let unreadable = json!({ "key": text, "permissions": "read AND" });
    for left in ["6", "5"] {
        let answer = home.call("root", VerifyKey::PATH, &unreadable).await;
        answer.refuses(400, "user/bad_request/permissions_query_syntax_error");
        assert_eq!(limit_headers(&answer)[1], Some(left));
    }
}
