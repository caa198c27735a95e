-- Times are microseconds since the epoch, UTC. Ids are made by the application.
CREATE TABLE tenants (
    id TEXT NOT NULL PRIMARY KEY,
    created_at INTEGER NOT NULL
) STRICT;

-- One row per KEK version. kek_id: the tenant's KEK over all versions. key_ref: opaque, names the device
-- object; recorded before the object is made. state: planned, active (seals), retired (opens only), destroyed.
-- wraps_reserved: upper bound of the wraps made under this version by all daemons together.
CREATE TABLE keks (
    tenant_id TEXT NOT NULL REFERENCES tenants (id),
    version INTEGER NOT NULL,
    kek_id BLOB NOT NULL,
    key_ref BLOB NOT NULL,
    state TEXT NOT NULL,
    wraps_reserved INTEGER NOT NULL,
    created_at INTEGER NOT NULL,
    activated_at INTEGER,
    destroyed_at INTEGER,
    PRIMARY KEY (tenant_id, version)
) STRICT;

-- labels: a JSON object of texts. row_version: the ETag.
CREATE TABLE secrets (
    id TEXT NOT NULL PRIMARY KEY,
    tenant_id TEXT NOT NULL REFERENCES tenants (id),
    name TEXT NOT NULL,
    kind TEXT NOT NULL,
    labels TEXT NOT NULL,
    current_version INTEGER NOT NULL,
    expires_at INTEGER,
    created_at INTEGER NOT NULL,
    updated_at INTEGER NOT NULL,
    row_version INTEGER NOT NULL
) STRICT;
CREATE UNIQUE INDEX secrets_by_name ON secrets (tenant_id, name);
CREATE INDEX secrets_by_id ON secrets (tenant_id, id);

-- wrapped_dek, iv, ciphertext, tag: the parts of docs/formats/sealed-v1.md. kek_version repeats what wrapped_dek
-- says, for counting and rewrap only; opening goes by wrapped_dek.
CREATE TABLE secret_versions (
    secret_id TEXT NOT NULL REFERENCES secrets (id),
    version INTEGER NOT NULL,
    tenant_id TEXT NOT NULL,
    encoding TEXT NOT NULL,
    value_len INTEGER NOT NULL,
    kek_version INTEGER NOT NULL,
    wrapped_dek BLOB NOT NULL,
    iv BLOB NOT NULL,
    ciphertext BLOB NOT NULL,
    tag BLOB NOT NULL,
    created_at INTEGER NOT NULL,
    PRIMARY KEY (secret_id, version)
) STRICT;
CREATE INDEX secret_versions_by_kek ON secret_versions (tenant_id, kek_version, secret_id, version);

-- state: queued, running, succeeded, failed, cancelled. position: where a resumed job goes on.
CREATE TABLE jobs (
    id TEXT NOT NULL PRIMARY KEY,
    tenant_id TEXT NOT NULL REFERENCES tenants (id),
    kind TEXT NOT NULL,
    state TEXT NOT NULL,
    target INTEGER NOT NULL,
    total INTEGER NOT NULL,
    done INTEGER NOT NULL,
    failed INTEGER NOT NULL,
    position TEXT NOT NULL,
    last_error TEXT,
    lease_owner TEXT,
    lease_until INTEGER NOT NULL,
    lease_epoch INTEGER NOT NULL,
    created_at INTEGER NOT NULL,
    updated_at INTEGER NOT NULL
) STRICT;
CREATE INDEX jobs_by_state ON jobs (state, lease_until);

-- Written in the transaction that creates result_id. body_mac: HMAC of the request body under a device key.
CREATE TABLE idempotency_keys (
    tenant_id TEXT NOT NULL,
    principal TEXT NOT NULL,
    key TEXT NOT NULL,
    operation TEXT NOT NULL,
    body_mac BLOB NOT NULL,
    result_id TEXT NOT NULL,
    expires_at INTEGER NOT NULL,
    PRIMARY KEY (tenant_id, principal, key)
) STRICT;
CREATE INDEX idempotency_keys_by_expiry ON idempotency_keys (expires_at);
