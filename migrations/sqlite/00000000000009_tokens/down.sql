DROP TABLE user_tokens;
DROP TABLE account_centers;
DROP TABLE verification_records;
DROP TABLE token_sets;
DROP TABLE connectors;
DROP TABLE user_identities;
DROP TABLE users;
DELETE FROM secret_versions WHERE kind <> 'secret';
CREATE TABLE versions_of_secrets (
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
    backup_dek BLOB,
    backup_kek INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (secret_id, version)
) STRICT;
INSERT INTO versions_of_secrets (secret_id, version, tenant_id, encoding, value_len, kek_version, wrapped_dek, iv, ciphertext,
    tag, created_at, backup_dek, backup_kek)
    SELECT secret_id, version, tenant_id, encoding, value_len, kek_version, wrapped_dek, iv, ciphertext,
        tag, created_at, backup_dek, backup_kek FROM secret_versions;
DROP TABLE secret_versions;
ALTER TABLE versions_of_secrets RENAME TO secret_versions;
CREATE INDEX secret_versions_by_kek ON secret_versions (tenant_id, kek_version, secret_id, version);
CREATE INDEX secret_versions_by_backup ON secret_versions (tenant_id, backup_kek, secret_id, version);
