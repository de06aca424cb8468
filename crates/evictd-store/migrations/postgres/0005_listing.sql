-- A client lists the live keys of an API, all of them or those of one external id. Each list reads just the rows that it
-- returns, however many keys the API has, or had.
CREATE INDEX keys_listed ON keys (api_id, id) WHERE deleted_at_m IS NULL;
CREATE INDEX keys_external ON keys (api_id, external_id, id) WHERE deleted_at_m IS NULL AND external_id IS NOT NULL;
