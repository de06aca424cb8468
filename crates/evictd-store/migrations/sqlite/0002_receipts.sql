-- Receipts (R12), and what a publisher has to find quickly to write them.

-- What became of a request, once that is final. Ids only, in `body` too: a receipt outlives the record
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

-- Set together with the receipt. The log may be long, and the requests that are still open are few: the
-- second index holds those alone.
ALTER TABLE invalidations ADD COLUMN receipted INTEGER NOT NULL DEFAULT 0 CHECK (receipted IN (0, 1));
CREATE INDEX invalidations_request ON invalidations (request_id) WHERE request_id IS NOT NULL;
CREATE INDEX invalidations_open ON invalidations (epoch, position)
    WHERE position IS NOT NULL AND request_id IS NOT NULL AND receipted = 0;

CREATE INDEX audit_log_request ON audit_log (correlation_id) WHERE correlation_id IS NOT NULL;

-- What a publisher knows of the roster (R11) is as old as a revision; what changed since has a higher one.
-- Rows from before there were revisions are of the first.
ALTER TABLE log_head ADD COLUMN roster_revision INTEGER NOT NULL DEFAULT 1;
-- 0 from the beginning of an epoch until a bound later: the store may have gone back, and its roster with it.
ALTER TABLE log_head ADD COLUMN roster_complete INTEGER NOT NULL DEFAULT 1 CHECK (roster_complete IN (0, 1));
ALTER TABLE roster ADD COLUMN revision INTEGER NOT NULL DEFAULT 1;
CREATE INDEX roster_revision ON roster (revision);
