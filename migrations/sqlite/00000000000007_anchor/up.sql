-- The anchor's last record is looked for at each start and once a period, among however many records.
CREATE INDEX audit_records_of_the_anchor ON audit_records (tenant_id, seq)
    WHERE action IN ('anchor.advance', 'anchor.accept');
-- anchor: counting one up in the device and saying so in the log.
INSERT INTO turns (name) VALUES ('anchor');
