-- The address of the connection. `remote_ip` is the client's, as trusted proxies report it.
ALTER TABLE audit_log ADD COLUMN peer_ip TEXT;
