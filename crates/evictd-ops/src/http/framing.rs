//! Requests that a proxy in front may read in another way than this server.

use hyper::header::{HOST, TRANSFER_ENCODING};

use super::Parts;

/// Returns what of a request two programs could read differently, if anything. A proxy could take it for a request to
/// another host, or for two requests.
pub(super) fn ambiguity(parts: &Parts) -> Option<&'static str> {
    if parts.headers.get_all(HOST).iter().nth(1).is_some() {
        return Some("more than one Host header");
    }
    let mut encodings = parts.headers.get_all(TRANSFER_ENCODING).iter();
    match (encodings.next(), encodings.next()) {
        (None, _) => None,
        (Some(encoding), None) if encoding.as_bytes().eq_ignore_ascii_case(b"chunked") => None,
        _ => Some("a Transfer-Encoding other than chunked"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parts(headers: &[(&str, &str)]) -> Parts {
        let mut request = hyper::Request::builder().uri("/");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        request.body(()).unwrap().into_parts().0
    }

    #[test]
    fn ambiguous_requests_are_recognized() {
        for clear in [&[("host", "a")][..], &[], &[("host", "a"), ("transfer-encoding", "Chunked")]] {
            assert_eq!(ambiguity(&parts(clear)), None, "{clear:?}");
        }
        for unclear in [
            &[("host", "a"), ("host", "a")][..],
            &[("transfer-encoding", "gzip, chunked")],
            &[("transfer-encoding", "chunked"), ("transfer-encoding", "chunked")],
            &[("transfer-encoding", "identity")],
        ] {
            assert!(ambiguity(&parts(unclear)).is_some(), "{unclear:?}");
        }
    }
}
