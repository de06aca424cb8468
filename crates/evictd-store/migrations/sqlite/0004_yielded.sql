-- One more cause of an incarnation. SQLite can't alter a CHECK.
CREATE TABLE history_with_yields (
    place          INTEGER PRIMARY KEY AUTOINCREMENT,
    incarnation    INTEGER NOT NULL UNIQUE,
    -- The head at which the previous incarnation ended, and the one at which this one begins.
    after_epoch    INTEGER NOT NULL,
    after_position INTEGER NOT NULL,
    epoch          INTEGER NOT NULL,
    position       INTEGER NOT NULL,
    token          INTEGER NOT NULL, -- the head's, when it began
    cause          TEXT    NOT NULL
                   CHECK (cause IN ('created', 'opened', 'branched', 'declared', 'schema_changed', 'yielded')),
    time           INTEGER NOT NULL, -- microseconds since 1970
    evidence       TEXT              -- for people
) STRICT;

INSERT INTO history_with_yields
SELECT place, incarnation, after_epoch, after_position, epoch, position, token, cause, time, evidence FROM history;
DROP TABLE history;
ALTER TABLE history_with_yields RENAME TO history;
