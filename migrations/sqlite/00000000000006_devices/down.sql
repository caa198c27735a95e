DROP TABLE installation;
DROP INDEX secret_versions_by_backup;
ALTER TABLE secret_versions DROP COLUMN backup_kek;
ALTER TABLE secret_versions DROP COLUMN backup_dek;
ALTER TABLE keks DROP COLUMN role;
ALTER TABLE signing_keys DROP COLUMN device;
ALTER TABLE keks DROP COLUMN device;
