//! Two devices in one process: two tokens of one module, which is initialised once for both, and two modules.

use std::collections::BTreeMap;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use lacre::seal::guarded::Options;
use lacre::seal::{
    Alg, Arena, DeviceName, DeviceState, Devices, Kek, KeyRef, KeySpec, SealError, SealerConfig, SealerMode,
    StartError, Surroundings,
};
use serde_json::json;

use crate::raw::{Module, Session};
use crate::shim::shim_path;
use crate::stage::{HERE, Stage, kek_of, stage};

fn name(text: &str) -> DeviceName {
    DeviceName::parse(text).unwrap()
}

/// Starts `default` on the stage's token and `b` on another token, both of `module`s given.
pub fn start(stage: &Stage, modules: [&std::path::Path; 2], second: &str) -> Devices {
    try_start(stage, modules, second, None).unwrap()
}

/// The same; `parameters` are what the second device wants its module to be initialised with.
fn try_start(
    stage: &Stage,
    modules: [&std::path::Path; 2],
    second: &str,
    parameters: Option<&str>,
) -> Result<Devices, StartError> {
    let config = |module: &std::path::Path, token: &str, parameters: Option<&str>| {
        serde_json::from_value(json!({ "latch_dir": stage.token.dir.join("latch"), "pkcs11": {
            "module": module, "token": token, "init_parameters": parameters,
            "pin_source": format!("file:{}", stage.token.pin_file.display()),
        }}))
        .unwrap()
    };
    let configs = BTreeMap::from([
        (DeviceName::default(), config(modules[0], &stage.token.label, None)),
        (name("b"), config(modules[1], second, parameters)),
    ]);
    let options = Options { slots: 64, allow_unlocked: true, ..Options::default() };
    let arena = Arena::new(&options).unwrap();
    let surroundings = Surroundings::new(&options, "info", false);
    Devices::start(
        &configs,
        &SealerConfig { mode: SealerMode::Thread, ..SealerConfig::default() },
        &surroundings,
        &arena,
    )
}

/// A second token beside the stage's, made once.
pub fn second(stage: &Stage) -> &'static str {
    static MADE: OnceLock<()> = OnceLock::new();
    MADE.get_or_init(|| drop(stage.token.add_token("second")));
    "second"
}

pub async fn kek(devices: &Devices, device: &str) -> Kek {
    let planned = KeyRef::plan(KeySpec::Kek).unwrap().on(name(device));
    kek_of(devices.admin.generate(&planned).await.unwrap())
}

async fn round_trip(devices: &Devices, kek: &Kek) -> Result<(), SealError> {
    let sealed = devices.sealer.seal(kek, &HERE, b"value").await?;
    let opened = devices.sealer.open(kek, &HERE, &sealed).await?;
    opened.with(|value| assert_eq!(value, b"value"));
    Ok(())
}

/// A session of somebody else: it can only be opened while the library is initialised.
fn probe(label: &str) -> Session {
    let module = Module::load(&shim_path());
    module.session(module.slot(label).unwrap()).unwrap()
}

#[tokio::test]
async fn two_tokens_of_one_module_are_used_side_by_side() {
    let stage = stage().await;
    let shim = shim_path();
    let devices = start(&stage, [&shim, &shim], second(&stage));
    let initialised = stage.control.count("C_Initialize");

    let (a, b) = (kek(&devices, "default").await, kek(&devices, "b").await);
    let signer = KeyRef::plan(KeySpec::EcP256).unwrap().on(name("b"));
    let signer = devices.admin.generate(&signer).await.unwrap();
    devices.sealer.sign(&signer, Alg::Es256, b"text").await.unwrap();
    for kek in [&a, &b] {
        round_trip(&devices, kek).await.unwrap();
    }
    // From one to the other, and only then does it open there.
    let sealed = devices.sealer.seal(&a, &HERE, b"moved").await.unwrap();
    let later = Kek { id: a.id, version: 2, key: b.key.clone() };
    let moved = devices.sealer.rewrap(&a, &later, &HERE, sealed.key()).await.unwrap();
    let back = devices.sealer.rewrap(&later, &a, &HERE, &moved).await.unwrap();
    assert!(back.kek_version() == 1 && moved.kek_version() == 2);
    // Each key is on its own token and on no other.
    let (here, there) = (stage.objects(&a.key.id().to_string()), stage.objects(&b.key.id().to_string()));
    assert!(!here.is_empty() && there.is_empty());
    let elsewhere = a.key.clone().on(name("b"));
    assert!(matches!(devices.admin.inspect(&elsewhere).await, Err(SealError::KeyMissing { .. })));
    let nowhere = a.key.clone().on(name("c"));
    assert!(matches!(devices.admin.inspect(&nowhere).await, Err(SealError::NoDevice { .. })));
    assert_eq!(stage.control.count("C_Initialize"), initialised, "once for both");
    devices.close();
}

#[tokio::test]
async fn a_token_that_is_closed_leaves_its_module_to_the_other() {
    let stage = stage().await;
    let shim = shim_path();
    let devices = start(&stage, [&shim, &shim], second(&stage));
    let (a, b) = (kek(&devices, "default").await, kek(&devices, "b").await);
    round_trip(&devices, &b).await.unwrap();

    let finalised = stage.control.count("C_Finalize");
    devices.iter().find(|device| device.name() == &name("b")).unwrap().close();
    assert_eq!(stage.control.count("C_Finalize"), finalised);
    for _ in 0..20 {
        round_trip(&devices, &a).await.unwrap();
    }
    drop(probe(&stage.token.label));
    devices.close();
    assert_eq!(stage.control.count("C_Finalize"), finalised + 1, "with the last one");
}

#[tokio::test]
async fn a_token_that_is_not_there_yet_disturbs_nobody_for_long_and_is_found() {
    let stage = stage().await;
    let shim = shim_path();
    let devices = start(&stage, [&shim, &shim], "late");
    assert!(matches!(devices.state(&name("b")), Some(DeviceState::Away(_))));
    let a = kek(&devices, "default").await;

    // While both are new its probes have the module initialised again, below the other one's calls.
    let (began, finalised) = (Instant::now(), stage.control.count("C_Finalize"));
    let mut rounds = 0;
    while began.elapsed() < Duration::from_secs(6) {
        round_trip(&devices, &a).await.unwrap();
        rounds += 1;
    }
    let disturbed = stage.control.count("C_Finalize") - finalised;
    assert!(disturbed >= 1 && rounds > 50, "{disturbed} in {rounds}");
    assert_eq!(devices.state(&DeviceName::default()), Some(DeviceState::Ready));

    // From when the other one has been well for a while it is left alone.
    tokio::time::sleep(Duration::from_secs(6)).await;
    let finalised = stage.control.count("C_Finalize");
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert_eq!(stage.control.count("C_Finalize"), finalised);

    // SoftHSM finds new tokens when it is initialised: at the next turn, half a minute after the last.
    stage.token.add_token("late");
    let began = Instant::now();
    while devices.state(&name("b")) != Some(DeviceState::Ready) {
        assert!(began.elapsed() < Duration::from_secs(60), "{:?}", devices.status());
        round_trip(&devices, &a).await.unwrap();
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let b = kek(&devices, "b").await;
    round_trip(&devices, &b).await.unwrap();
    round_trip(&devices, &a).await.unwrap();
    devices.close();
}

#[tokio::test]
async fn two_modules_are_driven_at_once_and_one_that_fails_leaves_the_other_alone() {
    let stage = stage().await;
    // The shim loads SoftHSM itself: a copy is another library to the loader.
    let direct = stage.token.dir.join("direct.so");
    if !direct.exists() {
        std::fs::copy(&stage.token.module, &direct).unwrap();
    }
    let shim = shim_path();
    let devices = start(&stage, [&shim, &direct], second(&stage));
    let (a, b) = (kek(&devices, "default").await, kek(&devices, "b").await);
    round_trip(&devices, &a).await.unwrap();
    round_trip(&devices, &b).await.unwrap();

    stage.control.set_rules("C_Encrypt * return:0x30\nC_OpenSession * return:0x30");
    let refused = round_trip(&devices, &a).await;
    assert!(matches!(refused, Err(SealError::Unavailable { .. })), "{refused:?}");
    // Through all steps of the first one's recovery.
    let began = Instant::now();
    while began.elapsed() < Duration::from_secs(4) {
        round_trip(&devices, &b).await.unwrap();
    }
    assert!(matches!(devices.state(&DeviceName::default()), Some(DeviceState::Away(_))));
    assert_eq!(devices.state(&name("b")), Some(DeviceState::Ready));
    stage.control.set_rules("");
    let began = Instant::now();
    while round_trip(&devices, &a).await.is_err() {
        assert!(began.elapsed() < Duration::from_secs(10), "{:?}", devices.status());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    devices.close();
}

#[tokio::test]
async fn a_device_that_hangs_takes_no_guarded_memory_from_the_other() {
    let stage = stage().await;
    let shim = shim_path();
    let devices = start(&stage, [&shim, &shim], second(&stage));
    let (a, b) = (kek(&devices, "default").await, kek(&devices, "b").await);
    let mac = KeyRef::plan(KeySpec::HmacSha256).unwrap().on(name("b"));
    let mac = devices.admin.generate(&mac).await.unwrap();
    round_trip(&devices, &b).await.unwrap();

    // More calls than there are slots, all of which hang in the first device.
    stage.control.set_rules("C_EncryptInit 1 hang");
    let calls: Vec<_> = (0..100)
        .map(|_| {
            let (sealer, a) = (devices.sealer.clone(), a.clone());
            tokio::spawn(async move { sealer.seal(&a, &HERE, b"value").await.map(drop) })
        })
        .collect();
    tokio::time::sleep(Duration::from_millis(300)).await;
    for _ in 0..20 {
        let began = Instant::now();
        devices.sealer.mac(&mac, b"text").await.unwrap();
        round_trip(&devices, &b).await.unwrap();
        assert!(began.elapsed() < Duration::from_secs(1), "{:?}", began.elapsed());
    }
    stage.control.set_rules("");
    for call in calls {
        let _ = call.await.unwrap();
    }
    devices.close();
}

#[tokio::test]
async fn two_tokens_of_one_module_cannot_want_it_initialised_differently() {
    let stage = stage().await;
    let shim = shim_path();
    let result = try_start(&stage, [&shim, &shim], second(&stage), Some("configdir='sql:/elsewhere'"));
    let Err(StartError::Module { reason, .. }) = result else { panic!("started, or failed otherwise") };
    assert!(reason.contains("init_parameters"), "{reason}");
}
