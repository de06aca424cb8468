-- One history (R15, R16): which store this is, and which pasts it knows.
--
-- Random numbers of 64 bits are stored as signed integers, and never 0; to_hex(n) shows them as logs do.

-- Where the store is, whatever lies in front of it by now.
SELECT set_config('search_path', quote_ident(nspname) || ', pg_temp', true)
FROM pg_class JOIN pg_namespace ON pg_namespace.oid = relnamespace WHERE pg_class.oid = 'log_head'::regclass;

-- With it the store vouches for what agents have seen. A copy of the store has the same. Nothing but a publisher may
-- read it: an agent that reads the database itself could claim to have seen whatever it likes.
CREATE TABLE voucher_key (
    id  INTEGER PRIMARY KEY CHECK (id = 1),
    key BYTEA   NOT NULL CHECK (octet_length(key) = 32)
);
REVOKE ALL ON voucher_key FROM PUBLIC;

-- Without an extension, there is no other source of secure randomness: 122 bits in each.
INSERT INTO voucher_key (id, key) VALUES (1, sha256((gen_random_uuid()::text || gen_random_uuid()::text)::bytea));

-- What distinguishes the head from the head of a copy. `fence` made a durable write of each round; a drawn token does that now.
ALTER TABLE log_head RENAME COLUMN fence TO rounds;
ALTER TABLE log_head
    -- Drawn when the store is created; its copies have the same.
    ADD COLUMN store_id    BIGINT CHECK (store_id <> 0),
    -- The newest one of the history.
    ADD COLUMN incarnation BIGINT CHECK (incarnation <> 0),
    -- Of the row at the head; of the incarnation's beginning, if it has given out no position yet.
    ADD COLUMN token       BIGINT CHECK (token <> 0),
    -- The newest probe round's.
    ADD COLUMN round       BIGINT CHECK (round <> 0),
    -- The highest epoch that an agent has proved to have seen of a history that isn't this one: what an operator
    -- declares begins above it. A constant default rewrites nothing.
    ADD COLUMN lost_epoch  INTEGER NOT NULL DEFAULT 0;

-- A default would rewrite the table, and by that look like a restore. (That the migration writes this row is noted at its
-- end, see src/postgres/schema.rs.)
UPDATE log_head
SET store_id    = ('x' || encode(sha256(gen_random_uuid()::text::bytea), 'hex'))::bit(64)::bigint,
    incarnation = ('x' || encode(sha256(gen_random_uuid()::text::bytea), 'hex'))::bit(64)::bigint,
    token       = ('x' || encode(sha256(gen_random_uuid()::text::bytea), 'hex'))::bit(64)::bigint,
    round       = ('x' || encode(sha256(gen_random_uuid()::text::bytea), 'hex'))::bit(64)::bigint;

ALTER TABLE log_head
    ALTER COLUMN store_id SET NOT NULL,
    ALTER COLUMN incarnation SET NOT NULL,
    ALTER COLUMN token SET NOT NULL,
    ALTER COLUMN round SET NOT NULL;

-- The tokens of the last rounds: a publisher that doesn't find a colleague's in its own store works on a copy. Not in
-- log_head, which lookups read: its row would be ten times as long, and be written as often.
CREATE TABLE round_tokens (
    place INTEGER PRIMARY KEY, -- log_head.rounds modulo how many are kept
    token BIGINT  NOT NULL
) WITH (fillfactor = 50);

INSERT INTO round_tokens (place, token) SELECT rounds % 512, round FROM log_head;

-- The incarnations of this store. Only ever added to: an agent may come back after months.
CREATE TABLE history (
    place          BIGINT  GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    incarnation    BIGINT  NOT NULL UNIQUE,
    -- The head at which the one before it ended, and the one from which it goes on.
    after_epoch    INTEGER NOT NULL,
    after_position BIGINT  NOT NULL,
    epoch          INTEGER NOT NULL,
    position       BIGINT  NOT NULL,
    token          BIGINT  NOT NULL, -- the head's, when it began
    cause          TEXT    COLLATE "C" NOT NULL CHECK (cause IN ('created', 'opened', 'branched', 'declared', 'schema_changed')),
    time           BIGINT  NOT NULL DEFAULT evictd_now(), -- microseconds since 1970
    evidence       TEXT                                   -- for people
);

-- An older store is as good as created here: no agent can present anything of what it gave out before.
INSERT INTO history (incarnation, after_epoch, after_position, epoch, position, token, cause)
SELECT incarnation, 0, 0, epoch, head, token, 'created' FROM log_head;

-- Two logs that agree on a position and its token agree on everything up to there. Drawn by each transaction that
-- gives positions; those of an older store's rows were all given by now. A default that is a constant costs no
-- rewriting of a long log. What waits for a position has it too, and gets another one with that.
DO $$
BEGIN
    EXECUTE format('ALTER TABLE invalidations ADD COLUMN token BIGINT DEFAULT %L::bigint', (SELECT token FROM log_head));
    ALTER TABLE invalidations ALTER COLUMN token DROP DEFAULT;
END
$$;
