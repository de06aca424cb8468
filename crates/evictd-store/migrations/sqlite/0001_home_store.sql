-- The home store: records, the log of what changed, and the triggers that keep the one from changing
-- without the other (rule R3).
--
-- * Columns that end in `_m`, and `expires`, are milliseconds since 1970, as in Unkey; `committed_at`
--   and the roster's times are microseconds. julianday() instead of unixepoch('subsec') keeps the schema
--   usable from older sqlite3 shells (STRICT asks for 3.37).
-- * Sizes are bounded in bytes where a column ends up on the wire. The log repeats the bounds of the
--   records: under OR IGNORE a trigger's insert would skip a violating row silently, so it must be
--   impossible that a record fits and its log row doesn't.
-- * WITHOUT ROWID: a record is known by its id and its hash alone. A hidden third key (the rowid) would
--   be a third way for REPLACE to remove one.

CREATE TABLE workspaces (
    id           TEXT    NOT NULL PRIMARY KEY CHECK (length(CAST(id AS BLOB)) BETWEEN 1 AND 255),
    enabled      INTEGER NOT NULL DEFAULT 1 CHECK (enabled IN (0, 1)),
    created_at_m INTEGER NOT NULL DEFAULT (CAST(round((julianday('now') - 2440587.5) * 86400000.0) AS INTEGER))
) STRICT, WITHOUT ROWID;

CREATE TABLE root_keys (
    id           TEXT    NOT NULL PRIMARY KEY CHECK (length(CAST(id AS BLOB)) BETWEEN 1 AND 255),
    workspace_id TEXT    NOT NULL REFERENCES workspaces (id) CHECK (length(CAST(workspace_id AS BLOB)) BETWEEN 1 AND 255),
    hash         BLOB    NOT NULL UNIQUE CHECK (length(hash) = 32), -- SHA-256; the text is never stored
    start        TEXT    NOT NULL CHECK (length(CAST(start AS BLOB)) <= 255),
    name         TEXT    CHECK (length(CAST(name AS BLOB)) <= 1024),
    permissions  TEXT    NOT NULL DEFAULT '[]' CHECK (length(CAST(permissions AS BLOB)) <= 65536 AND json_valid(permissions)),
    enabled      INTEGER NOT NULL DEFAULT 1 CHECK (enabled IN (0, 1)),
    expires      INTEGER,
    expired      INTEGER NOT NULL DEFAULT 0 CHECK (expired IN (0, 1)), -- see keys.expired
    created_at_m INTEGER NOT NULL DEFAULT (CAST(round((julianday('now') - 2440587.5) * 86400000.0) AS INTEGER)),
    deleted_at_m INTEGER
) STRICT, WITHOUT ROWID;

CREATE INDEX root_keys_workspace ON root_keys (workspace_id);
CREATE INDEX root_keys_to_expire ON root_keys (expires)
    WHERE expires IS NOT NULL AND expired = 0 AND deleted_at_m IS NULL;

CREATE TABLE apis (
    id                TEXT    NOT NULL PRIMARY KEY CHECK (length(CAST(id AS BLOB)) BETWEEN 1 AND 255),
    workspace_id      TEXT    NOT NULL REFERENCES workspaces (id) CHECK (length(CAST(workspace_id AS BLOB)) BETWEEN 1 AND 255),
    name              TEXT    NOT NULL CHECK (length(CAST(name AS BLOB)) <= 1024),
    delete_protection INTEGER NOT NULL DEFAULT 0 CHECK (delete_protection IN (0, 1)),
    created_at_m      INTEGER NOT NULL DEFAULT (CAST(round((julianday('now') - 2440587.5) * 86400000.0) AS INTEGER)),
    deleted_at_m      INTEGER
) STRICT, WITHOUT ROWID;

CREATE INDEX apis_workspace ON apis (workspace_id);

CREATE TABLE keys (
    id           TEXT    NOT NULL PRIMARY KEY CHECK (length(CAST(id AS BLOB)) BETWEEN 1 AND 255),
    api_id       TEXT    NOT NULL REFERENCES apis (id) CHECK (length(CAST(api_id AS BLOB)) BETWEEN 1 AND 255),
    workspace_id TEXT    NOT NULL REFERENCES workspaces (id) CHECK (length(CAST(workspace_id AS BLOB)) BETWEEN 1 AND 255),
    hash         BLOB    NOT NULL UNIQUE CHECK (length(hash) = 32), -- SHA-256; the text is never stored
    start        TEXT    NOT NULL CHECK (length(CAST(start AS BLOB)) <= 255),
    name         TEXT    CHECK (length(CAST(name AS BLOB)) <= 1024),
    meta         TEXT    CHECK (meta IS NULL OR (length(CAST(meta AS BLOB)) <= 16384 AND json_valid(meta))),
    external_id  TEXT    CHECK (length(CAST(external_id AS BLOB)) BETWEEN 1 AND 255),
    -- At most 1,000 of 128 bytes.
    permissions  TEXT    NOT NULL DEFAULT '[]' CHECK (length(CAST(permissions AS BLOB)) <= 163840 AND json_valid(permissions)),
    enabled      INTEGER NOT NULL DEFAULT 1 CHECK (enabled IN (0, 1)),
    expires      INTEGER,
    -- Set once the end has come, so that it comes for every region alike, whatever their clocks say.
    -- To prolong a key by hand, set it back to 0 together with `expires`.
    expired      INTEGER NOT NULL DEFAULT 0 CHECK (expired IN (0, 1)),
    created_at_m INTEGER NOT NULL DEFAULT (CAST(round((julianday('now') - 2440587.5) * 86400000.0) AS INTEGER)),
    updated_at_m INTEGER,
    deleted_at_m INTEGER
) STRICT, WITHOUT ROWID;

CREATE INDEX keys_api ON keys (api_id);
CREATE INDEX keys_to_expire ON keys (expires)
    WHERE expires IS NOT NULL AND expired = 0 AND deleted_at_m IS NULL;

-- The head of the log (R1, R2): one row. The fence is raised by every probe round, so that a round is
-- always a durable write (R7).
CREATE TABLE log_head (
    id    INTEGER PRIMARY KEY CHECK (id = 1),
    epoch INTEGER NOT NULL CHECK (epoch BETWEEN 1 AND 1048575),
    head  INTEGER NOT NULL CHECK (head BETWEEN 0 AND 17592186044415),
    fence INTEGER NOT NULL,
    -- Publishers read the roster (R11) from their last revision on: what changed since has a higher one.
    roster_revision INTEGER NOT NULL DEFAULT 1,
    -- 0 from the beginning of an epoch until a bound later: the store may have gone back, and its roster with it.
    roster_complete INTEGER NOT NULL DEFAULT 1 CHECK (roster_complete IN (0, 1)),
    -- Receipts of older changes (milliseconds since 1970) may have been purged.
    receipts_since_m INTEGER NOT NULL DEFAULT 0
) STRICT;

INSERT INTO log_head (id, epoch, head, fence) VALUES (1, 1, 0, 0);

-- The log. A row is written in the transaction of its change, without a place; the sequencer gives it
-- `epoch` and `position` afterwards. Ids follow the order of commits, because SQLite has one writer.
CREATE TABLE invalidations (
    id           INTEGER PRIMARY KEY AUTOINCREMENT,
    epoch        INTEGER,
    position     INTEGER,
    scope        TEXT    NOT NULL CHECK (scope IN ('key', 'api', 'workspace', 'all')),
    key_hash     BLOB    CHECK (length(key_hash) = 32),
    key_id       TEXT    CHECK (length(CAST(key_id AS BLOB)) BETWEEN 1 AND 255),
    api_id       TEXT    CHECK (length(CAST(api_id AS BLOB)) BETWEEN 1 AND 255),
    workspace_id TEXT    CHECK (length(CAST(workspace_id AS BLOB)) BETWEEN 1 AND 255),
    cause        TEXT    NOT NULL CHECK (cause IN ('created', 'changed', 'deleted', 'erased', 'restored', 'expired')),
    -- Which request of the control API wrote it; NULL for direct SQL and for ends that came by themselves: these get
    -- their audit record when they are numbered.
    request_id   TEXT,
    -- The statement's time for direct SQL; the control API sets it as the last statement of its transaction.
    committed_at INTEGER NOT NULL DEFAULT (CAST(round((julianday('now') - 2440587.5) * 86400000.0) AS INTEGER) * 1000),
    -- Of how many keys' rows this one for their API took the place.
    merged       INTEGER,
    -- Set together with the request's receipt (R12).
    receipted    INTEGER NOT NULL DEFAULT 0 CHECK (receipted IN (0, 1)),
    CHECK ((epoch IS NULL) = (position IS NULL))
) STRICT;

CREATE UNIQUE INDEX invalidations_position ON invalidations (position) WHERE position IS NOT NULL;
CREATE INDEX invalidations_unnumbered ON invalidations (id) WHERE position IS NULL;
CREATE INDEX invalidations_request ON invalidations (request_id) WHERE request_id IS NOT NULL;
-- The log may be long, and the requests without a receipt are few: this holds those alone.
CREATE INDEX invalidations_open ON invalidations (epoch, position)
    WHERE position IS NOT NULL AND request_id IS NOT NULL AND receipted = 0;

-- What became of a request, once that is final (R12). Ids only, in `body` too: a receipt outlives the record
-- that a permanent deletion erased.
CREATE TABLE receipts (
    request_id   TEXT    NOT NULL PRIMARY KEY,
    workspace_id TEXT    NOT NULL,
    epoch        INTEGER NOT NULL,
    position     INTEGER NOT NULL,
    committed_at INTEGER NOT NULL, -- microseconds since 1970, as everywhere in the log
    final_at     INTEGER NOT NULL,
    body         TEXT    NOT NULL CHECK (json_valid(body))
) STRICT;

CREATE INDEX receipts_final_at ON receipts (final_at);

-- Every agent process that may hold a lease (R11).
CREATE TABLE roster (
    region     TEXT    NOT NULL,
    agent      TEXT    NOT NULL,
    instance   TEXT    NOT NULL, -- 16 hexadecimal digits
    policy     TEXT    NOT NULL CHECK (policy IN ('deny', 'serve_stale')),
    bound_ms   INTEGER NOT NULL,
    first_seen INTEGER NOT NULL,
    last_seen  INTEGER NOT NULL, -- refreshed about once a minute
    revision   INTEGER NOT NULL DEFAULT 1,
    -- It announced its departure, and answers nothing any more.
    departed   INTEGER NOT NULL DEFAULT 0 CHECK (departed IN (0, 1)),
    PRIMARY KEY (region, agent, instance)
) STRICT, WITHOUT ROWID;

CREATE INDEX roster_revision ON roster (revision);

-- Who changed what. Ids only: a permanent deletion must not live on here.
CREATE TABLE audit_log (
    event_id       TEXT    NOT NULL PRIMARY KEY DEFAULT ('log_' || lower(hex(randomblob(12)))),
    time           INTEGER NOT NULL, -- milliseconds since 1970
    workspace_id   TEXT,            -- NULL: it is about the whole store
    bucket         TEXT    NOT NULL DEFAULT 'unkey_mutations',
    source         TEXT    NOT NULL DEFAULT 'platform',
    event          TEXT    NOT NULL, -- 'key.delete', ...
    description    TEXT    NOT NULL,
    actor_type     TEXT    NOT NULL,
    actor_id       TEXT    NOT NULL,
    actor_name     TEXT,
    actor_meta     TEXT,
    remote_ip      TEXT,
    user_agent     TEXT,
    targets        TEXT    NOT NULL CHECK (json_valid(targets)), -- [{"type", "id", "name"}]
    correlation_id TEXT             -- the request
) STRICT;

CREATE INDEX audit_log_time ON audit_log (time);
CREATE INDEX audit_log_request ON audit_log (correlation_id) WHERE correlation_id IS NOT NULL;

-- ---------------------------------------------------------------------------------------------------
-- Triggers (R3). One row of the log for every change of something that a verification reads, by any
-- client. Emitting once too often costs an agent one cache miss; once too seldom breaks the bound.
--
-- What SQLite has in store for direct SQL:
-- * There is no TRUNCATE, and DELETE without WHERE visits each row where a delete trigger exists.
-- * REPLACE removes the rows that are in its way, and fires their delete triggers only under
--   PRAGMA recursive_triggers, which only the publisher's connections set. So the BEFORE triggers look for rows
--   that are about to be replaced: those with the new id or the new hash. What remains of such a row
--   under the same hash, API and workspace is covered by the row for the new record.
-- * The conflict clause of the outer statement holds inside triggers too; see the note on sizes above.
-- * Schema changes, PRAGMA writable_schema, and the C API's switch that turns triggers off are out of
--   reach of any trigger. The publisher compares this text with the database's at start and regularly.
-- ---------------------------------------------------------------------------------------------------

CREATE TRIGGER keys_before_insert BEFORE INSERT ON keys
BEGIN
    INSERT INTO invalidations (scope, key_hash, key_id, api_id, workspace_id, cause)
    SELECT 'key', hash, id, api_id, workspace_id, 'erased' FROM keys
    WHERE (id = NEW.id OR hash = NEW.hash)
      AND (hash, api_id, workspace_id) IS NOT (NEW.hash, NEW.api_id, NEW.workspace_id);
END;

CREATE TRIGGER keys_after_insert AFTER INSERT ON keys
BEGIN
    INSERT INTO invalidations (scope, key_hash, key_id, api_id, workspace_id, cause)
    VALUES ('key', NEW.hash, NEW.id, NEW.api_id, NEW.workspace_id, 'created');
END;

CREATE TRIGGER keys_before_update BEFORE UPDATE ON keys
WHEN (NEW.id, NEW.hash) IS NOT (OLD.id, OLD.hash)
BEGIN
    INSERT INTO invalidations (scope, key_hash, key_id, api_id, workspace_id, cause)
    SELECT 'key', hash, id, api_id, workspace_id, 'erased' FROM keys
    WHERE (id = NEW.id OR hash = NEW.hash) AND id IS NOT OLD.id
      AND (hash, api_id, workspace_id) IS NOT (NEW.hash, NEW.api_id, NEW.workspace_id);
END;

-- The old row is emitted on its own when an agent could find it under another hash, or under another
-- API or workspace: floors of keys may have been merged into one of those (R6). A hash that is new to a
-- key counts as created: what is cached for it says "not found".
CREATE TRIGGER keys_after_update AFTER UPDATE ON keys
WHEN (NEW.hash, NEW.id, NEW.api_id, NEW.workspace_id, NEW.name, NEW.meta, NEW.external_id, NEW.permissions, NEW.enabled, NEW.expires, NEW.expired, NEW.deleted_at_m)
    IS NOT (OLD.hash, OLD.id, OLD.api_id, OLD.workspace_id, OLD.name, OLD.meta, OLD.external_id, OLD.permissions, OLD.enabled, OLD.expires, OLD.expired, OLD.deleted_at_m)
BEGIN
    INSERT INTO invalidations (scope, key_hash, key_id, api_id, workspace_id, cause)
    SELECT 'key', OLD.hash, OLD.id, OLD.api_id, OLD.workspace_id, 'changed'
    WHERE (NEW.hash, NEW.api_id, NEW.workspace_id) IS NOT (OLD.hash, OLD.api_id, OLD.workspace_id);

    INSERT INTO invalidations (scope, key_hash, key_id, api_id, workspace_id, cause)
    VALUES ('key', NEW.hash, NEW.id, NEW.api_id, NEW.workspace_id, CASE
        WHEN NEW.hash IS NOT OLD.hash THEN 'created'
        WHEN NEW.deleted_at_m IS NOT NULL AND OLD.deleted_at_m IS NULL THEN 'deleted'
        WHEN NEW.deleted_at_m IS NULL AND OLD.deleted_at_m IS NOT NULL THEN 'restored'
        WHEN NEW.expired = 1 AND OLD.expired = 0 THEN 'expired'
        ELSE 'changed' END);
END;

CREATE TRIGGER keys_after_delete AFTER DELETE ON keys
BEGIN
    INSERT INTO invalidations (scope, key_hash, key_id, api_id, workspace_id, cause)
    VALUES ('key', OLD.hash, OLD.id, OLD.api_id, OLD.workspace_id, 'erased');
END;

CREATE TRIGGER root_keys_before_insert BEFORE INSERT ON root_keys
BEGIN
    INSERT INTO invalidations (scope, key_hash, key_id, workspace_id, cause)
    SELECT 'key', hash, id, workspace_id, 'erased' FROM root_keys
    WHERE (id = NEW.id OR hash = NEW.hash) AND (hash, workspace_id) IS NOT (NEW.hash, NEW.workspace_id);
END;

CREATE TRIGGER root_keys_after_insert AFTER INSERT ON root_keys
BEGIN
    INSERT INTO invalidations (scope, key_hash, key_id, workspace_id, cause)
    VALUES ('key', NEW.hash, NEW.id, NEW.workspace_id, 'created');
END;

CREATE TRIGGER root_keys_before_update BEFORE UPDATE ON root_keys
WHEN (NEW.id, NEW.hash) IS NOT (OLD.id, OLD.hash)
BEGIN
    INSERT INTO invalidations (scope, key_hash, key_id, workspace_id, cause)
    SELECT 'key', hash, id, workspace_id, 'erased' FROM root_keys
    WHERE (id = NEW.id OR hash = NEW.hash) AND id IS NOT OLD.id
      AND (hash, workspace_id) IS NOT (NEW.hash, NEW.workspace_id);
END;

CREATE TRIGGER root_keys_after_update AFTER UPDATE ON root_keys
WHEN (NEW.hash, NEW.id, NEW.workspace_id, NEW.permissions, NEW.enabled, NEW.expires, NEW.expired, NEW.deleted_at_m)
    IS NOT (OLD.hash, OLD.id, OLD.workspace_id, OLD.permissions, OLD.enabled, OLD.expires, OLD.expired, OLD.deleted_at_m)
BEGIN
    INSERT INTO invalidations (scope, key_hash, key_id, workspace_id, cause)
    SELECT 'key', OLD.hash, OLD.id, OLD.workspace_id, 'changed'
    WHERE (NEW.hash, NEW.workspace_id) IS NOT (OLD.hash, OLD.workspace_id);

    INSERT INTO invalidations (scope, key_hash, key_id, workspace_id, cause)
    VALUES ('key', NEW.hash, NEW.id, NEW.workspace_id, CASE
        WHEN NEW.hash IS NOT OLD.hash THEN 'created'
        WHEN NEW.deleted_at_m IS NOT NULL AND OLD.deleted_at_m IS NULL THEN 'deleted'
        WHEN NEW.deleted_at_m IS NULL AND OLD.deleted_at_m IS NOT NULL THEN 'restored'
        WHEN NEW.expired = 1 AND OLD.expired = 0 THEN 'expired'
        ELSE 'changed' END);
END;

CREATE TRIGGER root_keys_after_delete AFTER DELETE ON root_keys
BEGIN
    INSERT INTO invalidations (scope, key_hash, key_id, workspace_id, cause)
    VALUES ('key', OLD.hash, OLD.id, OLD.workspace_id, 'erased');
END;

-- A new API changes no verification, unless keys were waiting for it: direct SQL brought it back, or
-- replaced it.
CREATE TRIGGER apis_after_insert AFTER INSERT ON apis
WHEN EXISTS (SELECT 1 FROM keys WHERE api_id = NEW.id)
BEGIN
    INSERT INTO invalidations (scope, api_id, workspace_id, cause)
    VALUES ('api', NEW.id, NEW.workspace_id, 'restored');
END;

CREATE TRIGGER apis_after_update AFTER UPDATE ON apis
WHEN (NEW.id, NEW.workspace_id, NEW.deleted_at_m) IS NOT (OLD.id, OLD.workspace_id, OLD.deleted_at_m)
BEGIN
    INSERT INTO invalidations (scope, api_id, workspace_id, cause)
    SELECT 'api', OLD.id, OLD.workspace_id, 'changed'
    WHERE (NEW.id, NEW.workspace_id) IS NOT (OLD.id, OLD.workspace_id);

    INSERT INTO invalidations (scope, api_id, workspace_id, cause)
    VALUES ('api', NEW.id, NEW.workspace_id, CASE
        WHEN NEW.deleted_at_m IS NOT NULL AND OLD.deleted_at_m IS NULL THEN 'deleted'
        WHEN NEW.deleted_at_m IS NULL AND OLD.deleted_at_m IS NOT NULL THEN 'restored'
        ELSE 'changed' END);
END;

CREATE TRIGGER apis_after_delete AFTER DELETE ON apis
BEGIN
    INSERT INTO invalidations (scope, api_id, workspace_id, cause)
    VALUES ('api', OLD.id, OLD.workspace_id, 'erased');
END;

-- As with APIs: only a workspace that something was waiting for.
CREATE TRIGGER workspaces_after_insert AFTER INSERT ON workspaces
WHEN EXISTS (SELECT 1 FROM apis WHERE workspace_id = NEW.id)
    OR EXISTS (SELECT 1 FROM root_keys WHERE workspace_id = NEW.id)
BEGIN
    INSERT INTO invalidations (scope, workspace_id, cause) VALUES ('workspace', NEW.id, 'restored');
END;

CREATE TRIGGER workspaces_after_update AFTER UPDATE ON workspaces
WHEN (NEW.id, NEW.enabled) IS NOT (OLD.id, OLD.enabled)
BEGIN
    INSERT INTO invalidations (scope, workspace_id, cause)
    SELECT 'workspace', OLD.id, 'erased' WHERE NEW.id IS NOT OLD.id;

    INSERT INTO invalidations (scope, workspace_id, cause)
    VALUES ('workspace', NEW.id, CASE WHEN NEW.id IS NOT OLD.id THEN 'restored' ELSE 'changed' END);
END;

CREATE TRIGGER workspaces_after_delete AFTER DELETE ON workspaces
BEGIN
    INSERT INTO invalidations (scope, workspace_id, cause) VALUES ('workspace', OLD.id, 'erased');
END;
