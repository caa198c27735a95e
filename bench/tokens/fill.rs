//! Rows around those of the real users, straight into the SQLite file.
//!
//! A set is sealed for its place, so copies of its bytes do not open; nobody tries. What counts is that tables and
//! indexes are as large as they would be: users, identities, token sets and sealed records, under ids scattered as
//! random ones are. The real rows are moved to lie scattered among the others, as those of any thousand users do.

use std::fs::File;

use diesel::connection::SimpleConnection;
use diesel::sql_types::Text;
use diesel::{QueryableByName, RunQueryDsl, SqliteConnection};

use crate::installation::Installation;

/// Rows of each table in one transaction.
const CHUNK: u64 = 100_000;
/// Out of the way of all rows that there will be.
const AWAY: u64 = 1 << 40;

/// A table of which each user has one row.
struct Table {
    name: &'static str,
    /// Which rows those are.
    of_users: &'static str,
    /// Columns that are not copied, and what they have; `person` is the new user's id and `n` its number.
    own: &'static [(&'static str, &'static str)],
}

const TABLES: [Table; 4] = [
    Table {
        name: "users",
        of_users: "TRUE",
        own: &[("id", "person"), ("username", "'fill_' || person"), ("created_at", "created_at + n")],
    },
    Table {
        name: "user_identities",
        of_users: "TRUE",
        own: &[("user_id", "person"), ("identity_id", "'fill_' || person")],
    },
    Table {
        name: "token_sets",
        of_users: "TRUE",
        own: &[
            ("id", "person || 'fill-full'"),
            ("user_id", "person"),
            ("identity_id", "'fill_' || person"),
            ("created_at", "created_at + n"),
        ],
    },
    Table {
        name: "secret_versions",
        of_users: "kind = 'token-set'",
        own: &[(
            "secret_id",
            "'token-set/' || tenant_id || '/' || person || substr(secret_id, instr(secret_id, '/social/'))",
        )],
    },
];

#[derive(QueryableByName)]
struct Column {
    #[diesel(sql_type = Text)]
    name: String,
}

/// Fills up to `sets` rows around those of `users` users, while the daemon does not run.
pub fn around(installation: &Installation, users: u64, sets: u64) {
    let step = sets / users;
    if step < 2 {
        return;
    }
    let mut database = installation.sqlite();
    let tuning = "PRAGMA foreign_keys = OFF; PRAGMA synchronous = OFF; PRAGMA cache_size = -500000;";
    database.batch_execute(tuning).unwrap();
    for table in &TABLES {
        scatter(&mut database, table, step);
        let columns = columns(&mut database, table);
        let (mut from, last) = (1, sets - users);
        while from <= last {
            let to = last.min(from + CHUNK - 1);
            insert(&mut database, table, &columns, step, [from, to]);
            from = to + 1;
        }
    }
    // Else the first audit records wait until the kernel has written all this.
    File::open(installation.sqlite_file()).unwrap().sync_all().unwrap();
}

/// Moves the users' rows to the multiples of `step`, and all others out of the way.
fn scatter(database: &mut SqliteConnection, table: &Table, step: u64) {
    let Table { name, of_users, .. } = table;
    let statements = format!(
        "BEGIN;
         UPDATE {name} SET rowid = rowid + {AWAY};
         UPDATE {name} SET rowid = {step} * ranked.place
             FROM (SELECT rowid AS old, row_number() OVER () AS place FROM {name} WHERE {of_users}) AS ranked
             WHERE {name}.rowid = ranked.old;
         COMMIT;"
    );
    database.batch_execute(&statements).unwrap();
}

fn columns(database: &mut SqliteConnection, table: &Table) -> Vec<String> {
    let query = format!("SELECT name FROM pragma_table_info('{}')", table.name);
    let columns: Vec<Column> = diesel::sql_query(query).load(database).unwrap();
    columns.into_iter().map(|column| column.name).collect()
}

/// Inserts the rows of the new users of these numbers into the gaps.
fn insert(
    database: &mut SqliteConnection,
    table: &Table,
    columns: &[String],
    step: u64,
    [from, to]: [u64; 2],
) {
    let Table { name, own, .. } = table;
    let mut values = columns.to_vec();
    for (column, value) in columns.iter().zip(&mut values) {
        if let Some((_, own)) = own.iter().find(|(known, _)| known == column) {
            (*own).clone_into(value);
        }
    }
    let (columns, values) = (columns.join(", "), values.join(", "));
    // An odd factor permutes the numbers below 2^40. Two digits of base 36 in front, as all ids of users begin.
    let statements = format!(
        "BEGIN;
         WITH RECURSIVE numbers(n) AS (SELECT {from} UNION ALL SELECT n + 1 FROM numbers WHERE n < {to}),
             scrambled(n, x) AS (SELECT n, n * 680564733841 % 1099511627776 FROM numbers),
             people(n, place, person) AS (SELECT n, n + (n - 1) / ({step} - 1),
                 substr('0123456789abcdefghijklmnopqrstuvwxyz', x % 36 + 1, 1)
                 || substr('0123456789abcdefghijklmnopqrstuvwxyz', x / 36 % 36 + 1, 1) || printf('%010x', x)
                 FROM scrambled)
             INSERT INTO {name} (rowid, {columns})
             SELECT place, {values} FROM (SELECT * FROM {name} WHERE rowid = {step}), people;
         COMMIT; PRAGMA wal_checkpoint(TRUNCATE);"
    );
    database.batch_execute(&statements).unwrap();
}
