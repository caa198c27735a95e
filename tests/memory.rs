//! Guarded memory and the hardened process, seen from outside: what a taker gets, what another
//! process, a core dump or a forked child sees, and when a start is refused.
//!
//! What must not compile is in `src/seal/guarded/misuse.rs`.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stdout,
    clippy::disallowed_methods,
    clippy::disallowed_types,
    unreachable_pub,
    reason = "a test fails by panicking"
)]

#[path = "memory/probe.rs"]
mod probe;
#[path = "memory/roles.rs"]
mod roles;

use std::os::unix::process::ExitStatusExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use lacre::seal::guarded::{Mode, Options};
use lacre::seal::{Arena, SealError, SecretBuf};
use zeroize::Zeroize;

const MAX: usize = (1 << 20) + (64 << 10);

#[test]
#[ignore = "not a test: what this binary does when a test starts it as another process"]
fn role() {
    roles::play();
}

fn options(slots: usize) -> Options {
    Options { slots, large_bytes: 4 << 20, wait: Duration::from_millis(50), ..Options::default() }
}

fn arena(slots: usize) -> Arena {
    Arena::new(&options(slots)).unwrap()
}

fn is_busy(taken: &Result<SecretBuf, SealError>) -> bool {
    matches!(taken, Err(SealError::Busy { what: "guarded memory", retry_after }) if *retry_after == Duration::from_secs(1))
}

fn filled(mut buf: SecretBuf) -> SecretBuf {
    buf.with_mut(|bytes| bytes.fill(0xA5));
    buf
}

#[test]
fn a_buffer_is_zeroed_and_has_the_length_asked_for() {
    let arena = arena(4);

    for len in [0, 1, 32, 4096, 4097, MAX] {
        let buf = arena.try_take(len).unwrap();
        assert_eq!(buf.len(), len);
        assert!(buf.with(|bytes| bytes.len() == len && bytes.iter().all(|byte| *byte == 0)));
    }
}

#[test]
fn nobody_gets_the_bytes_of_the_one_before() {
    let arena = arena(2);
    drop(filled(arena.try_take(4096).unwrap()));

    let (first, second) = (arena.try_take(4096).unwrap(), arena.try_take(4096).unwrap());

    assert!(first.with(|bytes| bytes.iter().all(|byte| *byte == 0)));
    assert!(second.with(|bytes| bytes.iter().all(|byte| *byte == 0)));
}

#[test]
fn a_panic_while_the_bytes_are_in_use_wipes_them_and_gives_the_slot_back() {
    let arena = arena(1);
    let mut buf = arena.try_take(32).unwrap();

    let unwound = catch_unwind(AssertUnwindSafe(move || {
        buf.with_mut(|bytes| {
            bytes.fill(0xA5);
            panic!("a handler fails");
        });
    }));

    assert!(unwound.is_err());
    assert_eq!(arena.status().free, 1);
    assert!(arena.try_take(4096).unwrap().with(|bytes| bytes.iter().all(|byte| *byte == 0)));
}

#[test]
fn a_forgotten_buffer_costs_its_slot_and_shows_it_to_nobody() {
    let arena = arena(1);

    std::mem::forget(filled(arena.try_take(32).unwrap()));

    assert!(is_busy(&arena.try_take(32)));
    assert_eq!(arena.status().free, 0);
}

#[test]
fn buffers_outlive_the_last_handle_of_their_arena() {
    let arena = arena(1);
    let (slot, large) = (filled(arena.try_take(32).unwrap()), filled(arena.try_take(MAX).unwrap()));

    drop(arena);

    assert!(slot.with(|bytes| bytes.iter().all(|byte| *byte == 0xA5)));
    assert!(large.with(|bytes| bytes.iter().all(|byte| *byte == 0xA5)));
}

#[tokio::test]
async fn random_bytes_fill_the_buffer() {
    let arena = arena(2);

    let (one, other) = (arena.random(32).await.unwrap(), arena.random(32).await.unwrap());

    assert!(one.with(|one| other.with(|other| one != other)));
    assert!(one.with(|bytes| bytes.iter().any(|byte| *byte != 0)));
}

#[tokio::test]
async fn an_empty_pool_makes_takers_wait_and_then_sends_them_away() {
    let arena = arena(1);
    let _held = arena.try_take(32).unwrap();
    let begin = std::time::Instant::now();

    let refused = arena.take(32).await;

    assert!(is_busy(&refused));
    assert!(begin.elapsed() >= Duration::from_millis(50));
}

#[tokio::test]
async fn a_waiting_taker_gets_the_slot_that_comes_back() {
    let arena = Arena::new(&Options { wait: Duration::from_secs(30), ..options(1) }).unwrap();
    let held = filled(arena.try_take(32).unwrap());
    let waiting = tokio::spawn({
        let arena = arena.clone();
        async move { arena.take(32).await }
    });
    tokio::task::yield_now().await;

    drop(held);

    let buf = waiting.await.unwrap().unwrap();
    assert!(buf.with(|bytes| bytes.iter().all(|byte| *byte == 0)));
}

#[tokio::test]
async fn a_taker_that_gives_up_takes_nothing_with_it() {
    let arena = arena(1);
    let held = arena.try_take(32).unwrap();
    let gave_up = tokio::time::timeout(Duration::from_millis(5), arena.take(32)).await;

    drop(held);

    assert!(gave_up.is_err());
    assert!(arena.try_take(32).is_ok());
}

#[test]
fn many_threads_never_see_each_others_bytes() {
    let arena = arena(3);

    std::thread::scope(|threads| {
        for mark in 1..=4_u8 {
            let arena = arena.clone();
            threads.spawn(move || {
                for _ in 0..20_000 {
                    let Ok(mut buf) = arena.try_take(64) else { continue };
                    assert!(buf.with(|bytes| bytes.iter().all(|byte| *byte == 0)));
                    buf.with_mut(|bytes| bytes.fill(mark));
                    assert!(buf.with(|bytes| bytes.iter().all(|byte| *byte == mark)));
                }
            });
        }
    });

    assert_eq!(arena.status().free, 3);
}

#[test]
fn large_buffers_are_bounded_in_number() {
    let arena = Arena::new(&Options { large_buffers: 1, ..options(1) }).unwrap();
    let held = arena.try_take(5000).unwrap();

    assert!(is_busy(&arena.try_take(5000)));
    assert_eq!((arena.status().large_in_use, arena.status().large_bytes_in_use), (1, 8192));

    drop(held);
    assert!(arena.try_take(5000).is_ok());
    assert_eq!((arena.status().large_in_use, arena.status().large_bytes_in_use), (0, 0));
}

#[tokio::test]
async fn large_buffers_are_bounded_in_bytes() {
    let arena = Arena::new(&Options { large_bytes: MAX + 4096, ..options(1) }).unwrap();
    let held = arena.try_take(MAX).unwrap();

    assert!(is_busy(&arena.take(8192).await));

    drop(held);
    assert!(arena.take(8192).await.is_ok());
}

#[tokio::test]
async fn what_could_never_fit_is_refused_at_once() {
    let arena = Arena::new(&Options { wait: Duration::from_secs(60), ..options(1) }).unwrap();

    assert!(matches!(arena.take(MAX + 1).await, Err(SealError::TooLarge { len }) if len == MAX + 1));
    assert!(matches!(arena.try_take(usize::MAX), Err(SealError::TooLarge { .. })));
}

#[test]
fn secret_memory_cannot_be_read_even_by_root_or_by_the_process_itself() {
    let arena = match Arena::new(&Options { require_secretmem: true, ..options(1) }) {
        Ok(arena) => arena,
        Err(refusal) => return eprintln!("not checked on this kernel: {refusal}"),
    };
    let (slot, large) = (filled(arena.try_take(32).unwrap()), filled(arena.try_take(5000).unwrap()));
    let heap = vec![0xA5_u8; 32];
    let me = std::process::id();

    for address in [&slot, &large].map(|buf| buf.with(|bytes| bytes.as_ptr() as usize)) {
        assert_eq!(probe::read_proc_mem(me, address, 32).unwrap_err().raw_os_error(), Some(libc::EIO));
        assert_eq!(probe::read_vm(me, address, 32).unwrap_err().raw_os_error(), Some(libc::EFAULT));
    }
    // The probes do read what is not guarded.
    assert_eq!(probe::read_proc_mem(me, heap.as_ptr() as usize, 32).unwrap(), heap);
    assert_eq!(probe::read_vm(me, heap.as_ptr() as usize, 32).unwrap(), heap);
}

#[test]
fn without_secret_memory_the_arena_is_locked_and_says_so() {
    let output = roles::run("start-without-secretmem");
    let said = roles::said(&output);

    assert!(said[0].starts_with("memfd_secret is required and this kernel does not offer it"), "{said:?}");
    assert!(said[1].contains(r#""mode":"mlock""#), "{said:?}");
    let locked: usize = said[2].split_whitespace().nth(1).unwrap().parse().unwrap();
    assert!(locked >= 1024, "{said:?}");
    for (flag, meaning) in [("lo", "locked"), ("dd", "not dumped"), ("wf", "wiped on fork")] {
        assert!(said[3].split_whitespace().any(|word| word == flag), "{meaning}: {said:?}");
    }
    let log = String::from_utf8_lossy(&output.stderr);
    assert!(log.contains("WARN") && log.contains("guarded memory is weaker than it could be"), "{log}");
}

#[test]
fn a_forked_child_gets_none_of_the_bytes() {
    let fallback = roles::said(&roles::run("fork false"));
    let present = roles::said(&roles::run("fork true"));

    assert_eq!(fallback, ["Mlock Byte(0)"]);
    assert!(present == ["MemfdSecret Nothing"] || present == fallback, "{present:?}");
}

#[test]
fn a_start_is_refused_if_the_limit_on_locked_memory_is_too_small() {
    let said = roles::said(&roles::run("start-with-limit 65536 false"));

    assert!(said[0].starts_with("cannot lock "), "{said:?}");
    assert!(said[0].contains("a limit of 65536 bytes"), "{said:?}");
    assert!(said[0].ends_with("raise LimitMEMLOCK (ulimit -l) or pass --allow-unlocked-memory"), "{said:?}");
}

#[test]
fn a_start_with_room_for_the_slots_alone_is_refused_too() {
    let said = roles::said(&roles::run("start-with-limit 1500000 false"));

    assert!(said[0].starts_with("cannot lock "), "{said:?}");
}

#[test]
fn unlocked_memory_is_used_only_if_allowed_and_announced() {
    let output = roles::run("start-with-limit 65536 true");

    assert!(roles::said(&output)[0].contains(r#""mode":"unlocked""#));
    let log = String::from_utf8_lossy(&output.stderr);
    assert!(log.contains("WARN") && log.contains("instead=Unlocked"), "{log}");
}

#[test]
fn a_smaller_limit_leaves_less_room_for_large_values_and_says_so() {
    let output = roles::run("start-with-limit 8388608 false");

    let status: serde_json::Value = serde_json::from_str(&roles::said(&output)[0]).unwrap();
    assert_ne!(status["mode"], "unlocked");
    assert_eq!(status["large_bytes"], 4 << 20);
    let log = String::from_utf8_lossy(&output.stderr);
    assert!(log.contains("leaves less room for large values"), "{log}");
}

#[test]
fn a_crash_leaves_no_core() {
    for how in ["abort", "segv"] {
        let place = tempfile::tempdir().unwrap();
        let crash = |hardened: bool| {
            roles::command(&format!("crash {how} {hardened}")).current_dir(&place).output().unwrap()
        };

        let hardened = crash(true);
        assert!(hardened.status.signal().is_some(), "{how}: {hardened:?}");
        assert!(!hardened.status.core_dumped(), "{how}");
        assert_eq!(std::fs::read_dir(&place).unwrap().count(), 0, "{how}");

        // Without hardening the same crash does leave one, where the system allows any.
        let open = crash(false);
        if roles::said(&open)[0] == "cores allowed" {
            assert!(open.status.core_dumped(), "{how}: {open:?}");
        }
    }
}

#[test]
fn a_read_past_a_slot_ends_in_the_guard_page() {
    let output = roles::run("crash segv true");

    assert_eq!(output.status.signal(), Some(libc::SIGSEGV), "{output:?}");
}

#[test]
fn a_hardened_process_is_closed_to_its_own_user_and_to_others() {
    let mut victim = roles::Running::start("victim");
    let address = victim.hear();
    let pid = victim.pid();
    let read_as = |uid: u32| roles::said(&roles::run(&format!("reader {uid} {pid} {address}")));
    let yama = std::fs::read_to_string("/proc/sys/kernel/yama/ptrace_scope");
    if yama.is_err() || yama.is_ok_and(|scope| scope.trim() == "0") {
        assert_eq!(read_as(probe::NOBODY), ["32 bytes", "32 bytes"], "the probe reads an open process");
    }

    victim.go_on();
    let hardening = victim.hear();

    assert!(hardening.contains(r#""dumpable":false,"core_limit":0"#), "{hardening}");
    assert_eq!(read_as(probe::NOBODY), ["PermissionDenied", "PermissionDenied"]);
    if probe::is_root() {
        assert_eq!(read_as(probe::SOMEBODY_ELSE), ["PermissionDenied", "PermissionDenied"]);
    }
}

/// Runs `work` far down the stack, where the frames of the scanner do not overwrite what it leaves.
#[inline(never)]
fn deep_in_the_stack<T>(work: impl FnOnce() -> T) -> T {
    #[expect(clippy::large_stack_arrays, reason = "that is the point")]
    let depth = [0_u8; 64 << 10];
    std::hint::black_box(&depth);
    work()
}

#[inline(never)]
fn leave_a_copy(key: &[u8]) {
    let mut copy = [0_u8; 32];
    copy.copy_from_slice(key);
    std::hint::black_box(&copy);
}

#[inline(never)]
fn seal_and_open(key: &[u8], payload: &mut SecretBuf) {
    let cipher = || LessSafeKey::new(UnboundKey::new(&AES_256_GCM, key).unwrap());
    let nonce = || Nonce::assume_unique_for_key([7; 12]);
    payload.with_mut(|bytes| {
        let len = bytes.len() - AES_256_GCM.tag_len();
        let (text, tag_place) = bytes.split_at_mut(len);
        let tag = cipher().seal_in_place_separate_tag(nonce(), Aad::from(b"context"), text).unwrap();
        tag_place.copy_from_slice(tag.as_ref());
        cipher().open_in_place(nonce(), Aad::from(b"context"), bytes).unwrap();
    });
}

#[tokio::test]
async fn sealing_and_opening_in_a_slot_leaves_no_copy_of_the_key() {
    let arena = arena(4);
    if arena.status().mode != Mode::MemfdSecret {
        return eprintln!("not checked on this kernel: the scan would find the key's own slot");
    }
    let key = arena.random(32).await.unwrap();
    let mut payload = filled(arena.try_take(2048 + AES_256_GCM.tag_len()).unwrap());

    deep_in_the_stack(|| key.with(|key| seal_and_open(key, &mut payload)));

    assert_eq!(key.with(probe::copies_in_own_memory), 0);

    // The scan does find copies: one on the heap, and one left on the stack in the same place.
    let mut copy = key.with(<[u8]>::to_vec);
    assert!(key.with(probe::copies_in_own_memory) >= 2);
    copy.zeroize();
    assert_eq!(key.with(probe::copies_in_own_memory), 0);
    deep_in_the_stack(|| key.with(leave_a_copy));
    assert!(key.with(probe::copies_in_own_memory) >= 2);
}
