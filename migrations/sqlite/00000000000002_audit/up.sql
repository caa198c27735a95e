-- Row 1: the last record's number and hash. Appending locks it, so that numbers have no gaps.
-- Row 2 (SQLite only): up to which number all intents have their outcome; where a start after a crash begins to read.
CREATE TABLE audit_head (
    id INTEGER NOT NULL PRIMARY KEY,
    seq INTEGER NOT NULL,
    hash BLOB NOT NULL
) STRICT;

-- body: the exact bytes of the record (docs/formats/audit-v1.md); the other columns repeat parts of it for filters.
CREATE TABLE audit_records (
    seq INTEGER NOT NULL PRIMARY KEY,
    at INTEGER NOT NULL,
    tenant_id TEXT NOT NULL,
    action TEXT NOT NULL,
    body TEXT NOT NULL
) STRICT;
CREATE INDEX audit_records_by_tenant ON audit_records (tenant_id, seq);
