//! Another program's PostgreSQL database, for reading: one thread owns the one connection.
//!
//! Everything is read in one transaction, so what is read first and what is read last is of one moment, however
//! long it takes; and the server refuses every write in it. Where a standby is, that will do.

use std::sync::mpsc::{Sender, channel};

use diesel::PgConnection;
use diesel::connection::SimpleConnection;
use tokio::sync::oneshot;

use super::connect::{self, Target};
use super::lanes::spawn;
use super::{DbError, OpenError, Url};

type Query = Box<dyn FnOnce(&mut PgConnection) + Send>;

/// The database. Its connection goes with this.
pub struct Foreign(Sender<Query>);

impl Foreign {
    /// Connects and begins the transaction.
    ///
    /// # Errors
    /// [`OpenError::BadUrl`] unless it is a PostgreSQL server's, [`OpenError::Unreachable`].
    pub async fn open(url: &Url) -> Result<Self, OpenError> {
        let Target::Postgres(url) = url.target().clone() else {
            return Err(OpenError::BadUrl { reason: "it does not begin with `postgres://`".to_owned() });
        };
        let (queries, asked) = channel::<Query>();
        let (tell, told) = oneshot::channel();
        spawn("lacre-foreign", move || {
            let mut conn = match connect::postgres_foreign(&url).and_then(begun) {
                Ok(conn) => conn,
                // Nobody waits any more, or hears it.
                Err(reason) => return drop(tell.send(Err(reason))),
            };
            if tell.send(Ok(())).is_ok() {
                for query in asked {
                    query(&mut conn);
                }
            }
        })?;
        match told.await {
            Ok(Ok(())) => Ok(Self(queries)),
            Ok(Err(reason)) => Err(OpenError::Unreachable { reason }),
            Err(_) => Err(OpenError::Unreachable { reason: "its thread has ended".to_owned() }),
        }
    }

    /// Runs a query.
    ///
    /// # Errors
    /// What the server says.
    pub async fn read<T, F>(&self, query: F) -> Result<T, DbError>
    where
        T: Send + 'static,
        F: FnOnce(&mut PgConnection) -> Result<T, diesel::result::Error> + Send + 'static,
    {
        let (answer, answered) = oneshot::channel();
        let query: Query = Box::new(move |conn| drop(answer.send(query(conn))));
        self.0.send(query).map_err(|_| DbError::Unavailable(None))?;
        answered.await.map_err(|_| DbError::Unavailable(None))?.map_err(DbError::from)
    }
}

/// Its own limits could end a transaction between two questions, and this program takes its time in between.
fn begun(mut conn: PgConnection) -> Result<PgConnection, String> {
    let begin = conn.batch_execute(
        "SET default_transaction_read_only = on; SET idle_in_transaction_session_timeout = 0;
         BEGIN ISOLATION LEVEL REPEATABLE READ, READ ONLY",
    );
    begin.map(|()| conn).map_err(|error| error.to_string())
}
