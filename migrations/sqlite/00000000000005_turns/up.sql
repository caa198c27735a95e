-- What one daemon at a time does: its row is locked meanwhile, and nothing is ever written to it.
-- device-keys: making keys on the token. SQLite has one daemon and needs no turns; the schema is the same.
CREATE TABLE turns (
    name TEXT NOT NULL PRIMARY KEY
) STRICT;
INSERT INTO turns (name) VALUES ('device-keys');
