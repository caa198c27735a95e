//! A daemon on either engine, and its tables behind its back.

use diesel::prelude::*;
use diesel::sql_types::Text;
use reqwest::{Response, StatusCode};
use serde_json::Value;

use crate::daemon::{Api, Options, TestDaemon};
use crate::postgres::Postgres;

/// Where a daemon keeps its data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Engine {
    Sqlite,
    Postgres,
}

/// A daemon and its database.
pub struct Stage {
    pub daemon: TestDaemon,
    engine: Engine,
    url: String,
}

#[derive(QueryableByName)]
struct Line {
    #[diesel(sql_type = Text)]
    t: String,
}

/// A configuration for `lacre serve`: `top` before all sections, `more` after them.
pub fn config(top: &str, more: &str) -> String {
    format!(
        "data_dir = \"{{dir}}\"\n{top}\n[server]\nlisten = \"127.0.0.1:{{port}}\"\n[seal.pkcs11]\n\
         module = \"{{module}}\"\ntoken = \"lacre-dev\"\npin_source = \"file:{{pin}}\"\n{more}\n"
    )
}

impl Stage {
    /// A daemon on a fresh database, with further lines of configuration.
    pub async fn on(engine: Engine, more: &str) -> Self {
        let url = match engine {
            Engine::Sqlite => String::new(),
            Engine::Postgres => Postgres::shared().database(),
        };
        let database = match engine {
            Engine::Sqlite => String::new(),
            Engine::Postgres => format!("[database]\nurl = \"{url}\"\n"),
        };
        // As `lacre dev` has it: a new key signs within seconds.
        let keys = if more.contains("[keys]") { "" } else { "[keys]\npropagation = \"2s\"\nskew = \"0s\"\n" };
        let text = config("", &format!("{database}{keys}{more}"));
        let daemon = TestDaemon::start(Options { config: Some(text), ..Options::default() }).await;
        Self { daemon, engine, url }
    }

    /// A daemon that runs already, on the database at `url`.
    pub const fn of(daemon: TestDaemon, engine: Engine, url: String) -> Self {
        Self { daemon, engine, url }
    }

    /// Changes rows behind the daemon's back.
    pub fn run(&self, sql: &str) {
        let done = match self.engine {
            Engine::Sqlite => diesel::sql_query(sql).execute(&mut self.sqlite()),
            Engine::Postgres => diesel::sql_query(sql).execute(&mut self.postgres()),
        };
        done.unwrap_or_else(|error| panic!("{sql}: {error}"));
    }

    /// The texts that a query selects as `t`.
    pub fn texts(&self, sql: &str) -> Vec<String> {
        let lines: QueryResult<Vec<Line>> = match self.engine {
            Engine::Sqlite => diesel::sql_query(sql).load(&mut self.sqlite()),
            Engine::Postgres => diesel::sql_query(sql).load(&mut self.postgres()),
        };
        lines.unwrap_or_else(|error| panic!("{sql}: {error}")).into_iter().map(|line| line.t).collect()
    }

    /// An expression for a column's bytes in lower-case hex.
    pub fn hex(&self, column: &str) -> String {
        match self.engine {
            Engine::Sqlite => format!("lower(hex({column}))"),
            Engine::Postgres => format!("encode({column}, 'hex')"),
        }
    }

    /// A literal of bytes.
    pub fn bytes(&self, hex: &str) -> String {
        match self.engine {
            Engine::Sqlite => format!("X'{hex}'"),
            Engine::Postgres => format!("decode('{hex}', 'hex')"),
        }
    }

    fn sqlite(&self) -> SqliteConnection {
        let mut conn = SqliteConnection::establish(self.daemon.database().to_str().unwrap()).unwrap();
        for pragma in ["busy_timeout = 5000", "foreign_keys = OFF"] {
            diesel::sql_query(format!("PRAGMA {pragma}")).execute(&mut conn).unwrap();
        }
        conn
    }

    fn postgres(&self) -> PgConnection {
        PgConnection::establish(&self.url).unwrap()
    }
}

/// The id of a new secret.
pub async fn stored(api: &Api, name: &str, value: &str) -> String {
    api.create(name, value).await["id"].as_str().unwrap().to_owned()
}

/// Checks an answer against the family's error format; the whole body.
pub async fn problem(answer: Response, status: u16, code: &str) -> Value {
    let (now, headers) = (answer.status(), answer.headers().clone());
    let text = answer.text().await.unwrap();
    assert_eq!(now, StatusCode::from_u16(status).unwrap(), "{code} expected: {text}");
    assert_eq!(headers["Content-Type"], "application/problem+json", "{text}");
    assert_eq!(headers["Cache-Control"], "no-store");
    let body: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(
        (body["code"].as_str(), body["status"].as_u64()),
        (Some(code), Some(u64::from(status))),
        "{body}"
    );
    assert_eq!(body["type"], format!("urn:lacre:problem:{code}"));
    assert_eq!(body["request_id"], headers["X-Request-Id"].to_str().unwrap());
    assert!(body["title"].is_string() && body["retryable"].is_boolean(), "{body}");
    assert!(status < 500 || body.get("detail").is_none(), "a 5xx explains itself: {body}");
    assert_eq!(headers.contains_key("Retry-After"), status == 503 || status == 429, "{body}");
    body
}

/// One test on both engines.
macro_rules! on_both {
    ($name:ident, $scenario:ident) => {
        mod $name {
            #[tokio::test]
            async fn on_sqlite() {
                super::$scenario(crate::stage::Engine::Sqlite).await;
            }

            #[tokio::test]
            async fn on_postgresql() {
                super::$scenario(crate::stage::Engine::Postgres).await;
            }
        }
    };
}
pub(crate) use on_both;
