-- Keys of the purposes jwt and cookie form a ring: many of them, which come and go through the phases of keys/model.rs.
-- state: planned, next, current, previous, retired, destroyed (rings); planned, active, retired (the other purposes).
-- choice: what was asked for (EC, RSA, ES256, ...). origin: generated, imported. ended: why it was retired.
-- grace, longest (lifetime of a token that it signed) and margin are microseconds; the other numbers are times.
ALTER TABLE signing_keys ADD COLUMN choice TEXT;
ALTER TABLE signing_keys ADD COLUMN origin TEXT NOT NULL DEFAULT 'generated';
ALTER TABLE signing_keys ADD COLUMN grace INTEGER NOT NULL DEFAULT 0;
ALTER TABLE signing_keys ADD COLUMN published_at INTEGER;
ALTER TABLE signing_keys ADD COLUMN effective_at INTEGER;
ALTER TABLE signing_keys ADD COLUMN signs_from INTEGER;
ALTER TABLE signing_keys ADD COLUMN signs_until INTEGER;
ALTER TABLE signing_keys ADD COLUMN longest INTEGER NOT NULL DEFAULT 0;
ALTER TABLE signing_keys ADD COLUMN margin INTEGER NOT NULL DEFAULT 0;
ALTER TABLE signing_keys ADD COLUMN is_leaving INTEGER NOT NULL DEFAULT 0;
ALTER TABLE signing_keys ADD COLUMN ended TEXT;

-- What the first versions made: the lifetime of the tokens was configuration and is not known, so a day is assumed.
UPDATE signing_keys SET choice = 'EC' WHERE purpose = 'jwt';
UPDATE signing_keys SET state = 'current', published_at = COALESCE(activated_at, created_at),
    effective_at = COALESCE(activated_at, created_at),
    signs_from = COALESCE(activated_at, created_at), longest = 86400000000, margin = 120000000 WHERE purpose = 'jwt' AND state = 'active';
UPDATE signing_keys SET state = 'destroyed', ended = 'lost' WHERE purpose = 'jwt' AND state = 'retired';

-- One key signs.
CREATE UNIQUE INDEX signing_keys_one_signs ON signing_keys (tenant_id, purpose) WHERE state = 'current';
-- A kid names one key for ever.
CREATE UNIQUE INDEX signing_keys_by_kid ON signing_keys (tenant_id, kid) WHERE kid IS NOT NULL;

-- version: grows with every change of the ring; what a change was decided on. policy: a JSON object (keys/model.rs).
CREATE TABLE signing_rings (
    tenant_id TEXT NOT NULL,
    purpose TEXT NOT NULL,
    version INTEGER NOT NULL,
    policy TEXT NOT NULL,
    PRIMARY KEY (tenant_id, purpose)
) STRICT;

-- How many tokens of a key expire about then: what a revocation kills. Counted behind the signatures, so a crash may lose some.
CREATE TABLE signing_key_tokens (
    key_id TEXT NOT NULL,
    expires_at INTEGER NOT NULL,
    tokens INTEGER NOT NULL,
    PRIMARY KEY (key_id, expires_at)
) STRICT;

-- Row 1. high: the latest wall time that a daemon has seen. doubt and lag: by how much it may be ahead or
-- behind (microseconds), until doubt_until.
CREATE TABLE clock_marks (
    id INTEGER NOT NULL PRIMARY KEY,
    high INTEGER NOT NULL,
    doubt INTEGER NOT NULL,
    lag INTEGER NOT NULL,
    doubt_until INTEGER NOT NULL
) STRICT;
