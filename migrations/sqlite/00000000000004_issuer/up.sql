-- secret_mac: HMAC-SHA256 of tenant, client id and secret under a key in the device. scopes: space-separated, what may be granted.
-- settings: a JSON object with what only some kinds have (redirect_uris, allow_token_exchange).
CREATE TABLE applications (
    client_id TEXT NOT NULL PRIMARY KEY,
    tenant_id TEXT NOT NULL,
    name TEXT NOT NULL,
    kind TEXT NOT NULL,
    secret_mac BLOB NOT NULL,
    scopes TEXT NOT NULL,
    settings TEXT NOT NULL,
    created_at INTEGER NOT NULL,
    row_version INTEGER NOT NULL
) STRICT;
CREATE INDEX applications_by_tenant ON applications (tenant_id, client_id);
