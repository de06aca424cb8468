// Unkey's TypeScript client against evictd: every operation that both support, and every error.
//
// `cargo xtask test sdk` starts the deployments, sets the environment variables and runs this suite
// (`tests/tests/e2e/sdk.rs`). `../python/suite.py` has the same tests under the same names.

import assert from "node:assert/strict";
import { describe, test } from "node:test";
import { setTimeout as pause } from "node:timers/promises";

import { Unkey } from "@unkey/api";
import { HTTPClient } from "@unkey/api/lib/http";
import * as errors from "@unkey/api/models/errors";

import { LossyProxy, badGateway, hangUp, reset } from "./lossy-proxy.mjs";

function setting(name) {
  const value = process.env[name];
  if (!value) {
    console.error(`${name} is not set: \`cargo xtask test sdk\` starts the deployments and sets it`);
    process.exit(1);
  }
  return value;
}

const PUBLISHER = setting("EVICTD_PUBLISHER_URL");
const AGENTS = setting("EVICTD_AGENT_URLS").split(",");
// The servers that verify keys, by name.
const VERIFIERS = [["the publisher", PUBLISHER], ...AGENTS.map((url, index) => [`agent ${index + 1}`, url])];

const ROOT_KEY = setting("EVICTD_ROOT_KEY"); // may do everything
const VERIFIER = setting("EVICTD_VERIFIER_ROOT_KEY"); // may verify, and nothing else
const STRANGER = setting("EVICTD_STRANGER_ROOT_KEY"); // may do everything, in another workspace

// The bound: the longest time until a change is visible everywhere.
const BOUND_MILLIS = 30_000;
// The pause between two requests while a test waits for a change.
const POLL_MILLIS = 20;

const NO_RETRIES = { retries: { strategy: "none" } };

// The errors, as [class, status, title, the end of the type's URL].
const MISSING = [errors.BadRequestErrorResponse, 400, "Bad Request", "unkey/application/invalid_input"];
const MALFORMED = [errors.BadRequestErrorResponse, 400, "Bad Request", "unkey/authentication/malformed"];
const INVALID = [errors.BadRequestErrorResponse, 400, "Bad Request", "unkey/application/invalid_input"];
const BAD_QUERY = [
  errors.BadRequestErrorResponse,
  400,
  "Bad Request",
  "user/bad_request/permissions_query_syntax_error",
];
const UNAUTHORIZED = [
  errors.UnauthorizedErrorResponse,
  401,
  "Unauthorized",
  "unkey/authentication/key_not_found",
];
const EXPIRED = [errors.ForbiddenErrorResponse, 403, "Forbidden", "unkey/authorization/forbidden"];
const DISABLED = [errors.ForbiddenErrorResponse, 403, "Key is disabled", "unkey/authorization/key_disabled"];
const CLOSED = [
  errors.ForbiddenErrorResponse,
  403,
  "Workspace is disabled",
  "unkey/authorization/workspace_disabled",
];
const LACKING = [
  errors.ForbiddenErrorResponse,
  403,
  "Insufficient Permissions",
  "unkey/authorization/insufficient_permissions",
];
const NO_KEY = [errors.NotFoundErrorResponse, 404, "Not Found", "unkey/data/key_not_found"];
const NO_API = [errors.NotFoundErrorResponse, 404, "Not Found", "unkey/data/api_not_found"];
const PROTECTED = [
  errors.PreconditionFailedErrorResponse,
  412,
  "Resource is protected",
  "unkey/application/protected_resource",
];
const TOO_LARGE = [
  errors.APIError,
  413,
  "Request Entity Too Large",
  "user/bad_request/request_body_too_large",
];
const TOO_MANY = [
  errors.TooManyRequestsErrorResponse,
  429,
  "Too Many Requests",
  "user/too_many_requests/workspace_rate_limited",
];
const BROKEN = [
  errors.InternalServerErrorResponse,
  500,
  "Internal Server Error",
  "unkey/application/service_unavailable",
];
const UNPROVEN = [errors.APIError, 503, "Service Unavailable", "unkey/application/service_unavailable"];

const NOT_FOUND = { valid: false, code: "NOT_FOUND" };

/** The published client with its default retries. `undefined`: without a root key. */
function client(serverURL = PUBLISHER, rootKey = ROOT_KEY) {
  return new Unkey({ serverURL, rootKey });
}

const control = client();

/** A client, and the raw answers to it, including fields that it doesn't know. */
function keepingAnswers(rootKey = ROOT_KEY) {
  const answers = [];
  const httpClient = new HTTPClient();
  httpClient.addHook("response", async (response) => {
    const { status, headers } = response;
    answers.push({ status, headers, body: await response.clone().json() });
  });
  return { unkey: new Unkey({ serverURL: PUBLISHER, rootKey, httpClient }), answers };
}

async function createApi(name = "payments") {
  return (await control.apis.createApi({ name })).data.apiId;
}

// The API for keys of tests that need no API of their own.
const API = await createApi();

async function createKey(settings = {}) {
  return (await control.keys.createKey({ apiId: API, ...settings })).data;
}

async function shown(keyId) {
  return (await control.keys.getKey({ keyId })).data;
}

async function verified(url, key, rootKey = ROOT_KEY, settings = {}) {
  return (await client(url, rootKey).keys.verifyKey({ key, ...settings })).data;
}

/** Returns all operations as functions of a client. The ids need not exist. */
function operations(apiId, keyId, key, options = {}) {
  return {
    "apis.createApi": (unkey) => unkey.apis.createApi({ name: "never" }, options),
    "apis.getApi": (unkey) => unkey.apis.getApi({ apiId }, options),
    "apis.listKeys": (unkey) => unkey.apis.listKeys({ apiId }, options),
    "apis.deleteApi": (unkey) => unkey.apis.deleteApi({ apiId }, options),
    "keys.createKey": (unkey) => unkey.keys.createKey({ apiId }, options),
    "keys.getKey": (unkey) => unkey.keys.getKey({ keyId }, options),
    "keys.updateKey": (unkey) => unkey.keys.updateKey({ keyId, name: "never" }, options),
    "keys.rerollKey": (unkey) => unkey.keys.rerollKey({ keyId, expiration: 0 }, options),
    "keys.deleteKey": (unkey) => unkey.keys.deleteKey({ keyId }, options),
    "keys.verifyKey": (unkey) => unkey.keys.verifyKey({ key }, options),
  };
}

/** Returns each call for each server that supports it, with a description for failures. */
function everywhere(calls) {
  return Object.entries(calls).flatMap(([operation, call]) => {
    const places = operation === "keys.verifyKey" ? VERIFIERS : [["the publisher", PUBLISHER]];
    return places.map(([place, url]) => [`${operation} at ${place}`, url, call]);
  });
}

/** Runs `check`, and adds `what` to its failure. */
async function at(what, check) {
  try {
    await check();
  } catch (cause) {
    throw new Error(what, { cause });
  }
}

/** Asserts that the answer has a request id, and this data. */
function assertAnswer(answer, data) {
  assert.match(answer.meta.requestId, /^req_[a-zA-Z0-9]+$/);
  if (data !== undefined) assert.deepEqual(answer, { meta: answer.meta, data });
}

/** Asserts that the call fails with exactly this error, with all fields. Returns it. */
async function assertFails([kind, status, title, typeUrl], call) {
  let error;
  try {
    await call();
  } catch (raised) {
    error = raised;
  }
  assert.equal(error?.constructor, kind, `it raised ${error}`);
  const body = JSON.parse(error.body);
  if (kind !== errors.APIError) assert.deepEqual({ meta: error.meta, error: error.error }, body);
  const problem = body.error;
  assert.deepEqual(
    [error.statusCode, problem.status, problem.title, problem.type],
    [status, status, title, `https://unkey.com/docs/errors/${typeUrl}`],
  );
  assert.ok(problem.detail);
  assert.match(body.meta.requestId, /^req_[a-zA-Z0-9]+$/);
  assert.equal("errors" in problem, [400, 413].includes(status), error.body);
  assert.equal(error.contentType, status === 429 ? "application/problem+json" : "application/json");
  return error;
}

/** Asserts that the call is refused for exactly one problem, at `location`. */
async function assertInvalid(location, message, call) {
  const error = await assertFails(INVALID, call);
  assert.deepEqual(
    error.error.errors.map((problem) => problem.location),
    [location],
  );
  const [problem] = error.error.errors;
  assert.ok(problem.message.includes(message), problem.message);
  return problem;
}

/** Asserts that every verifier returns exactly this for the key, at once. */
async function assertVerdict(expected, key, rootKey = ROOT_KEY, settings = {}) {
  for (const [place, url] of VERIFIERS) {
    await at(place, async () => assert.deepEqual(await verified(url, key, rootKey, settings), expected));
  }
}

/** Asserts that the keys are valid everywhere. Afterwards every agent has cached them. */
async function assertCached(...keys) {
  for (const key of keys) {
    for (const [place, url] of VERIFIERS) assert.equal((await verified(url, key)).code, "VALID", place);
  }
}

/** Asserts that every verifier returns this within the bound, and the code `before` until then. */
async function assertBecomes(expected, key, before = "VALID", settings = {}) {
  const changedAt = performance.now();
  for (const [place, url] of VERIFIERS) {
    await at(place, async () => {
      for (;;) {
        const askedAt = performance.now();
        const answer = await verified(url, key, ROOT_KEY, settings);
        try {
          return assert.deepEqual(answer, expected);
        } catch (difference) {
          assert.ok([before, expected.code].includes(answer.code), `it is ${answer.code}`);
          if (askedAt - changedAt >= BOUND_MILLIS) throw difference;
        }
        await pause(POLL_MILLIS);
      }
    });
  }
  // The new answer is stable.
  await assertVerdict(expected, key, ROOT_KEY, settings);
}

async function pagesOf(first) {
  const pages = [];
  for await (const page of await first) pages.push(page.result);
  return pages;
}

function idsOf(pages) {
  return pages.map((page) => page.data.map((key) => key.keyId));
}

function isBetween(low, value, high) {
  assert.ok(low <= value && value <= high, `${value} is not between ${low} and ${high}`);
}

describe("apis", () => {
  test("an api is created and shown", async () => {
    const created = await control.apis.createApi({ name: "Zahlungen & Rechnungen" });
    const { apiId } = created.data;
    assertAnswer(created, { apiId });
    assert.match(apiId, /^api_[a-zA-Z0-9]+$/);
    assertAnswer(await control.apis.getApi({ apiId }), { id: apiId, name: "Zahlungen & Rechnungen" });
  });

  test("a deleted api takes its keys with it everywhere", async () => {
    const apiId = await createApi();
    const other = await createKey();
    const keys = [await createKey({ apiId }), await createKey({ apiId }), await createKey({ apiId })];
    await assertCached(other.key, ...keys.map((key) => key.key));

    assertAnswer(await control.apis.deleteApi({ apiId }), {});
    for (const { key } of keys) await assertBecomes(NOT_FOUND, key);
    await assertCached(other.key);

    await assertFails(NO_API, () => control.apis.getApi({ apiId }));
    await assertFails(NO_API, () => control.apis.listKeys({ apiId }));
    await assertFails(NO_API, () => control.keys.createKey({ apiId }));
    await assertFails(NO_KEY, () => control.keys.getKey({ keyId: keys[0].keyId }));
    await assertFails(NO_KEY, () => control.keys.deleteKey({ keyId: keys[0].keyId }));
  });

  test("listkeys pages through all keys in order of id", async () => {
    const apiId = await createApi();
    const ids = [];
    for (let count = 0; count < 5; count += 1) ids.push((await createKey({ apiId })).keyId);
    ids.sort();

    const pages = await pagesOf(control.apis.listKeys({ apiId, limit: 2 }));
    for (const page of pages) assertAnswer(page);
    assert.deepEqual(idsOf(pages), [ids.slice(0, 2), ids.slice(2, 4), ids.slice(4)]);
    assert.deepEqual(
      pages.map((page) => page.pagination.hasMore),
      [true, true, false],
    );
    assert.equal(pages[2].pagination.cursor, undefined);

    // Another call can use the cursor later.
    const { cursor } = pages[0].pagination;
    assert.deepEqual(idsOf(await pagesOf(control.apis.listKeys({ apiId, limit: 100, cursor }))), [
      ids.slice(2),
    ]);
    const whole = await pagesOf(control.apis.listKeys({ apiId, revalidateKeysCache: true }));
    assert.deepEqual(idsOf(whole), [ids]);
    assert.deepEqual(whole[0].pagination, { hasMore: false });
  });

  test("listkeys shows what getkey shows without deleted keys", async () => {
    const apiId = await createApi();
    const named = { apiId, name: "ci", meta: { team: "core" }, permissions: ["read"], externalId: "user_1" };
    const left = [await createKey(named), await createKey({ apiId, expires: 1, enabled: false })];
    const gone = await createKey({ apiId });
    await control.keys.deleteKey({ keyId: gone.keyId });
    const [{ data }] = await pagesOf(control.apis.listKeys({ apiId }));
    const byId = (one, other) => (one.keyId < other.keyId ? -1 : 1);
    const expected = await Promise.all(left.map((key) => shown(key.keyId)));
    assert.deepEqual(data, expected.sort(byId));
  });

  test("listkeys finds the keys of one external id", async () => {
    const apiId = await createApi();
    const ids = [];
    for (const externalId of ["ada", "grace", "ada"])
      ids.push((await createKey({ apiId, externalId })).keyId);
    await createKey({ apiId });
    const pages = await pagesOf(control.apis.listKeys({ apiId, externalId: "ada", limit: 1 }));
    assert.deepEqual(idsOf(pages).flat(), [ids[0], ids[2]].sort());
    const [none] = await pagesOf(control.apis.listKeys({ apiId, externalId: "unknown" }));
    assert.deepEqual([none.data, none.pagination.hasMore], [[], false]);
  });
});

describe("keys", () => {
  test("createkey returns an id and a key in the given form", async () => {
    const created = await control.keys.createKey({ apiId: API, prefix: "prod", byteLength: 24 });
    const { keyId, key } = created.data;
    assertAnswer(created, { keyId, key });
    assert.match(keyId, /^key_[a-zA-Z0-9]+$/);
    // Base58, as Bitcoin writes it: 24 bytes are 33 digits, or fewer when they begin with zeros.
    assert.match(key, /^prod_[1-9A-HJ-NP-Za-km-z]{28,33}$/);
    assert.match((await createKey()).key, /^[1-9A-HJ-NP-Za-km-z]{18,22}$/);
  });

  test("getkey shows every field that createkey was given", async () => {
    const before = Date.now();
    const expires = before + 3_600_000;
    const created = await createKey({
      prefix: "prod",
      name: "Laptop",
      meta: { plan: "pro" },
      externalId: "user_42",
      permissions: ["documents.read", "documents.write"],
      expires,
      enabled: false,
    });
    const answer = await control.keys.getKey({ keyId: created.keyId });
    const { createdAt, identity } = answer.data;
    isBetween(before - 1000, createdAt, Date.now() + 1000);
    assert.match(identity.id, /^[a-zA-Z0-9_]+$/);
    assertAnswer(answer, {
      keyId: created.keyId,
      start: created.key.slice(0, "prod_".length + 4),
      enabled: false,
      createdAt,
      name: "Laptop",
      meta: { plan: "pro" },
      expires,
      permissions: ["documents.read", "documents.write"],
      identity: { id: identity.id, externalId: "user_42" },
    });
  });

  test("verifykey returns every field at publisher and agents", async () => {
    const expires = Date.now() + 3_600_000;
    const { keyId, key } = await createKey({
      name: "Laptop",
      meta: { plan: "pro" },
      externalId: "user_42",
      permissions: ["documents.read", "documents.write"],
      expires,
    });
    const expected = {
      valid: true,
      code: "VALID",
      keyId,
      name: "Laptop",
      meta: { plan: "pro" },
      expires,
      enabled: true,
      permissions: ["documents.read", "documents.write"],
      identity: (await shown(keyId)).identity,
    };
    for (const [, url] of VERIFIERS) assertAnswer(await client(url).keys.verifyKey({ key }), expected);
    await assertVerdict(expected, key);
    await assertVerdict(expected, key, VERIFIER);
    await assertVerdict(expected, key, ROOT_KEY, { tags: ["path=/v1/pay", "region=eu"] });
  });

  test("a key without settings shows only the required fields", async () => {
    const { keyId, key } = await createKey();
    const { createdAt, ...rest } = await shown(keyId);
    assert.ok(Number.isInteger(createdAt));
    assert.deepEqual(rest, { keyId, start: key.slice(0, 4), enabled: true });
    await assertVerdict({ valid: true, code: "VALID", keyId, enabled: true }, key);
  });

  test("metadata comes back as it was given", async () => {
    const meta = {
      limits: { daily: 1000, ratio: 0.25, most: 9007199254740991, least: -1 },
      labels: ["ä", "日本", "🔑", "", '"\\\n\u0001'],
      nothing: null,
      empty: {},
      mixed: [1, "1", [1.5, false], { deep: [{}] }],
      "": "no name",
    };
    const { keyId, key } = await createKey({ meta });
    assert.deepEqual((await shown(keyId)).meta, meta);
    for (const [place, url] of VERIFIERS) {
      await at(place, async () => assert.deepEqual((await verified(url, key)).meta, meta));
    }
  });

  test("keys of one external id have one identity", async () => {
    const identities = [];
    for (const externalId of ["ada", "ada", "grace"]) {
      identities.push((await shown((await createKey({ externalId })).keyId)).identity);
    }
    assert.deepEqual(identities[0], identities[1]);
    assert.notEqual(identities[0].id, identities[2].id);
    const stranger = client(PUBLISHER, STRANGER);
    const { apiId } = (await stranger.apis.createApi({ name: "elsewhere" })).data;
    const { keyId } = (await stranger.keys.createKey({ apiId, externalId: "ada" })).data;
    const theirs = (await stranger.keys.getKey({ keyId })).data.identity;
    assert.equal(theirs.externalId, "ada");
    assert.notEqual(theirs.id, identities[0].id);
  });

  test("an unknown key is not found without further details", async () => {
    await assertVerdict(NOT_FOUND, "prod_unknown");
    await assertVerdict(NOT_FOUND, "🔑 ".repeat(100));
  });

  test("a permission query is decided by the keys permissions", async () => {
    const permissions = ["billing:view", "documents.read", "documents.write"];
    const { keyId, key } = await createKey({ permissions });
    const enough = { valid: true, code: "VALID", keyId, enabled: true, permissions };
    const lacking = { ...enough, valid: false, code: "INSUFFICIENT_PERMISSIONS" };
    for (const [query, expected] of [
      ["documents.read", enough],
      ["admin", lacking],
      ["documents.read AND documents.write", enough],
      ["documents.read and admin", lacking],
      ["admin OR documents.read", enough],
      ["admin or (documents.read And billing:view)", enough],
      // AND binds tighter than OR.
      ["documents.read OR admin AND owner", enough],
      ["(documents.read OR admin) AND owner", lacking],
      // A star is a letter like any other.
      ["documents.*", lacking],
    ]) {
      await at(query, () => assertVerdict(expected, key, ROOT_KEY, { permissions: query }));
    }
    await assertVerdict(NOT_FOUND, "prod_unknown", ROOT_KEY, { permissions: "admin" });
  });

  test("a key that was created disabled is disabled everywhere", async () => {
    const { keyId, key } = await createKey({ enabled: false, permissions: ["read"] });
    const expected = { valid: false, code: "DISABLED", keyId, enabled: false, permissions: ["read"] };
    await assertVerdict(expected, key);
    // DISABLED comes before the permission query.
    await assertVerdict(expected, key, ROOT_KEY, { permissions: "admin" });
  });

  test("a key is expired everywhere at its expiry", async () => {
    const expires = Date.now() + 1_500;
    const [created, ended] = [await createKey({ expires }), await createKey({ expires: 1 })];
    const expired = { valid: false, code: "EXPIRED", enabled: true };
    await assertVerdict({ ...expired, keyId: ended.keyId, expires: 1 }, ended.key);
    await assertBecomes({ ...expired, keyId: created.keyId, expires }, created.key);
    assert.ok(Date.now() > expires - 500);
  });

  test("an expiry of zero has passed and is not shown", async () => {
    const listed = await createApi();
    const { keyId, key } = await createKey({ apiId: listed, expires: 0 });
    await assertVerdict({ valid: false, code: "EXPIRED", keyId, enabled: true }, key);
    const stored = await shown(keyId);
    assert.ok(!("expires" in stored));
    const [page] = await pagesOf(control.apis.listKeys({ apiId: listed }));
    assert.deepEqual(page.data, [stored]);
    // Zero is a real expiry: without it, the key is valid.
    await control.keys.updateKey({ keyId, expires: null });
    await assertBecomes({ valid: true, code: "VALID", keyId, enabled: true }, key, "EXPIRED");
  });

  test("updatekey changes given fields and keeps the rest", async () => {
    const expires = Date.now() + 3_600_000;
    const settings = { name: "a", meta: { a: 1 }, externalId: "a", permissions: ["a"], expires };
    const { keyId, key } = await createKey(settings);
    const before = await shown(keyId);
    assert.ok(!("updatedAt" in before));
    await assertCached(key);

    assertAnswer(await control.keys.updateKey({ keyId, name: "b", externalId: "b" }), {});
    const { updatedAt, ...after } = await shown(keyId);
    assert.ok(updatedAt >= before.createdAt);
    assert.equal(after.identity.externalId, "b");
    assert.notEqual(after.identity.id, before.identity.id);
    assert.deepEqual(after, { ...before, name: "b", identity: after.identity });
    const { start, createdAt, ...details } = after;
    await assertBecomes({ valid: true, code: "VALID", ...details }, key);

    const more = { meta: { b: [2] }, expires: expires + 1 };
    await control.keys.updateKey({ keyId, ...more });
    await assertBecomes({ valid: true, code: "VALID", ...details, ...more }, key);
  });

  test("updatekey clears fields that are null", async () => {
    const settings = { name: "a", meta: { a: 1 }, externalId: "a", permissions: ["a"] };
    const { keyId, key } = await createKey({ ...settings, expires: Date.now() + 3_600_000 });
    await assertCached(key);
    const nothing = {
      name: null,
      meta: null,
      externalId: null,
      expires: null,
      credits: null,
      permissions: [],
    };
    await control.keys.updateKey({ keyId, ...nothing });
    const fields = Object.keys(await shown(keyId)).sort();
    assert.deepEqual(fields, ["createdAt", "enabled", "keyId", "start", "updatedAt"]);
    await assertBecomes({ valid: true, code: "VALID", keyId, enabled: true }, key);
  });

  test("updatekey switches a key off and on everywhere", async () => {
    const { keyId, key } = await createKey();
    await assertCached(key);
    await control.keys.updateKey({ keyId, enabled: false });
    assert.equal((await shown(keyId)).enabled, false);
    await assertBecomes({ valid: false, code: "DISABLED", keyId, enabled: false }, key);
    await control.keys.updateKey({ keyId, enabled: true });
    await assertBecomes({ valid: true, code: "VALID", keyId, enabled: true }, key, "DISABLED");
  });

  test("updatekey expires and extends a key everywhere", async () => {
    const { keyId, key } = await createKey();
    await assertCached(key);
    await control.keys.updateKey({ keyId, expires: 1 });
    await assertBecomes({ valid: false, code: "EXPIRED", keyId, enabled: true, expires: 1 }, key);
    await control.keys.updateKey({ keyId, expires: null });
    await assertBecomes({ valid: true, code: "VALID", keyId, enabled: true }, key, "EXPIRED");
  });

  test("updatekey gives and takes permissions everywhere", async () => {
    const { keyId, key } = await createKey({ permissions: ["read"] });
    const query = { permissions: "read" };
    const enough = { valid: true, code: "VALID", keyId, enabled: true, permissions: ["read"] };
    await assertVerdict(enough, key, ROOT_KEY, query);
    await control.keys.updateKey({ keyId, permissions: ["write"] });
    const lacking = { ...enough, valid: false, code: "INSUFFICIENT_PERMISSIONS", permissions: ["write"] };
    await assertBecomes(lacking, key, "VALID", query);
    await control.keys.updateKey({ keyId, permissions: ["read"] });
    await assertBecomes(enough, key, "INSUFFICIENT_PERMISSIONS", query);
  });

  test("a rerolled key expires and its successor is valid", async () => {
    const settings = { name: "a", meta: { a: 1 }, externalId: "a", permissions: ["a"] };
    const old = await createKey({ prefix: "prod", ...settings });
    await assertCached(old.key);
    const { keyId, start, createdAt, ...details } = await shown(old.keyId);

    const askedAt = Date.now();
    const rerolled = await control.keys.rerollKey({ keyId, expiration: 0 });
    const answeredAt = Date.now();
    const successor = rerolled.data;
    assertAnswer(rerolled, { keyId: successor.keyId, key: successor.key });
    assert.notEqual(successor.keyId, keyId);
    assert.notEqual(successor.key, old.key);
    assert.match(successor.key, /^prod_[1-9A-HJ-NP-Za-km-z]{18,22}$/);
    await assertVerdict({ valid: true, code: "VALID", ...details, keyId: successor.keyId }, successor.key);

    const { expires } = await shown(keyId);
    isBetween(askedAt - 1000, expires, answeredAt + 1000);
    await assertBecomes({ valid: false, code: "EXPIRED", ...details, keyId, expires }, old.key);
    const { createdAt: since, ...rest } = await shown(successor.keyId);
    assert.ok(since >= createdAt);
    assert.deepEqual(rest, { ...details, keyId: successor.keyId, start: successor.key.slice(0, 9) });
  });

  test("a rerolled key stays valid for its grace period", async () => {
    const { keyId, key } = await createKey();
    await assertCached(key);
    const askedAt = Date.now();
    const successor = (await control.keys.rerollKey({ keyId, expiration: 90_000 })).data;
    const answeredAt = Date.now();
    const { expires } = await shown(keyId);
    // Rounded up to the next full minute.
    assert.equal(expires % 60_000, 0);
    isBetween(askedAt + 90_000 - 1000, expires, answeredAt + 150_000 + 1000);
    await assertBecomes({ valid: true, code: "VALID", keyId, enabled: true, expires }, key);
    const expected = { valid: true, code: "VALID", keyId: successor.keyId, enabled: true };
    await assertVerdict(expected, successor.key);
  });

  test("a deleted key is not found everywhere within the bound", async () => {
    for (const permanent of [false, true]) {
      await at(`permanent: ${permanent}`, async () => {
        const [{ keyId, key }, other] = [await createKey(), await createKey()];
        await assertCached(key, other.key);
        assertAnswer(await control.keys.deleteKey({ keyId, permanent }), {});
        await assertBecomes(NOT_FOUND, key);
        await assertCached(other.key);
      });
    }
  });

  test("a confirmed deletion holds everywhere at once", async () => {
    const { keyId, key } = await createKey();
    const { unkey, answers } = keepingAnswers();
    await assertCached(key);
    const wait = { headers: { Prefer: `wait=${BOUND_MILLIS / 1000}` } };
    const deleted = await unkey.keys.deleteKey({ keyId }, wait);
    // The client ignores the receipt, which Unkey's API doesn't have.
    assertAnswer(deleted, {});
    assert.deepEqual(deleted.meta, { requestId: deleted.meta.requestId });
    const receipt = answers[0].body.meta.propagation;
    assert.deepEqual([receipt.state, receipt.final], ["confirmed", true]);
    assert.equal(receipt.regions.length, AGENTS.length);
    await assertVerdict(NOT_FOUND, key);
  });
});

describe("errors", () => {
  test("a schema violation is a bad request that names the rule", async () => {
    const { apis, keys } = control;
    const { keyId } = await createKey();
    const yearTooLate = 4_133_980_800_000;
    for (const [location, message, call] of [
      ["name/minLength", "got 2, want 3", () => apis.createApi({ name: "ab" })],
      ["name/maxLength", "got 257, want 256", () => apis.createApi({ name: "a".repeat(257) })],
      ["apiId/minLength", "got 7, want 8", () => apis.getApi({ apiId: "api_123" })],
      ["apiId/pattern", "pattern", () => apis.deleteApi({ apiId: "api-12345" })],
      ["limit/maximum", "got 101, want 100", () => apis.listKeys({ apiId: API, limit: 101 })],
      ["limit/minimum", "got 0, want 1", () => apis.listKeys({ apiId: API, limit: 0 })],
      ["byteLength/minimum", "got 15, want 16", () => keys.createKey({ apiId: API, byteLength: 15 })],
      ["prefix/pattern", "pattern", () => keys.createKey({ apiId: API, prefix: "a-b" })],
      ["externalId/pattern", "pattern", () => keys.createKey({ apiId: API, externalId: "a b" })],
      ["permissions/items/pattern", "pattern", () => keys.createKey({ apiId: API, permissions: ["a b"] })],
      ["expires/maximum", "want 4102444800000", () => keys.updateKey({ keyId, expires: yearTooLate })],
      ["name/minLength", "got 0, want 1", () => keys.updateKey({ keyId, name: "" })],
      ["expiration/minimum", "got -1, want 0", () => keys.rerollKey({ keyId, expiration: -1 })],
      ["keyId/minLength", "got 2, want 3", () => keys.getKey({ keyId: "ke" })],
      ["keyId/pattern", "pattern", () => keys.deleteKey({ keyId: "key/1" })],
    ]) {
      await at(location, () => assertInvalid(`/properties/${location}`, message, call));
    }
    for (const [place, url] of VERIFIERS) {
      const verify = (request) => () => client(url).keys.verifyKey(request);
      const tags = Array(21).fill("t");
      await at(place, async () => {
        await assertInvalid("/properties/key/minLength", "got 0, want 1", verify({ key: "" }));
        await assertInvalid("/properties/tags/maxItems", "got 21, want 20", verify({ key: "k", tags }));
      });
    }
    // The body is checked before the root key.
    await assertFails(INVALID, () => client(PUBLISHER, "unkey_unknown").apis.createApi({ name: "ab" }));
  });

  test("an unsupported field is a bad request that names it", async () => {
    const { apis, keys } = control;
    const { keyId } = await createKey();
    const ratelimits = [{ name: "requests", limit: 1, duration: 1000, autoApply: true }];
    const calls = [
      ["credits", () => keys.createKey({ apiId: API, credits: { remaining: 1 } })],
      ["ratelimits", () => keys.createKey({ apiId: API, ratelimits })],
      ["roles", () => keys.createKey({ apiId: API, roles: ["admin"] })],
      ["recoverable", () => keys.createKey({ apiId: API, recoverable: true })],
      ["credits", () => keys.updateKey({ keyId, credits: { remaining: 1 } })],
      ["ratelimits", () => keys.updateKey({ keyId, ratelimits })],
      ["roles", () => keys.updateKey({ keyId, roles: ["admin"] })],
      ["decrypt", () => keys.getKey({ keyId, decrypt: true })],
      ["decrypt", () => apis.listKeys({ apiId: API, decrypt: true })],
    ];
    for (const [, url] of VERIFIERS) {
      const verify = (request) => () => client(url).keys.verifyKey({ key: "k", ...request });
      calls.push(
        ["credits", verify({ credits: { cost: 1 } })],
        ["ratelimits", verify({ ratelimits: [{ name: "requests" }] })],
        ["migrationId", verify({ migrationId: "from_elsewhere" })],
      );
    }
    for (const [field, call] of calls) {
      await at(`${field}: ${call}`, async () => {
        const problem = await assertInvalid(`/properties/${field}`, "not supported", call);
        assert.ok(problem.message.includes(field) && problem.fix, JSON.stringify(problem));
      });
    }
  });

  test("unsupported fields without effect are accepted", async () => {
    const nothing = { roles: [], ratelimits: [] };
    const { keyId, key } = await createKey({ ...nothing, permissions: [], recoverable: false });
    await control.keys.updateKey({ keyId, ...nothing, credits: null });
    await control.keys.getKey({ keyId, decrypt: false });
    await control.apis.listKeys({ apiId: API, decrypt: false, revalidateKeysCache: false });
    const expected = { valid: true, code: "VALID", keyId, enabled: true };
    await assertVerdict(expected, key, ROOT_KEY, { tags: [], ratelimits: [] });
  });

  test("a malformed permission query is a bad request", async () => {
    const { key } = await createKey({ permissions: ["read"] });
    for (const permissions of ["read AND", "(read", "read write", "read AND OR write", "read & write"]) {
      for (const [place, url] of VERIFIERS) {
        const verify = () => client(url).keys.verifyKey({ key, permissions });
        await at(`${permissions} at ${place}`, () => assertFails(BAD_QUERY, verify));
      }
    }
    // For an unknown key, the query isn't parsed.
    await assertVerdict(NOT_FOUND, "prod_unknown", ROOT_KEY, { permissions: "read AND" });
  });

  test("a body that is too large is refused", async () => {
    const request = { apiId: API, meta: { text: "x".repeat(16 << 20) } };
    await assertFails(TOO_LARGE, () => control.keys.createKey(request, NO_RETRIES));
  });

  test("a request without a root key is a bad request", async () => {
    const { keyId, key } = await createKey();
    for (const [what, serverURL, call] of everywhere(operations(API, keyId, key))) {
      await at(what, async () => {
        const { error } = await assertFails(MISSING, () => call(new Unkey({ serverURL })));
        assert.ok(error.detail.includes("Authorization"), error.detail);
        assert.equal(error.errors.length, 1);
      });
    }
    const otherScheme = { headers: { Authorization: "Basic a" } };
    for (const [what, url, call] of everywhere(operations(API, keyId, key, otherScheme))) {
      await at(`${what}, another scheme`, () => assertFails(MALFORMED, () => call(client(url))));
    }
    await assertCached(key);
  });

  test("an unknown revoked or ordinary key is unauthorized", async () => {
    const { keyId, key } = await createKey();
    for (const [kind, rootKey] of [
      ["unknown", "unkey_unknown"],
      ["revoked", setting("EVICTD_REVOKED_ROOT_KEY")],
      ["an ordinary key", key],
    ]) {
      for (const [what, url, call] of everywhere(operations(API, keyId, key))) {
        await at(`${kind}: ${what}`, () => assertFails(UNAUTHORIZED, () => call(client(url, rootKey))));
      }
    }
    await assertCached(key);
  });

  test("an expired or disabled root key is forbidden", async () => {
    const { keyId, key } = await createKey();
    for (const [rootKey, expected] of [
      [setting("EVICTD_EXPIRED_ROOT_KEY"), EXPIRED],
      [setting("EVICTD_DISABLED_ROOT_KEY"), DISABLED],
      [setting("EVICTD_CLOSED_ROOT_KEY"), CLOSED],
    ]) {
      for (const [what, url, call] of everywhere(operations(API, keyId, key))) {
        await at(`${expected[2]}: ${what}`, () => assertFails(expected, () => call(client(url, rootKey))));
      }
    }
    await assertCached(key);
  });

  test("a missing permission is forbidden or not found", async () => {
    const { keyId, key } = await createKey();
    const verifier = client(PUBLISHER, VERIFIER);
    const calls = operations(API, keyId, key);
    for (const [operation, action] of [
      ["apis.createApi", "create_api"],
      ["apis.getApi", "read_api"],
      ["apis.deleteApi", "delete_api"],
      ["keys.getKey", "read_key"],
      ["keys.updateKey", "update_key"],
      ["keys.rerollKey", "create_key"],
      ["keys.deleteKey", "delete_key"],
    ]) {
      await at(operation, async () => {
        const { error } = await assertFails(LACKING, () => calls[operation](verifier));
        const wanted = [`api.*.${action}`];
        if (operation !== "apis.createApi") wanted.push(`api.${API}.${action}`);
        for (const permission of wanted) assert.ok(error.detail.includes(permission), error.detail);
      });
    }
    // A root key that may neither read nor create keys in an API can't learn that it exists.
    for (const operation of ["keys.createKey", "apis.listKeys"]) {
      await at(operation, () => assertFails(NO_API, () => calls[operation](verifier)));
    }
    await assertVerdict(NOT_FOUND, key, setting("EVICTD_POWERLESS_ROOT_KEY"));

    // For APIs the permission is checked before the existence, for keys after it.
    const nothing = operations("api_unknown", "key_unknown", "unknown");
    for (const operation of ["apis.getApi", "apis.deleteApi"]) {
      await at(`${operation}, unknown id`, () => assertFails(LACKING, () => nothing[operation](verifier)));
    }
    for (const operation of ["keys.getKey", "keys.updateKey", "keys.rerollKey", "keys.deleteKey"]) {
      await at(`${operation}, unknown id`, () => assertFails(NO_KEY, () => nothing[operation](verifier)));
    }
    await assertCached(key);
  });

  test("a root key for one api works there and nowhere else", async () => {
    const [rootKey, apiId] = [setting("EVICTD_SCOPED_ROOT_KEY"), setting("EVICTD_SCOPED_API_ID")];
    const unkey = client(PUBLISHER, rootKey);
    const { keyId, key } = (await unkey.keys.createKey({ apiId })).data;
    assert.equal((await unkey.apis.getApi({ apiId })).data.id, apiId);
    await unkey.keys.updateKey({ keyId, name: "a" });
    await unkey.keys.getKey({ keyId });
    await unkey.apis.listKeys({ apiId });
    await assertVerdict({ valid: true, code: "VALID", keyId, name: "a", enabled: true }, key, rootKey);
    const successor = (await unkey.keys.rerollKey({ keyId, expiration: 0 })).data;
    await unkey.keys.deleteKey({ keyId: successor.keyId });

    const other = await createKey();
    await assertVerdict(NOT_FOUND, other.key, rootKey);
    const calls = operations(API, other.keyId, other.key);
    for (const operation of [
      "apis.createApi",
      "apis.getApi",
      "apis.deleteApi",
      "keys.getKey",
      "keys.deleteKey",
    ]) {
      await at(operation, () => assertFails(LACKING, () => calls[operation](unkey)));
    }
    await assertCached(other.key);
  });

  const OF_APIS = ["apis.getApi", "apis.listKeys", "apis.deleteApi", "keys.createKey"];
  const OF_KEYS = ["keys.getKey", "keys.updateKey", "keys.rerollKey", "keys.deleteKey"];

  async function assertNoneFound(expected, names, calls, unkey) {
    for (const operation of names)
      await at(operation, () => assertFails(expected, () => calls[operation](unkey)));
  }

  test("an unknown id is not found by any operation", async () => {
    const nothing = operations("api_unknown", "key_unknown", "unknown");
    await assertNoneFound(NO_API, OF_APIS, nothing, control);
    await assertNoneFound(NO_KEY, OF_KEYS, nothing, control);
  });

  test("a deleted id is not found by any operation", async () => {
    const apiId = await createApi();
    const { keyId, key } = await createKey({ apiId });
    const calls = operations(apiId, keyId, key);
    await control.keys.deleteKey({ keyId });
    await assertNoneFound(NO_KEY, OF_KEYS, calls, control);
    await control.apis.deleteApi({ apiId });
    await assertNoneFound(NO_API, OF_APIS, calls, control);
  });

  test("another workspaces id is not found by any operation", async () => {
    const { keyId, key } = await createKey();
    const [stranger, calls] = [client(PUBLISHER, STRANGER), operations(API, keyId, key)];
    await assertNoneFound(NO_API, OF_APIS, calls, stranger);
    await assertNoneFound(NO_KEY, OF_KEYS, calls, stranger);
    await assertVerdict(NOT_FOUND, key, STRANGER);
    await assertCached(key);
  });

  test("a protected api is not deleted", async () => {
    const apiId = setting("EVICTD_PROTECTED_API_ID");
    const { keyId, key } = await createKey({ apiId });
    await assertFails(PROTECTED, () => control.apis.deleteApi({ apiId }));
    assert.equal((await control.apis.getApi({ apiId })).data.id, apiId);
    await assertCached(key);
    // Its keys are not protected.
    await control.keys.deleteKey({ keyId });
    await assertBecomes(NOT_FOUND, key);
  });

  test("requests above the workspaces limit are too many", async () => {
    const limit = Number(setting("EVICTD_REQUESTS_PER_MINUTE"));
    const { unkey, answers } = keepingAnswers(setting("EVICTD_LIMITED_ROOT_KEY"));
    const beganAt = performance.now();
    let refused;
    // Twice as many may pass if a minute ends in between.
    while (!refused && answers.length <= 2 * limit) {
      try {
        await unkey.apis.createApi({ name: "many" });
      } catch (error) {
        assert.equal(error.constructor, errors.TooManyRequestsErrorResponse, `it raised ${error}`);
        refused = error;
      }
    }
    assert.ok(refused, `${answers.length} requests passed`);
    assert.ok(answers.length > limit, `only ${answers.length - 1} requests passed`);

    for (const { headers } of answers.slice(0, -1)) {
      assert.equal(headers.get("ratelimit-limit"), String(limit));
      isBetween(0, Number(headers.get("ratelimit-remaining") ?? NaN), limit - 1);
      isBetween(0, Number(headers.get("ratelimit-reset") ?? NaN), 60);
    }
    const { headers } = refused;
    const limits = [headers.get("ratelimit-limit"), headers.get("ratelimit-remaining")];
    assert.deepEqual(limits, [String(limit), "0"]);
    isBetween(1, Number(headers.get("retry-after") ?? NaN), 60);
    assert.equal(headers.get("retry-after"), headers.get("ratelimit-reset"));
    // The client raises the error at once, without a retry.
    const count = answers.length;
    const { error } = await assertFails(TOO_MANY, () => unkey.apis.createApi({ name: "many" }));
    assert.ok(error.detail.includes(`${limit}/1m0s`), error.detail);
    assert.equal(answers.length, count + 1);
    assert.ok(performance.now() - beganAt < 20_000);
    // With a limit of zero, the answer has no rate limit headers.
    const silenced = client(PUBLISHER, setting("EVICTD_SILENCED_ROOT_KEY"));
    const nothing = await assertFails(TOO_MANY, () => silenced.apis.createApi({ name: "many" }));
    assert.equal(nothing.headers.get("ratelimit-limit"), null);
  });

  test("a broken store fails every operation with 500", async () => {
    const broken = client(setting("EVICTD_BROKEN_URL"), setting("EVICTD_BROKEN_ROOT_KEY"));
    const [apiId, keyId] = [setting("EVICTD_BROKEN_API_ID"), setting("EVICTD_BROKEN_KEY_ID")];
    for (const [operation, call] of Object.entries(operations(apiId, keyId, "k", NO_RETRIES))) {
      await at(operation, () => assertFails(BROKEN, () => call(broken)));
    }
  });

  test("an agent without a proof answers 503", async () => {
    // 503 is not in Unkey's specification, so the client has no error class of its own for it.
    const agent = client(setting("EVICTD_BROKEN_AGENT_URL"), setting("EVICTD_BROKEN_ROOT_KEY"));
    const key = setting("EVICTD_BROKEN_KEY");
    await assertFails(UNPROVEN, () => agent.keys.verifyKey({ key }, NO_RETRIES));
  });
});

describe("retries", () => {
  /** Gets the receipt of a request. The client doesn't have this operation. */
  async function receipt(exchange) {
    const { requestId } = JSON.parse(exchange.answer).meta;
    const answer = await fetch(`${PUBLISHER}/v2/propagation.getReceipt`, {
      method: "POST",
      headers: { authorization: `Bearer ${ROOT_KEY}`, "content-type": "application/json" },
      body: JSON.stringify({ requestId }),
    });
    return { status: answer.status, body: await answer.json() };
  }

  function statuses(exchanges) {
    return exchanges.map((exchange) => exchange.status);
  }

  /** Asserts that the first request was carried out, and that the second found nothing. */
  async function assertDeletedOnce(exchanges) {
    assert.deepEqual(statuses(exchanges), [200, 404]);
    assert.equal(exchanges[0].request, exchanges[1].request);
    const receipts = await Promise.all(exchanges.map(receipt));
    assert.deepEqual(statuses(receipts), [200, 404]);
    assert.equal(receipts[0].body.data.cause, "deleted");
  }

  test("a deletion whose answer was lost is done once", async (t) => {
    for (const loss of [badGateway, reset]) {
      await at(loss.name, async () => {
        const proxy = await LossyProxy.start(t, PUBLISHER);
        const unkey = client(proxy.url);
        const [{ keyId, key }, apiId] = [await createKey(), await createApi()];
        await assertCached(key);
        proxy.loseNext(loss);
        await assertFails(NO_KEY, () => unkey.keys.deleteKey({ keyId }));
        await assertDeletedOnce(proxy.exchanges);
        await assertBecomes(NOT_FOUND, key);

        proxy.exchanges = [];
        proxy.loseNext(loss);
        await assertFails(NO_API, () => unkey.apis.deleteApi({ apiId }));
        await assertDeletedOnce(proxy.exchanges);
      });
    }
  });

  test("a deletion whose connection was closed is done once", async (t) => {
    // This client retries after a connection that was closed cleanly.
    const proxy = await LossyProxy.start(t, PUBLISHER);
    const { keyId, key } = await createKey();
    await assertCached(key);
    proxy.loseNext(hangUp);
    await assertFails(NO_KEY, () => client(proxy.url).keys.deleteKey({ keyId }));
    await assertDeletedOnce(proxy.exchanges);
    await assertBecomes(NOT_FOUND, key);
  });

  test("a change whose answer was lost is repeated unchanged", async (t) => {
    const proxy = await LossyProxy.start(t, PUBLISHER);
    const { keyId, key } = await createKey();
    await assertCached(key);
    proxy.loseNext(badGateway);
    await client(proxy.url).keys.updateKey({ keyId, enabled: false });
    assert.deepEqual(statuses(proxy.exchanges), [200, 200]);
    await assertBecomes({ valid: false, code: "DISABLED", keyId, enabled: false }, key);
  });

  test("a creation whose answer was lost leaves an extra key", async (t) => {
    // As with Unkey, requests have no idempotency key. The extra key can be listed and deleted.
    const proxy = await LossyProxy.start(t, PUBLISHER);
    const apiId = await createApi();
    proxy.loseNext(badGateway);
    const returned = (await client(proxy.url).keys.createKey({ apiId })).data.keyId;
    assert.deepEqual(statuses(proxy.exchanges), [200, 200]);
    const [page] = await pagesOf(control.apis.listKeys({ apiId }));
    const lost = JSON.parse(proxy.exchanges[0].answer).data.keyId;
    assert.deepEqual(
      page.data.map((key) => key.keyId),
      [returned, lost].sort(),
    );
  });

  test("a broken publisher is retried for ten seconds", async (t) => {
    const proxy = await LossyProxy.start(t, setting("EVICTD_BROKEN_URL"));
    const unkey = client(proxy.url, setting("EVICTD_BROKEN_ROOT_KEY"));
    const keyId = setting("EVICTD_BROKEN_KEY_ID");
    const beganAt = performance.now();
    await assertFails(BROKEN, () => unkey.keys.deleteKey({ keyId }));
    const elapsed = performance.now() - beganAt;
    // The client's pauses are random, at most a second: about fourteen attempts.
    isBetween(8, proxy.exchanges.length, 22);
    isBetween(10_000, elapsed, 15_000);
    assert.deepEqual([...new Set(statuses(proxy.exchanges))], [500]);
    assert.equal(new Set(proxy.exchanges.map((exchange) => exchange.request)).size, 1);
  });
});
