//! The database layer on both engines.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stdout,
    clippy::disallowed_methods,
    clippy::disallowed_types,
    unreachable_pub,
    reason = "a test fails by panicking"
)]

#[path = "support/postgres.rs"]
mod postgres;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use diesel::connection::SimpleConnection;
use diesel::prelude::*;
use diesel::sql_types::{BigInt, Text};
use lacre::db::{Conn, Db, DbError, OpenError, OpenOptions, TurnName, Url, migrate, schema::tenants};
use lacre::with_conn;
use postgres::Postgres;

const MIGRATE: OpenOptions = OpenOptions { connections: 2, migrate: true };

struct Fixture {
    db: Db,
    url: Url,
    directory: tempfile::TempDir,
}

impl Fixture {
    fn sqlite() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let url = Url::sqlite(directory.path().join("lacre.db"));
        Self { db: Db::open(&url, &MIGRATE).unwrap(), url, directory }
    }

    fn postgres() -> Self {
        let url = Url::parse(&Postgres::shared().database()).unwrap();
        Self { db: Db::open(&url, &MIGRATE).unwrap(), url, directory: tempfile::tempdir().unwrap() }
    }

    fn both() -> [Self; 2] {
        [Self::sqlite(), Self::postgres()]
    }

    async fn insert(&self, id: &str) -> Result<(), DbError> {
        let id = id.to_owned();
        self.db.write(move |conn| insert(conn, &id)).await
    }

    async fn ids(&self) -> Vec<String> {
        let ids = |conn: &mut Conn| -> Result<Vec<String>, DbError> {
            let query = tenants::table.select(tenants::id).order(tenants::id);
            Ok(with_conn!(conn, |c| query.load(c))?)
        };
        self.db.read(ids).await.unwrap()
    }

    /// Forty rows of a page each, in one job.
    async fn fill(&self, prefix: &'static str) -> Result<(), DbError> {
        let id = move |n: u32| format!("{prefix}{n}{}", "x".repeat(4000));
        self.db.write(move |conn| (0..40).try_for_each(|n| insert(conn, &id(n)))).await
    }

    async fn execute(&self, sql: &str) -> Result<(), DbError> {
        let sql = sql.to_owned();
        self.db.write(move |conn| Ok(with_conn!(conn, |c| c.batch_execute(&sql))?)).await
    }
}

fn insert(conn: &mut Conn, id: &str) -> Result<(), DbError> {
    let row = (tenants::id.eq(id), tenants::created_at.eq(1));
    with_conn!(conn, |c| diesel::insert_into(tenants::table).values(row).execute(c))?;
    Ok(())
}

#[tokio::test]
async fn what_was_written_is_read_back() {
    for fixture in Fixture::both() {
        fixture.insert("a").await.unwrap();

        assert_eq!(fixture.ids().await, ["a"]);
        assert!(matches!(fixture.insert("a").await, Err(DbError::Duplicate)));
        assert_eq!(fixture.db.status().problem, None);
    }
}

#[tokio::test]
async fn a_job_that_fails_rolls_back_alone() {
    for fixture in Fixture::both() {
        let failing = fixture.db.write(|conn| -> Result<(), DbError> {
            insert(conn, "half")?;
            Err(DbError::impossible("tenants", "half"))
        });
        let (first, failed, last) = tokio::join!(fixture.insert("a"), failing, fixture.insert("b"));

        assert!(first.is_ok() && last.is_ok());
        assert!(matches!(failed, Err(DbError::Impossible { .. })));
        assert_eq!(fixture.ids().await, ["a", "b"]);
    }
}

#[tokio::test]
async fn a_job_that_panics_rolls_back_alone_and_its_thread_lives_on() {
    for fixture in Fixture::both() {
        let panicking = fixture.db.write(|conn| -> Result<(), DbError> {
            insert(conn, "half")?;
            // Inside a nested transaction, as a careless store might be.
            let nested = |_: &mut Conn| -> Result<(), DbError> { panic!("on purpose") };
            match conn {
                Conn::Sqlite(c) => c.transaction(|_| -> QueryResult<()> { panic!("on purpose") })?,
                other @ Conn::Postgres(_) => nested(other)?,
            }
            Ok(())
        });
        let (first, failed, last) = tokio::join!(fixture.insert("a"), panicking, fixture.insert("b"));

        assert!(first.is_ok() && last.is_ok(), "{first:?} {last:?}");
        assert!(matches!(failed, Err(DbError::Refused(_))), "{failed:?}");
        let read = fixture.db.read(|_| -> Result<(), DbError> { panic!("on purpose") }).await;
        assert!(matches!(read, Err(DbError::Refused(_))));
        assert_eq!(fixture.ids().await, ["a", "b"]);
    }
}

#[tokio::test]
async fn an_error_that_a_job_swallows_does_not_pass_for_a_commit() {
    let fixture = Fixture::postgres();
    fixture.insert("a").await.unwrap();

    let careless = fixture.db.write(|conn| -> Result<(), DbError> {
        insert(conn, "b")?;
        let _ = insert(conn, "a");
        Ok(())
    });

    assert!(careless.await.is_err());
    assert_eq!(fixture.ids().await, ["a"]);
}

#[tokio::test]
async fn writes_that_wait_together_share_a_commit() {
    let fixture = Arc::new(Fixture::sqlite());
    let before = fixture.db.status();

    let writes: Vec<_> = (0..300)
        .map(|n| {
            let fixture = Arc::clone(&fixture);
            tokio::spawn(async move { fixture.insert(&format!("t{n:03}")).await })
        })
        .collect();
    for write in writes {
        write.await.unwrap().unwrap();
    }

    let after = fixture.db.status();
    assert_eq!(after.writes - before.writes, 300);
    assert!(after.commits - before.commits < 150, "{} commits", after.commits - before.commits);
    assert_eq!(fixture.ids().await.len(), 300);
}

#[tokio::test]
async fn a_reader_cannot_write_an_sqlite_file() {
    let fixture = Fixture::sqlite();

    let result = fixture.db.read(|conn| insert(conn, "a")).await;

    assert!(result.is_err());
    assert!(fixture.ids().await.is_empty());
}

#[tokio::test]
async fn deleted_bytes_are_gone_from_the_files() {
    let fixture = Fixture::sqlite();
    let canary = "a-canary-that-must-disappear";
    let padding = "x".repeat(20_000);
    fixture.insert(canary).await.unwrap();
    fixture.insert(&padding).await.unwrap();

    fixture.execute("DELETE FROM tenants").await.unwrap();

    // Without a restart: the writer truncates its log when writing pauses.
    let gone = || !files(fixture.directory.path()).iter().any(|(_, bytes)| holds(bytes, canary.as_bytes()));
    for _ in 0..50 {
        if gone() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert!(gone());
}

#[tokio::test]
async fn deleted_bytes_are_gone_soon_after_a_reader_of_the_file_has_ended() {
    let fixture = Fixture::sqlite();
    let canary = "a-canary-that-must-disappear";
    fixture.insert(canary).await.unwrap();
    // Another program with a snapshot, such as a backup.
    let file = fixture.directory.path().join("lacre.db");
    let mut reader = SqliteConnection::establish(file.to_str().unwrap()).unwrap();
    reader.batch_execute("BEGIN; SELECT count(*) FROM tenants").unwrap();
    fixture.execute("DELETE FROM tenants").await.unwrap();

    // Longer than the truncation waits for readers.
    tokio::time::sleep(Duration::from_secs(7)).await;
    let gone = || !files(fixture.directory.path()).iter().any(|(_, bytes)| holds(bytes, canary.as_bytes()));
    assert!(!gone(), "the reader kept nothing from happening");
    drop(reader);

    for _ in 0..150 {
        if gone() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    panic!("the bytes are there still");
}

#[tokio::test]
async fn a_full_disk_refuses_writes_and_heals() {
    let fixture = Fixture::sqlite();
    fixture.execute("PRAGMA max_page_count = 40").await.unwrap();

    let (full, small) = (fixture.fill("a").await, fixture.insert("small").await);

    assert!(matches!(full, Err(DbError::Unavailable(_))), "{full:?}");
    assert!(small.is_ok(), "{small:?}");
    fixture.execute("PRAGMA max_page_count = 100000").await.unwrap();
    fixture.fill("b").await.unwrap();
    assert_eq!(fixture.ids().await.len(), 41);
    assert_eq!(fixture.db.status().problem, None);
}

#[tokio::test]
async fn files_are_readable_by_their_owner_only() {
    use std::os::unix::fs::PermissionsExt;
    let fixture = Fixture::sqlite();
    fixture.insert("a").await.unwrap();

    for entry in std::fs::read_dir(fixture.directory.path()).unwrap().flatten() {
        let mode = entry.metadata().unwrap().permissions().mode() & 0o777;
        assert_eq!(mode, 0o600, "{:?}", entry.file_name());
    }
}

#[tokio::test]
async fn a_second_daemon_is_kept_off_the_file() {
    let fixture = Fixture::sqlite();

    assert!(matches!(Db::open(&fixture.url, &MIGRATE), Err(OpenError::InUse { .. })));
    assert!(matches!(migrate::migrate(&fixture.url), Err(OpenError::InUse { .. })));
    let other_name = fixture.directory.path().join("other-name.db");
    std::os::unix::fs::symlink("lacre.db", &other_name).unwrap();
    assert!(matches!(Db::open(&Url::sqlite(other_name), &MIGRATE), Err(OpenError::InUse { .. })));
    assert!(migrate::status(&fixture.url).unwrap().iter().all(|migration| migration.applied));

    fixture.db.close();
    Db::open(&fixture.url, &MIGRATE).unwrap();
}

#[tokio::test]
async fn a_closed_database_keeps_what_was_written_and_refuses_more() {
    for fixture in Fixture::both() {
        fixture.insert("a").await.unwrap();
        fixture.db.close();

        assert!(matches!(fixture.insert("b").await, Err(DbError::Unavailable(_))));
        let reopened = Db::open(&fixture.url, &OpenOptions::default()).unwrap();
        let count = |conn: &mut Conn| -> Result<i64, DbError> {
            Ok(with_conn!(conn, |c| tenants::table.count().get_result(c))?)
        };
        assert_eq!(reopened.read(count).await.unwrap(), 1);
    }
}

#[test]
fn a_file_of_another_program_is_refused_and_left_alone() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("other.db");
    let mut other = SqliteConnection::establish(path.to_str().unwrap()).unwrap();
    other.batch_execute("CREATE TABLE songs (title TEXT)").unwrap();
    drop(other);
    let text = directory.path().join("notes.txt");
    std::fs::write(&text, "these are notes and no database at all, over and over".repeat(40)).unwrap();

    for file in [&path, &text] {
        let before = std::fs::read(file).unwrap();
        let result = Db::open(&Url::sqlite(file.clone()), &MIGRATE);

        assert!(matches!(result.map(|_| ()), Err(OpenError::Foreign { .. })), "{file:?}");
        assert_eq!(std::fs::read(file).unwrap(), before);
    }
}

#[tokio::test]
async fn a_schema_of_a_newer_program_is_refused() {
    for fixture in Fixture::both() {
        let newer = "INSERT INTO __diesel_schema_migrations (version) VALUES ('99990101000000')";
        fixture.execute(newer).await.unwrap();
        fixture.db.close();

        for result in
            [Db::open(&fixture.url, &MIGRATE).map(|_| ()), migrate::status(&fixture.url).map(|_| ())]
        {
            assert!(
                matches!(&result, Err(OpenError::NewerSchema { found }) if found == "99990101000000"),
                "{result:?}"
            );
        }
    }
}

#[test]
fn postgres_is_migrated_by_command_only() {
    let url = Url::parse(&Postgres::shared().database()).unwrap();

    let refused = Db::open(&url, &OpenOptions::default()).map(|_| ());
    assert!(matches!(refused, Err(OpenError::MigrationsPending { count: 9 })), "{refused:?}");
    assert_eq!(migrate::migrate(&url).unwrap().len(), 9);

    assert!(migrate::migrate(&url).unwrap().is_empty());
    Db::open(&url, &OpenOptions::default()).unwrap();
}

#[test]
fn an_unreachable_server_is_named_without_its_password() {
    let url = Url::parse("postgres://lacre:s3cret@127.0.0.1:1/lacre").unwrap();

    let error = Db::open(&url, &OpenOptions::default()).map(|_| ()).unwrap_err();

    assert!(matches!(error, OpenError::Unreachable { .. }));
    assert!(!error.to_string().contains("s3cret"), "{error}");
}

#[tokio::test]
async fn migrations_go_up_down_and_up_again() {
    for fixture in Fixture::both() {
        let engine = if fixture.url.to_string().starts_with("sqlite:") { "sqlite" } else { "postgres" };
        let before = columns(&fixture).await;

        for down in down_scripts(engine) {
            fixture.execute(&down).await.unwrap();
        }
        let left = columns(&fixture).await;
        assert!(left.is_empty(), "{left:?}");
        fixture.execute("DELETE FROM __diesel_schema_migrations").await.unwrap();
        fixture.db.close();

        let again = Fixture { db: Db::open(&fixture.url, &MIGRATE).unwrap(), ..fixture };
        assert_eq!(columns(&again).await, before);
    }
}

#[tokio::test]
async fn both_engines_have_the_tables_and_columns_of_the_schema() {
    let [sqlite, postgres] = Fixture::both();
    let (sqlite, postgres) = (columns(&sqlite).await, columns(&postgres).await);

    assert_eq!(sqlite, postgres);
    assert_eq!(sqlite, columns_of_schema());
}

#[tokio::test]
async fn commits_are_durable_and_transactions_as_expected_whatever_the_database_is_set_to() {
    let fixture = Fixture::postgres();
    let name = fixture.url.to_string().split(['/', '?']).nth(3).unwrap().to_owned();
    for setting in ["synchronous_commit = off", "default_transaction_isolation = 'serializable'"] {
        fixture.execute(&format!("ALTER DATABASE {name} SET {setting}")).await.unwrap();
    }

    let other = Db::open(&fixture.url, &MIGRATE).unwrap();
    for (name, wanted) in [("synchronous_commit", "on"), ("transaction_isolation", "read committed")] {
        let setting = move |conn: &mut Conn| {
            let query = diesel::sql_query(format!("SELECT current_setting('{name}') AS id"));
            Ok::<Vec<Named>, DbError>(with_conn!(conn, |c| query.load(c))?)
        };
        assert_eq!(other.read(setting).await.unwrap()[0].id, wanted);
        assert_eq!(other.write(setting).await.unwrap()[0].id, wanted);
    }
}

#[derive(QueryableByName)]
struct Named {
    #[diesel(sql_type = Text)]
    id: String,
}

#[tokio::test]
async fn a_turn_is_one_daemon_s_until_it_ends_or_its_connection_does() {
    let mut server = Postgres::start();
    let url = Url::parse(&server.database()).unwrap();
    migrate::migrate(&url).unwrap();
    let [first, second] = [(); 2].map(|()| Db::open(&url, &OpenOptions::default()).unwrap());
    let waits = Duration::from_millis(500);

    let turn = first.turn(TurnName::DeviceKeys).await.unwrap();
    assert!(tokio::time::timeout(waits, second.turn(TurnName::DeviceKeys)).await.is_err(), "two at once");
    drop(turn);
    let kept = second.turn(TurnName::DeviceKeys).await.unwrap();
    assert!(tokio::time::timeout(waits, first.turn(TurnName::DeviceKeys)).await.is_err(), "two at once");
    // As when the process of `second` dies.
    server.drop_connections();
    drop(first.turn(TurnName::DeviceKeys).await.unwrap());
    drop(kept);

    server.crash();
    assert!(matches!(first.turn(TurnName::DeviceKeys).await, Err(DbError::Unavailable(_))));
}

#[tokio::test]
async fn broken_connections_are_replaced() {
    let server = Postgres::start();
    let url = Url::parse(&server.database()).unwrap();
    let fixture =
        Fixture { db: Db::open(&url, &MIGRATE).unwrap(), url, directory: tempfile::tempdir().unwrap() };
    fixture.insert("a").await.unwrap();

    server.drop_connections();
    fixture.insert("b").await.unwrap();
    server.drop_connections();
    tokio::time::sleep(Duration::from_millis(1100)).await;
    assert_eq!(fixture.ids().await, ["a", "b"]);

    drop(server);
    let started = std::time::Instant::now();
    for _ in 0..20 {
        assert!(matches!(fixture.insert("c").await, Err(DbError::Unavailable(_))));
    }
    assert!(started.elapsed() < Duration::from_secs(3));
    assert!(fixture.db.status().problem.is_some());
}

#[derive(QueryableByName)]
#[allow(clippy::struct_field_names, reason = "the names of information_schema")]
struct Column {
    #[diesel(sql_type = Text)]
    table_name: String,
    #[diesel(sql_type = Text)]
    column_name: String,
    #[diesel(sql_type = Text)]
    type_name: String,
    #[diesel(sql_type = BigInt)]
    required: i64,
}

/// Table to its columns: name, type as schema.rs calls it, whether a value is required.
type Columns = BTreeMap<String, Vec<(String, String, bool)>>;

async fn columns(fixture: &Fixture) -> Columns {
    const SQLITE: &str = "SELECT m.name AS table_name, c.name AS column_name, c.type AS type_name,
            c.\"notnull\" AS required
        FROM sqlite_master m JOIN pragma_table_info(m.name) c
        WHERE m.type = 'table' AND m.name NOT LIKE '\\_\\_%' ESCAPE '\\' ORDER BY m.name, c.cid";
    const POSTGRES: &str = "SELECT table_name::text, column_name::text, data_type::text AS type_name,
            (CASE is_nullable WHEN 'NO' THEN 1 ELSE 0 END)::int8 AS required
        FROM information_schema.columns
        WHERE table_schema = 'public' AND table_name NOT LIKE '\\_\\_%' ORDER BY table_name, ordinal_position";
    let load = |conn: &mut Conn| -> Result<Vec<Column>, DbError> {
        Ok(match conn {
            Conn::Sqlite(c) => diesel::sql_query(SQLITE).load(c)?,
            Conn::Postgres(c) => diesel::sql_query(POSTGRES).load(c)?,
        })
    };
    let mut tables = Columns::new();
    for column in fixture.db.read(load).await.unwrap() {
        let kind = match column.type_name.as_str() {
            "TEXT" | "text" => "Text",
            "INTEGER" | "bigint" => "BigInt",
            "BLOB" | "bytea" => "Binary",
            other => panic!("{}.{} has type {other}", column.table_name, column.column_name),
        };
        let entry = (column.column_name, kind.to_owned(), column.required == 1);
        tables.entry(column.table_name).or_default().push(entry);
    }
    tables
}

/// What src/db/schema.rs says, read from its text.
fn columns_of_schema() -> Columns {
    let text = std::fs::read_to_string(repository().join("src/db/schema.rs")).unwrap();
    let mut tables = Columns::new();
    for block in text.split("diesel::table! {").skip(1) {
        let (name, rest) = block.trim_start().split_once(' ').unwrap();
        let (_, body) = rest.split_once('{').unwrap();
        let (body, _) = body.split_once('}').unwrap();
        let columns =
            body.split(',').filter_map(|column| column.trim().split_once(" -> ")).map(|(column, kind)| {
                let inner = kind.strip_prefix("Nullable<").and_then(|kind| kind.strip_suffix('>'));
                (column.to_owned(), inner.unwrap_or(kind).to_owned(), inner.is_none())
            });
        tables.insert(name.to_owned(), columns.collect());
    }
    tables
}

fn down_scripts(engine: &str) -> Vec<String> {
    let mut folders: Vec<_> = std::fs::read_dir(repository().join("migrations").join(engine))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    folders.sort();
    folders.iter().rev().map(|folder| std::fs::read_to_string(folder.join("down.sql")).unwrap()).collect()
}

fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn files(directory: &Path) -> Vec<(std::path::PathBuf, Vec<u8>)> {
    std::fs::read_dir(directory)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .map(|path| (path.clone(), std::fs::read(path).unwrap()))
        .collect()
}

fn holds(bytes: &[u8], wanted: &[u8]) -> bool {
    bytes.windows(wanted.len()).any(|window| window == wanted)
}
