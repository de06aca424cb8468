-- By which each round notices that a trigger was dropped for a moment, or a table replaced (R3): PRAGMA schema_version
-- as it was then. NULL is taken for whatever is there; each migration sets it.
ALTER TABLE log_head ADD COLUMN schema_version INTEGER;
-- Whether all triggers were in place, and nothing in their way.
ALTER TABLE log_head ADD COLUMN schema_intact INTEGER NOT NULL DEFAULT 1 CHECK (schema_intact IN (0, 1));
