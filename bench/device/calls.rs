//! PKCS#11 calls per operation, counted by the shim: one init and one call, and nothing else.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use super::{IN_FLIGHT, Operation, Stage, support};

const OPERATIONS: usize = 2048;

pub async fn run() {
    let stage = Arc::new(Stage::new().await);
    let cases = [
        ("ES256 signature", Operation::Sign),
        ("HMAC-SHA256", Operation::Mac),
        ("DEK open", Operation::Open),
    ];
    let mut rows = Vec::new();
    for (name, operation) in cases {
        burst(&stage, operation, IN_FLIGHT).await;
        let before = counts();
        burst(&stage, operation, OPERATIONS).await;
        let after = counts();
        let calls = after.iter().filter_map(|(function, count)| {
            let more = count - before.get(function).copied().unwrap_or(0);
            (more > 0).then(|| format!("{function} {:.3}", per_operation(more)))
        });
        let calls: Vec<_> = calls.collect();
        let more = |function: &str| after[function] - before.get(function).copied().unwrap_or(0);
        let [find, open] =
            ["C_FindObjects", "C_OpenSession"].map(|name| format!("{:.3}", per_operation(more(name))));
        rows.push(vec![name.to_owned(), calls.join(", "), find, open]);
    }
    let head = ["operation", "calls per operation", "C_FindObjects", "C_OpenSession"];
    support::print_table(
        "PKCS#11 calls per operation (target: one init, one call, no search, no session)",
        &head,
        &rows,
    );
    stage.device.close();
}

#[expect(clippy::cast_precision_loss, reason = "a few thousand")]
fn per_operation(calls: u64) -> f64 {
    calls as f64 / OPERATIONS as f64
}

async fn burst(stage: &Arc<Stage>, operation: Operation, operations: usize) {
    let tasks: Vec<_> = (0..IN_FLIGHT)
        .map(|_| {
            let stage = stage.clone();
            tokio::spawn(async move {
                for _ in 0..operations / IN_FLIGHT {
                    operation.run(&stage).await;
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
}

/// The parent made the file; see `tests/backend/shim/README.md` for what is in it.
fn counts() -> BTreeMap<String, u64> {
    let path = std::env::var_os("LACRE_SHIM_COUNTS").map(PathBuf::from).unwrap();
    super::shim::read_counts(&path)
}
