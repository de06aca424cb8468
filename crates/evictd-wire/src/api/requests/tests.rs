//! Whole requests; `tests/unkey/fields.rs` tests each limit of each field.

use std::borrow::Cow;
use std::time::Duration;

use proptest::prelude::*;

use super::*;

fn locations(error: &ApiError) -> Vec<&str> {
    error.errors.iter().map(|error| error.location.as_str()).collect()
}

#[test]
fn requests_of_the_sdks_are_accepted() {
    let deletion = DeleteKey::parse(br#"{"keyId":"key_1234abcd","permanent":false}"#).unwrap();
    assert_eq!(deletion, DeleteKey { key_id: "key_1234abcd".into(), permanent: false });
    assert_eq!(DeleteApi::parse(br#"{"apiId":"api_1234abcd"}"#).unwrap().api_id, "api_1234abcd");
    assert_eq!(VerifyKey::parse(br#"{"key":"prod_abc"}"#).unwrap().key, "prod_abc");
    let key =
        CreateKey::parse(br#"{"apiId":"api_1","byteLength":16,"enabled":true,"recoverable":false}"#).unwrap();
    assert_eq!((key.api_id.as_str(), key.byte_length, key.enabled), ("api_1", 16, true));
    assert_eq!(GetKey::parse(br#"{"keyId":"key_1","decrypt":false}"#).unwrap().key_id, "key_1");
    assert_eq!(CreateApi::parse(br#"{"name":"payments"}"#).unwrap().name, "payments");
    assert_eq!(GetApi::parse(br#"{"apiId":"api_1234"}"#).unwrap().api_id, "api_1234");
    let update = UpdateKey::parse(br#"{"keyId":"key_1","enabled":false}"#).unwrap();
    assert_eq!((update.key_id.as_str(), update.enabled), ("key_1", Some(false)));
    let reroll = RerollKey::parse(br#"{"keyId":"key_1","expiration":0}"#).unwrap();
    assert_eq!((reroll.key_id.as_str(), reroll.grace()), ("key_1", Duration::ZERO));
    let list =
        ListKeys::parse(br#"{"apiId":"api_1","limit":100,"decrypt":false,"revalidateKeysCache":false}"#)
            .unwrap();
    assert_eq!((list.api_id.as_str(), list.limit), ("api_1", 100));
}

#[test]
fn absent_properties_have_their_defaults() {
    assert!(!DeleteKey::parse(br#"{"keyId":"key_1"}"#).unwrap().permanent);
    let key = CreateKey::parse(br#"{"apiId":"api_1"}"#).unwrap();
    assert_eq!((key.byte_length, key.enabled, key.expires), (16, true, None));
    assert!(key.prefix.is_none() && key.name.is_none() && key.meta.is_none());
    assert!(key.external_id.is_none() && key.permissions.is_empty());
    let list = ListKeys::parse(br#"{"apiId":"api_1"}"#).unwrap();
    assert_eq!((list.limit, list.cursor, list.external_id), (100, None, None));
    assert_eq!(VerifyKey::parse(br#"{"key":"k"}"#).unwrap(), VerifyKey::new("k"));
}

#[test]
fn an_update_keeps_absent_and_clears_null_properties() {
    let kept = UpdateKey::parse(br#"{"keyId":"key_1"}"#).unwrap();
    assert_eq!((&kept.name, &kept.external_id, &kept.expires), (&Patch::Keep, &Patch::Keep, &Patch::Keep));
    assert!(kept.meta.is_keep());
    assert_eq!((kept.enabled, &kept.permissions), (None, &None));

    let body =
        br#"{"keyId":"key_1","name":null,"externalId":null,"meta":null,"expires":null,"credits":null}"#;
    let cleared = UpdateKey::parse(body).unwrap();
    assert_eq!(
        (&cleared.name, &cleared.external_id, &cleared.expires),
        (&Patch::Clear, &Patch::Clear, &Patch::Clear)
    );
    assert!(matches!(cleared.meta, Patch::Clear));

    let body = br#"{"keyId":"key_1","name":"ci","externalId":"u.1-x","meta":{"b": 1.50},"expires":0,
        "enabled":true,"permissions":[],"ratelimits":[],"roles":[]}"#;
    let set = UpdateKey::parse(body).unwrap();
    assert_eq!(set.name, Patch::Set("ci".to_owned()));
    assert_eq!(set.external_id, Patch::Set("u.1-x".to_owned()));
    assert!(matches!(set.meta, Patch::Set(meta) if meta.get() == r#"{"b": 1.50}"#));
    assert_eq!((set.expires, set.enabled, set.permissions), (Patch::Set(0), Some(true), Some(Vec::new())));
}

#[test]
fn an_update_with_unsupported_rights_is_rejected() {
    let body =
        br#"{"keyId":"key_1","roles":["admin"],"ratelimits":[{"name":"x"}],"credits":{"remaining":5}}"#;
    let error = UpdateKey::parse(body).unwrap_err();
    assert_eq!(locations(&error), ["/properties/credits", "/properties/ratelimits", "/properties/roles"]);
    assert!(error.errors.iter().all(|error| error.message.contains("not supported by evictd")));
    assert_eq!(error.errors[0].fix.as_deref(), Some("leave it out, or send null"));
}

#[test]
fn permissions_become_a_sorted_set() {
    let key = CreateKey::parse(br#"{"apiId":"api_1","permissions":["b","a","b","B","*"]}"#).unwrap();
    assert_eq!(key.permissions, ["*", "B", "a", "b"]);
    let update = UpdateKey::parse(br#"{"keyId":"key_1","permissions":["z:1","a-b","z:1"]}"#).unwrap();
    assert_eq!(update.permissions.unwrap(), ["a-b", "z:1"]);
}

#[test]
fn a_reroll_ignores_unknown_properties() {
    let body = br#"{"keyId":"key_1","expiration":60000,"remaining":1,"remaining":{"a":"\ud800"}}"#;
    let request = RerollKey::parse(body).unwrap();
    assert_eq!(request.grace(), Duration::from_mins(1));
    let error = RerollKey::parse(br#"{"keyId":"key_1","keyId":"key_2","expiration":0}"#).unwrap_err();
    assert_eq!(locations(&error), ["requestBody"]);
}

#[test]
fn every_endpoint_is_found_by_its_path() {
    for endpoint in Endpoint::ALL {
        assert_eq!(Endpoint::of(endpoint.path()), Some(endpoint));
    }
    assert_eq!(Endpoint::of("/v2/keys.whoami"), None);
    assert!(Endpoint::ALL.iter().enumerate().all(|(index, endpoint)| *endpoint as usize == index));
}

#[test]
fn ids_have_their_lengths_and_characters() {
    assert!(DeleteKey::parse(br#"{"keyId":"abc"}"#).is_ok());
    assert!(DeleteApi::parse(br#"{"apiId":"12345678"}"#).is_ok());
    let error = DeleteApi::parse(br#"{"apiId":"api_123"}"#).unwrap_err();
    assert_eq!(locations(&error), ["/properties/apiId/minLength"]);
    let error = DeleteKey::parse(br#"{"keyId":"key-1"}"#).unwrap_err();
    assert_eq!(locations(&error), ["/properties/keyId/pattern"]);
    let error = DeleteKey::parse(format!(r#"{{"keyId":"{}"}}"#, "k".repeat(256)).as_bytes()).unwrap_err();
    assert_eq!(locations(&error), ["/properties/keyId/maxLength"]);
}

#[test]
fn metadata_is_kept_byte_for_byte() {
    let key = CreateKey::parse(br#"{"apiId":"api_1","meta":{"b": 1.50, "a":[ ]}}"#).unwrap();
    assert_eq!(key.meta.unwrap().get(), r#"{"b": 1.50, "a":[ ]}"#);
}

#[test]
fn a_key_with_unsupported_rights_is_not_created() {
    let body = br#"{"apiId":"api_1","roles":["admin"],"ratelimits":[{"name":"x"}],"credits":{"remaining":5},
        "recoverable":true}"#;
    let error = CreateKey::parse(body).unwrap_err();
    assert_eq!(error.errors.len(), 4);
    assert!(error.errors.iter().all(|error| error.message.contains("not supported by evictd")));
    let harmless =
        br#"{"apiId":"api_1","roles":[],"permissions":[],"ratelimits":[],"credits":{"remaining":null}}"#;
    assert!(CreateKey::parse(harmless).is_ok());
    let update = br#"{"keyId":"key_1","credits":{"remaining":null}}"#;
    assert!(UpdateKey::parse(update).is_ok());
}

#[test]
fn a_verification_with_unsupported_properties_is_rejected() {
    for field in [
        r#""credits":{"cost":1}"#,
        r#""ratelimits":[{"name":"x"}]"#,
        r#""migrationId":"m""#,
        r#""keyspaces":["ks"]"#,
        // A restriction to nothing admits nothing, which isn't what leaving it out means.
        r#""keyspaces":[]"#,
    ] {
        let error = VerifyKey::parse(format!(r#"{{"key":"k",{field}}}"#).as_bytes()).unwrap_err();
        assert!(error.errors[0].message.contains("not supported by evictd"), "{field}");
    }
    // Version 1 required it; version 2 rejects it like any unknown field.
    let error = VerifyKey::parse(br#"{"key":"k","apiId":"api_1"}"#).unwrap_err();
    assert_eq!(locations(&error), ["/additionalProperties"]);
}

#[test]
fn harmless_extras_of_a_verification_take_the_slow_path() {
    let body = br#"{"key":"k\u0041","tags":["a=b"],"ratelimits":[]}"#;
    assert_eq!(VerifyKey::parse_plain(body), None);
    let request = VerifyKey::parse(body).unwrap();
    assert_eq!((request.key.as_ref(), request.tags.len()), ("kA", 1));
}

#[test]
fn a_plain_verification_copies_nothing() {
    let body = br#"{"key":"prod_abc","tags":["a=b"],"permissions":"a OR b"}"#;
    let request = VerifyKey::parse(body).unwrap();
    assert!(matches!(request.key, Cow::Borrowed("prod_abc")));
    assert!(matches!(request.tags[..], [Cow::Borrowed("a=b")]));
    assert!(matches!(request.permissions, Some(Cow::Borrowed("a OR b"))));
}

#[test]
fn keys_in_a_rejected_or_printed_verification_are_redacted() {
    let body = br#"{"key":"prod_hunter2","credits":1}"#;
    assert!(!format!("{:?}", VerifyKey::parse(body)).contains("hunter2"));
    let body = br#"{"key":"prod_hunter2"}"#;
    assert!(!format!("{:?}", VerifyKey::parse(body)).contains("hunter2"));
    let body = br#"{"key":["prod_hunter2"], "tags":"prod_hunter2"}"#;
    assert!(!format!("{:?}", VerifyKey::parse(body)).contains("hunter2"));
}

#[test]
fn a_permission_query_takes_the_fast_path_unparsed() {
    let body = br#"{"key":"k","permissions":"a AND ("}"#;
    let request = VerifyKey::parse_plain(body).unwrap();
    assert!(matches!(request.permissions, Some(Cow::Borrowed("a AND ("))));
    let error = VerifyKey::parse(br#"{"key":"k","permissions":null}"#).unwrap_err();
    assert_eq!(locations(&error), ["/properties/permissions/type"]);
}

#[test]
fn an_array_is_not_accepted_as_an_object() {
    let error = VerifyKey::parse(br#"["prod_abc"]"#).unwrap_err();
    assert_eq!(locations(&error), ["/type"]);
}

#[test]
fn a_missing_authorization_has_the_words_of_unkeys_validator() {
    for error in [missing_authorization(), authorization(b"").unwrap_err()] {
        assert_eq!((error.kind, error.status()), (ErrorKind::InvalidInput, 400));
        assert_eq!(error.detail, "Authorization header for 'bearer' scheme");
        let problem = FieldError {
            location: "security".to_owned(),
            message: "Authorization header was not found".to_owned(),
            fix: Some("Add an 'Authorization' header to this request".to_owned()),
        };
        assert_eq!(error.errors, [problem]);
    }
}

#[test]
fn a_malformed_authorization_header_is_rejected() {
    assert_eq!(authorization(b"Bearer unkey_1").unwrap(), "unkey_1");
    assert_eq!(authorization(b"Bearer  unkey_1 ").unwrap(), "unkey_1");
    for header in [&b"Bearer"[..], b"Bearer ", b"Bearer  ", b"bearer x", b"Basic abc", b"Bearer \xff"] {
        let error = authorization(header).unwrap_err();
        assert_eq!((error.kind, error.status()), (ErrorKind::AuthenticationMalformed, 400));
    }
}

#[test]
fn an_unknown_content_type_has_the_words_of_unkeys_validator() {
    let error = unknown_content_type("");
    assert_eq!(error.detail, "POST operation request content type '' does not exist");
    assert_eq!((error.kind, locations(&error)), (ErrorKind::InvalidInput, vec!["requestBody"]));
    assert_eq!(
        unknown_content_type("text/plain; charset=utf-8").detail,
        "POST operation request content type 'text/plain; charset=utf-8' does not exist"
    );
    assert!(unknown_content_type(&"x".repeat(10_000)).detail.len() < 200);
}

#[test]
fn requests_serialize_as_they_parse() {
    let key = CreateKey::parse(br#"{"apiId":"api_1","prefix":"p","meta":{"a":1},"expires":5}"#).unwrap();
    let body = serde_json::to_vec(&key).unwrap();
    let expected =
        r#"{"apiId":"api_1","prefix":"p","byteLength":16,"meta":{"a":1},"expires":5,"enabled":true}"#;
    assert_eq!(String::from_utf8(body.clone()).unwrap(), expected);
    assert!(CreateKey::parse(&body).is_ok());
    let body = br#"{"keyId":"key_1","name":null,"meta":{"a":1},"permissions":["a"]}"#;
    let update = UpdateKey::parse(body).unwrap();
    assert_eq!(serde_json::to_vec(&update).unwrap(), body);
    let deletion = DeleteKey { key_id: "key_1".into(), permanent: false };
    assert_eq!(serde_json::to_string(&deletion).unwrap(), r#"{"keyId":"key_1","permanent":false}"#);
    let verification = VerifyKey::new("k");
    assert_eq!(serde_json::to_string(&verification).unwrap(), r#"{"key":"k"}"#);
}

/// Bodies around the limits: valid ones, wrong types, repetitions, extras, random bytes.
fn bodies() -> impl Strategy<Value = Vec<u8>> {
    let name = prop_oneof![
        4 => Just("key"),
        2 => Just("tags"),
        1 => Just(r"k\u0065y"),
        1 => Just("ratelimits"),
        1 => Just("apiId"),
        1 => Just("permissions"),
        1 => Just("keyId"),
        1 => Just("name"),
        1 => Just("expires"),
        1 => Just("meta"),
        1 => Just("byteLength"),
    ];
    let value = prop_oneof![
        Just(r#""prod_abc""#.to_owned()),
        Just(r#""a\u0041\n""#.to_owned()),
        Just(r#""\ud800""#.to_owned()),
        (0usize..=520).prop_map(|length| format!("\"{}\"", "ä".repeat(length))),
        (0usize..=22).prop_map(|count| format!("[{}]", vec!["\"t\""; count].join(","))),
        (10i64..=300).prop_map(|number| number.to_string()),
        Just(r#"["", "ok"]"#.to_owned()),
        Just(r#"["\ud800"]"#.to_owned()),
        Just("[]".to_owned()),
        Just("null".to_owned()),
        Just("16.0".to_owned()),
        Just("-0".to_owned()),
        Just(r#"{"a":1e999}"#.to_owned()),
        Just(r#"{"a":{"a":1,"a":2}}"#.to_owned()),
    ];
    let members = prop::collection::vec((name, value), 0..4);
    let object = (members, "[ \n]{0,2}", prop_oneof![8 => Just(""), 1 => Just("x"), 1 => Just("}")])
        .prop_map(|(members, space, tail)| {
            let members: Vec<_> =
                members.iter().map(|(name, value)| format!("{space}\"{name}\"{space}:{value}")).collect();
            format!("{space}{{{}}}{space}{tail}", members.join(",")).into_bytes()
        });
    let damaged = (object, any::<prop::sample::Index>(), any::<u8>(), 0u8..4).prop_map(
        |(mut body, at, byte, damage)| {
            if damage == 0 && !body.is_empty() {
                let at = at.index(body.len());
                body[at] = byte;
            }
            body
        },
    );
    prop_oneof![
        8 => damaged,
        1 => Just(br#"["prod_abc"]"#.to_vec()),
        1 => prop::collection::vec(any::<u8>(), 0..20)
    ]
}

#[test]
fn minus_zero_is_zero() {
    let created = CreateKey::parse(br#"{"apiId":"api_1","expires":-0}"#).unwrap();
    assert_eq!(created.expires, Some(0));
    let updated = UpdateKey::parse(br#"{"keyId":"key_1","expires": -0 }"#).unwrap();
    assert_eq!(updated.expires, Patch::Set(0));
    let rerolled = RerollKey::parse(br#"{"keyId":"key_1","expiration":-0}"#).unwrap();
    assert_eq!(rerolled.grace(), Duration::ZERO);
}

proptest! {
    #[test]
    fn the_fast_path_accepts_only_what_the_schema_accepts(body in bodies()) {
        if let Some(quick) = VerifyKey::parse_plain(&body) {
            prop_assert!(VerifyKey::check(&body).is_ok());
            let slow: VerifyKey<'_> = serde_json::from_slice(&body).unwrap();
            prop_assert_eq!(quick, slow);
        }
    }

    #[test]
    fn bodies_that_a_schema_accepts_can_be_parsed(body in bodies()) {
        let results = [
            VerifyKey::parse(&body).err(),
            CreateKey::parse(&body).err(),
            UpdateKey::parse(&body).err(),
            RerollKey::parse(&body).err(),
            ListKeys::parse(&body).err(),
        ];
        for result in results {
            prop_assert!(result.is_none_or(|error| error.kind == ErrorKind::InvalidInput));
        }
    }

    #[test]
    fn keys_parse_as_they_were_sent(key in "\\PC{1,512}") {
        let body = serde_json::to_vec(&VerifyKey::new(key.as_str())).unwrap();
        prop_assert_eq!(VerifyKey::parse(&body).unwrap().key, key);
    }
}
