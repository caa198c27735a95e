-- secret_versions holds sealed records of other parts than `secrets` too: kind is the Context::kind they are bound to, and
-- secret_id their name (for token sets `token-set/TENANT/USER/FAMILY/TARGET`). So the reference to `secrets` goes.
ALTER TABLE secret_versions DROP CONSTRAINT secret_versions_secret_id_fkey;
ALTER TABLE secret_versions ADD COLUMN kind TEXT NOT NULL DEFAULT 'secret';

-- People whose identities at other providers are kept. profile, custom_data: JSON objects. password_hash: Argon2id, PHC form.
CREATE TABLE users (
    tenant_id TEXT NOT NULL,
    id TEXT NOT NULL,
    username TEXT,
    primary_email TEXT,
    primary_phone TEXT,
    name TEXT,
    avatar TEXT,
    profile TEXT NOT NULL,
    custom_data TEXT NOT NULL,
    password_hash TEXT,
    is_suspended INT8 NOT NULL,
    created_at INT8 NOT NULL,
    updated_at INT8 NOT NULL,
    PRIMARY KEY (tenant_id, id)
);
CREATE UNIQUE INDEX users_by_username ON users (tenant_id, username) WHERE username IS NOT NULL;
CREATE UNIQUE INDEX users_by_email ON users (tenant_id, primary_email) WHERE primary_email IS NOT NULL;
CREATE UNIQUE INDEX users_by_phone ON users (tenant_id, primary_phone) WHERE primary_phone IS NOT NULL;
CREATE INDEX users_by_age ON users (tenant_id, created_at, id);

-- Accounts at other providers. family: social, sso. target: the connector's target (social) or its id (sso). id and
-- issuer: of sso only. One account belongs to one user.
CREATE TABLE user_identities (
    tenant_id TEXT NOT NULL,
    user_id TEXT NOT NULL,
    family TEXT NOT NULL,
    target TEXT NOT NULL,
    id TEXT NOT NULL,
    issuer TEXT,
    identity_id TEXT NOT NULL,
    details TEXT NOT NULL,
    created_at INT8 NOT NULL,
    updated_at INT8 NOT NULL,
    PRIMARY KEY (tenant_id, user_id, family, target)
);
CREATE UNIQUE INDEX user_identities_by_account ON user_identities (tenant_id, family, target, identity_id);

-- family: social, sso. factory: the connector's kind. shown: what the API shows, without secrets. What decides (also the columns
-- factory, target and stores_tokens) is in the sealed record `connector/TENANT/ID`, of this version. refresh_ahead: seconds
-- before expiry, 0: none. breaker_until: until then its provider is not called (breaker_reason says why).
CREATE TABLE connectors (
    tenant_id TEXT NOT NULL,
    id TEXT NOT NULL,
    family TEXT NOT NULL,
    factory TEXT NOT NULL,
    target TEXT NOT NULL,
    shown TEXT NOT NULL,
    stores_tokens INT8 NOT NULL,
    refresh_ahead INT8 NOT NULL,
    version INT8 NOT NULL,
    breaker_until INT8 NOT NULL,
    breaker_reason TEXT,
    breaker_failures INT8 NOT NULL,
    created_at INT8 NOT NULL,
    updated_at INT8 NOT NULL,
    PRIMARY KEY (tenant_id, id)
);
CREATE UNIQUE INDEX connectors_by_target ON connectors (tenant_id, family, target);

-- Metadata of a token set; its values are the sealed record of this version. expires_at: seconds; other times microseconds.
-- state: idle, refreshing (its intent is durable; lease_until by the database's clock), needs_reauth. epoch: grows with each
-- refresh that begins. spent: the one more try with an old refresh token is used up. issued_at: when the request
-- that brought the tokens began.
CREATE TABLE token_sets (
    tenant_id TEXT NOT NULL,
    id TEXT NOT NULL,
    user_id TEXT NOT NULL,
    family TEXT NOT NULL,
    target TEXT NOT NULL,
    connector_id TEXT NOT NULL,
    issuer TEXT,
    identity_id TEXT NOT NULL,
    has_refresh_token INT8 NOT NULL,
    scope TEXT,
    token_type TEXT,
    expires_at INT8,
    issued_at INT8 NOT NULL,
    version INT8 NOT NULL,
    state TEXT NOT NULL,
    epoch INT8 NOT NULL,
    lease_until INT8 NOT NULL,
    spent INT8 NOT NULL,
    failures INT8 NOT NULL,
    last_error TEXT,
    retry_at INT8 NOT NULL,
    refresh_at INT8,
    created_at INT8 NOT NULL,
    updated_at INT8 NOT NULL,
    PRIMARY KEY (tenant_id, id)
);
CREATE UNIQUE INDEX token_sets_by_place ON token_sets (tenant_id, user_id, family, target);
CREATE INDEX token_sets_by_connector ON token_sets (tenant_id, connector_id, id);
CREATE INDEX token_sets_by_refresh ON token_sets (tenant_id, refresh_at) WHERE refresh_at IS NOT NULL;

-- Proofs with a short life. kind: social, sso, password. state: pending, verified. What was asked, the profile and the
-- parked tokens are the sealed record `verification/TENANT/USER/ID` of this version.
CREATE TABLE verification_records (
    tenant_id TEXT NOT NULL,
    id TEXT NOT NULL,
    user_id TEXT NOT NULL,
    kind TEXT NOT NULL,
    connector_id TEXT,
    target TEXT,
    state TEXT NOT NULL,
    version INT8 NOT NULL,
    expires_at INT8 NOT NULL,
    PRIMARY KEY (tenant_id, id)
);
CREATE INDEX verification_records_by_expiry ON verification_records (tenant_id, expires_at);
CREATE INDEX verification_records_by_user ON verification_records (tenant_id, user_id);
CREATE INDEX verification_records_by_connector ON verification_records (tenant_id, connector_id);

-- The account center's settings: which version of the sealed record `account-center/TENANT` holds.
CREATE TABLE account_centers (
    tenant_id TEXT NOT NULL PRIMARY KEY,
    version INT8 NOT NULL
);

-- Tokens that stand for a user. kind: access (opaque access tokens), subject (to be exchanged once). hash: SHA-256 of the token. mac: HMAC
-- of the row under a key in the device. scopes, client_id: of access tokens only.
CREATE TABLE user_tokens (
    hash BYTEA NOT NULL PRIMARY KEY,
    tenant_id TEXT NOT NULL,
    kind TEXT NOT NULL,
    user_id TEXT NOT NULL,
    client_id TEXT,
    scopes TEXT NOT NULL,
    expires_at INT8 NOT NULL,
    mac BYTEA NOT NULL
);
CREATE INDEX user_tokens_by_expiry ON user_tokens (expires_at);
CREATE INDEX user_tokens_by_user ON user_tokens (tenant_id, user_id);
