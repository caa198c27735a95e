-- purpose: jwt (signs access tokens), client-secret (HMAC of client secrets), request-body (HMAC of idempotent bodies).
-- state: planned, active, retired. kid and jwk are filled once the device has made the key (asymmetric keys only).
CREATE TABLE signing_keys (
    id TEXT NOT NULL PRIMARY KEY,
    tenant_id TEXT NOT NULL,
    purpose TEXT NOT NULL,
    alg TEXT NOT NULL,
    key_ref BLOB NOT NULL,
    kid TEXT,
    jwk TEXT,
    state TEXT NOT NULL,
    created_at INTEGER NOT NULL,
    activated_at INTEGER
) STRICT;
-- Two daemons that start together plan one key, not two.
CREATE UNIQUE INDEX signing_keys_one_current ON signing_keys (tenant_id, purpose) WHERE state IN ('planned', 'active');
