//! The shim does to a real module what its rules say, and nothing else.
//!
//! All tests share one process, one token and one set of rules, so they take turns.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stdout,
    clippy::disallowed_methods,
    clippy::disallowed_types,
    unreachable_pub,
    reason = "a test fails by panicking"
)]
#![expect(unsafe_code, reason = "the environment of the test process is set once")]

use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use cryptoki::context::{CInitializeArgs, CInitializeFlags, Pkcs11};
use cryptoki::error::{Error, RvError};
use cryptoki::mechanism::Mechanism;
use cryptoki::mechanism::aead::GcmParams;
use cryptoki::object::{Attribute, AttributeType, ObjectHandle};
use cryptoki::session::{Session, UserType};
use cryptoki::slot::Slot;
use cryptoki::types::AuthPin;

#[path = "support/raw.rs"]
mod raw;
#[path = "support/shim.rs"]
mod shim;
#[path = "support/softhsm.rs"]
mod softhsm;

use shim::{ShimControl, shim_path};
use softhsm::SoftHsm;

/// SoftHSM under the shim in this process, logged in.
struct Stage {
    control: ShimControl,
    module: Pkcs11,
    slot: Slot,
    key: ObjectHandle,
    // Keeps the login: it belongs to the process as long as a session is open.
    anchor: Session,
}

fn stage() -> MutexGuard<'static, Stage> {
    static STAGE: OnceLock<Mutex<Stage>> = OnceLock::new();
    let stage = STAGE.get_or_init(|| Mutex::new(Stage::new())).lock().unwrap_or_else(PoisonError::into_inner);
    stage.control.set_rules("");
    stage
}

impl Stage {
    fn new() -> Self {
        let token = SoftHsm::in_process("shim");
        let control = ShimControl::new(&token.module);
        for (name, value) in control.env() {
            // SAFETY: as in SoftHsm::in_process; every test of this program starts in stage().
            unsafe { std::env::set_var(name, value) };
        }
        let module = Pkcs11::new(shim_path()).unwrap();
        module.initialize(CInitializeArgs::new(CInitializeFlags::OS_LOCKING_OK)).unwrap();
        let slots = module.get_slots_with_token().unwrap();
        let slot =
            slots.into_iter().find(|slot| module.get_token_info(*slot).unwrap().label() == "shim").unwrap();
        let (anchor, key) = log_in(&module, slot);
        Self { control, module, slot, key, anchor }
    }

    fn session(&self) -> Session {
        self.module.open_rw_session(self.slot).unwrap()
    }

    fn random(&self) -> Result<Vec<u8>, Error> {
        self.anchor.generate_random_vec(8)
    }
}

fn log_in(module: &Pkcs11, slot: Slot) -> (Session, ObjectHandle) {
    let session = module.open_rw_session(slot).unwrap();
    let pin = AuthPin::new(SoftHsm::in_process("shim").pin.clone().into());
    session.login(UserType::User, Some(&pin)).unwrap();
    let key = [
        Attribute::ValueLen(32.into()),
        Attribute::Token(false),
        Attribute::Encrypt(true),
        Attribute::Decrypt(true),
    ];
    let key = session.generate_key(&Mechanism::AesKeyGen, &key).unwrap();
    (session, key)
}

fn code<T>(result: Result<T, Error>) -> Option<RvError> {
    match result.err()? {
        Error::Pkcs11(code, _) => Some(code),
        _ => None,
    }
}

#[test]
fn every_call_is_counted_where_others_can_read_it() {
    let stage = stage();
    let before = stage.control.count("C_GenerateRandom");
    for _ in 0..3 {
        stage.random().unwrap();
    }
    assert_eq!(stage.control.count("C_GenerateRandom"), before + 3);
    assert_eq!(stage.control.counts().len(), 68 + 3);
}

#[test]
fn the_nth_call_fails_and_the_others_do_not() {
    let stage = stage();
    stage.control.set_rules("C_GenerateRandom 2 return:0x30");
    let fired = stage.control.count("rules_fired");
    assert!(stage.random().is_ok());
    assert_eq!(code(stage.random()), Some(RvError::DeviceError));
    assert!(stage.random().is_ok());
    assert_eq!(stage.control.count("rules_fired"), fired + 1);
}

#[test]
fn new_rules_start_counting_at_the_next_call() {
    let stage = stage();
    for _ in 0..2 {
        stage.control.set_rules("C_GenerateRandom after:1 return:0x30");
        // The thread that watches the control file must not start the counting once more.
        assert!(stage.random().is_ok());
        std::thread::sleep(Duration::from_millis(60));
        assert_eq!(code(stage.random()), Some(RvError::DeviceError));
    }
}

#[test]
fn a_failure_after_the_effect_leaves_the_effect() {
    let stage = stage();
    stage.control.set_rules("C_GenerateKey * return-after:0x30");
    let label = [Attribute::Label(b"left behind".to_vec())];
    let template = [&[Attribute::ValueLen(32.into()), Attribute::Token(false)], &label[..]].concat();
    let answer = stage.anchor.generate_key(&Mechanism::AesKeyGen, &template);
    assert_eq!(code(answer), Some(RvError::DeviceError));
    assert_eq!(stage.anchor.find_objects(&label).unwrap().len(), 1);
}

#[test]
fn a_delayed_call_takes_its_time() {
    let stage = stage();
    stage.control.set_rules("C_GenerateRandom 1 sleep:80");
    let start = Instant::now();
    stage.random().unwrap();
    assert!(start.elapsed() >= Duration::from_millis(80));
}

#[test]
fn a_hanging_call_goes_on_when_its_rule_is_gone() {
    let stage = stage();
    stage.control.set_rules("C_GetTokenInfo * hang");
    std::thread::scope(|scope| {
        let (module, slot) = (stage.module.clone(), stage.slot);
        let call = scope.spawn(move || module.get_token_info(slot).is_ok());
        std::thread::sleep(Duration::from_millis(50));
        assert!(!call.is_finished());
        stage.control.set_rules("");
        assert!(call.join().unwrap());
    });
}

#[test]
fn rules_written_by_hand_are_seen_within_a_moment() {
    let stage = stage();
    let [_, (_, control), _] = stage.control.env();
    std::fs::write(control, "# by hand\n\nC_GenerateRandom * return:0x30\n").unwrap();
    let deadline = Instant::now() + Duration::from_secs(5);
    while stage.random().is_ok() {
        assert!(Instant::now() < deadline, "the rule was never seen");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn all_sessions_can_be_lost_at_once() {
    let mut stage = stage();
    let other = stage.session();
    stage.control.set_rules("C_GenerateRandom 1 close-all-sessions");
    assert_eq!(code(stage.random()), Some(RvError::SessionHandleInvalid));
    assert_eq!(code(other.generate_random_vec(8)), Some(RvError::SessionHandleInvalid));
    let (anchor, key) = log_in(&stage.module, stage.slot);
    stage.anchor = anchor;
    stage.key = key;
}

fn seal(stage: &Stage, iv: &mut [u8], aad: &[u8]) -> Result<Vec<u8>, Error> {
    let params = GcmParams::new(iv, aad, 128.into()).unwrap();
    stage.session().encrypt(&Mechanism::AesGcm(params), stage.key, &[7; 32])
}

#[test]
fn a_device_may_make_its_own_iv() {
    let stage = stage();
    for rule in ["C_EncryptInit 1 write-iv", "C_EncryptInit 1 write-iv-late"] {
        stage.control.set_rules(rule);
        let mut iv = [0; 12];
        let sealed = seal(&stage, &mut iv, b"aad").unwrap();
        assert_ne!(iv, [0; 12], "{rule}");
        let params = GcmParams::new(&mut iv, b"aad", 128.into()).unwrap();
        let opened = stage.session().decrypt(&Mechanism::AesGcm(params), stage.key, &sealed);
        assert_eq!(opened.unwrap(), [7; 32], "{rule}");
    }
}

#[test]
fn unsafe_gcm_parameters_are_counted() {
    let stage = stage();
    let bad = || stage.control.count("bad_gcm_params");
    let before = bad();
    seal(&stage, &mut [1; 12], b"aad").unwrap();
    assert_eq!(bad(), before);
    // Refused before it reaches the module, which is known to crash without AAD.
    stage.control.set_rules("C_EncryptInit * return:0x71");
    assert!(seal(&stage, &mut [1; 12], b"").is_err());
    assert!(seal(&stage, &mut [1; 16], b"aad").is_err());
    assert_eq!(bad(), before + 2);
}

#[test]
fn outputs_can_be_shortened_and_corrupted() {
    let stage = stage();
    let whole = stage.session().digest(&Mechanism::Sha256, b"x").unwrap();
    stage.control.set_rules("C_Digest * corrupt");
    let corrupt = stage.session().digest(&Mechanism::Sha256, b"x").unwrap();
    assert_eq!((corrupt[0], &corrupt[1..]), (whole[0] ^ 1, &whole[1..]));
    stage.control.set_rules("C_Digest * zero");
    assert_eq!(stage.session().digest(&Mechanism::Sha256, b"x").unwrap(), vec![0; whole.len()]);
    stage.control.set_rules("C_Digest * short");
    assert!(stage.session().digest(&Mechanism::Sha256, b"x").unwrap().len() < whole.len());
}

#[test]
fn a_token_can_be_another_one() {
    let stage = stage();
    let flags = "C_GetTokenInfo * flags:0x60000\n";
    stage
        .control
        .set_rules(&format!("{flags}C_GetTokenInfo * serial:0123 abc\nC_GetTokenInfo * label:other"));
    let info = stage.module.get_token_info(stage.slot).unwrap();
    assert_eq!((info.serial_number(), info.label()), ("0123 abc", "other"));
    assert!(info.user_pin_final_try() && info.user_pin_locked());
}

#[test]
fn an_output_can_be_longer_than_it_is() {
    let stage = stage();
    let module = raw::Module::load(&shim_path());
    let session = module.session(stage.slot.id()).unwrap();
    let seal = || {
        let mut iv = [3; 12];
        session.gcm_seal(stage.key.handle(), &mut iv, b"aad", &[7; 32]).unwrap().len()
    };
    assert_eq!(seal(), 48);
    // The oracle cuts its buffer at the reported length, so the rule is seen where there is more room.
    let sign = |out: &mut [u8]| {
        let key = session.generate_ec(&P256).unwrap();
        session.sign(cryptoki_sys::CKM_ECDSA, key, &[1; 32], out).unwrap()
    };
    let mut out = [0; 100];
    assert_eq!(sign(&mut out), 64);
    stage.control.set_rules("C_Sign * long");
    assert_eq!(sign(&mut out), 65);
}

/// DER of the curve's object identifier.
const P256: [u8; 10] = [0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07];

#[test]
fn randomness_can_be_zero() {
    let stage = stage();
    assert_ne!(stage.random().unwrap(), [0; 8]);
    stage.control.set_rules("C_GenerateRandom * zero");
    assert_eq!(stage.random().unwrap(), [0; 8]);
}

#[test]
fn a_generator_can_be_stuck() {
    let stage = stage();
    stage.control.set_rules("C_EncryptInit * same-iv");
    let ivs = [[0; 12], [1; 12]].map(|mut iv| {
        seal(&stage, &mut iv, b"aad").unwrap();
        iv
    });
    assert_eq!(ivs[0], ivs[1]);
    assert_ne!(ivs[0], [0; 12]);
}

#[test]
fn slots_can_have_other_numbers() {
    let stage = stage();
    let before = stage.slot;
    stage.control.set_rules("C_GetSlotList * slots:1000");
    let slots = stage.module.get_slots_with_token().unwrap();
    let now = slots.into_iter().find(|slot| slot.id() == before.id() + 1000).expect("a greater number");
    assert_eq!(stage.module.get_token_info(now).unwrap().label(), "shim");
    assert_eq!(code(stage.module.get_token_info(before)), Some(RvError::SlotIdInvalid));
    let session = stage.module.open_ro_session(now).unwrap();
    assert_eq!(session.get_session_info().unwrap().slot_id(), now);
    stage.control.set_rules("");
    assert_eq!(stage.module.get_token_info(before).unwrap().label(), "shim");
}

#[test]
fn two_tokens_can_have_one_label() {
    let stage = stage();
    stage.control.set_rules("C_GetTokenInfo * label:shim");
    let slots = stage.module.get_slots_with_token().unwrap();
    let named = |slot: &Slot| stage.module.get_token_info(*slot).unwrap().label() == "shim";
    assert!(slots.len() > 1 && slots.iter().all(named));
}

#[test]
fn a_code_can_be_translated() {
    let stage = stage();
    stage.control.set_rules("C_Sign * translate:0x91=0x40");
    // Nothing was begun: CKR_OPERATION_NOT_INITIALIZED.
    let module = raw::Module::load(&shim_path());
    let session = module.session(stage.slot.id()).unwrap();
    assert_eq!(session.sign_without_init(), Err(0x40));
    stage.control.set_rules("");
    assert_eq!(session.sign_without_init(), Err(0x91));
}

#[test]
fn an_attribute_can_be_turned_over() {
    let stage = stage();
    let kinds = [AttributeType::Encrypt, AttributeType::Decrypt];
    let read = || stage.anchor.get_attributes(stage.key, &kinds).unwrap();
    assert_eq!(read(), [Attribute::Encrypt(true), Attribute::Decrypt(true)]);
    stage.control.set_rules("C_GetAttributeValue * turn:0x105");
    assert_eq!(read(), [Attribute::Encrypt(true), Attribute::Decrypt(false)]);
}
