-- Times are microseconds since the epoch, UTC. Ids are made by the application.
CREATE TABLE tenants (
    id TEXT NOT NULL PRIMARY KEY,
    created_at INT8 NOT NULL
);

-- One row per KEK version. kek_id: the tenant's KEK over all versions. key_ref: opaque, names the device
-- object; recorded before the object is made. state: planned, active (seals), retired (opens only), destroyed.
-- wraps_reserved: upper bound of the wraps made under this version by all daemons together.
CREATE TABLE keks (
    tenant_id TEXT NOT NULL REFERENCES tenants (id),
    version INT8 NOT NULL,
    kek_id BYTEA NOT NULL,
    key_ref BYTEA NOT NULL,
    state TEXT NOT NULL,
    wraps_reserved INT8 NOT NULL,
    created_at INT8 NOT NULL,
    activated_at INT8,
    destroyed_at INT8,
    PRIMARY KEY (tenant_id, version)
);

-- labels: a JSON object of texts. row_version: the ETag.
CREATE TABLE secrets (
    id TEXT NOT NULL PRIMARY KEY,
    tenant_id TEXT NOT NULL REFERENCES tenants (id),
    name TEXT NOT NULL,
    kind TEXT NOT NULL,
    labels TEXT NOT NULL,
    current_version INT8 NOT NULL,
    expires_at INT8,
    created_at INT8 NOT NULL,
    updated_at INT8 NOT NULL,
    row_version INT8 NOT NULL
);
CREATE UNIQUE INDEX secrets_by_name ON secrets (tenant_id, name);
CREATE INDEX secrets_by_id ON secrets (tenant_id, id);

-- wrapped_dek, iv, ciphertext, tag: the parts of docs/formats/sealed-v1.md. kek_version repeats what wrapped_dek
-- says, for counting and rewrap only; opening goes by wrapped_dek.
CREATE TABLE secret_versions (
    secret_id TEXT NOT NULL REFERENCES secrets (id),
    version INT8 NOT NULL,
    tenant_id TEXT NOT NULL,
    encoding TEXT NOT NULL,
    value_len INT8 NOT NULL,
    kek_version INT8 NOT NULL,
    wrapped_dek BYTEA NOT NULL,
    iv BYTEA NOT NULL,
    ciphertext BYTEA NOT NULL,
    tag BYTEA NOT NULL,
    created_at INT8 NOT NULL,
    PRIMARY KEY (secret_id, version)
);
CREATE INDEX secret_versions_by_kek ON secret_versions (tenant_id, kek_version, secret_id, version);

-- state: queued, running, succeeded, failed, cancelled. position: where a resumed job goes on.
CREATE TABLE jobs (
    id TEXT NOT NULL PRIMARY KEY,
    tenant_id TEXT NOT NULL REFERENCES tenants (id),
    kind TEXT NOT NULL,
    state TEXT NOT NULL,
    target INT8 NOT NULL,
    total INT8 NOT NULL,
    done INT8 NOT NULL,
    failed INT8 NOT NULL,
    position TEXT NOT NULL,
    last_error TEXT,
    lease_owner TEXT,
    lease_until INT8 NOT NULL,
    lease_epoch INT8 NOT NULL,
    created_at INT8 NOT NULL,
    updated_at INT8 NOT NULL
);
CREATE INDEX jobs_by_state ON jobs (state, lease_until);

-- Written in the transaction that creates result_id. body_mac: HMAC of the request body under a device key.
CREATE TABLE idempotency_keys (
    tenant_id TEXT NOT NULL,
    principal TEXT NOT NULL,
    key TEXT NOT NULL,
    operation TEXT NOT NULL,
    body_mac BYTEA NOT NULL,
    result_id TEXT NOT NULL,
    expires_at INT8 NOT NULL,
    PRIMARY KEY (tenant_id, principal, key)
);
CREATE INDEX idempotency_keys_by_expiry ON idempotency_keys (expires_at);
