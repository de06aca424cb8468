//! Every field of every endpoint, with its limits: Unkey's, less the unsupported ones.

use evictd_wire::api::error::ApiError;
use evictd_wire::api::requests::{
    CreateApi, CreateKey, DeleteApi, DeleteKey, GetApi, GetKey, GetReceipt, ListKeys, RerollKey, UpdateKey,
    VerifyKey,
};

/// An endpoint's body.
pub(crate) struct EndpointRow {
    pub(crate) path: &'static str,
    pub(crate) parse: fn(&[u8]) -> Result<(), ApiError>,
    /// Whether an unknown field is an error.
    pub(crate) strict: bool,
    pub(crate) fields: &'static [FieldRow],
}

pub(crate) struct FieldRow {
    pub(crate) name: &'static str,
    pub(crate) required: bool,
    pub(crate) nullable: bool,
    pub(crate) rule: RuleRow,
}

#[derive(Clone, Copy)]
pub(crate) enum RuleRow {
    /// Length in characters.
    Text {
        min: usize,
        max: usize,
        of: Characters,
    },
    /// A list of texts.
    List {
        max_items: usize,
        min: usize,
        max: usize,
        of: Characters,
    },
    Integer {
        min: i64,
        max: i64,
    },
    Flag,
    /// At most 100 properties and 16 KiB.
    Object,
    /// Rejected, unless its value is one of these.
    LeftOut {
        /// As JSON.
        harmless: &'static [&'static str],
    },
}

#[derive(Clone, Copy)]
pub(crate) enum Characters {
    Any,
    /// All but NUL.
    Stored,
    /// Letters and digits of ASCII, and these.
    LettersDigitsAnd(&'static str),
}

use Characters::{Any, LettersDigitsAnd, Stored};

const UNLIMITED: usize = usize::MAX;
const END_OF_2099: i64 = 4_102_444_800_000;
const UNLIMITED_CREDITS: &str = r#"{"remaining":null}"#;

const fn required(name: &'static str, rule: RuleRow) -> FieldRow {
    FieldRow { name, required: true, nullable: false, rule }
}

const fn optional(name: &'static str, rule: RuleRow) -> FieldRow {
    FieldRow { name, required: false, nullable: false, rule }
}

const fn nullable(name: &'static str, rule: RuleRow) -> FieldRow {
    FieldRow { name, required: false, nullable: true, rule }
}

const fn left_out(name: &'static str, harmless: &'static [&'static str]) -> FieldRow {
    optional(name, RuleRow::LeftOut { harmless })
}

const fn id(min: usize, max: usize) -> RuleRow {
    RuleRow::Text { min, max, of: LettersDigitsAnd("_") }
}

const fn text(min: usize, max: usize, of: Characters) -> RuleRow {
    RuleRow::Text { min, max, of }
}

const EXTERNAL_ID: RuleRow = text(1, 255, LettersDigitsAnd("_.-"));
const PERMISSIONS: RuleRow =
    RuleRow::List { max_items: 1000, min: 1, max: 128, of: LettersDigitsAnd("_:-.*") };
const TAGS: RuleRow = RuleRow::List { max_items: 20, min: 1, max: 512, of: Any };
const EXPIRES: RuleRow = RuleRow::Integer { min: 0, max: END_OF_2099 };

/// All endpoints with a body.
pub(crate) const ENDPOINTS: [&EndpointRow; 11] = [
    &CREATE_API,
    &GET_API,
    &DELETE_API,
    &LIST_KEYS,
    &CREATE_KEY,
    &GET_KEY,
    &UPDATE_KEY,
    &REROLL_KEY,
    &DELETE_KEY,
    &VERIFY_KEY,
    &GET_RECEIPT,
];

pub(crate) const CREATE_API: EndpointRow = EndpointRow {
    path: "/v2/apis.createApi",
    parse: |body| CreateApi::parse(body).map(drop),
    strict: true,
    fields: &[required("name", text(3, 256, Stored))],
};

pub(crate) const GET_API: EndpointRow = EndpointRow {
    path: "/v2/apis.getApi",
    parse: |body| GetApi::parse(body).map(drop),
    strict: true,
    fields: &[required("apiId", id(8, 255))],
};

pub(crate) const DELETE_API: EndpointRow = EndpointRow {
    path: "/v2/apis.deleteApi",
    parse: |body| DeleteApi::parse(body).map(drop),
    strict: true,
    fields: &[required("apiId", id(8, 255))],
};

pub(crate) const LIST_KEYS: EndpointRow = EndpointRow {
    path: "/v2/apis.listKeys",
    parse: |body| ListKeys::parse(body).map(drop),
    strict: true,
    fields: &[
        required("apiId", text(1, UNLIMITED, Any)),
        optional("limit", RuleRow::Integer { min: 1, max: 100 }),
        optional("cursor", text(0, UNLIMITED, Stored)),
        optional("externalId", text(1, UNLIMITED, Stored)),
        optional("revalidateKeysCache", RuleRow::Flag),
        left_out("decrypt", &["false"]),
    ],
};

pub(crate) const CREATE_KEY: EndpointRow = EndpointRow {
    path: "/v2/keys.createKey",
    parse: |body| CreateKey::parse(body).map(drop),
    strict: true,
    fields: &[
        required("apiId", id(3, 255)),
        optional("prefix", id(1, 16)),
        optional("name", text(1, 255, Stored)),
        optional("byteLength", RuleRow::Integer { min: 16, max: 255 }),
        optional("externalId", EXTERNAL_ID),
        optional("meta", RuleRow::Object),
        optional("permissions", PERMISSIONS),
        optional("expires", EXPIRES),
        optional("enabled", RuleRow::Flag),
        left_out("roles", &["[]"]),
        left_out("credits", &[UNLIMITED_CREDITS]),
        left_out("ratelimits", &["[]"]),
        left_out("recoverable", &["false"]),
    ],
};

pub(crate) const GET_KEY: EndpointRow = EndpointRow {
    path: "/v2/keys.getKey",
    parse: |body| GetKey::parse(body).map(drop),
    strict: true,
    fields: &[required("keyId", id(3, 255)), left_out("decrypt", &["false"])],
};

pub(crate) const UPDATE_KEY: EndpointRow = EndpointRow {
    path: "/v2/keys.updateKey",
    parse: |body| UpdateKey::parse(body).map(drop),
    strict: true,
    fields: &[
        required("keyId", id(3, 255)),
        nullable("name", text(1, 255, Stored)),
        nullable("externalId", EXTERNAL_ID),
        nullable("meta", RuleRow::Object),
        nullable("expires", EXPIRES),
        optional("enabled", RuleRow::Flag),
        optional("permissions", PERMISSIONS),
        left_out("credits", &["null", UNLIMITED_CREDITS]),
        left_out("ratelimits", &["[]"]),
        left_out("roles", &["[]"]),
    ],
};

pub(crate) const REROLL_KEY: EndpointRow = EndpointRow {
    path: "/v2/keys.rerollKey",
    parse: |body| RerollKey::parse(body).map(drop),
    strict: false,
    fields: &[
        required("keyId", id(3, 255)),
        required("expiration", RuleRow::Integer { min: 0, max: END_OF_2099 }),
    ],
};

pub(crate) const DELETE_KEY: EndpointRow = EndpointRow {
    path: "/v2/keys.deleteKey",
    parse: |body| DeleteKey::parse(body).map(drop),
    strict: true,
    fields: &[required("keyId", id(3, 255)), optional("permanent", RuleRow::Flag)],
};

pub(crate) const VERIFY_KEY: EndpointRow = EndpointRow {
    path: "/v2/keys.verifyKey",
    parse: |body| VerifyKey::parse(body).map(drop),
    strict: true,
    fields: &[
        required("key", text(1, 512, Any)),
        optional("tags", TAGS),
        optional("permissions", text(1, 1000, Any)),
        left_out("credits", &[]),
        left_out("ratelimits", &["[]"]),
        left_out("migrationId", &[]),
        left_out("keyspaces", &[]),
    ],
};

pub(crate) const GET_RECEIPT: EndpointRow = EndpointRow {
    path: "/v2/propagation.getReceipt",
    parse: |body| GetReceipt::parse(body).map(drop),
    strict: true,
    fields: &[required("requestId", id(3, 255))],
};
