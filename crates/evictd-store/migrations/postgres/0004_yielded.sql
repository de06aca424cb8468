-- One more cause of an incarnation.
ALTER TABLE history DROP CONSTRAINT history_cause_check;
ALTER TABLE history ADD CONSTRAINT history_cause_check
    CHECK (cause IN ('created', 'opened', 'branched', 'declared', 'schema_changed', 'yielded'));
