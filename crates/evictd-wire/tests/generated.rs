//! The checked-in protobuf code is what the specification generates.
//!
//! `EVICTD_REGENERATE=1` (what `cargo xtask generate` sets) rewrites it instead of failing.

use std::path::Path;

const FILES: [&str; 8] = [
    "evictd/v1/invalidation.proto",
    "evictd/v1/voucher.proto",
    "evictd/v1/publisher.proto",
    "evictd/v1/live.proto",
    "evictd/v1/probe.proto",
    "evictd/v1/replay.proto",
    "evictd/v1/lookup.proto",
    "evictd/v1/applied.proto",
];

#[test]
fn generated_code_is_up_to_date() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let proto = root.join("../../proto");
    let specified = std::fs::read_dir(proto.join("evictd/v1"))
        .unwrap()
        .filter(|entry| entry.as_ref().unwrap().path().extension().is_some_and(|end| end == "proto"))
        .count();
    assert_eq!(specified, FILES.len(), "a file under proto/ is not in this test's list");

    let descriptors = protox::compile(FILES, [&proto]).expect("the specification compiles");
    let out = tempfile::tempdir().unwrap();
    prost_build::Config::new().out_dir(out.path()).compile_fds(descriptors).unwrap();
    let fresh = std::fs::read_to_string(out.path().join("evictd.v1.rs")).unwrap();

    let checked_in = root.join("src/generated/evictd.v1.rs");
    if std::env::var_os("EVICTD_REGENERATE").is_some() {
        std::fs::write(&checked_in, fresh).unwrap();
        return;
    }
    let stands = std::fs::read_to_string(&checked_in).unwrap_or_default();
    assert!(stands == fresh, "src/generated is not what proto/ generates: run `cargo xtask generate`");
}
