"""Unkey's Python client against evictd: every operation that both support, and every error.

`cargo xtask test sdk` starts the deployments, sets the environment variables and runs this suite
(`tests/tests/e2e/sdk.rs`). `../typescript/suite.mjs` has the same tests under the same names.
"""

import functools
import json
import os
import sys
import time
import unittest

import httpx
from unkey.py import Unkey, errors, models
from unkey.py.utils import BackoffStrategy, RetryConfig

from lossy_proxy import LossyProxy, bad_gateway, hang_up, reset


def setting(name):
    value = os.environ.get(name)
    if not value:
        sys.exit(f"{name} is not set: `cargo xtask test sdk` starts the deployments and sets it")
    return value


PUBLISHER = setting("EVICTD_PUBLISHER_URL")
AGENTS = setting("EVICTD_AGENT_URLS").split(",")
# The servers that verify keys, by name.
VERIFIERS = {"the publisher": PUBLISHER} | {f"agent {number}": url for number, url in enumerate(AGENTS, 1)}

ROOT_KEY = setting("EVICTD_ROOT_KEY")  # may do everything
VERIFIER = setting("EVICTD_VERIFIER_ROOT_KEY")  # may verify, and nothing else
STRANGER = setting("EVICTD_STRANGER_ROOT_KEY")  # may do everything, in another workspace

# The bound: the longest time until a change is visible everywhere.
BOUND_SECONDS = 30.0
# The pause between two requests while a test waits for a change.
POLL_SECONDS = 0.02

NO_RETRIES = RetryConfig("none", BackoffStrategy(1, 1, 1, 1), False)

# The errors, as (class, status, title, the end of the type's URL).
MISSING = (errors.BadRequestErrorResponse, 400, "Bad Request", "unkey/application/invalid_input")
MALFORMED = (errors.BadRequestErrorResponse, 400, "Bad Request", "unkey/authentication/malformed")
INVALID = (errors.BadRequestErrorResponse, 400, "Bad Request", "unkey/application/invalid_input")
BAD_QUERY = (
    errors.BadRequestErrorResponse,
    400,
    "Bad Request",
    "user/bad_request/permissions_query_syntax_error",
)
UNAUTHORIZED = (errors.UnauthorizedErrorResponse, 401, "Unauthorized", "unkey/authentication/key_not_found")
EXPIRED = (errors.ForbiddenErrorResponse, 403, "Forbidden", "unkey/authorization/forbidden")
DISABLED = (errors.ForbiddenErrorResponse, 403, "Key is disabled", "unkey/authorization/key_disabled")
CLOSED = (
    errors.ForbiddenErrorResponse,
    403,
    "Workspace is disabled",
    "unkey/authorization/workspace_disabled",
)
LACKING = (
    errors.ForbiddenErrorResponse,
    403,
    "Insufficient Permissions",
    "unkey/authorization/insufficient_permissions",
)
NO_KEY = (errors.NotFoundErrorResponse, 404, "Not Found", "unkey/data/key_not_found")
NO_API = (errors.NotFoundErrorResponse, 404, "Not Found", "unkey/data/api_not_found")
PROTECTED = (
    errors.PreconditionFailedErrorResponse,
    412,
    "Resource is protected",
    "unkey/application/protected_resource",
)
TOO_LARGE = (errors.APIError, 413, "Request Entity Too Large", "user/bad_request/request_body_too_large")
TOO_MANY = (
    errors.TooManyRequestsErrorResponse,
    429,
    "Too Many Requests",
    "user/too_many_requests/workspace_rate_limited",
)
BROKEN = (
    errors.InternalServerErrorResponse,
    500,
    "Internal Server Error",
    "unkey/application/service_unavailable",
)
UNPROVEN = (errors.APIError, 503, "Service Unavailable", "unkey/application/service_unavailable")


@functools.cache
def client(url=PUBLISHER, root_key=ROOT_KEY):
    """The published client with its default retries. `None`: without a root key."""
    return Unkey(root_key=root_key, server_url=url)


class Answers:
    """A client that keeps the raw answers, including fields that it doesn't know."""

    def __init__(self, root_key=ROOT_KEY):
        self.kept = []
        http = httpx.Client(event_hooks={"response": [self._keep]})
        self.client = Unkey(root_key=root_key, server_url=PUBLISHER, client=http)

    def _keep(self, answer):
        answer.read()
        self.kept.append(answer)

    def last(self):
        return self.kept[-1].json()


@functools.cache
def api():
    """The API for keys of tests that need no API of their own."""
    return create_api()


def create_api(name="payments"):
    return client().apis.create_api(name=name).data.api_id


def create_key(api_id=None, **settings):
    return client().keys.create_key(api_id=api_id or api(), **settings).data


def plain(answer):
    """Converts a typed answer to JSON without absent fields."""
    return answer.model_dump(by_alias=True, exclude_none=True)


def shown(key_id):
    return plain(client().keys.get_key(key_id=key_id).data)


def verified(url, key, root_key=ROOT_KEY, **settings):
    return plain(client(url, root_key).keys.verify_key(key=key, **settings).data)


def now_millis():
    return time.time_ns() // 1_000_000


def operations(api_id, key_id, key, **options):
    """Returns all operations as functions of a client. The ids need not exist."""
    return {
        "apis.createApi": lambda unkey: unkey.apis.create_api(name="never", **options),
        "apis.getApi": lambda unkey: unkey.apis.get_api(api_id=api_id, **options),
        "apis.listKeys": lambda unkey: unkey.apis.list_keys(api_id=api_id, **options),
        "apis.deleteApi": lambda unkey: unkey.apis.delete_api(api_id=api_id, **options),
        "keys.createKey": lambda unkey: unkey.keys.create_key(api_id=api_id, **options),
        "keys.getKey": lambda unkey: unkey.keys.get_key(key_id=key_id, **options),
        "keys.updateKey": lambda unkey: unkey.keys.update_key(key_id=key_id, name="never", **options),
        "keys.rerollKey": lambda unkey: unkey.keys.reroll_key(key_id=key_id, expiration=0, **options),
        "keys.deleteKey": lambda unkey: unkey.keys.delete_key(key_id=key_id, **options),
        "keys.verifyKey": lambda unkey: unkey.keys.verify_key(key=key, **options),
    }


def everywhere(calls):
    """Yields each call for each server that supports it, with a description for failures."""
    for operation, call in calls.items():
        places = VERIFIERS if operation == "keys.verifyKey" else {"the publisher": PUBLISHER}
        for place, url in places.items():
            yield f"{operation} at {place}", url, call


class Suite(unittest.TestCase):
    maxDiff = None

    def assert_answer(self, answer, kind):
        """Asserts the type of the answer, and that it has a request id."""
        self.assertIs(type(answer), kind)
        self.assertRegex(answer.meta.request_id, r"^req_[a-zA-Z0-9]+$")

    def assert_fails(self, expected, call, *arguments, **settings):
        """Asserts that the call raises exactly this error, with all fields. Returns it."""
        kind, status, title, type_url = expected
        with self.assertRaises(errors.UnkeyError) as raised:
            call(*arguments, **settings)
        error = raised.exception
        self.assertIs(type(error), kind, error)
        body = json.loads(error.body)
        if kind is not errors.APIError:
            self.assertEqual(plain(error.data), body)
        problem = body["error"]
        self.assertEqual(
            (error.status_code, problem["status"], problem["title"], problem["type"]),
            (status, status, title, f"https://unkey.com/docs/errors/{type_url}"),
        )
        self.assertTrue(problem["detail"])
        self.assertRegex(body["meta"]["requestId"], r"^req_[a-zA-Z0-9]+$")
        self.assertEqual("errors" in problem, status in (400, 413), problem)
        content_type = "application/problem+json" if status == 429 else "application/json"
        self.assertEqual(error.headers["content-type"], content_type)
        return error

    def assert_invalid(self, location, message, call, *arguments, **settings):
        """Asserts that the call is refused for exactly one problem, at `location`."""
        error = self.assert_fails(INVALID, call, *arguments, **settings)
        problems = error.data.error.errors
        self.assertEqual([problem.location for problem in problems], [location])
        self.assertIn(message, problems[0].message)
        return problems[0]

    def assert_verdict(self, expected, key, root_key=ROOT_KEY, **settings):
        """Asserts that every verifier returns exactly this for the key, at once."""
        for place, url in VERIFIERS.items():
            with self.subTest(place):
                self.assertEqual(verified(url, key, root_key, **settings), expected)

    def assert_cached(self, *keys):
        """Asserts that the keys are valid everywhere. Afterwards every agent has cached them."""
        for key in keys:
            for place, url in VERIFIERS.items():
                self.assertEqual(verified(url, key)["code"], "VALID", place)

    def assert_becomes(self, expected, key, before="VALID", **settings):
        """Asserts that every verifier returns this within the bound, and the code `before` until then."""
        changed_at = time.monotonic()
        for place, url in VERIFIERS.items():
            with self.subTest(place):
                while True:
                    asked_at = time.monotonic()
                    answer = verified(url, key, **settings)
                    if answer == expected:
                        break
                    self.assertIn(answer["code"], (before, expected["code"]))
                    if asked_at - changed_at >= BOUND_SECONDS:
                        self.assertEqual(answer, expected, "after the bound")
                    time.sleep(POLL_SECONDS)
        # The new answer is stable.
        self.assert_verdict(expected, key, **settings)


NOT_FOUND = {"valid": False, "code": "NOT_FOUND"}


class Apis(Suite):
    def test_an_api_is_created_and_shown(self):
        created = client().apis.create_api(name="Zahlungen & Rechnungen")
        self.assert_answer(created, models.V2ApisCreateAPIResponseBody)
        self.assertRegex(created.data.api_id, r"^api_[a-zA-Z0-9]+$")

        answer = client().apis.get_api(api_id=created.data.api_id)
        self.assert_answer(answer, models.V2ApisGetAPIResponseBody)
        self.assertEqual(plain(answer.data), {"id": created.data.api_id, "name": "Zahlungen & Rechnungen"})

    def test_a_deleted_api_takes_its_keys_with_it_everywhere(self):
        doomed, other = create_api(), create_key()
        keys = [create_key(doomed) for _ in range(3)]
        self.assert_cached(other.key, *(key.key for key in keys))

        deleted = client().apis.delete_api(api_id=doomed)
        self.assert_answer(deleted, models.V2ApisDeleteAPIResponseBody)
        self.assertEqual(plain(deleted.data), {})
        for key in keys:
            self.assert_becomes(NOT_FOUND, key.key)
        self.assert_cached(other.key)

        self.assert_fails(NO_API, client().apis.get_api, api_id=doomed)
        self.assert_fails(NO_API, client().apis.list_keys, api_id=doomed)
        self.assert_fails(NO_API, client().keys.create_key, api_id=doomed)
        self.assert_fails(NO_KEY, client().keys.get_key, key_id=keys[0].key_id)
        self.assert_fails(NO_KEY, client().keys.delete_key, key_id=keys[0].key_id)

    def test_listkeys_pages_through_all_keys_in_order_of_id(self):
        listed = create_api()
        keys = sorted(create_key(listed).key_id for _ in range(5))

        page = client().apis.list_keys(api_id=listed, limit=2)
        pages = []
        while page is not None:
            self.assert_answer(page.result, models.V2ApisListKeysResponseBody)
            pages.append(page)
            page = page.next()
        self.assertEqual(
            [[key.key_id for key in page.result.data] for page in pages], [keys[:2], keys[2:4], keys[4:]]
        )
        self.assertEqual([page.result.pagination.has_more for page in pages], [True, True, False])
        self.assertIsNone(pages[-1].result.pagination.cursor)

        # Another call can use the cursor later.
        later = client().apis.list_keys(api_id=listed, limit=100, cursor=pages[0].result.pagination.cursor)
        self.assertEqual([key.key_id for key in later.result.data], keys[2:])
        whole = client().apis.list_keys(api_id=listed, revalidate_keys_cache=True)
        self.assertEqual([key.key_id for key in whole.result.data], keys)
        self.assertEqual(plain(whole.result.pagination), {"hasMore": False})
        self.assertIsNone(whole.next())

    def test_listkeys_shows_what_getkey_shows_without_deleted_keys(self):
        listed = create_api()
        named = create_key(
            listed, name="ci", meta={"team": "core"}, permissions=["read"], external_id="user_1"
        )
        ended, gone = create_key(listed, expires=1, enabled=False), create_key(listed)
        client().keys.delete_key(key_id=gone.key_id)
        keys = client().apis.list_keys(api_id=listed).result.data
        self.assertEqual([type(key) for key in keys], [models.KeyResponseData] * 2)
        expected = {key.key_id: shown(key.key_id) for key in (named, ended)}
        self.assertEqual({key.key_id: plain(key) for key in keys}, expected)

    def test_listkeys_finds_the_keys_of_one_external_id(self):
        listed = create_api()
        keys = [create_key(listed, external_id=owner).key_id for owner in ("ada", "grace", "ada")]
        create_key(listed)
        page = client().apis.list_keys(api_id=listed, external_id="ada", limit=1)
        found = [page.result.data[0].key_id]
        while (page := page.next()) is not None:
            found += [key.key_id for key in page.result.data]
        self.assertEqual(found, sorted([keys[0], keys[2]]))
        none = client().apis.list_keys(api_id=listed, external_id="unknown").result
        self.assertEqual((none.data, none.pagination.has_more), ([], False))


class Keys(Suite):
    def test_createkey_returns_an_id_and_a_key_in_the_given_form(self):
        created = client().keys.create_key(api_id=api(), prefix="prod", byte_length=24)
        self.assert_answer(created, models.V2KeysCreateKeyResponseBody)
        self.assertRegex(created.data.key_id, r"^key_[a-zA-Z0-9]+$")
        # Base58, as Bitcoin writes it: 24 bytes are 33 digits, or fewer when they begin with zeros.
        self.assertRegex(created.data.key, r"^prod_[1-9A-HJ-NP-Za-km-z]{28,33}$")
        self.assertRegex(create_key().key, r"^[1-9A-HJ-NP-Za-km-z]{18,22}$")

    def test_getkey_shows_every_field_that_createkey_was_given(self):
        before, ends = now_millis(), now_millis() + 3_600_000
        created = create_key(
            prefix="prod",
            name="Laptop",
            meta={"plan": "pro"},
            external_id="user_42",
            permissions=["documents.read", "documents.write"],
            expires=ends,
            enabled=False,
        )
        answer = client().keys.get_key(key_id=created.key_id)
        self.assert_answer(answer, models.V2KeysGetKeyResponseBody)
        key = plain(answer.data)
        self.assertTrue(before - 1000 <= key.pop("createdAt") <= now_millis() + 1000)
        self.assertRegex(key["identity"].pop("id"), r"^[a-zA-Z0-9_]+$")
        expected = {
            "keyId": created.key_id,
            "start": created.key[: len("prod_") + 4],
            "enabled": False,
            "name": "Laptop",
            "meta": {"plan": "pro"},
            "expires": ends,
            "permissions": ["documents.read", "documents.write"],
            "identity": {"externalId": "user_42"},
        }
        self.assertEqual(key, expected)

    def test_verifykey_returns_every_field_at_publisher_and_agents(self):
        ends = now_millis() + 3_600_000
        created = create_key(
            name="Laptop",
            meta={"plan": "pro"},
            external_id="user_42",
            permissions=["documents.read", "documents.write"],
            expires=ends,
        )
        for url in VERIFIERS.values():
            answer = client(url).keys.verify_key(key=created.key)
            self.assert_answer(answer, models.V2KeysVerifyKeyResponseBody)
        expected = {
            "valid": True,
            "code": models.Code.VALID,
            "keyId": created.key_id,
            "name": "Laptop",
            "meta": {"plan": "pro"},
            "expires": ends,
            "enabled": True,
            "permissions": ["documents.read", "documents.write"],
            "identity": shown(created.key_id)["identity"],
        }
        self.assert_verdict(expected, created.key)
        self.assert_verdict(expected, created.key, VERIFIER)
        self.assert_verdict(expected, created.key, tags=["path=/v1/pay", "region=eu"])

    def test_a_key_without_settings_shows_only_the_required_fields(self):
        created = create_key()
        key = shown(created.key_id)
        self.assertIs(type(key.pop("createdAt")), int)
        self.assertEqual(key, {"keyId": created.key_id, "start": created.key[:4], "enabled": True})
        expected = {"valid": True, "code": "VALID", "keyId": created.key_id, "enabled": True}
        self.assert_verdict(expected, created.key)

    def test_metadata_comes_back_as_it_was_given(self):
        meta = {
            "limits": {"daily": 1000, "ratio": 0.25, "most": 9007199254740991, "least": -1},
            "labels": ["ä", "日本", "🔑", "", '"\\\n\u0001'],
            "nothing": None,
            "empty": {},
            "mixed": [1, "1", [1.5, False], {"deep": [{}]}],
            "": "no name",
        }
        created = create_key(meta=meta)
        self.assertEqual(shown(created.key_id)["meta"], meta)
        for place, url in VERIFIERS.items():
            with self.subTest(place):
                self.assertEqual(verified(url, created.key)["meta"], meta)

    def test_keys_of_one_external_id_have_one_identity(self):
        identities = [
            shown(create_key(external_id=owner).key_id)["identity"] for owner in ("ada", "ada", "grace")
        ]
        self.assertEqual(identities[0], identities[1])
        self.assertNotEqual(identities[0]["id"], identities[2]["id"])
        elsewhere = client(root_key=STRANGER)
        api_id = elsewhere.apis.create_api(name="elsewhere").data.api_id
        key_id = elsewhere.keys.create_key(api_id=api_id, external_id="ada").data.key_id
        theirs = plain(elsewhere.keys.get_key(key_id=key_id).data)["identity"]
        self.assertEqual(theirs["externalId"], "ada")
        self.assertNotEqual(theirs["id"], identities[0]["id"])

    def test_an_unknown_key_is_not_found_without_further_details(self):
        self.assert_verdict(NOT_FOUND, "prod_unknown")
        self.assert_verdict(NOT_FOUND, "🔑 " * 100)

    def test_a_permission_query_is_decided_by_the_keys_permissions(self):
        created = create_key(permissions=["billing:view", "documents.read", "documents.write"])
        details = {
            "keyId": created.key_id,
            "enabled": True,
            "permissions": ["billing:view", "documents.read", "documents.write"],
        }
        enough = {"valid": True, "code": "VALID"} | details
        lacking = {"valid": False, "code": "INSUFFICIENT_PERMISSIONS"} | details
        for query, expected in {
            "documents.read": enough,
            "admin": lacking,
            "documents.read AND documents.write": enough,
            "documents.read and admin": lacking,
            "admin OR documents.read": enough,
            "admin or (documents.read And billing:view)": enough,
            # AND binds tighter than OR.
            "documents.read OR admin AND owner": enough,
            "(documents.read OR admin) AND owner": lacking,
            # A star is a letter like any other.
            "documents.*": lacking,
        }.items():
            with self.subTest(query):
                self.assert_verdict(expected, created.key, permissions=query)
        self.assert_verdict({"valid": False, "code": "NOT_FOUND"}, "prod_unknown", permissions="admin")

    def test_a_key_that_was_created_disabled_is_disabled_everywhere(self):
        created = create_key(enabled=False, permissions=["read"])
        expected = {"valid": False, "code": "DISABLED", "keyId": created.key_id, "enabled": False}
        expected["permissions"] = ["read"]
        self.assert_verdict(expected, created.key)
        # DISABLED comes before the permission query.
        self.assert_verdict(expected, created.key, permissions="admin")

    def test_a_key_is_expired_everywhere_at_its_expiry(self):
        ends = now_millis() + 1_500
        created, ended = create_key(expires=ends), create_key(expires=1)
        expired = {"valid": False, "code": "EXPIRED", "enabled": True}
        self.assert_verdict(expired | {"keyId": ended.key_id, "expires": 1}, ended.key)
        self.assert_becomes(expired | {"keyId": created.key_id, "expires": ends}, created.key)
        self.assertGreater(now_millis(), ends - 500)

    def test_an_expiry_of_zero_has_passed_and_is_not_shown(self):
        listed = create_api()
        created = create_key(listed, expires=0)
        self.assert_verdict(
            {"valid": False, "code": "EXPIRED", "keyId": created.key_id, "enabled": True}, created.key
        )
        key = shown(created.key_id)
        self.assertNotIn("expires", key)
        self.assertEqual(plain(client().apis.list_keys(api_id=listed).result)["data"], [key])
        # Zero is a real expiry: without it, the key is valid.
        client().keys.update_key(key_id=created.key_id, expires=None)
        valid = {"valid": True, "code": "VALID", "keyId": created.key_id, "enabled": True}
        self.assert_becomes(valid, created.key, before="EXPIRED")

    def test_updatekey_changes_given_fields_and_keeps_the_rest(self):
        ends = now_millis() + 3_600_000
        created = create_key(name="a", meta={"a": 1}, external_id="a", permissions=["a"], expires=ends)
        before = shown(created.key_id)
        self.assertNotIn("updatedAt", before)
        self.assert_cached(created.key)

        updated = client().keys.update_key(key_id=created.key_id, name="b", external_id="b")
        self.assert_answer(updated, models.V2KeysUpdateKeyResponseBody)
        self.assertEqual(plain(updated.data), {})
        after = shown(created.key_id)
        self.assertGreaterEqual(after.pop("updatedAt"), before["createdAt"])
        self.assertEqual(after["identity"]["externalId"], "b")
        self.assertNotEqual(after["identity"]["id"], before["identity"]["id"])
        self.assertEqual(after, before | {"name": "b", "identity": after["identity"]})
        for field in ("start", "createdAt"):
            after.pop(field)
        self.assert_becomes({"valid": True, "code": "VALID"} | after, created.key)

        client().keys.update_key(key_id=created.key_id, meta={"b": [2]}, expires=ends + 1)
        after |= {"meta": {"b": [2]}, "expires": ends + 1}
        self.assert_becomes({"valid": True, "code": "VALID"} | after, created.key)

    def test_updatekey_clears_fields_that_are_null(self):
        created = create_key(
            name="a", meta={"a": 1}, external_id="a", permissions=["a"], expires=now_millis() + 3_600_000
        )
        self.assert_cached(created.key)
        client().keys.update_key(
            key_id=created.key_id,
            name=None,
            meta=None,
            external_id=None,
            expires=None,
            credits=None,
            permissions=[],
        )
        key = shown(created.key_id)
        self.assertEqual(set(key), {"keyId", "start", "enabled", "createdAt", "updatedAt"})
        expected = {"valid": True, "code": "VALID", "keyId": created.key_id, "enabled": True}
        self.assert_becomes(expected, created.key)

    def test_updatekey_switches_a_key_off_and_on_everywhere(self):
        created = create_key()
        self.assert_cached(created.key)
        client().keys.update_key(key_id=created.key_id, enabled=False)
        self.assertFalse(shown(created.key_id)["enabled"])
        off = {"valid": False, "code": "DISABLED", "keyId": created.key_id, "enabled": False}
        self.assert_becomes(off, created.key)
        client().keys.update_key(key_id=created.key_id, enabled=True)
        on = {"valid": True, "code": "VALID", "keyId": created.key_id, "enabled": True}
        self.assert_becomes(on, created.key, before="DISABLED")

    def test_updatekey_expires_and_extends_a_key_everywhere(self):
        created = create_key()
        self.assert_cached(created.key)
        client().keys.update_key(key_id=created.key_id, expires=1)
        details = {"keyId": created.key_id, "enabled": True}
        self.assert_becomes({"valid": False, "code": "EXPIRED", "expires": 1} | details, created.key)
        client().keys.update_key(key_id=created.key_id, expires=None)
        self.assert_becomes({"valid": True, "code": "VALID"} | details, created.key, before="EXPIRED")

    def test_updatekey_gives_and_takes_permissions_everywhere(self):
        created = create_key(permissions=["read"])
        details = {"keyId": created.key_id, "enabled": True}
        enough = {"valid": True, "code": "VALID", "permissions": ["read"]} | details
        self.assert_verdict(enough, created.key, permissions="read")
        client().keys.update_key(key_id=created.key_id, permissions=["write"])
        lacking = {"valid": False, "code": "INSUFFICIENT_PERMISSIONS", "permissions": ["write"]} | details
        self.assert_becomes(lacking, created.key, permissions="read")
        client().keys.update_key(key_id=created.key_id, permissions=["read"])
        self.assert_becomes(enough, created.key, before="INSUFFICIENT_PERMISSIONS", permissions="read")

    def test_a_rerolled_key_expires_and_its_successor_is_valid(self):
        settings = {"name": "a", "meta": {"a": 1}, "external_id": "a", "permissions": ["a"]}
        old = create_key(prefix="prod", **settings)
        self.assert_cached(old.key)
        before = shown(old.key_id)

        asked_at = now_millis()
        rerolled = client().keys.reroll_key(key_id=old.key_id, expiration=0)
        answered_at = now_millis()
        self.assert_answer(rerolled, models.V2KeysRerollKeyResponseBody)
        new = rerolled.data
        self.assertNotEqual((new.key_id, new.key), (old.key_id, old.key))
        self.assertRegex(new.key, r"^prod_[1-9A-HJ-NP-Za-km-z]{18,22}$")
        details = {name: before[name] for name in ("name", "meta", "permissions", "identity", "enabled")}
        self.assert_verdict({"valid": True, "code": "VALID", "keyId": new.key_id} | details, new.key)

        ended_at = shown(old.key_id)["expires"]
        self.assertTrue(asked_at - 1000 <= ended_at <= answered_at + 1000, ended_at)
        expired = {"valid": False, "code": "EXPIRED", "keyId": old.key_id, "expires": ended_at}
        self.assert_becomes(expired | details, old.key)
        successor = shown(new.key_id)
        self.assertEqual((successor.pop("keyId"), successor.pop("start")), (new.key_id, new.key[:9]))
        self.assertGreaterEqual(successor.pop("createdAt"), before["createdAt"])
        self.assertEqual(successor, details)

    def test_a_rerolled_key_stays_valid_for_its_grace_period(self):
        old = create_key()
        self.assert_cached(old.key)
        asked_at = now_millis()
        new = client().keys.reroll_key(key_id=old.key_id, expiration=90_000).data
        answered_at = now_millis()
        ends = shown(old.key_id)["expires"]
        # Rounded up to the next full minute.
        self.assertEqual(ends % 60_000, 0)
        self.assertTrue(asked_at + 90_000 - 1000 <= ends <= answered_at + 150_000 + 1000, ends - asked_at)
        details = {"valid": True, "code": "VALID", "enabled": True}
        self.assert_becomes(details | {"keyId": old.key_id, "expires": ends}, old.key)
        self.assert_verdict(details | {"keyId": new.key_id}, new.key)

    def test_a_deleted_key_is_not_found_everywhere_within_the_bound(self):
        for permanent in (False, True):
            with self.subTest(permanent=permanent):
                created, other = create_key(), create_key()
                self.assert_cached(created.key, other.key)
                deleted = client().keys.delete_key(key_id=created.key_id, permanent=permanent)
                self.assert_answer(deleted, models.V2KeysDeleteKeyResponseBody)
                self.assertEqual(plain(deleted.data), {})
                self.assert_becomes(NOT_FOUND, created.key)
                self.assert_cached(other.key)

    def test_a_confirmed_deletion_holds_everywhere_at_once(self):
        created, answers = create_key(), Answers()
        self.assert_cached(created.key)
        deleted = answers.client.keys.delete_key(
            key_id=created.key_id, http_headers={"Prefer": f"wait={BOUND_SECONDS:.0f}"}
        )
        # The client ignores the receipt, which Unkey's API doesn't have.
        self.assert_answer(deleted, models.V2KeysDeleteKeyResponseBody)
        self.assertEqual(plain(deleted), {"meta": {"requestId": deleted.meta.request_id}, "data": {}})
        receipt = answers.last()["meta"]["propagation"]
        self.assertEqual((receipt["state"], receipt["final"]), ("confirmed", True))
        self.assertEqual(len(receipt["regions"]), len(AGENTS))
        self.assert_verdict(NOT_FOUND, created.key)


class Errors(Suite):
    def test_a_schema_violation_is_a_bad_request_that_names_the_rule(self):
        unkey = client()
        key_id, year_2101 = create_key().key_id, 4_133_980_800_000
        for location, message, call, settings in [
            ("name/minLength", "got 2, want 3", unkey.apis.create_api, {"name": "ab"}),
            ("name/maxLength", "got 257, want 256", unkey.apis.create_api, {"name": "a" * 257}),
            ("apiId/minLength", "got 7, want 8", unkey.apis.get_api, {"api_id": "api_123"}),
            ("apiId/pattern", "pattern", unkey.apis.delete_api, {"api_id": "api-12345"}),
            ("limit/maximum", "got 101, want 100", unkey.apis.list_keys, {"api_id": api(), "limit": 101}),
            ("limit/minimum", "got 0, want 1", unkey.apis.list_keys, {"api_id": api(), "limit": 0}),
            (
                "byteLength/minimum",
                "got 15, want 16",
                unkey.keys.create_key,
                {"api_id": api(), "byte_length": 15},
            ),
            ("prefix/pattern", "pattern", unkey.keys.create_key, {"api_id": api(), "prefix": "a-b"}),
            ("externalId/pattern", "pattern", unkey.keys.create_key, {"api_id": api(), "external_id": "a b"}),
            (
                "permissions/items/pattern",
                "pattern",
                unkey.keys.create_key,
                {"api_id": api(), "permissions": ["a b"]},
            ),
            (
                "expires/maximum",
                "want 4102444800000",
                unkey.keys.update_key,
                {"key_id": key_id, "expires": year_2101},
            ),
            ("name/minLength", "got 0, want 1", unkey.keys.update_key, {"key_id": key_id, "name": ""}),
            (
                "expiration/minimum",
                "got -1, want 0",
                unkey.keys.reroll_key,
                {"key_id": key_id, "expiration": -1},
            ),
            ("expiration/type", "got null", unkey.keys.reroll_key, {"key_id": key_id, "expiration": None}),
            ("keyId/minLength", "got 2, want 3", unkey.keys.get_key, {"key_id": "ke"}),
            ("keyId/pattern", "pattern", unkey.keys.delete_key, {"key_id": "key/1"}),
        ]:
            with self.subTest(location):
                self.assert_invalid(f"/properties/{location}", message, call, **settings)
        for place, url in VERIFIERS.items():
            with self.subTest(place):
                verify = client(url).keys.verify_key
                self.assert_invalid("/properties/key/minLength", "got 0, want 1", verify, key="")
                self.assert_invalid(
                    "/properties/tags/maxItems", "got 21, want 20", verify, key="k", tags=["t"] * 21
                )
        # The body is checked before the root key.
        self.assert_fails(INVALID, client(root_key="unkey_unknown").apis.create_api, name="ab")

    def test_an_unsupported_field_is_a_bad_request_that_names_it(self):
        unkey, key_id = client(), create_key().key_id
        limits = [{"name": "requests", "limit": 1, "duration": 1000, "auto_apply": True}]
        calls = [
            ("credits", unkey.keys.create_key, {"api_id": api(), "credits": {"remaining": 1}}),
            ("ratelimits", unkey.keys.create_key, {"api_id": api(), "ratelimits": limits}),
            ("roles", unkey.keys.create_key, {"api_id": api(), "roles": ["admin"]}),
            ("recoverable", unkey.keys.create_key, {"api_id": api(), "recoverable": True}),
            ("credits", unkey.keys.update_key, {"key_id": key_id, "credits": {"remaining": 1}}),
            ("ratelimits", unkey.keys.update_key, {"key_id": key_id, "ratelimits": limits}),
            ("roles", unkey.keys.update_key, {"key_id": key_id, "roles": ["admin"]}),
            ("decrypt", unkey.keys.get_key, {"key_id": key_id, "decrypt": True}),
            ("decrypt", unkey.apis.list_keys, {"api_id": api(), "decrypt": True}),
        ]
        for url in VERIFIERS.values():
            verify = client(url).keys.verify_key
            calls += [
                ("credits", verify, {"key": "k", "credits": {"cost": 1}}),
                ("ratelimits", verify, {"key": "k", "ratelimits": [{"name": "requests"}]}),
                ("migrationId", verify, {"key": "k", "migration_id": "from_elsewhere"}),
                ("keyspaces", verify, {"key": "k", "keyspaces": ["ks_1"]}),
                ("keyspaces", verify, {"key": "k", "keyspaces": []}),
            ]
        for field, call, settings in calls:
            with self.subTest(field, settings=settings):
                problem = self.assert_invalid(f"/properties/{field}", "not supported", call, **settings)
                self.assertIn(field, problem.message)
                self.assertTrue(problem.fix)

    def test_unsupported_fields_without_effect_are_accepted(self):
        created = create_key(roles=[], ratelimits=[], permissions=[], recoverable=False)
        client().keys.update_key(key_id=created.key_id, roles=[], ratelimits=[], credits=None)
        client().keys.get_key(key_id=created.key_id, decrypt=False)
        client().apis.list_keys(api_id=api(), decrypt=False, revalidate_keys_cache=False)
        expected = {"valid": True, "code": "VALID", "keyId": created.key_id, "enabled": True}
        self.assert_verdict(expected, created.key, tags=[], ratelimits=[])

    def test_a_malformed_permission_query_is_a_bad_request(self):
        created = create_key(permissions=["read"])
        for query in ("read AND", "(read", "read write", "read AND OR write", "read & write"):
            for place, url in VERIFIERS.items():
                with self.subTest(query, place=place):
                    self.assert_fails(
                        BAD_QUERY, client(url).keys.verify_key, key=created.key, permissions=query
                    )
        # For an unknown key, the query isn't parsed.
        self.assert_verdict(NOT_FOUND, "prod_unknown", permissions="read AND")

    def test_a_body_that_is_too_large_is_refused(self):
        meta = {"text": "x" * (16 << 20)}
        self.assert_fails(TOO_LARGE, client().keys.create_key, api_id=api(), meta=meta, retries=NO_RETRIES)

    def test_a_request_without_a_root_key_is_a_bad_request(self):
        created = create_key()
        for what, url, call in everywhere(operations(api(), created.key_id, created.key)):
            with self.subTest(what):
                error = self.assert_fails(MISSING, call, client(url, None))
                self.assertIn("Authorization", error.data.error.detail)
                self.assertEqual(len(error.data.error.errors), 1)
        other_scheme = operations(
            api(), created.key_id, created.key, http_headers={"Authorization": "Basic a"}
        )
        for what, url, call in everywhere(other_scheme):
            with self.subTest(f"{what}, another scheme"):
                self.assert_fails(MALFORMED, call, client(url))
        self.assert_cached(created.key)

    def test_an_unknown_revoked_or_ordinary_key_is_unauthorized(self):
        created = create_key()
        root_keys = {
            "unknown": "unkey_unknown",
            "revoked": setting("EVICTD_REVOKED_ROOT_KEY"),
            "an ordinary key": created.key,
        }
        for kind, root_key in root_keys.items():
            for what, url, call in everywhere(operations(api(), created.key_id, created.key)):
                with self.subTest(f"{kind}: {what}"):
                    self.assert_fails(UNAUTHORIZED, call, client(url, root_key))
        self.assert_cached(created.key)

    def test_an_expired_or_disabled_root_key_is_forbidden(self):
        created = create_key()
        root_keys = {
            setting("EVICTD_EXPIRED_ROOT_KEY"): EXPIRED,
            setting("EVICTD_DISABLED_ROOT_KEY"): DISABLED,
            setting("EVICTD_CLOSED_ROOT_KEY"): CLOSED,
        }
        for root_key, expected in root_keys.items():
            for what, url, call in everywhere(operations(api(), created.key_id, created.key)):
                with self.subTest(f"{expected[2]}: {what}"):
                    self.assert_fails(expected, call, client(url, root_key))
        self.assert_cached(created.key)

    def test_a_missing_permission_is_forbidden_or_not_found(self):
        created = create_key()
        lacking = {
            "apis.createApi": "create_api",
            "apis.getApi": "read_api",
            "apis.deleteApi": "delete_api",
            "keys.getKey": "read_key",
            "keys.updateKey": "update_key",
            "keys.rerollKey": "create_key",
            "keys.deleteKey": "delete_key",
        }
        calls = operations(api(), created.key_id, created.key)
        for operation, action in lacking.items():
            with self.subTest(operation):
                error = self.assert_fails(LACKING, calls[operation], client(root_key=VERIFIER))
                self.assertIn(f"api.*.{action}", error.data.error.detail)
                if operation != "apis.createApi":
                    self.assertIn(f"api.{api()}.{action}", error.data.error.detail)
        # A root key that may neither read nor create keys in an API can't learn that it exists.
        for operation in ("keys.createKey", "apis.listKeys"):
            with self.subTest(operation):
                self.assert_fails(NO_API, calls[operation], client(root_key=VERIFIER))
        self.assert_verdict(NOT_FOUND, created.key, setting("EVICTD_POWERLESS_ROOT_KEY"))

        # For APIs the permission is checked before the existence, for keys after it.
        nothing = operations("api_unknown", "key_unknown", "unknown")
        for operation in ("apis.getApi", "apis.deleteApi"):
            with self.subTest(f"{operation}, unknown id"):
                self.assert_fails(LACKING, nothing[operation], client(root_key=VERIFIER))
        for operation in ("keys.getKey", "keys.updateKey", "keys.rerollKey", "keys.deleteKey"):
            with self.subTest(f"{operation}, unknown id"):
                self.assert_fails(NO_KEY, nothing[operation], client(root_key=VERIFIER))
        self.assert_cached(created.key)

    def test_a_root_key_for_one_api_works_there_and_nowhere_else(self):
        root_key, api_id = setting("EVICTD_SCOPED_ROOT_KEY"), setting("EVICTD_SCOPED_API_ID")
        unkey = client(root_key=root_key)
        created = unkey.keys.create_key(api_id=api_id).data
        self.assertEqual(unkey.apis.get_api(api_id=api_id).data.id, api_id)
        unkey.keys.update_key(key_id=created.key_id, name="a")
        unkey.keys.get_key(key_id=created.key_id)
        unkey.apis.list_keys(api_id=api_id)
        expected = {"valid": True, "code": "VALID", "keyId": created.key_id, "name": "a", "enabled": True}
        self.assert_verdict(expected, created.key, root_key)
        successor = unkey.keys.reroll_key(key_id=created.key_id, expiration=0).data
        unkey.keys.delete_key(key_id=successor.key_id)

        other = create_key()
        self.assert_verdict(NOT_FOUND, other.key, root_key)
        calls = operations(api(), other.key_id, other.key)
        for operation in ("apis.createApi", "apis.getApi", "apis.deleteApi", "keys.getKey", "keys.deleteKey"):
            with self.subTest(operation):
                self.assert_fails(LACKING, calls[operation], unkey)
        self.assert_cached(other.key)

    def test_an_unknown_id_is_not_found_by_any_operation(self):
        nothing = operations("api_unknown", "key_unknown", "unknown")
        for operation in ("apis.getApi", "apis.listKeys", "apis.deleteApi", "keys.createKey"):
            with self.subTest(operation):
                self.assert_fails(NO_API, nothing[operation], client())
        for operation in ("keys.getKey", "keys.updateKey", "keys.rerollKey", "keys.deleteKey"):
            with self.subTest(operation):
                self.assert_fails(NO_KEY, nothing[operation], client())

    def test_a_deleted_id_is_not_found_by_any_operation(self):
        doomed = create_api()
        created = create_key(doomed)
        calls = operations(doomed, created.key_id, created.key)
        client().keys.delete_key(key_id=created.key_id)
        for operation in ("keys.getKey", "keys.updateKey", "keys.rerollKey", "keys.deleteKey"):
            with self.subTest(operation):
                self.assert_fails(NO_KEY, calls[operation], client())
        client().apis.delete_api(api_id=doomed)
        for operation in ("apis.getApi", "apis.listKeys", "apis.deleteApi", "keys.createKey"):
            with self.subTest(operation):
                self.assert_fails(NO_API, calls[operation], client())

    def test_another_workspaces_id_is_not_found_by_any_operation(self):
        created = create_key()
        stranger, calls = client(root_key=STRANGER), operations(api(), created.key_id, created.key)
        for operation in ("apis.getApi", "apis.listKeys", "apis.deleteApi", "keys.createKey"):
            with self.subTest(operation):
                self.assert_fails(NO_API, calls[operation], stranger)
        for operation in ("keys.getKey", "keys.updateKey", "keys.rerollKey", "keys.deleteKey"):
            with self.subTest(operation):
                self.assert_fails(NO_KEY, calls[operation], stranger)
        self.assert_verdict(NOT_FOUND, created.key, STRANGER)
        self.assert_cached(created.key)

    def test_a_protected_api_is_not_deleted(self):
        protected = setting("EVICTD_PROTECTED_API_ID")
        created = create_key(protected)
        self.assert_fails(PROTECTED, client().apis.delete_api, api_id=protected)
        self.assertEqual(client().apis.get_api(api_id=protected).data.id, protected)
        self.assert_cached(created.key)
        # Its keys are not protected.
        client().keys.delete_key(key_id=created.key_id)
        self.assert_becomes(NOT_FOUND, created.key)

    def test_requests_above_the_workspaces_limit_are_too_many(self):
        limit = int(setting("EVICTD_REQUESTS_PER_MINUTE"))
        answers = Answers(setting("EVICTD_LIMITED_ROOT_KEY"))
        began_at, refused = time.monotonic(), None
        # Twice as many may pass if a minute ends in between.
        while refused is None and len(answers.kept) <= 2 * limit:
            try:
                answers.client.apis.create_api(name="many")
            except errors.TooManyRequestsErrorResponse as error:
                refused = error
        self.assertIsNotNone(refused, f"{len(answers.kept)} requests passed")
        self.assertGreater(len(answers.kept), limit)

        for passed in answers.kept[:-1]:
            self.assertEqual(passed.headers["ratelimit-limit"], str(limit))
            self.assertTrue(0 <= int(passed.headers["ratelimit-remaining"]) < limit)
            self.assertTrue(0 <= int(passed.headers["ratelimit-reset"]) <= 60)
        headers = refused.headers
        self.assertEqual((headers["ratelimit-limit"], headers["ratelimit-remaining"]), (str(limit), "0"))
        self.assertTrue(1 <= int(headers["retry-after"]) <= 60)
        self.assertEqual(headers["retry-after"], headers["ratelimit-reset"])
        # The client raises the error at once, without a retry.
        count = len(answers.kept)
        error = self.assert_fails(TOO_MANY, answers.client.apis.create_api, name="many")
        self.assertIn(f"{limit}/1m0s", error.data.error.detail)
        self.assertEqual(len(answers.kept), count + 1)
        self.assertLess(time.monotonic() - began_at, 20)
        # With a limit of zero, the answer has no rate limit headers.
        silenced = client(root_key=setting("EVICTD_SILENCED_ROOT_KEY"))
        error = self.assert_fails(TOO_MANY, silenced.apis.create_api, name="many")
        self.assertNotIn("ratelimit-limit", error.headers)

    def test_a_broken_store_fails_every_operation_with_500(self):
        url, root_key = setting("EVICTD_BROKEN_URL"), setting("EVICTD_BROKEN_ROOT_KEY")
        api_id, key_id = setting("EVICTD_BROKEN_API_ID"), setting("EVICTD_BROKEN_KEY_ID")
        for operation, call in operations(api_id, key_id, "k", retries=NO_RETRIES).items():
            with self.subTest(operation):
                self.assert_fails(BROKEN, call, client(url, root_key))

    def test_an_agent_without_a_proof_answers_503(self):
        # 503 is not in Unkey's specification, so the client has no error class of its own for it.
        verify = client(setting("EVICTD_BROKEN_AGENT_URL"), setting("EVICTD_BROKEN_ROOT_KEY")).keys.verify_key
        self.assert_fails(UNPROVEN, verify, key=setting("EVICTD_BROKEN_KEY"), retries=NO_RETRIES)


class Retries(Suite):
    def assert_deleted_once(self, exchanges):
        """Asserts that the first request was carried out, and that the second found nothing."""
        self.assertEqual([exchange.status for exchange in exchanges], [200, 404], exchanges)
        self.assertEqual(exchanges[0].request, exchanges[1].request)
        receipts = [self.receipt(exchange) for exchange in exchanges]
        self.assertEqual([receipt.status_code for receipt in receipts], [200, 404])
        self.assertEqual(receipts[0].json()["data"]["cause"], "deleted")

    def receipt(self, exchange):
        """Gets the receipt of a request. The client doesn't have this operation."""
        request_id = json.loads(exchange.answer)["meta"]["requestId"]
        return httpx.post(
            f"{PUBLISHER}/v2/propagation.getReceipt",
            json={"requestId": request_id},
            headers={"Authorization": f"Bearer {ROOT_KEY}"},
        )

    def test_a_deletion_whose_answer_was_lost_is_done_once(self):
        for loss in (bad_gateway, reset):
            with self.subTest(loss.__name__), LossyProxy(PUBLISHER) as proxy:
                unkey, created, doomed = client(proxy.url), create_key(), create_api()
                self.assert_cached(created.key)
                proxy.lose_next(loss)
                self.assert_fails(NO_KEY, unkey.keys.delete_key, key_id=created.key_id)
                self.assert_deleted_once(proxy.exchanges)
                self.assert_becomes(NOT_FOUND, created.key)

                proxy.exchanges.clear()
                proxy.lose_next(loss)
                self.assert_fails(NO_API, unkey.apis.delete_api, api_id=doomed)
                self.assert_deleted_once(proxy.exchanges)

    def test_a_deletion_whose_connection_was_closed_is_done_once(self):
        # This client doesn't retry after a connection that was closed cleanly.
        with LossyProxy(PUBLISHER) as proxy:
            created = create_key()
            self.assert_cached(created.key)
            proxy.lose_next(hang_up)
            with self.assertRaises(httpx.RemoteProtocolError):
                client(proxy.url).keys.delete_key(key_id=created.key_id)
            self.assertEqual([exchange.status for exchange in proxy.exchanges], [200])
            self.assertEqual(self.receipt(proxy.exchanges[0]).status_code, 200)
            # A repeated deletion finds no key.
            self.assert_fails(NO_KEY, client(proxy.url).keys.delete_key, key_id=created.key_id)
            self.assert_deleted_once(proxy.exchanges)
            self.assert_becomes(NOT_FOUND, created.key)

    def test_a_change_whose_answer_was_lost_is_repeated_unchanged(self):
        with LossyProxy(PUBLISHER) as proxy:
            created = create_key()
            self.assert_cached(created.key)
            proxy.lose_next(bad_gateway)
            client(proxy.url).keys.update_key(key_id=created.key_id, enabled=False)
            self.assertEqual([exchange.status for exchange in proxy.exchanges], [200, 200])
            off = {"valid": False, "code": "DISABLED", "keyId": created.key_id, "enabled": False}
            self.assert_becomes(off, created.key)

    def test_a_creation_whose_answer_was_lost_leaves_an_extra_key(self):
        # As with Unkey, requests have no idempotency key. The extra key can be listed and deleted.
        with LossyProxy(PUBLISHER) as proxy:
            owner = create_api()
            proxy.lose_next(bad_gateway)
            returned = client(proxy.url).keys.create_key(api_id=owner).data.key_id
            self.assertEqual([exchange.status for exchange in proxy.exchanges], [200, 200])
            keys = {key.key_id for key in client().apis.list_keys(api_id=owner).result.data}
            lost = json.loads(proxy.exchanges[0].answer)["data"]["keyId"]
            self.assertEqual(keys, {returned, lost})

    def test_a_broken_publisher_is_retried_for_ten_seconds(self):
        with LossyProxy(setting("EVICTD_BROKEN_URL")) as proxy:
            unkey = client(proxy.url, setting("EVICTD_BROKEN_ROOT_KEY"))
            began_at = time.monotonic()
            self.assert_fails(BROKEN, unkey.keys.delete_key, key_id=setting("EVICTD_BROKEN_KEY_ID"))
            elapsed = time.monotonic() - began_at
            # The client's pauses are random, at most a second: about fourteen attempts.
            self.assertTrue(8 <= len(proxy.exchanges) <= 22, len(proxy.exchanges))
            self.assertTrue(10 <= elapsed <= 15, elapsed)
            self.assertEqual({exchange.status for exchange in proxy.exchanges}, {500})
            self.assertEqual(len({exchange.request for exchange in proxy.exchanges}), 1)


if __name__ == "__main__":
    unittest.main(verbosity=2)
