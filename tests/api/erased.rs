//! A deletion is real: the sealed bytes are gone from SQLite's files (ME-2), and what was pushed out too.

use std::fs;
use std::time::{Duration, Instant};

use reqwest::StatusCode;

use crate::daemon::contains;
use crate::stage::{Engine, Stage, stored};

fn in_files(stage: &Stage, bytes: &[u8]) -> bool {
    ["", "-wal", "-shm"].iter().any(|ending| {
        let path = format!("{}{ending}", stage.daemon.database().display());
        fs::read(path).is_ok_and(|file| contains(&file, bytes))
    })
}

#[tokio::test]
async fn deleted_and_pushed_out_values_are_gone_from_the_files() {
    let stage = Stage::on(Engine::Sqlite, "").await;
    let api = stage.daemon.api().await;
    let long = |name: &str| format!("{}{}", stage.daemon.secret(name), "y".repeat(9000));
    let deleted = stored(&api, "deleted", &long("deleted")).await;
    let replaced = stored(&api, "replaced", &long("replaced")).await;
    let sealed = |id: &str| {
        let hex = stage.hex("ciphertext");
        let text = stage.texts(&format!(
            "SELECT {hex} AS t FROM secret_versions WHERE secret_id = '{id}' AND version = 1"
        ));
        let bytes = hex::decode(&text[0]).unwrap();
        // The middle and the end: a value this long has overflow pages of its own.
        [bytes[2000..2032].to_vec(), bytes[bytes.len() - 32..].to_vec()]
    };
    let parts = [sealed(&deleted), sealed(&replaced)].concat();
    assert!(parts.iter().all(|part| in_files(&stage, part)), "the search finds nothing");

    assert_eq!(api.delete(&format!("/v1/secrets/{deleted}")).await.status(), StatusCode::NO_CONTENT);
    for version in 2..=11 {
        api.replace(&replaced, &format!("{version}")).await.error_for_status().unwrap();
    }

    let began = Instant::now();
    while parts.iter().any(|part| in_files(&stage, part)) {
        assert!(began.elapsed() < Duration::from_secs(5), "deleted bytes are still in the files");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    stage.daemon.finish().await;
}
