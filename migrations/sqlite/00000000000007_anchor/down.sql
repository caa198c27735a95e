DELETE FROM turns WHERE name = 'anchor';
DROP INDEX audit_records_of_the_anchor;
