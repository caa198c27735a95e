//! The daemon as its clients see it.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stdout,
    clippy::disallowed_methods,
    clippy::disallowed_types,
    unreachable_pub,
    reason = "a test fails by panicking"
)]

#[path = "support/daemon.rs"]
mod daemon;

use daemon::TestDaemon;

#[tokio::test]
async fn a_secret_survives_a_restart_byte_for_byte() {
    let mut daemon = TestDaemon::dev().await;
    let value = daemon.secret("first");
    let id = daemon.api().await.create("first", &value).await["id"].as_str().unwrap().to_owned();

    daemon.restart().await;

    assert_eq!(daemon.api().await.value(&id).await, value);
    daemon.finish().await;
}
