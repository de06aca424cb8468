-- The home store on PostgreSQL: records, the log of what changed, and the triggers that keep the one from
-- changing without the other (rule R3). Tables and columns are those of the SQLite store.
--
-- * Columns that end in `_m`, and `expires`, are milliseconds since 1970, as in Unkey; `committed_at`
--   and the roster's times are microseconds.
-- * Ids are ordered by their bytes, whatever the database's locale.
-- * Sizes are bounded in bytes where a column ends up on the wire.
-- * JSON that must come back byte for byte is text with a check: jsonb would rewrite it.

-- Everything below is created here, and the functions find it here for every caller: with pg_temp last, no
-- temporary table can stand in for one of these.
SELECT set_config('search_path', quote_ident(current_schema()) || ', pg_temp', true);

-- The store's clock: microseconds since 1970, running within a transaction.
CREATE FUNCTION evictd_now() RETURNS bigint LANGUAGE sql VOLATILE PARALLEL SAFE
    RETURN (extract(epoch FROM clock_timestamp()) * 1000000)::bigint;

CREATE TABLE workspaces (
    id           TEXT    COLLATE "C" NOT NULL PRIMARY KEY CHECK (octet_length(id) BETWEEN 1 AND 255),
    enabled      BOOLEAN NOT NULL DEFAULT true,
    created_at_m BIGINT  NOT NULL DEFAULT evictd_now() / 1000
);

CREATE TABLE root_keys (
    id           TEXT    COLLATE "C" NOT NULL PRIMARY KEY CHECK (octet_length(id) BETWEEN 1 AND 255),
    workspace_id TEXT    COLLATE "C" NOT NULL REFERENCES workspaces (id),
    hash         BYTEA   NOT NULL UNIQUE CHECK (octet_length(hash) = 32), -- SHA-256; the text is never stored
    start        TEXT    NOT NULL CHECK (octet_length(start) <= 255),
    name         TEXT    CHECK (octet_length(name) <= 1024),
    permissions  TEXT    NOT NULL DEFAULT '[]' CHECK (octet_length(permissions) <= 65536 AND json_typeof(permissions::json) = 'array'),
    enabled      BOOLEAN NOT NULL DEFAULT true,
    expires      BIGINT,
    expired      BOOLEAN NOT NULL DEFAULT false, -- see keys.expired
    created_at_m BIGINT  NOT NULL DEFAULT evictd_now() / 1000,
    deleted_at_m BIGINT
);

CREATE INDEX root_keys_workspace ON root_keys (workspace_id);
CREATE INDEX root_keys_to_expire ON root_keys (expires)
    WHERE expires IS NOT NULL AND NOT expired AND deleted_at_m IS NULL;

-- The planner's statistics hold values, and outlive their rows: erasing one key causes no ANALYZE. So there are none
-- of what must be gone then. They wouldn't help: a hash is unique, and the rest is found by API.
ALTER TABLE root_keys
    ALTER COLUMN hash SET STATISTICS 0,
    ALTER COLUMN start SET STATISTICS 0,
    ALTER COLUMN name SET STATISTICS 0,
    ALTER COLUMN permissions SET STATISTICS 0;

CREATE TABLE apis (
    id                TEXT    COLLATE "C" NOT NULL PRIMARY KEY CHECK (octet_length(id) BETWEEN 1 AND 255),
    workspace_id      TEXT    COLLATE "C" NOT NULL REFERENCES workspaces (id),
    name              TEXT    NOT NULL CHECK (octet_length(name) <= 1024),
    delete_protection BOOLEAN NOT NULL DEFAULT false,
    created_at_m      BIGINT  NOT NULL DEFAULT evictd_now() / 1000,
    deleted_at_m      BIGINT
);

CREATE INDEX apis_workspace ON apis (workspace_id);

CREATE TABLE keys (
    id           TEXT    COLLATE "C" NOT NULL PRIMARY KEY CHECK (octet_length(id) BETWEEN 1 AND 255),
    api_id       TEXT    COLLATE "C" NOT NULL REFERENCES apis (id),
    workspace_id TEXT    COLLATE "C" NOT NULL REFERENCES workspaces (id),
    hash         BYTEA   NOT NULL CONSTRAINT keys_hash UNIQUE CHECK (octet_length(hash) = 32), -- SHA-256; the text is never stored
    start        TEXT    NOT NULL CHECK (octet_length(start) <= 255),
    name         TEXT    CHECK (octet_length(name) <= 1024),
    meta         TEXT    CHECK (octet_length(meta) <= 16384 AND json_typeof(meta::json) = 'object'),
    external_id  TEXT    COLLATE "C" CHECK (octet_length(external_id) BETWEEN 1 AND 255),
    -- At most 1,000 of 128 bytes.
    permissions  TEXT    NOT NULL DEFAULT '[]' CHECK (octet_length(permissions) <= 163840 AND json_typeof(permissions::json) = 'array'),
    enabled      BOOLEAN NOT NULL DEFAULT true,
    expires      BIGINT,
    -- Set once the end has come, so that it comes for every region alike, whatever their clocks say.
    -- To prolong a key by hand, set it back to false together with `expires`.
    expired      BOOLEAN NOT NULL DEFAULT false,
    created_at_m BIGINT  NOT NULL DEFAULT evictd_now() / 1000,
    updated_at_m BIGINT,
    deleted_at_m BIGINT
);

CREATE INDEX keys_api ON keys (api_id, id);
CREATE INDEX keys_to_expire ON keys (expires)
    WHERE expires IS NOT NULL AND NOT expired AND deleted_at_m IS NULL;

-- As with root keys.
ALTER TABLE keys
    ALTER COLUMN hash SET STATISTICS 0,
    ALTER COLUMN start SET STATISTICS 0,
    ALTER COLUMN name SET STATISTICS 0,
    ALTER COLUMN meta SET STATISTICS 0,
    ALTER COLUMN external_id SET STATISTICS 0,
    ALTER COLUMN permissions SET STATISTICS 0;

-- The head of the log (R1, R2): one row. A transaction that numbers rows, begins an epoch, or writes the roster raises
-- its fence first, and so holds its lock until the commit; and every probe round is a durable write (R7).
CREATE TABLE log_head (
    id    INTEGER PRIMARY KEY CHECK (id = 1),
    epoch INTEGER NOT NULL CHECK (epoch BETWEEN 1 AND 1048575),
    head  BIGINT  NOT NULL CHECK (head BETWEEN 0 AND 17592186044415),
    fence BIGINT  NOT NULL,
    -- Publishers read the roster (R11) from their last revision on: what changed since has a higher one.
    roster_revision  BIGINT  NOT NULL DEFAULT 1,
    -- False from the beginning of an epoch until a bound later: the store may have gone back, and its roster with it.
    roster_complete  BOOLEAN NOT NULL DEFAULT true,
    -- Receipts of older changes (milliseconds since 1970) may have been purged.
    receipts_since_m BIGINT  NOT NULL DEFAULT 0,
    -- The history that the last position was given in. When the server's is another one, the store may have gone
    -- back, and a new epoch begins before anything else is numbered (R2).
    timeline          BIGINT NOT NULL,
    system_identifier BIGINT NOT NULL,
    database          OID    NOT NULL,
    -- Which transaction wrote this row. Where it wasn't the one that did (xmin), this is a copy out of a dump or a
    -- logical replica, and the store may have gone back as well. That stays known until an epoch begins.
    written_by  XID     NOT NULL,
    is_original BOOLEAN NOT NULL DEFAULT true
) WITH (fillfactor = 10);

-- Each timeline has 256 epochs of its own: see src/postgres/lineage.rs.
INSERT INTO log_head (id, epoch, head, fence, timeline, system_identifier, database, written_by)
SELECT 1, CASE WHEN timeline <= 4096 THEN (timeline - 1) * 256 + 1 ELSE 1 END, 0, 0, timeline, system_identifier,
       (SELECT oid FROM pg_database WHERE datname = current_database()), pg_current_xact_id()::xid
FROM (SELECT ('x' || left(pg_walfile_name(pg_current_wal_lsn()), 8))::bit(32)::bigint AS timeline) AS server,
     pg_control_system();

-- The log. A row is written in the transaction of its change, without a place; the sequencer gives it
-- `epoch` and `position` afterwards, in whatever order the transactions commit.
CREATE TABLE invalidations (
    id           BIGINT  GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    -- By which the transaction finds its own rows, to date them before it commits.
    xact         XID8    NOT NULL DEFAULT pg_current_xact_id(),
    epoch        INTEGER,
    position     BIGINT,
    scope        TEXT    COLLATE "C" NOT NULL CHECK (scope IN ('key', 'api', 'workspace', 'all')),
    key_hash     BYTEA   CHECK (octet_length(key_hash) = 32),
    key_id       TEXT    COLLATE "C" CHECK (octet_length(key_id) BETWEEN 1 AND 255),
    api_id       TEXT    COLLATE "C" CHECK (octet_length(api_id) BETWEEN 1 AND 255),
    workspace_id TEXT    COLLATE "C" CHECK (octet_length(workspace_id) BETWEEN 1 AND 255),
    cause        TEXT    COLLATE "C" NOT NULL CHECK (cause IN ('created', 'changed', 'deleted', 'erased', 'restored', 'expired')),
    -- Which request of the control API, or of an operator, wrote it: set with SET LOCAL. NULL for direct SQL
    -- and for ends that came by themselves: these get their audit record when they are numbered.
    request_id   TEXT    COLLATE "C" DEFAULT nullif(current_setting('evictd.request_id', true), ''),
    -- The statement's time for direct SQL; the control API sets it as the last statement of its transaction. No
    -- index has it, so that this stays on the row's page.
    committed_at BIGINT  NOT NULL DEFAULT evictd_now(),
    -- Of how many keys' rows this one for their API took the place.
    merged       BIGINT,
    -- Set together with the request's receipt (R12).
    receipted    BOOLEAN NOT NULL DEFAULT false,
    CHECK ((epoch IS NULL) = (position IS NULL))
) WITH (fillfactor = 80, autovacuum_vacuum_scale_factor = 0.02);

CREATE UNIQUE INDEX invalidations_position ON invalidations (position) WHERE position IS NOT NULL;
CREATE INDEX invalidations_unnumbered ON invalidations (id) WHERE position IS NULL;
CREATE INDEX invalidations_undated ON invalidations (xact) WHERE position IS NULL;
CREATE INDEX invalidations_request ON invalidations (request_id) WHERE request_id IS NOT NULL;
-- The log may be long, and the requests without a receipt are few: this holds those alone.
CREATE INDEX invalidations_open ON invalidations (epoch, position)
    WHERE position IS NOT NULL AND request_id IS NOT NULL AND NOT receipted;

-- Rows wait for milliseconds, and the planner's statistics are minutes old: after it has counted a backlog, it would
-- plan for that long as if nearly every row waited, and look for one from the beginning of the log.
ALTER TABLE invalidations ALTER COLUMN position SET STATISTICS 0;

-- As with root keys; of a table that has become empty, statistics are never renewed.
ALTER TABLE invalidations ALTER COLUMN key_hash SET STATISTICS 0;

-- What became of a request, once that is final (R12). Ids only, in `body` too: a receipt outlives the record
-- that a permanent deletion erased.
CREATE TABLE receipts (
    request_id   TEXT    COLLATE "C" NOT NULL PRIMARY KEY,
    workspace_id TEXT    COLLATE "C" NOT NULL,
    epoch        INTEGER NOT NULL,
    position     BIGINT  NOT NULL,
    committed_at BIGINT  NOT NULL, -- microseconds since 1970, as everywhere in the log
    final_at     BIGINT  NOT NULL,
    body         TEXT    NOT NULL CHECK (body::json IS NOT NULL)
);

CREATE INDEX receipts_final_at ON receipts (final_at);

-- Every agent process that may hold a lease (R11).
CREATE TABLE roster (
    region     TEXT   COLLATE "C" NOT NULL,
    agent      TEXT   COLLATE "C" NOT NULL,
    instance   TEXT   COLLATE "C" NOT NULL, -- 16 hexadecimal digits
    policy     TEXT   COLLATE "C" NOT NULL CHECK (policy IN ('deny', 'serve_stale')),
    bound_ms   BIGINT NOT NULL,
    first_seen BIGINT NOT NULL,
    last_seen  BIGINT NOT NULL, -- refreshed about once a minute
    revision   BIGINT NOT NULL DEFAULT 1,
    departed   BOOLEAN NOT NULL DEFAULT false, -- it announced its departure, and answers nothing any more
    PRIMARY KEY (region, agent, instance)
);

CREATE INDEX roster_revision ON roster (revision);

-- Who changed what. Ids only: a permanent deletion must not live on here.
CREATE TABLE audit_log (
    event_id       TEXT   COLLATE "C" NOT NULL PRIMARY KEY DEFAULT 'log_' || left(replace(gen_random_uuid()::text, '-', ''), 24),
    written        BIGINT GENERATED ALWAYS AS IDENTITY, -- the order of what has the same time
    time           BIGINT NOT NULL DEFAULT evictd_now() / 1000,
    workspace_id   TEXT   COLLATE "C", -- NULL: it is about the whole store
    bucket         TEXT   NOT NULL DEFAULT 'unkey_mutations',
    source         TEXT   NOT NULL DEFAULT 'platform',
    event          TEXT   NOT NULL, -- 'key.delete', ...
    description    TEXT   NOT NULL,
    actor_type     TEXT   NOT NULL,
    actor_id       TEXT   NOT NULL,
    actor_name     TEXT,
    actor_meta     TEXT,
    remote_ip      TEXT,
    user_agent     TEXT,
    targets        JSONB  NOT NULL, -- [{"type", "id", "name"}]
    correlation_id TEXT   COLLATE "C" -- the request
);

CREATE INDEX audit_log_time ON audit_log (time, written);
CREATE INDEX audit_log_request ON audit_log (correlation_id) WHERE correlation_id IS NOT NULL;
-- What happened to one key, among millions of records.
CREATE INDEX audit_log_targets ON audit_log
    USING gin (jsonb_path_query_array(targets, '$[*].id') jsonb_path_ops);

-- ---------------------------------------------------------------------------------------------------
-- Triggers (R3). One row of the log for every change of something that a verification reads, by any
-- client. Emitting once too often costs an agent one cache miss; once too seldom breaks the bound.
--
-- * ENABLE ALWAYS: they fire under session_replication_role = replica too, and for what a logical
--   subscription applies.
-- * SECURITY DEFINER with a fixed search_path: who may change a key needs no right to the log, and can't
--   lead its row astray.
-- * What may not be news is compared inside the functions, so that a trigger's definition is one line. The
--   publisher compares those lines and the functions' bodies with this text, at start and regularly.
-- * Schema changes are out of reach of any trigger.
-- ---------------------------------------------------------------------------------------------------

-- Writes a row of the log. Who changes something past the control API wakes the publishers at its commit; the
-- control API wakes its own publisher, and spares its commits the lock that NOTIFY holds through each of them.
CREATE FUNCTION evictd_log(scope text, key_hash bytea, key_id text, api_id text, workspace_id text, cause text)
    RETURNS void LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
BEGIN
    INSERT INTO invalidations (scope, key_hash, key_id, api_id, workspace_id, cause)
    VALUES ($1, $2, $3, $4, $5, $6);
    IF coalesce(current_setting('evictd.control_api', true), '') <> 'on' THEN
        PERFORM pg_notify('evictd_log', '');
    END IF;
END
$$;

-- The old row is emitted on its own when an agent could find it under another hash, or under another
-- API or workspace: floors of keys may have been merged into one of those (R6). A hash that is new to a
-- key counts as created: what is cached for it says "not found".
CREATE FUNCTION evictd_keys_changed() RETURNS trigger
    LANGUAGE plpgsql SECURITY DEFINER SET search_path FROM CURRENT AS $$
BEGIN
    IF TG_OP = 'INSERT' THEN
        PERFORM evictd_log('key', NEW.hash, NEW.id, NEW.api_id, NEW.workspace_id, 'created');
    ELSIF TG_OP = 'DELETE' THEN
        PERFORM evictd_log('key', OLD.hash, OLD.id, OLD.api_id, OLD.workspace_id, 'erased');
    ELSIF (NEW.hash, NEW.id, NEW.api_id, NEW.workspace_id, NEW.name, NEW.meta, NEW.external_id, NEW.permissions, NEW.enabled, NEW.expires, NEW.expired, NEW.deleted_at_m)
        IS DISTINCT FROM (OLD.hash, OLD.id, OLD.api_id, OLD.workspace_id, OLD.name, OLD.meta, OLD.external_id, OLD.permissions, OLD.enabled, OLD.expires, OLD.expired, OLD.deleted_at_m) THEN
        IF (NEW.hash, NEW.api_id, NEW.workspace_id) IS DISTINCT FROM (OLD.hash, OLD.api_id, OLD.workspace_id) THEN
            PERFORM evictd_log('key', OLD.hash, OLD.id, OLD.api_id, OLD.workspace_id, 'changed');
        END IF;
        PERFORM evictd_log('key', NEW.hash, NEW.id, NEW.api_id, NEW.workspace_id, CASE
            WHEN NEW.hash <> OLD.hash THEN 'created'
            WHEN NEW.deleted_at_m IS NOT NULL AND OLD.deleted_at_m IS NULL THEN 'deleted'
            WHEN NEW.deleted_at_m IS NULL AND OLD.deleted_at_m IS NOT NULL THEN 'restored'
            WHEN NEW.expired AND NOT OLD.expired THEN 'expired'
            ELSE 'changed' END);
    END IF;
    RETURN NULL;
END
$$;

CREATE FUNCTION evictd_root_keys_changed() RETURNS trigger
    LANGUAGE plpgsql SECURITY DEFINER SET search_path FROM CURRENT AS $$
BEGIN
    IF TG_OP = 'INSERT' THEN
        PERFORM evictd_log('key', NEW.hash, NEW.id, NULL, NEW.workspace_id, 'created');
    ELSIF TG_OP = 'DELETE' THEN
        PERFORM evictd_log('key', OLD.hash, OLD.id, NULL, OLD.workspace_id, 'erased');
    ELSIF (NEW.hash, NEW.id, NEW.workspace_id, NEW.permissions, NEW.enabled, NEW.expires, NEW.expired, NEW.deleted_at_m)
        IS DISTINCT FROM (OLD.hash, OLD.id, OLD.workspace_id, OLD.permissions, OLD.enabled, OLD.expires, OLD.expired, OLD.deleted_at_m) THEN
        IF (NEW.hash, NEW.workspace_id) IS DISTINCT FROM (OLD.hash, OLD.workspace_id) THEN
            PERFORM evictd_log('key', OLD.hash, OLD.id, NULL, OLD.workspace_id, 'changed');
        END IF;
        PERFORM evictd_log('key', NEW.hash, NEW.id, NULL, NEW.workspace_id, CASE
            WHEN NEW.hash <> OLD.hash THEN 'created'
            WHEN NEW.deleted_at_m IS NOT NULL AND OLD.deleted_at_m IS NULL THEN 'deleted'
            WHEN NEW.deleted_at_m IS NULL AND OLD.deleted_at_m IS NOT NULL THEN 'restored'
            WHEN NEW.expired AND NOT OLD.expired THEN 'expired'
            ELSE 'changed' END);
    END IF;
    RETURN NULL;
END
$$;

-- A new API changes no verification, unless keys were waiting for it: a session that checks no foreign keys
-- brought it back.
CREATE FUNCTION evictd_apis_changed() RETURNS trigger
    LANGUAGE plpgsql SECURITY DEFINER SET search_path FROM CURRENT AS $$
BEGIN
    IF TG_OP = 'INSERT' THEN
        IF EXISTS (SELECT FROM keys WHERE api_id = NEW.id) THEN
            PERFORM evictd_log('api', NULL, NULL, NEW.id, NEW.workspace_id, 'restored');
        END IF;
    ELSIF TG_OP = 'DELETE' THEN
        PERFORM evictd_log('api', NULL, NULL, OLD.id, OLD.workspace_id, 'erased');
    ELSIF (NEW.id, NEW.workspace_id, NEW.deleted_at_m) IS DISTINCT FROM (OLD.id, OLD.workspace_id, OLD.deleted_at_m) THEN
        IF (NEW.id, NEW.workspace_id) <> (OLD.id, OLD.workspace_id) THEN
            PERFORM evictd_log('api', NULL, NULL, OLD.id, OLD.workspace_id, 'changed');
        END IF;
        PERFORM evictd_log('api', NULL, NULL, NEW.id, NEW.workspace_id, CASE
            WHEN NEW.deleted_at_m IS NOT NULL AND OLD.deleted_at_m IS NULL THEN 'deleted'
            WHEN NEW.deleted_at_m IS NULL AND OLD.deleted_at_m IS NOT NULL THEN 'restored'
            ELSE 'changed' END);
    END IF;
    RETURN NULL;
END
$$;

-- As with APIs: only a workspace that something was waiting for.
CREATE FUNCTION evictd_workspaces_changed() RETURNS trigger
    LANGUAGE plpgsql SECURITY DEFINER SET search_path FROM CURRENT AS $$
BEGIN
    IF TG_OP = 'INSERT' THEN
        IF EXISTS (SELECT FROM apis WHERE workspace_id = NEW.id)
            OR EXISTS (SELECT FROM root_keys WHERE workspace_id = NEW.id) THEN
            PERFORM evictd_log('workspace', NULL, NULL, NULL, NEW.id, 'restored');
        END IF;
    ELSIF TG_OP = 'DELETE' THEN
        PERFORM evictd_log('workspace', NULL, NULL, NULL, OLD.id, 'erased');
    ELSIF NEW.id <> OLD.id THEN
        PERFORM evictd_log('workspace', NULL, NULL, NULL, OLD.id, 'erased');
        PERFORM evictd_log('workspace', NULL, NULL, NULL, NEW.id, 'restored');
    ELSIF NEW.enabled <> OLD.enabled THEN
        PERFORM evictd_log('workspace', NULL, NULL, NULL, NEW.id, 'changed');
    END IF;
    RETURN NULL;
END
$$;

-- TRUNCATE names no rows: every agent flushes.
CREATE FUNCTION evictd_truncated() RETURNS trigger
    LANGUAGE plpgsql SECURITY DEFINER SET search_path FROM CURRENT AS $$
BEGIN
    PERFORM evictd_log('all', NULL, NULL, NULL, NULL, 'erased');
    RETURN NULL;
END
$$;

CREATE TRIGGER keys_changed AFTER INSERT OR DELETE OR UPDATE ON keys FOR EACH ROW EXECUTE FUNCTION evictd_keys_changed();
CREATE TRIGGER root_keys_changed AFTER INSERT OR DELETE OR UPDATE ON root_keys FOR EACH ROW EXECUTE FUNCTION evictd_root_keys_changed();
CREATE TRIGGER apis_changed AFTER INSERT OR DELETE OR UPDATE ON apis FOR EACH ROW EXECUTE FUNCTION evictd_apis_changed();
CREATE TRIGGER workspaces_changed AFTER INSERT OR DELETE OR UPDATE ON workspaces FOR EACH ROW EXECUTE FUNCTION evictd_workspaces_changed();
CREATE TRIGGER keys_truncated AFTER TRUNCATE ON keys FOR EACH STATEMENT EXECUTE FUNCTION evictd_truncated();
CREATE TRIGGER root_keys_truncated AFTER TRUNCATE ON root_keys FOR EACH STATEMENT EXECUTE FUNCTION evictd_truncated();
CREATE TRIGGER apis_truncated AFTER TRUNCATE ON apis FOR EACH STATEMENT EXECUTE FUNCTION evictd_truncated();
CREATE TRIGGER workspaces_truncated AFTER TRUNCATE ON workspaces FOR EACH STATEMENT EXECUTE FUNCTION evictd_truncated();

ALTER TABLE keys ENABLE ALWAYS TRIGGER keys_changed, ENABLE ALWAYS TRIGGER keys_truncated;
ALTER TABLE root_keys ENABLE ALWAYS TRIGGER root_keys_changed, ENABLE ALWAYS TRIGGER root_keys_truncated;
ALTER TABLE apis ENABLE ALWAYS TRIGGER apis_changed, ENABLE ALWAYS TRIGGER apis_truncated;
ALTER TABLE workspaces ENABLE ALWAYS TRIGGER workspaces_changed, ENABLE ALWAYS TRIGGER workspaces_truncated;

-- Only through the triggers.
REVOKE EXECUTE ON FUNCTION evictd_log(text, bytea, text, text, text, text), evictd_keys_changed(),
    evictd_root_keys_changed(), evictd_apis_changed(), evictd_workspaces_changed(), evictd_truncated() FROM PUBLIC;
