//! Faults and load at the level of the [`Sealer`], in this process.

use std::fs;
use std::sync::Arc;
use std::time::{Duration, Instant};

use lacre::seal::{Alg, DeviceState, KeySpec, SealError};
use serde_json::json;

use crate::stage::{HERE, Stage, stage};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn five_hundred_openings_share_sixteen_slots_without_a_deadlock() {
    let stage = stage().await;
    let device = Arc::new(stage.try_start(json!({}), json!({}), 16).unwrap());
    let kek = device.kek().await;
    let sealed = Arc::new(device.sealer.seal(&kek, &HERE, b"value").await.unwrap());

    let (mut done, mut busy) = (0, 0);
    let mut calls = tokio::task::JoinSet::new();
    for _ in 0..500 {
        let (sealer, kek, sealed) = (device.sealer.clone(), kek.clone(), Arc::clone(&sealed));
        calls.spawn(async move { sealer.open(&kek, &HERE, &sealed).await.map(|opened| opened.len()) });
    }
    while let Some(answer) = calls.join_next().await {
        match answer.unwrap() {
            Ok(5) => done += 1,
            Err(SealError::Busy { .. }) => busy += 1,
            other => panic!("{other:?}"),
        }
    }
    println!("{done} opened, {busy} busy");
    assert_eq!(done + busy, 500);
    assert!(done >= 8);
    // Every slot came back.
    let status = device.arena.status();
    assert_eq!(status.free, status.slots);
    device.sealer.open(&kek, &HERE, &sealed).await.unwrap();
}

#[tokio::test]
async fn a_device_that_opens_nothing_is_away_and_the_values_are_not_blamed() {
    let stage = stage().await;
    let device = stage.start();
    let kek = device.kek().await;
    let sealed = device.sealer.seal(&kek, &HERE, b"value").await.unwrap();
    device.sealer.open(&kek, &HERE, &sealed).await.unwrap();

    // CKR_GENERAL_ERROR: what SoftHSM says of altered bytes, and of everything while it is ill.
    stage.control.set_rules("C_Decrypt * return:0x5");
    let answer = device.sealer.open(&kek, &HERE, &sealed).await;
    assert!(matches!(answer, Err(SealError::Unavailable { .. })), "{:?}", answer.err());
    assert!(matches!(device.status().state, DeviceState::Away(_)));

    // Answered at once by the breaker, and not closed by probes that fail the same way.
    tokio::time::sleep(Duration::from_secs(1)).await;
    let (calls, began) = (stage.control.count("C_DecryptInit"), Instant::now());
    for _ in 0..100 {
        assert!(
            device.sealer.open(&kek, &HERE, &sealed).await.is_err_and(|error| error.retry_after().is_some())
        );
    }
    assert!(began.elapsed() < Duration::from_millis(500));
    assert!(stage.control.count("C_DecryptInit") - calls < 20, "the breaker lets requests through");

    stage.control.set_rules("");
    let waited = device.ready(Duration::from_secs(10)).await;
    println!("ready again after {waited:?}");
    device.sealer.open(&kek, &HERE, &sealed).await.unwrap();
}

#[tokio::test]
async fn sessions_that_were_lost_are_replaced_with_one_login() {
    let stage = stage().await;
    let device = stage.start();
    let kek = device.kek().await;
    let signing = device.key(KeySpec::EcP256).await;
    let sealed = device.sealer.seal(&kek, &HERE, b"value").await.unwrap();
    device.sealer.sign(&signing, Alg::Es256, b"m").await.unwrap();

    let logins = stage.control.count("C_Login");
    stage.control.set_rules("C_DecryptInit 1 close-all-sessions");
    device.sealer.open(&kek, &HERE, &sealed).await.unwrap();
    device.sealer.sign(&signing, Alg::Es256, b"m").await.unwrap();
    assert_eq!(stage.control.count("C_Login"), logins + 1);
}

#[tokio::test]
async fn a_call_that_never_returns_does_not_keep_the_device_from_coming_back() {
    let stage = stage().await;
    let device = stage.try_start(json!({ "deadline": 1 }), json!({}), 64).unwrap();
    let kek = device.kek().await;
    let signing = device.key(KeySpec::EcP256).await;
    let sealed = device.sealer.seal(&kek, &HERE, b"value").await.unwrap();
    device.sealer.sign(&signing, Alg::Es256, b"m").await.unwrap();

    stage.control.set_rules("C_Sign 1 hang\nC_OpenSession * return:0x30");
    let answer = device.sealer.sign(&signing, Alg::Es256, b"m").await;
    assert!(matches!(answer, Err(SealError::Unavailable { .. })));
    device.away().await;
    // Long enough for the rounds of recovery that initialise the library again, which is not possible.
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert_eq!(device.status().stuck_threads, 1);

    stage.control.set_rules("C_Sign 1 hang");
    device.ready(Duration::from_secs(15)).await;
    assert_eq!(device.status().stuck_threads, 1);
    device.sealer.open(&kek, &HERE, &sealed).await.unwrap();

    stage.control.set_rules("");
    let until = Instant::now() + Duration::from_secs(5);
    while device.status().stuck_threads > 0 {
        assert!(Instant::now() < until, "the thread does not end");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    device.sealer.sign(&signing, Alg::Es256, b"m").await.unwrap();
}

#[tokio::test]
async fn fifty_times_away_and_back_leave_no_threads_no_sessions_and_no_memory_behind() {
    let stage = stage().await;
    let device = stage.start();
    let kek = device.kek().await;
    let sealed = device.sealer.seal(&kek, &HERE, b"value").await.unwrap();
    let mut after_ten = None;
    for round in 0..50 {
        // Ill for as long as it takes to reach the last step of recovery in some rounds.
        stage.control.set_rules("C_Decrypt * return:0x30\nC_OpenSession * return:0x30");
        assert!(device.sealer.open(&kek, &HERE, &sealed).await.is_err());
        device.away().await;
        if round % 10 == 0 {
            tokio::time::sleep(Duration::from_millis(1200)).await;
        }
        stage.control.set_rules("");
        device.ready(Duration::from_secs(10)).await;
        device.sealer.open(&kek, &HERE, &sealed).await.unwrap();
        if round == 9 {
            after_ten = Some((threads("seal-"), resident()));
        }
    }
    let (before, memory) = after_ten.unwrap();
    let grown = resident().saturating_sub(memory);
    println!("{before} threads, then {}; memory grew by {} KiB", threads("seal-"), grown >> 10);
    assert!(threads("seal-") <= before + 1);
    assert!(grown < 8 << 20, "memory grew by {grown} bytes");
    let (opened, closed) = (stage.control.count("C_OpenSession"), stage.control.count("C_CloseSession"));
    println!("{opened} sessions opened, {closed} closed, {} libraries", stage.control.count("C_Initialize"));
    let status = device.arena.status();
    assert_eq!(status.free, status.slots);
}

/// Threads of this process whose name begins so.
fn threads(name: &str) -> usize {
    let tasks = fs::read_dir("/proc/self/task").unwrap().flatten();
    tasks
        .filter(|task| fs::read_to_string(task.path().join("comm")).is_ok_and(|comm| comm.starts_with(name)))
        .count()
}

/// Resident memory in bytes.
fn resident() -> usize {
    let statm = fs::read_to_string("/proc/self/statm").unwrap();
    statm.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4096
}

/// Moves the token's files away and back.
fn move_token(stage: &Stage, away: bool) {
    let (here, there) = (stage.token.dir.join("tokens"), stage.token.dir.join("tokens.away"));
    if away { fs::rename(here, there).unwrap() } else { fs::rename(there, here).unwrap() }
}

#[tokio::test]
async fn a_device_that_is_away_at_the_start_comes_later() {
    let stage = stage().await;
    let device = stage.start();
    let kek = device.kek().await;
    let sealed = device.sealer.seal(&kek, &HERE, b"value").await.unwrap();
    drop(device);

    move_token(&stage, true);
    let device = stage.try_start(json!({}), json!({}), 64);
    move_token(&stage, false);
    let device = device.unwrap();
    assert!(matches!(device.status().state, DeviceState::Away(_)), "{:?}", device.status());
    device.ready(Duration::from_secs(10)).await;
    device.sealer.open(&kek, &HERE, &sealed).await.unwrap();
}

#[tokio::test]
async fn a_device_is_closed_while_calls_are_running() {
    let stage = stage().await;
    for _ in 0..5 {
        let device = stage.start();
        let kek = device.kek().await;
        let sealed = device.sealer.seal(&kek, &HERE, b"value").await.unwrap();
        let mut calls = tokio::task::JoinSet::new();
        for _ in 0..32 {
            let (sealer, kek, sealed) = (device.sealer.clone(), kek.clone(), sealed.clone());
            calls.spawn(async move { sealer.open(&kek, &HERE, &sealed).await.map(drop) });
        }
        tokio::task::yield_now().await;
        let sealer = device.sealer.clone();
        drop(device);
        while let Some(answer) = calls.join_next().await {
            let answer = answer.unwrap();
            assert!(answer.as_ref().is_ok_and(|()| true) || answer.is_err_and(|e| e.retry_after().is_some()));
        }
        let late = sealer.open(&kek, &HERE, &sealed).await;
        assert!(late.is_err_and(|error| error.retry_after().is_some()));
    }
}

#[tokio::test]
async fn a_thousand_lost_sessions_leave_none_behind() {
    let stage = stage().await;
    let device = stage.start();
    let kek = device.kek().await;
    let sealed = device.sealer.seal(&kek, &HERE, b"value").await.unwrap();
    let open = || stage.control.count("C_OpenSession") - stage.control.count("C_CloseSession");
    device.sealer.open(&kek, &HERE, &sealed).await.unwrap();
    let (before, opened) = (open(), stage.control.count("C_OpenSession"));
    for _ in 0..1000 {
        // The code only: the session itself is alive, so that a forgotten one would stay open.
        stage.control.set_rules("C_DecryptInit 1 return:0xB3");
        device.sealer.open(&kek, &HERE, &sealed).await.unwrap();
    }
    assert!(stage.control.count("C_OpenSession") - opened >= 1000);
    assert!(open() <= before + 1, "{} sessions are open, {before} were", open());
}

/// HS-8: turns are taken between tenants, and between the owners of signing keys.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tenant_with_many_requests_waits_behind_itself() {
    let stage = stage().await;
    let device = Arc::new(stage.try_start(json!({ "deadline": 30 }), json!({}), 512).unwrap());
    let (kek, other) = (device.kek().await, lacre::seal::Context { tenant: "u", ..HERE });
    let sealed = device.sealer.seal(&kek, &HERE, b"value").await.unwrap();
    let theirs = Arc::new(device.sealer.seal(&kek, &other, b"value").await.unwrap());
    let keys = [device.key(KeySpec::EcP256).await, device.key(KeySpec::EcP256).await];
    for key in &keys {
        device.sealer.sign(key, Alg::Es256, b"m").await.unwrap();
    }
    stage.control.set_rules("C_Decrypt * sleep:10\nC_Sign * sleep:10");

    let mut many = tokio::task::JoinSet::new();
    for number in 0..200 {
        let (device, kek, sealed, key) = (Arc::clone(&device), kek.clone(), sealed.clone(), keys[0].clone());
        many.spawn(async move {
            if number % 2 == 0 {
                device.sealer.open(&kek, &HERE, &sealed).await.map(drop).unwrap();
            } else {
                device.sealer.sign(&key, Alg::Es256, b"m").await.map(drop).unwrap();
            }
        });
    }
    // All of them queued.
    tokio::time::sleep(Duration::from_millis(100)).await;
    let began = Instant::now();
    for _ in 0..5 {
        device.sealer.open(&kek, &other, &theirs).await.unwrap();
        device.sealer.sign(&keys[1], Alg::Es256, b"m").await.unwrap();
    }
    let few = began.elapsed();
    let left = many.len() - std::iter::from_fn(|| many.try_join_next()).count();
    println!("ten requests of the other tenant took {few:?}, {left} of 200 were left");
    assert!(left >= 100, "it waited behind {} of another tenant", 200 - left);
    many.join_all().await;
}
