//! The memory of a cached entry, in bytes of the process.
//!
//! Each function takes its value apart without `..`, so that a new field doesn't compile before it is counted. The tests
//! compare the sum with what the system gives the process.

use evictd_core::record::{KeyRecord, Record, RootKeyRecord};

use super::CachedRecord;

/// The two counters in front of what an `Arc` holds.
const ARC_COUNTERS: usize = 16;

/// What moka and its hash table allocate for an entry, and what the allocator loses: measured.
const CACHE_OVERHEAD: usize = 370;

/// What glibc takes from the system for an allocation: a multiple of 16, at least 32, with a header of 8.
const fn allocated(bytes: usize) -> usize {
    let whole = (bytes + 8).next_multiple_of(16);
    if bytes == 0 {
        0
    } else if whole < 32 {
        32
    } else {
        whole
    }
}

/// Returns the memory of an entry and of its place in the cache.
pub(super) fn weight(entry: &CachedRecord) -> u32 {
    let CachedRecord { record, validity: _, expires_at: _, answers: _ } = entry;
    let own = allocated(ARC_COUNTERS + size_of::<CachedRecord>());
    u32::try_from(CACHE_OVERHEAD + own + of_record(record)).unwrap_or(u32::MAX)
}

/// Returns what a record allocates.
fn of_record(record: &Record) -> usize {
    match record {
        Record::Absent => 0,
        Record::Key(key) => {
            let KeyRecord {
                key_id,
                api_id,
                workspace_id,
                state: _,
                name,
                meta,
                external_id,
                permissions,
                expires_at: _,
            } = key;
            let ids = [key_id.as_str(), api_id.as_str(), workspace_id.as_str()];
            let optional = [name, meta, external_id].into_iter().flatten();
            ids.map(of_id).iter().sum::<usize>()
                + optional.map(|text| allocated(text.len())).sum::<usize>()
                + of_texts(permissions)
        }
        Record::RootKey(root) => {
            let RootKeyRecord { root_key_id, workspace_id, state: _, permissions, expires_at: _ } = root;
            of_id(root_key_id.as_str()) + of_id(workspace_id.as_str()) + of_texts(permissions)
        }
    }
}

fn of_id(id: &str) -> usize {
    allocated(ARC_COUNTERS + id.len())
}

fn of_texts(texts: &Vec<Box<str>>) -> usize {
    let each = texts.iter().map(|text| allocated(text.len()));
    allocated(texts.capacity() * size_of::<Box<str>>()) + each.sum::<usize>()
}
