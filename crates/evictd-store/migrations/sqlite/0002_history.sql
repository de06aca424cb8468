-- One history (R15, R16): which store this is, and which pasts it knows.
--
-- Random numbers of 64 bits are stored as signed integers, and never 0; printf('%016x', n) shows them as logs do.

-- With it the store vouches for what agents have seen. A copy of the store has the same. Nothing but a publisher
-- reads it.
CREATE TABLE voucher_key (
    id  INTEGER PRIMARY KEY CHECK (id = 1),
    key BLOB    NOT NULL CHECK (length(key) = 32)
) STRICT;

INSERT INTO voucher_key (id, key) VALUES (1, randomblob(32));

-- The head of the log, with what distinguishes it from the head of a copy. A column that must not be null can't be added.
CREATE TABLE named_head (
    id    INTEGER PRIMARY KEY CHECK (id = 1),
    epoch INTEGER NOT NULL CHECK (epoch BETWEEN 1 AND 1048575),
    head  INTEGER NOT NULL CHECK (head BETWEEN 0 AND 17592186044415),
    -- Drawn when the store is created; its copies have the same.
    store_id    INTEGER NOT NULL CHECK (store_id <> 0),
    -- The newest one of the history.
    incarnation INTEGER NOT NULL CHECK (incarnation <> 0),
    -- Of the row at the head; of the incarnation's beginning, if it has given out no position yet.
    token       INTEGER NOT NULL CHECK (token <> 0),
    -- The newest probe round's. Each round draws one, so that it is a durable write (R7).
    round       INTEGER NOT NULL CHECK (round <> 0),
    -- How many rounds there were: where round_tokens goes on.
    rounds      INTEGER NOT NULL,
    -- The highest epoch that an agent has proved to have seen of a history that isn't this one: what an operator
    -- declares begins above it.
    lost_epoch  INTEGER NOT NULL DEFAULT 0,
    -- Publishers read the roster (R11) from their last revision on: what changed since has a higher one.
    roster_revision INTEGER NOT NULL DEFAULT 1,
    -- 0 from the beginning of an epoch until a bound later: the store may have gone back, and its roster with it.
    roster_complete INTEGER NOT NULL DEFAULT 1 CHECK (roster_complete IN (0, 1)),
    -- Receipts of older changes (milliseconds since 1970) may have been purged.
    receipts_since_m INTEGER NOT NULL DEFAULT 0
) STRICT;

INSERT INTO named_head (id, epoch, head, store_id, incarnation, token, round, rounds, roster_revision,
                        roster_complete, receipts_since_m)
SELECT id, epoch, head, random(), random(), random(), random(), fence, roster_revision, roster_complete,
       receipts_since_m
FROM log_head;

DROP TABLE log_head;
ALTER TABLE named_head RENAME TO log_head;

-- The tokens of the last rounds: a publisher that doesn't find a colleague's in its own store works on a copy.
CREATE TABLE round_tokens (
    place INTEGER PRIMARY KEY, -- log_head.rounds modulo how many are kept
    token INTEGER NOT NULL
) STRICT;

INSERT INTO round_tokens (place, token) SELECT rounds % 512, round FROM log_head;

-- The incarnations of this store. Only ever added to: an agent may come back after months.
CREATE TABLE history (
    place          INTEGER PRIMARY KEY AUTOINCREMENT,
    incarnation    INTEGER NOT NULL UNIQUE,
    -- The head at which the one before it ended, and the one from which it goes on.
    after_epoch    INTEGER NOT NULL,
    after_position INTEGER NOT NULL,
    epoch          INTEGER NOT NULL,
    position       INTEGER NOT NULL,
    token          INTEGER NOT NULL, -- the head's, when it began
    cause          TEXT    NOT NULL CHECK (cause IN ('created', 'opened', 'branched', 'declared', 'schema_changed')),
    time           INTEGER NOT NULL, -- microseconds since 1970
    evidence       TEXT              -- for people
) STRICT;

-- An older store is as good as created here: no agent can present anything of what it gave out before.
INSERT INTO history (incarnation, after_epoch, after_position, epoch, position, token, cause, time)
SELECT incarnation, 0, 0, epoch, head, token, 'created',
       CAST(round((julianday('now') - 2440587.5) * 86400000.0) AS INTEGER) * 1000
FROM log_head;

-- Two logs that agree on a position and its token agree on everything up to there. Drawn by each transaction that
-- gives positions; those of an older store's rows were all given by now.
ALTER TABLE invalidations ADD COLUMN token INTEGER;
UPDATE invalidations SET token = (SELECT token FROM log_head) WHERE position IS NOT NULL;
