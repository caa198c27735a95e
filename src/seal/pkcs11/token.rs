//! One token in one module: found by serial or label, logged in once, and brought back after it was away.
//!
//! Login belongs to the application, not to a session, so one idle anchor session keeps it and all
//! others find themselves logged in (PKCS #11 v3.1, section 5.6.8). Every call into the module runs
//! under the read halves of two locks: the library's, so that it is not finalised below a running
//! call, and the token's own, so that its sessions are not closed below one. Other tokens may be in
//! the same library (`library.rs`).

use std::collections::HashSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard};

use cryptoki::session::Session as RawSession;
use cryptoki::slot::Slot;

use crate::seal::StartError;
use crate::seal::backend::BackendError;
use crate::seal::driver::{Known, Problem};
use crate::seal::guarded::{Arena, SecretBuf};
use crate::seal::key::{KeyId, WrapMechanism};
use crate::seal::latch::{Held, Latch};
use crate::seal::pkcs11::error::{fail, pin_problem};
use crate::seal::pkcs11::library::{Inside, Library, Modules, brief, exclusive};
use crate::seal::pkcs11::raw::{Raw, TokenInfo};
use crate::seal::pkcs11::select::Selection;

const CKR_USER_ALREADY_LOGGED_IN: u64 = 0x100;

/// The token while it is in use.
pub(super) struct Loaded {
    /// Which initialisation of the library this belongs to.
    generation: u64,
    /// The epoch in which this began. Sessions of earlier ones were closed, or belong to a library that was
    /// finalised.
    since: u64,
    pub(super) slot: Slot,
    pub(super) info: TokenInfo,
    /// Holds the login. `None` before the first login and after it was lost.
    anchor: Mutex<Option<RawSession>>,
}

/// The token.
pub(crate) struct Token {
    pub(super) selection: Selection,
    pub(super) raw: Arc<Raw>,
    pub(super) arena: Arena,
    library: Arc<Library>,
    /// Its number among the tokens of the library.
    seat: usize,
    latch: Latch,
    loaded: RwLock<Option<Loaded>>,
    known: Mutex<Known>,
    /// What the probe chose for new KEKs; asked once.
    pub(super) wrap_choice: Mutex<Option<WrapMechanism>>,
    /// Keys that have passed their self-test since the library was initialised.
    passed: Mutex<HashSet<KeyId>>,
    /// Grows whenever sessions and handles became void.
    epoch: AtomicU64,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Token {
    /// Loads the library, or joins those who have. Initialises nothing and sends no PIN.
    pub(crate) fn load(
        selection: Selection,
        latch: Latch,
        arena: &Arena,
        modules: &Modules,
    ) -> Result<Arc<Self>, StartError> {
        let library = modules
            .load(&selection.module, selection.init_parameters.as_deref())
            .map_err(|reason| StartError::Module { path: selection.module.display().to_string(), reason })?;
        Ok(Arc::new(Self {
            selection,
            raw: Arc::clone(&library.raw),
            seat: library.seat(),
            library,
            arena: arena.clone(),
            latch,
            loaded: RwLock::new(None),
            known: Mutex::new(Known::default()),
            wrap_choice: Mutex::new(None),
            passed: Mutex::default(),
            epoch: AtomicU64::new(1),
        }))
    }

    /// The path of the library.
    pub(crate) fn module(&self) -> String {
        self.selection.module.display().to_string()
    }

    pub(crate) fn known(&self) -> Known {
        lock(&self.known).clone()
    }

    pub(crate) fn epoch(&self) -> u64 {
        self.epoch.load(Ordering::Acquire)
    }

    /// Voids every session and handle that was opened so far.
    pub(crate) fn bump_epoch(&self) {
        self.epoch.fetch_add(1, Ordering::AcqRel);
    }

    /// Enters the module for one call; an error while the token is not in use, or if the library was
    /// initialised anew since.
    pub(super) fn enter(&self) -> Result<Entered<'_>, BackendError> {
        let away = BackendError::Away { function: "C_Initialize", code: 0 };
        let Some(library) = self.library.enter() else {
            // Another token has the library initialised anew at this moment: to one that is in use that is as
            // if it had been done, and its next session waits for it.
            let in_use = self.loaded.read().unwrap_or_else(PoisonError::into_inner).is_some();
            let void = BackendError::SessionLost { function: "C_Initialize", code: 0 };
            return Err(if in_use { void } else { away });
        };
        let token = self.loaded.read().unwrap_or_else(PoisonError::into_inner);
        match token.as_ref() {
            None => Err(away),
            Some(loaded) if loaded.generation != library.generation() => {
                Err(BackendError::SessionLost { function: "C_Initialize", code: 0 })
            }
            Some(_) => Ok(Entered { token, library }),
        }
    }

    /// Initialises the library where needed, finds the token, checks its identity and logs in.
    pub(crate) fn bring_up(&self) -> Result<(), Problem> {
        self.library.note_try(self.seat);
        self.load_once()?;
        let entered = self.enter().map_err(|error| Problem::Away(error.to_string()))?;
        self.login(&entered)?;
        self.library.forget_reloads(self.seat);
        Ok(())
    }

    fn load_once(&self) -> Result<(), Problem> {
        let is_current = |loaded: &Option<Loaded>, inside: &Inside<'_>| {
            loaded.as_ref().is_some_and(|loaded| loaded.generation == inside.generation())
        };
        let inside = self.library.ensure()?;
        if is_current(&self.loaded.read().unwrap_or_else(PoisonError::into_inner), &inside) {
            return Ok(());
        }
        let mut place = exclusive(&self.loaded)?;
        if is_current(&place, &inside) {
            return Ok(());
        }
        if let Some(Loaded { anchor, .. }) = place.take() {
            self.bump_epoch();
            // Of a library that was finalised: its number may be another session's by now.
            if let Some(anchor) = anchor.into_inner().unwrap_or_else(PoisonError::into_inner) {
                std::mem::forget(anchor);
            }
        }
        match self.find(&inside) {
            Ok(loaded) => {
                *place = Some(loaded);
                self.library.take_seat(self.seat, true);
                Ok(())
            }
            Err(problem) => {
                self.library.take_seat(self.seat, false);
                drop(inside);
                // Left initialised, some modules would remember "token absent" (krill#761). Where it cannot
                // be finalised now, the next round tries again.
                let _ = self.library.finalise(self.seat, false);
                Err(problem)
            }
        }
    }

    /// The last step of recovery: finalises the library and brings everything up anew. While a call
    /// hangs inside the module, or another token in it is well, what is possible without that is done.
    pub(crate) fn reinitialise(&self) -> Result<(), Problem> {
        self.library.note_try(self.seat);
        if let Err(problem) = self.leave(self.library.may_reload(self.seat)) {
            tracing::debug!(?problem, "PKCS#11 module not initialised again");
        }
        self.bring_up()
    }

    /// Logs out by closing all sessions, and finalises the library after its last token.
    pub(crate) fn take_down(&self) -> Result<(), Problem> {
        self.leave(false)
    }

    fn leave(&self, reload: bool) -> Result<(), Problem> {
        let mut place = exclusive(&self.loaded)?;
        self.bump_epoch();
        lock(&self.passed).clear();
        if let Some(loaded) = place.take() {
            self.library.take_seat(self.seat, false);
            let anchor = loaded.anchor.into_inner().unwrap_or_else(PoisonError::into_inner);
            match self.library.enter() {
                Some(inside) if inside.generation() == loaded.generation => {
                    drop(anchor);
                    // The threads' sessions too, which finalising would close: what they hold is void from
                    // here on.
                    if self.library.is_shared(self.seat)
                        && let Err(error) = self.raw.close_all_sessions(loaded.slot.id())
                    {
                        tracing::debug!(function = error.function, code = error.code, "sessions not closed");
                    }
                }
                // As in `load_once`.
                _ => std::mem::forget(anchor),
            }
        }
        self.library.finalise(self.seat, reload).map(drop)
    }

    fn find(&self, inside: &Inside<'_>) -> Result<Loaded, Problem> {
        let (slot, info) = self.find_token(inside)?;
        let library = inside.pkcs11().get_library_info().map_or_else(
            |_| String::new(),
            |info| format!("{} {}", info.library_description().trim(), info.library_version()),
        );
        *lock(&self.known) =
            Known { library, label: info.label.clone(), serial: info.serial.clone(), notice: None };
        let (generation, since) = (inside.generation(), self.epoch());
        Ok(Loaded { generation, since, slot, info, anchor: Mutex::new(None) })
    }

    /// The one token that the selection means; slot numbers are not looked at.
    fn find_token(&self, inside: &Inside<'_>) -> Result<(Slot, TokenInfo), Problem> {
        let slots = inside
            .pkcs11()
            .get_slots_with_token()
            .map_err(|error| Problem::Away(format!("no slot list: {}", brief(&error))))?;
        let selection = &self.selection;
        let wanted = |info: &TokenInfo| {
            [
                (&selection.serial, &info.serial),
                (&selection.label, &info.label),
                (&selection.manufacturer, &info.manufacturer),
                (&selection.model, &info.model),
            ]
            .into_iter()
            .all(|(wanted, found)| wanted.as_ref().is_none_or(|wanted| wanted == found))
        };
        let mut found: Vec<_> = slots
            .into_iter()
            .filter_map(|slot| Some((slot, self.raw.token_info(slot.id()).ok()?)))
            .filter(|(_, info)| wanted(info))
            .collect();
        let name = self.selection_name();
        let (slot, info) = match (found.pop(), found.is_empty()) {
            (Some(one), true) => one,
            (Some(_), false) => {
                return Err(Problem::Stopped(format!("more than one token is {name}; choose by serial")));
            }
            (None, _) => return Err(Problem::Away(format!("no token is {name}"))),
        };
        let expected =
            self.latch.expected_serial(&name, &info.serial).map_err(|error| latch_problem(&error))?;
        if expected != info.serial {
            return Err(Problem::Stopped(format!(
                "the token that is {name} has serial {}, and {expected} was known: another token; no PIN was sent",
                info.serial
            )));
        }
        Ok((slot, info))
    }

    fn selection_name(&self) -> String {
        match (&self.selection.serial, &self.selection.label) {
            (Some(serial), Some(label)) => format!("`{label}` with serial {serial}"),
            (Some(serial), None) => format!("the one with serial {serial}"),
            (None, label) => format!("`{}`", label.as_deref().unwrap_or_default()),
        }
    }

    /// Opens a session that is logged in, or says why there is none.
    pub(super) fn open_session(self: &Arc<Self>, read_write: bool) -> Result<OwnSession, BackendError> {
        if matches!(self.enter(), Err(BackendError::SessionLost { .. })) {
            // Another token had the library initialised anew.
            self.load_once()?;
        }
        let entered = self.enter()?;
        let epoch = self.epoch();
        let session = entered.open(read_write)?;
        if !self.raw.is_user_session(session.handle())? {
            self.login(&entered)?;
        }
        Ok(OwnSession { token: Arc::clone(self), epoch, session: Some(session) })
    }

    /// Logs in unless the anchor session says that the application is logged in already. One thread
    /// at a time, so that many threads which lost their login cause one login together (HS-6).
    fn login(&self, entered: &Entered<'_>) -> Result<(), Problem> {
        let away = |error: BackendError| Problem::Away(error.to_string());
        let loaded = entered.loaded();
        let mut anchor = lock(&loaded.anchor);
        let alive =
            anchor.as_ref().is_some_and(|session| self.raw.is_user_session(session.handle()) == Ok(true));
        if alive {
            return Ok(());
        }
        let session = entered.open(false).map_err(away)?;
        if !self.raw.is_user_session(session.handle()).map_err(|error| away(error.into()))? {
            self.send_pin(loaded, &session)?;
        }
        *anchor = Some(session);
        Ok(())
    }

    /// The only place where a PIN leaves the process, at most once for each PIN that is wrong.
    fn send_pin(&self, loaded: &Loaded, session: &RawSession) -> Result<(), Problem> {
        let info = self
            .raw
            .token_info(loaded.slot.id())
            .map_err(|error| Problem::Away(error.function.to_owned()))?;
        let stopped = |reason: &str| Err(Problem::Stopped(reason.to_owned()));
        if info.serial != loaded.info.serial {
            return Err(Problem::Away("the slot holds another token now".to_owned()));
        }
        if info.pin_locked() {
            return stopped("the token says that the PIN is locked; no login was tried");
        }
        if info.pin_final_try() {
            return stopped("the token says that one more wrong PIN locks it; no login was tried");
        }
        if !info.pin_initialized() {
            return stopped("the token has no user PIN yet");
        }
        let pin =
            self.selection.read_pin(&self.arena).map_err(|error| Problem::Stopped(error.to_string()))?;
        let attempt = pin
            .with(|pin| self.latch.begin(&Self::latch_name(&info), pin))
            .map_err(|error| latch_problem(&error))?;
        let attempt = match attempt {
            Ok(attempt) => attempt,
            Err(Held::WrongPin) => {
                return stopped(
                    "this PIN was wrong before and is not sent again; correct the PIN, or run `lacre hsm unlatch --force`",
                );
            }
            Err(Held::Unfinished) => {
                return stopped(
                    "the process died inside the last logins; run `lacre hsm unlatch` to try again",
                );
            }
        };
        let result = pin.with(|pin| self.raw.login(session.handle(), pin));
        let (noted, outcome) = match result {
            Ok(()) => (attempt.succeeded(), Ok(())),
            Err(error) if error.code == CKR_USER_ALREADY_LOGGED_IN => (attempt.succeeded(), Ok(())),
            Err(error) => match pin_problem(error.code) {
                Some(text) => (attempt.wrong_pin(), stopped(text)),
                None => (attempt.undecided(), Err(Problem::Away(BackendError::from(error).to_string()))),
            },
        };
        noted.map_err(|error| latch_problem(&error))?;
        outcome
    }

    fn latch_name(info: &TokenInfo) -> String {
        format!("{}\0{}\0{}", info.manufacturer, info.serial, info.label)
    }

    /// Whether the token answers: tells "the key is gone" from "the token is gone" (F4).
    pub(super) fn is_present(&self, entered: &Entered<'_>) -> bool {
        let loaded = entered.loaded();
        self.raw.token_info(loaded.slot.id()).is_ok_and(|info| info.serial == loaded.info.serial)
    }

    /// Clears the latch for the selected token and forgets its recorded serial if `force`; sends no PIN.
    /// Whether the PIN that its source gives now may be sent.
    pub(crate) fn unlatch(&self, force: bool) -> Result<bool, String> {
        if force {
            // Another serial number had kept the token from being taken up.
            self.latch.forget_serial(&self.selection_name()).map_err(|error| error.to_string())?;
        }
        self.load_once().map_err(|(Problem::Away(reason) | Problem::Stopped(reason))| reason)?;
        let entered = self.enter().map_err(|error| error.to_string())?;
        let name = Self::latch_name(&entered.loaded().info);
        self.latch.clear(&name, force).map_err(|error| error.to_string())?;
        let pin = self.selection.read_pin(&self.arena).map_err(|error| error.to_string())?;
        Ok(!pin.with(|pin| self.latch.holds(&name, pin)).map_err(|error| error.to_string())?)
    }

    /// Whether the key has passed its self-test since the library was initialised.
    pub(super) fn has_passed(&self, key: KeyId) -> bool {
        lock(&self.passed).contains(&key)
    }

    /// Keeps the result of a key's self-test.
    pub(super) fn note_test(&self, key: KeyId, is_passed: bool) {
        let mut passed = lock(&self.passed);
        if is_passed {
            passed.insert(key);
        } else {
            passed.remove(&key);
        }
    }

    /// A guarded buffer for a worker thread, without waiting.
    pub(crate) fn buffer(&self, len: usize) -> Result<SecretBuf, BackendError> {
        self.arena.try_take(len).map_err(|_| BackendError::Refused { function: "guarded memory", code: 0 })
    }
}

fn latch_problem(error: &std::io::Error) -> Problem {
    Problem::Stopped(format!("the PIN latch cannot be used, so no PIN is sent: {error}"))
}

/// Proof that the token is in use, in an initialised library, and stays so while this value lives.
pub(super) struct Entered<'a> {
    token: RwLockReadGuard<'a, Option<Loaded>>,
    library: Inside<'a>,
}

impl Entered<'_> {
    pub(super) fn loaded(&self) -> &Loaded {
        #[expect(clippy::expect_used, reason = "enter() made this value from a checked option")]
        self.token.as_ref().expect("entered only while loaded")
    }

    pub(super) fn open(&self, read_write: bool) -> Result<RawSession, BackendError> {
        let (slot, pkcs11) = (self.loaded().slot, self.library.pkcs11());
        let opened = if read_write { pkcs11.open_rw_session(slot) } else { pkcs11.open_ro_session(slot) };
        opened.map_err(|error| fail("C_OpenSession", &error).into())
    }
}

/// A session that is closed only in the library that opened it: after another initialisation its number
/// may be that of somebody else's session.
pub(super) struct OwnSession {
    token: Arc<Token>,
    epoch: u64,
    /// `None` only while it is being dropped.
    session: Option<RawSession>,
}

impl OwnSession {
    /// Enters the module for one call with this session.
    pub(super) fn enter<'a>(&self, token: &'a Token) -> Result<Entered<'a>, BackendError> {
        let entered = token.enter()?;
        if self.epoch < entered.loaded().since {
            return Err(BackendError::SessionLost { function: "C_Initialize", code: 0 });
        }
        Ok(entered)
    }
}

impl std::ops::Deref for OwnSession {
    type Target = RawSession;

    fn deref(&self) -> &RawSession {
        #[expect(clippy::expect_used, reason = "only drop takes it out")]
        self.session.as_ref().expect("only drop takes it out")
    }
}

impl Drop for OwnSession {
    fn drop(&mut self) {
        let Some(session) = self.session.take() else { return };
        match self.enter(&self.token) {
            // Closed while the library cannot be finalised below the call.
            Ok(_entered) => drop(session),
            // Finalising the library has closed it. Only a count on the library's handle is lost.
            Err(_) => std::mem::forget(session),
        }
    }
}
