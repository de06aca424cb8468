-- By which each round notices that triggers were off for a moment, or tables were replaced (R3): a digest of what the
-- catalog says of them (src/postgres/schema.rs). NULL is taken for whatever is there; the migration of an existing
-- store sets it.
ALTER TABLE log_head
    ADD COLUMN schema_fingerprint BYTEA,
    -- Whether nothing there keeps a change from the log. Looked at again in each round until it is so.
    ADD COLUMN schema_intact BOOLEAN NOT NULL DEFAULT false;
