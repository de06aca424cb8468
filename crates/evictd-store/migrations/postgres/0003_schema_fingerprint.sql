-- By which each round notices that triggers were off for a moment, or tables were replaced (R3): a digest of what the
-- catalog says of them (src/postgres/schema.rs). NULL is taken for whatever is there; the migration of an existing
-- store sets it.
ALTER TABLE log_head
    ADD COLUMN schema_fingerprint BYTEA,
    -- Whether nothing there keeps a change from the log. Looked at again in each round until it is so.
    ADD COLUMN schema_intact BOOLEAN NOT NULL DEFAULT false;

SELECT set_config('search_path', quote_ident(current_schema()) || ', pg_temp', true);

-- A trigger or a rule on the log that keeps a row out leaves no trace once it is gone. So the change fails with its row.
CREATE OR REPLACE FUNCTION evictd_log(scope text, key_hash bytea, key_id text, api_id text, workspace_id text, cause text)
    RETURNS void LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
BEGIN
    INSERT INTO invalidations (scope, key_hash, key_id, api_id, workspace_id, cause)
    VALUES ($1, $2, $3, $4, $5, $6);
    IF NOT FOUND THEN
        RAISE EXCEPTION 'a trigger or a rule on the table invalidations keeps out the row of this change'
            USING HINT = 'Drop it; nothing but evictd may have one there.';
    END IF;
    IF coalesce(current_setting('evictd.control_api', true), '') <> 'on' THEN
        PERFORM pg_notify('evictd_log', '');
    END IF;
END
$$;
