//! New ids and keys, and the hash of a key.

use evictd_core::ids::{KeyHash, WorkspaceId};
use sha2::{Digest, Sha256};

use super::secret::Secret;

// Prefixes of ids.
pub const KEY: &str = "key";
pub const API: &str = "api";
pub const REQUEST: &str = "req";
pub const IDENTITY: &str = "id";
pub const ROOT_KEY: &str = "root";

/// Characters of an id after its prefix: 95 bits, so that no two are the same.
const ID_CHARS: usize = 16;

/// Characters of a key that may be shown after its prefix.
const START_CHARS: usize = 4;

/// Bytes of the digest in an identity's id: enough that no two of a workspace are the same.
const IDENTITY_BYTES: usize = 16;

/// Random bytes of a root key.
const ROOT_KEY_BYTES: usize = 16;

const BASE62: &[u8; 62] = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";

/// Draws a new id: `<prefix>_` and 16 random characters of `[0-9A-Za-z]`.
pub fn new_id(prefix: &str) -> String {
    let mut id = String::with_capacity(prefix.len() + 1 + ID_CHARS);
    id.push_str(prefix);
    id.push('_');
    let full = id.len() + ID_CHARS;
    loop {
        // A few more bytes than needed, because some are rejected.
        for byte in random_bytes::<{ ID_CHARS + 4 }>() {
            if id.len() == full {
                return id;
            }
            if let Some(character) = base62(byte) {
                id.push(character);
            }
        }
    }
}

/// Whether `text` has the form of an id with this prefix, evictd's or Unkey's.
pub fn is_id(prefix: &str, text: &str) -> bool {
    let random = text.strip_prefix(prefix).and_then(|rest| rest.strip_prefix('_'));
    random.is_some_and(|random| {
        !random.is_empty() && random.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
    })
}

/// Draws a new key, `byte_length` random bytes in base58 after `<prefix>_`. Also returns its start, which may be shown.
pub fn new_key(prefix: Option<&str>, byte_length: usize) -> (Secret, String) {
    let mut bytes = vec![0; byte_length];
    fill(&mut bytes);
    let prefix = prefix.map(|prefix| format!("{prefix}_")).unwrap_or_default();
    let random = bs58::encode(&bytes).into_string();
    let shown: String = random.chars().take(START_CHARS).collect();
    (Secret::new(format!("{prefix}{random}")), format!("{prefix}{shown}"))
}

/// Draws a new root key. Also returns its start. It begins with `unkey_`, as Unkey's do, so that secret scanners
/// recognize it.
pub fn new_root_key() -> (Secret, String) {
    new_key(Some("unkey"), ROOT_KEY_BYTES)
}

/// Returns SHA-256 over the key's full text, prefix included. Store, bus and caches only have this hash.
pub fn hash(key: &str) -> KeyHash {
    KeyHash(Sha256::digest(key.as_bytes()).into())
}

/// Derives the id of the identity `external_id` in `workspace`.
///
/// evictd stores no identities, so the id follows from the two names: `id_`, and in base58 the first 16 bytes of
/// SHA-256 over the workspace's id, a zero byte and the external id. No id contains a zero byte, so different pairs
/// have different texts.
pub fn identity(workspace: &WorkspaceId, external_id: &str) -> String {
    let mut digest = Sha256::new();
    digest.update(workspace.as_str());
    digest.update([0]);
    digest.update(external_id);
    let digest = digest.finalize();
    format!("{IDENTITY}_{}", bs58::encode(&digest[..IDENTITY_BYTES]).into_string())
}

/// Maps equally many bytes to each character: bytes past the last full run of 62 are rejected.
fn base62(byte: u8) -> Option<char> {
    const ACCEPTED: usize = 256 / BASE62.len() * BASE62.len();
    let byte = usize::from(byte);
    (byte < ACCEPTED).then(|| char::from(BASE62[byte % BASE62.len()]))
}

fn random_bytes<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    fill(&mut bytes);
    bytes
}

/// Panics if the kernel has no randomness, because a guessable key is worse than none. A running system always
/// has some.
fn fill(bytes: &mut [u8]) {
    getrandom::fill(bytes).expect("the kernel gives random bytes");
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, HashSet};

    use super::*;

    #[test]
    fn an_id_is_its_prefix_and_16_letters_or_digits() {
        let ids: HashSet<String> = (0..1000).map(|_| new_id(REQUEST)).collect();
        assert_eq!(ids.len(), 1000);
        for id in ids {
            let random = id.strip_prefix("req_").unwrap();
            assert_eq!(random.len(), 16);
            assert!(random.bytes().all(|byte| byte.is_ascii_alphanumeric()));
            assert!(is_id(REQUEST, &id) && !is_id(KEY, &id));
        }
        for other in ["", "key", "key_", "key-1", "key_a-b", "key_\u{e4}", "_1", "monkey_1"] {
            assert!(!is_id(KEY, other), "{other}");
        }
    }

    #[test]
    fn every_character_comes_from_equally_many_bytes() {
        let mut bytes_of = BTreeMap::new();
        for character in (0..=u8::MAX).filter_map(base62) {
            *bytes_of.entry(character).or_insert(0) += 1;
        }
        assert_eq!(bytes_of.len(), 62);
        assert!(bytes_of.values().all(|&count| count == 4));
    }

    #[test]
    fn a_key_carries_its_prefix_and_shows_four_characters() {
        let (key, start) = new_key(Some("prod"), 16);
        assert!(key.expose().starts_with(&start));
        assert_eq!(start.len(), "prod_".len() + 4);
        let random = bs58::decode(key.expose().strip_prefix("prod_").unwrap()).into_vec().unwrap();
        assert_eq!(random.len(), 16);

        let (key, start) = new_key(None, 255);
        assert_eq!(start, &key.expose()[..4]);
        assert_eq!(bs58::decode(key.expose()).into_vec().unwrap().len(), 255);
    }

    #[test]
    fn root_keys_have_unkeys_prefix() {
        let (key, start) = new_root_key();
        assert!(start.starts_with("unkey_"));
        assert!(key.expose().starts_with(&start));
    }

    #[test]
    fn an_identity_depends_on_workspace_and_external_id() {
        let id = |workspace: &str, external_id| identity(&WorkspaceId::new(workspace), external_id);
        // SHA-256 of "ws_1\0user_1", computed elsewhere.
        assert_eq!(id("ws_1", "user_1"), "id_K3s1UbLXo492JC3ERX7Gte");
        assert_ne!(id("ws_1", "user_1"), id("ws_2", "user_1"));
        assert_ne!(id("ws_1", "user_1"), id("ws_1", "user_2"));
        assert_ne!(id("ws_1", "1user"), id("ws_11", "user"));
    }

    #[test]
    fn the_hash_of_a_key_is_its_sha256() {
        // The published test vector.
        assert_eq!(hash("abc").0[..4], [0xba, 0x78, 0x16, 0xbf]);
        assert_eq!(hash("abc").0[28..], [0xf2, 0x00, 0x15, 0xad]);
    }
}
