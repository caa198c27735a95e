-- device: the name of the device (configuration) that holds the key. Keys of earlier versions are on the one device there was.
ALTER TABLE keks ADD COLUMN device TEXT NOT NULL DEFAULT 'default';
ALTER TABLE signing_keys ADD COLUMN device TEXT NOT NULL DEFAULT 'default';
-- role: main (wraps what is in use), backup (wraps backup_dek only). Versions are numbered over both.
ALTER TABLE keks ADD COLUMN role TEXT NOT NULL DEFAULT 'main';

-- The second wrap of the same DEK, under a KEK version of role backup (backup_kek repeats its number; 0: none yet).
-- In the record's own row, so that deleting the record deletes it too.
ALTER TABLE secret_versions ADD COLUMN backup_dek BYTEA;
ALTER TABLE secret_versions ADD COLUMN backup_kek INT8 NOT NULL DEFAULT 0;
CREATE INDEX secret_versions_by_backup ON secret_versions (tenant_id, backup_kek, secret_id, version);

-- Row 1: what holds for the whole installation. quarantined_at: set by `lacre restore`, cleared by its release; nothing
-- scheduled runs and no key rotates meanwhile.
CREATE TABLE installation (
    id INT8 NOT NULL PRIMARY KEY,
    quarantined_at INT8
);
INSERT INTO installation (id) VALUES (1);
