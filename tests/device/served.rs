//! `lacre serve` over the shim over SoftHSM, and what it costs: calls per operation.

use std::path::Path;

use reqwest::{Response, StatusCode};
use serde_json::Value;

use crate::daemon::{Api, Options, TestDaemon};
use crate::shim::{ShimControl, shim_path};
use crate::softhsm;

/// A configuration for `lacre serve` over `module`, `seal` being further lines of `[seal]`.
pub fn config(module: &Path, seal: &str) -> String {
    let module = module.display();
    format!(
        "data_dir = \"{{dir}}\"\n[server]\nlisten = \"127.0.0.1:0\"\n[seal]\n{seal}\n[seal.pkcs11]\n\
         module = \"{module}\"\ntoken = \"lacre-dev\"\npin_source = \"file:{{pin}}\"\n"
    )
}

/// A daemon over the shim, ready, and the shim's rules.
pub async fn served(seal: &str) -> (TestDaemon, ShimControl) {
    let control = ShimControl::new(&softhsm::module());
    let daemon = TestDaemon::start(over(&control, seal)).await;
    (daemon, control)
}

/// The same with the module in the daemon itself, as `[sealer] mode = "thread"` has it.
pub async fn served_in_threads() -> (TestDaemon, ShimControl) {
    let control = ShimControl::new(&softhsm::module());
    let mut options = over(&control, "");
    let config = options.config.take().unwrap();
    options.config = Some(format!("{config}[sealer]\nmode = \"thread\"\n"));
    (TestDaemon::start(options).await, control)
}

/// Options for [`TestDaemon::start`] over the shim.
pub fn over(control: &ShimControl, seal: &str) -> Options {
    let env = control.env().map(|(name, path)| (name.to_owned(), path.to_str().unwrap().to_owned()));
    Options { env: env.to_vec(), config: Some(config(&shim_path(), seal)), ..Options::default() }
}

/// The path of a secret's value.
pub fn value_path(id: &str) -> String {
    format!("/v1/secrets/{id}/value")
}

/// The id of a new secret that holds `value`.
pub async fn stored(api: &Api, name: &str, value: &str) -> String {
    api.create(name, value).await["id"].as_str().unwrap().to_owned()
}

/// Checks that an answer is a 503 of the native API with that code, which says when to come back and
/// nothing about the inside; the whole body.
pub async fn refused_for_now(answer: Response, code: &str) -> Value {
    assert_eq!(answer.status(), StatusCode::SERVICE_UNAVAILABLE);
    assert!(answer.headers().contains_key("Retry-After"), "no Retry-After");
    assert_eq!(answer.headers()["Content-Type"], "application/problem+json");
    let body: Value = answer.json().await.unwrap();
    assert_eq!(body["code"], code, "{body}");
    assert!(body.get("detail").is_none(), "a 5xx explains itself: {body}");
    body
}

#[tokio::test]
async fn an_operation_costs_one_init_and_one_call_and_never_a_search() {
    const N: u64 = 50;
    let (daemon, control) = served("deadline = \"5s\"").await;
    let api = daemon.api().await;
    let value = daemon.secret("counted");
    let id = stored(&api, "counted", &value).await;
    assert_eq!(api.value(&id).await, value);

    let before = control.counts();
    for _ in 0..N {
        assert_eq!(api.value(&id).await, value);
        daemon.token("all").await;
    }
    let after = control.counts();

    let calls = |name: &str| after[name] - before[name];
    for (name, expected) in [("C_DecryptInit", N), ("C_Decrypt", N), ("C_SignInit", N), ("C_Sign", N)] {
        // The probe of the device and the minute's look at the keys may fall in between.
        assert!((expected..expected + 8).contains(&calls(name)), "{name}: {}", calls(name));
    }
    assert!(calls("C_FindObjectsInit") <= 8, "{} searches", calls("C_FindObjectsInit"));
    assert_eq!(calls("C_OpenSession"), 0);
    assert_eq!(calls("C_Login"), 0);
    assert_eq!(after["bad_gcm_params"], 0, "a tag other than 128 bits, an IV other than 12 bytes, or no AAD");
    daemon.finish().await;
}
