//! What a command prints: results in Unkey's form on standard output, everything else on standard error.

use std::fmt::Write as _;
use std::time::Duration;

use evictd_wire::api::envelope::{Failure, Meta, Pagination, Success};
use evictd_wire::api::requests::{CreateApi, CreateKey, RerollKey};
use indexmap::IndexMap;
use serde::{Deserialize, Serialize, Serializer};
use serde_json::value::RawValue;

use crate::call::{ApiAnswer, ApiCall, Delivery, NoAnswer, Repeat, SentCall};
use crate::settings::ClientSettings;

#[derive(PartialEq, Eq, Debug)]
pub(crate) struct Printout {
    pub(crate) stdout: String,
    pub(crate) stderr: String,
    pub(crate) is_success: bool,
}

pub(crate) fn render(call: &ApiCall, settings: &ClientSettings, sent: &SentCall, took: Duration) -> Printout {
    if let Some(problem) = problem(call, settings, sent) {
        return Printout { stdout: String::new(), stderr: format!("{problem}\n"), is_success: false };
    }
    let stdout = sent.result.as_ref().ok().and_then(|answer| success(answer, settings.json, took));
    Printout { stdout: stdout.unwrap_or_default(), stderr: String::new(), is_success: true }
}

/// Describes the failure; its first line stands for itself. Returns `None` on success.
pub(crate) fn problem(call: &ApiCall, settings: &ClientSettings, sent: &SentCall) -> Option<String> {
    let answer = match &sent.result {
        Ok(answer) if answer.status == 200 => {
            return parse(answer).is_none().then(|| foreign(answer, settings));
        }
        Ok(answer) => answer,
        Err(lost) => return Some(unreachable(call, settings, lost)),
    };
    let mut problem = refusal(answer, settings);
    if answer.status == 404 && sent.is_maybe_done && call.repeat == Repeat::FindsNothing {
        problem.push_str(
            "\n\nAn earlier attempt failed or got no answer, but has probably been carried out: \
             the object that you deleted is gone.",
        );
    }
    Some(problem)
}

/// A successful answer; a list has a cursor too.
#[derive(Deserialize)]
struct SuccessParts<'a> {
    meta: Meta,
    #[serde(borrow)]
    data: &'a RawValue,
    #[serde(default)]
    pagination: Option<Pagination>,
}

/// Returns the id of the key that a call has created; its text is only in this answer.
pub(crate) fn created_key(call: &ApiCall, answer: &ApiAnswer) -> Option<String> {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct PrintedKey {
        key_id: String,
    }
    let creates = [CreateKey::PATH, RerollKey::PATH].contains(&call.path) && answer.status == 200;
    let success: Success<PrintedKey> =
        creates.then(|| serde_json::from_slice(&answer.body).ok()).flatten()?;
    Some(success.data.key_id)
}

/// Returns `None` if the answer does not have the envelope of evictd and Unkey.
fn parse(answer: &ApiAnswer) -> Option<SuccessParts<'_>> {
    serde_json::from_slice(&answer.body).ok()
}

/// Whether the answer to a verification says that the key is valid.
pub(crate) fn is_valid_key(answer: &ApiAnswer) -> bool {
    #[derive(Deserialize)]
    struct VerdictMember {
        valid: bool,
    }
    let verdict =
        parse(answer).and_then(|parts| serde_json::from_str::<VerdictMember>(parts.data.get()).ok());
    verdict.is_some_and(|verdict| verdict.valid)
}

fn success(answer: &ApiAnswer, whole: bool, took: Duration) -> Option<String> {
    let parts = parse(answer)?;
    if whole {
        return Some(format!("{}\n", indented(serde_json::from_slice(&answer.body).ok()?)));
    }
    let (id, data) = (parts.meta.request_id, indented(parts.data));
    let cursor = parts.pagination.and_then(|page| page.cursor);
    let more = cursor.map(|cursor| format!("\nmore: --cursor={cursor}\n")).unwrap_or_default();
    Some(format!("{id} (took {}ms)\n\n{data}\n{more}", took.as_millis()))
}

fn refusal(answer: &ApiAnswer, settings: &ClientSettings) -> String {
    let Ok(Failure { meta, error }) = serde_json::from_slice(&answer.body) else {
        return foreign(answer, settings);
    };
    match error.status {
        400 => {
            let mut text = error.detail;
            for problem in error.errors.unwrap_or_default() {
                // Writing to a String cannot fail.
                let _ = write!(text, "\n  {}: {}", problem.location, problem.message);
                if let Some(fix) = problem.fix {
                    let _ = write!(text, " ({fix})");
                }
            }
            text
        }
        401 => format!(
            "Authentication failed: {}\n\nCheck the root key in --root-key, EVICTD_ROOT_KEY or the config file. \
             An ordinary API key is not a root key.",
            error.detail
        ),
        403 => format!("Permission denied: {}", error.detail),
        404 => format!("Not found: {}", error.detail),
        status => {
            let retry = answer.retry_after.map(|after| format!("\n\nTry again in {} s.", after.as_secs()));
            format!(
                "{} ({status}): {}\n  type: {}\n  request: {}{}",
                error.title,
                error.detail,
                error.r#type,
                meta.request_id,
                retry.unwrap_or_default()
            )
        }
    }
}

fn foreign(answer: &ApiAnswer, settings: &ClientSettings) -> String {
    let (command, variable) = settings.server.command_and_variable();
    format!(
        "{} answered {}, but not in the form of `{command}`; check --api-url or {variable}{}",
        settings.url,
        answer.status,
        through(settings)
    )
}

fn unreachable(call: &ApiCall, settings: &ClientSettings, lost: &NoAnswer) -> String {
    let (command, variable) = settings.server.command_and_variable();
    let advice = match (lost.delivery, call.repeat) {
        (Delivery::Unsendable, _) => format!("Check --api-url or {variable}, and the root key."),
        (Delivery::NotSent, _) => format!(
            "Is `{command}` running there? Start it with `{command}`, or set its URL with --api-url or {variable}."
        ),
        (Delivery::Unknown, Repeat::Harmless) => "Try again.".to_owned(),
        (Delivery::Unknown, Repeat::FindsNothing) => {
            "The deletion may or may not have been carried out. Try again: \"not found\" then means that it was."
                .to_owned()
        }
        (Delivery::Unknown, Repeat::Duplicates) => {
            format!("{} It was not retried.", possible_result(call.path))
        }
    };
    format!("no answer from {}{}: {}\n\n{advice}", settings.url, through(settings), lost.cause)
}

/// Names the proxy, which may be what failed.
fn through(settings: &ClientSettings) -> String {
    settings.proxy.as_ref().map(|proxy| format!(" ({proxy})")).unwrap_or_default()
}

/// Describes what a creation without an answer may have left behind.
fn possible_result(path: &str) -> &'static str {
    match path {
        CreateApi::PATH => {
            "The API may have been created nevertheless, under an unknown id. It has no keys and does no harm."
        }
        RerollKey::PATH => {
            "The key may have been replaced nevertheless: it then expires as requested, and its successor is lost."
        }
        _ => "The key may have been created nevertheless. Its text is lost, so it cannot be used.",
    }
}

/// Indents JSON by two spaces.
fn indented(json: &RawValue) -> String {
    // JSON that was just parsed can be serialized.
    serde_json::to_string_pretty(&Verbatim(json)).unwrap_or_default()
}

/// JSON whose members keep the server's order, and whose numbers keep its digits.
#[derive(Deserialize)]
#[serde(transparent)]
struct Verbatim<'a>(#[serde(borrow)] &'a RawValue);

impl Serialize for Verbatim<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if let Ok(object) = serde_json::from_str::<IndexMap<String, Verbatim<'_>>>(self.0.get()) {
            object.serialize(serializer)
        } else if let Ok(array) = serde_json::from_str::<Vec<Verbatim<'_>>>(self.0.get()) {
            array.serialize(serializer)
        } else {
            self.0.serialize(serializer)
        }
    }
}

#[cfg(test)]
mod tests {
    use evictd_wire::api::error::{ApiError, ErrorKind, FieldError};
    use evictd_wire::api::secret::Secret;

    use super::*;
    use crate::call::ApiServer;

    fn settings(json: bool) -> ClientSettings {
        let url = "http://127.0.0.1:7070".to_owned();
        let root_key = Secret::new("unkey_hunter2");
        ClientSettings { root_key, url, server: ApiServer::Publisher, json, proxy: None }
    }

    fn call(repeat: Repeat) -> ApiCall {
        ApiCall::new("/v2/test", &serde_json::json!({}), repeat).unwrap()
    }

    fn answered(status: u16, body: impl Into<Vec<u8>>, is_maybe_done: bool, json: bool) -> Printout {
        let answer = ApiAnswer { status, body: body.into(), retry_after: None };
        let sent = SentCall { result: Ok(answer), is_maybe_done };
        render(&call(Repeat::FindsNothing), &settings(json), &sent, Duration::from_micros(45_900))
    }

    /// Returns what a failure prints; standard output stays empty.
    fn failed(error: &ApiError, is_maybe_done: bool) -> String {
        let body = Failure::new("req_1", error).to_bytes();
        let printed = answered(error.status(), body, is_maybe_done, true);
        assert_eq!((printed.stdout.as_str(), printed.is_success), ("", false));
        printed.stderr
    }

    const EMPTY: &str = r#"{"meta":{"requestId":"req_2c9a0jf23l4k567"},"data":{}}"#;

    #[test]
    fn success_prints_request_time_and_data() {
        let printed = answered(200, EMPTY, false, false);
        assert_eq!(printed.stdout, "req_2c9a0jf23l4k567 (took 45ms)\n\n{}\n");
        assert_eq!((printed.stderr.as_str(), printed.is_success), ("", true));
    }

    #[test]
    fn json_output_is_the_whole_answer() {
        let printed = answered(200, EMPTY, false, true);
        let expected =
            "{\n  \"meta\": {\n    \"requestId\": \"req_2c9a0jf23l4k567\"\n  },\n  \"data\": {}\n}\n";
        assert_eq!(printed.stdout, expected);
    }

    #[test]
    fn list_prints_the_next_cursor() {
        let page = |pagination: &str| {
            let body = format!(r#"{{"meta":{{"requestId":"req_1"}},"data":[1],"pagination":{pagination}}}"#);
            answered(200, body, false, false).stdout
        };
        let more = page(r#"{"cursor":"key_3","hasMore":true}"#);
        assert_eq!(more, "req_1 (took 45ms)\n\n[\n  1\n]\n\nmore: --cursor=key_3\n");
        assert_eq!(page(r#"{"hasMore":false}"#), "req_1 (took 45ms)\n\n[\n  1\n]\n");
    }

    #[test]
    fn rate_limit_says_when_to_retry() {
        let body =
            Failure::new("req_1", &ApiError::new(ErrorKind::WorkspaceRateLimited, "because")).to_bytes();
        let answer = ApiAnswer { status: 429, body, retry_after: Some(Duration::from_secs(12)) };
        let text = refusal(&answer, &settings(false));
        assert!(text.starts_with("Too Many Requests (429): because\n"), "{text}");
        assert!(text.ends_with("\n\nTry again in 12 s."), "{text}");
    }

    #[test]
    fn data_keeps_order_and_digits() {
        let json = r#"{"b":1.50,"a":[ ],"c":[1,{"d":"{\"\\"}],"e":{ "f" : [[]] },"g":1e30}"#;
        let expected = r#"{
  "b": 1.50,
  "a": [],
  "c": [
    1,
    {
      "d": "{\"\\"
    }
  ],
  "e": {
    "f": [
      []
    ]
  },
  "g": 1e30
}"#;
        let indent = |text: &str| indented(serde_json::from_str(text).unwrap());
        assert_eq!(indent(json), expected);
        assert_eq!(indent("null"), "null");
    }

    #[test]
    fn refusals_have_their_forms() {
        let error = |kind| ApiError::new(kind, "because");
        assert_eq!(failed(&error(ErrorKind::InsufficientPermissions), false), "Permission denied: because\n");
        assert_eq!(failed(&error(ErrorKind::KeyNotFound), false), "Not found: because\n");
        let text = failed(&error(ErrorKind::RootKeyNotFound), false);
        assert!(text.starts_with("Authentication failed: because\n\nCheck the root key"), "{text}");
        assert_eq!(
            failed(&error(ErrorKind::ProtectedResource), false),
            "Resource is protected (412): because\n  \
             type: https://unkey.com/docs/errors/unkey/application/protected_resource\n  request: req_1\n"
        );
    }

    #[test]
    fn bad_request_lists_what_to_correct() {
        let mut error = ApiError::new(ErrorKind::InvalidInput, "no good");
        error.errors = vec![
            FieldError { location: "/a".into(), message: "b".into(), fix: None },
            FieldError { location: "/c".into(), message: "d".into(), fix: Some("e".into()) },
        ];
        assert_eq!(failed(&error, false), "no good\n  /a: b\n  /c: d (e)\n");
    }

    #[test]
    fn not_found_on_a_retry_is_explained() {
        let error = ApiError::new(ErrorKind::KeyNotFound, "because");
        let text = failed(&error, true);
        assert!(text.starts_with("Not found: because\n\nAn earlier attempt"), "{text}");
    }

    #[test]
    fn foreign_answer_names_the_url() {
        for (status, body) in
            [(200, "hello"), (200, r#"{"data":{}}"#), (404, "404 page not found"), (502, "<html>")]
        {
            let printed = answered(status, body, false, false);
            assert!(!printed.is_success && printed.stdout.is_empty());
            assert!(printed.stderr.contains("http://127.0.0.1:7070 answered"), "{}", printed.stderr);
            assert!(printed.stderr.contains("--api-url"), "{}", printed.stderr);
        }
    }

    #[test]
    fn only_an_answer_that_says_so_makes_a_key_valid() {
        let is_valid =
            |body: &str| is_valid_key(&ApiAnswer { status: 200, body: body.into(), retry_after: None });
        assert!(is_valid(r#"{"meta":{"requestId":"r"},"data":{"valid":true,"code":"VALID"}}"#));
        for body in [
            r#"{"meta":{"requestId":"r"},"data":{"valid":false,"code":"NOT_FOUND"}}"#,
            r#"{"meta":{"requestId":"r"},"data":{}}"#,
            r#"{"meta":{"requestId":"r"},"data":{"valid":"true"}}"#,
            "",
        ] {
            assert!(!is_valid(body), "{body}");
        }
    }

    #[test]
    fn unreachable_server_is_named_with_its_start_command() {
        let lost = |delivery, repeat| {
            let sent = SentCall {
                result: Err(NoAnswer { delivery, cause: "refused".into() }),
                is_maybe_done: false,
            };
            render(&call(repeat), &settings(false), &sent, Duration::ZERO).stderr
        };
        let text = lost(Delivery::NotSent, Repeat::Duplicates);
        for part in ["http://127.0.0.1:7070: refused", "`evictd publisher`", "EVICTD_API_URL"] {
            assert!(text.contains(part), "{text}");
        }
        assert!(lost(Delivery::Unknown, Repeat::FindsNothing).contains("may or may not"));
        assert!(lost(Delivery::Unknown, Repeat::Duplicates).contains("may have been created"));
        assert!(!lost(Delivery::Unknown, Repeat::Harmless).contains("hunter2"));
    }

    #[test]
    fn lost_creation_is_described_by_what_it_creates() {
        let text = |path| {
            let lost = NoAnswer { delivery: Delivery::Unknown, cause: "reset".into() };
            let sent = SentCall { result: Err(lost), is_maybe_done: false };
            render(&ApiCall { path, ..call(Repeat::Duplicates) }, &settings(false), &sent, Duration::ZERO)
                .stderr
        };
        let (api, key, replaced) = (text(CreateApi::PATH), text(CreateKey::PATH), text(RerollKey::PATH));
        assert!(api.contains("The API may have been created") && !api.contains("The key"), "{api}");
        assert!(key.contains("The key may have been created"), "{key}");
        assert!(replaced.contains("may have been replaced"), "{replaced}");
        assert!([api, key, replaced].iter().all(|text| text.contains("It was not retried.")));
    }
}
