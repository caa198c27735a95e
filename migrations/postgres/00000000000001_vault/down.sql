DROP TABLE idempotency_keys;
DROP TABLE jobs;
DROP TABLE secret_versions;
DROP TABLE secrets;
DROP TABLE keks;
DROP TABLE tenants;
