//! A module that is loaded: initialised once for the process, for all tokens in it.
//!
//! `C_Initialize` and `C_Finalize` are for the whole library, and finalising it ends every session of
//! every token. So tokens of one library share this value: calls hold the read half of its lock, and
//! what initialises or finalises holds the write half. A token that goes leaves the others alone. A
//! token that is away may want the library initialised anew; while another one in it is well that
//! happens seldom, and the other one finds itself in a new generation, logs in again and goes on.

#![expect(clippy::disallowed_types, reason = "the module is loaded and initialised here")]

use std::ffi::{CStr, CString};
use std::path::{Path, PathBuf};
use std::sync::{
    Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard, TryLockError, Weak,
};
use std::time::{Duration, Instant};

use cryptoki::context::Pkcs11;
use cryptoki::error::Error;

use crate::seal::driver::Problem;
use crate::seal::pkcs11::raw::Raw;

/// How long recovery waits for running calls to leave the module before it gives up for this round.
const QUIET_WAIT: Duration = Duration::from_secs(3);
/// A token that recovery has not touched for so long is well. Probes are at most 5 s apart.
const WELL: Duration = Duration::from_secs(10);
/// Pause between initialisations that a well token has to go along with; doubles up to the longest.
const FIRST_RELOAD: Duration = Duration::from_secs(30);
const LONGEST_RELOAD: Duration = Duration::from_secs(3600);

/// The modules of a process, each loaded once. Handed to every device that is started.
#[derive(Default)]
pub(crate) struct Modules(Mutex<Vec<Weak<Library>>>);

impl Modules {
    /// The library at that path, whatever link leads there. Initialises nothing. `parameters` are handed to
    /// it when that happens: once for all its tokens, so every one of them must give the same.
    pub(super) fn load(&self, path: &Path, parameters: Option<&CStr>) -> Result<Arc<Library>, String> {
        let place = std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
        let mut known = lock(&self.0);
        if let Some(library) = known.iter().filter_map(Weak::upgrade).find(|known| known.place == place) {
            if library.parameters.as_deref() != parameters {
                return Err("two devices in it give different `init_parameters`".to_owned());
            }
            return Ok(library);
        }
        let library = Arc::new(Library {
            raw: Arc::new(Raw::load(path)?),
            path: path.to_owned(),
            parameters: parameters.map(CStr::to_owned),
            place,
            state: RwLock::new(State { running: None, generation: 0, since: Instant::now() }),
            seats: Mutex::default(),
        });
        known.push(Arc::downgrade(&library));
        Ok(library)
    }
}

/// One module.
pub(super) struct Library {
    pub(super) raw: Arc<Raw>,
    /// As configured.
    path: PathBuf,
    /// What `C_Initialize` is given.
    parameters: Option<CString>,
    /// Where that really is.
    place: PathBuf,
    state: RwLock<State>,
    seats: Mutex<Vec<Seat>>,
}

struct State {
    running: Option<Pkcs11>,
    /// Grows with every initialisation: sessions of earlier ones are void.
    generation: u64,
    since: Instant,
}

/// What the library knows of a token in it.
struct Seat {
    /// Found and in use.
    is_taken: bool,
    /// When recovery last touched the token.
    tried: Instant,
    reload_pause: Duration,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Waits, for a bounded time, until no call is inside. A hung call means no.
pub(super) fn exclusive<T>(lock: &RwLock<T>) -> Result<RwLockWriteGuard<'_, T>, Problem> {
    let until = Instant::now() + QUIET_WAIT;
    loop {
        match lock.try_write() {
            Ok(guard) => return Ok(guard),
            Err(TryLockError::Poisoned(poisoned)) => return Ok(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) if Instant::now() < until => {
                std::thread::sleep(Duration::from_millis(2));
            }
            Err(TryLockError::WouldBlock) => {
                return Err(Problem::Away("a call hangs inside the module".to_owned()));
            }
        }
    }
}

impl Library {
    /// A token's number among those of this library.
    pub(super) fn seat(&self) -> usize {
        let mut seats = lock(&self.seats);
        seats.push(Seat { is_taken: false, tried: Instant::now(), reload_pause: FIRST_RELOAD });
        seats.len() - 1
    }

    /// Recovery is at work on that token.
    pub(super) fn note_try(&self, seat: usize) {
        lock(&self.seats)[seat].tried = Instant::now();
    }

    /// The token was found, or is gone.
    pub(super) fn take_seat(&self, seat: usize, is_taken: bool) {
        lock(&self.seats)[seat].is_taken = is_taken;
    }

    /// The token works again: next time it is away, the first pause holds.
    pub(super) fn forget_reloads(&self, seat: usize) {
        lock(&self.seats)[seat].reload_pause = FIRST_RELOAD;
    }

    /// Whether another token of this library is in use.
    pub(super) fn is_shared(&self, seat: usize) -> bool {
        lock(&self.seats).iter().enumerate().any(|(other, found)| other != seat && found.is_taken)
    }

    /// Whether the library may be initialised anew for this token's sake: always if no other token in it
    /// is well, else after a pause that grows each time.
    pub(super) fn may_reload(&self, seat: usize) -> bool {
        let age = self.read().since.elapsed();
        let mut seats = lock(&self.seats);
        let is_well =
            |(other, found): (usize, &Seat)| other != seat && found.is_taken && found.tried.elapsed() > WELL;
        if !seats.iter().enumerate().any(is_well) {
            return true;
        }
        let pause = seats[seat].reload_pause;
        let is_due = age >= pause;
        if is_due {
            seats[seat].reload_pause = (pause * 2).min(LONGEST_RELOAD);
        }
        is_due
    }

    fn read(&self) -> RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Enters the library while it is initialised.
    pub(super) fn enter(&self) -> Option<Inside<'_>> {
        let state = self.read();
        state.running.is_some().then_some(Inside(state))
    }

    /// Enters the library, initialising it where needed.
    pub(super) fn ensure(&self) -> Result<Inside<'_>, Problem> {
        loop {
            if let Some(inside) = self.enter() {
                return Ok(inside);
            }
            let mut state = exclusive(&self.state)?;
            if state.running.is_none() {
                state.running = Some(self.initialise()?);
                state.generation += 1;
                state.since = Instant::now();
            }
        }
    }

    fn initialise(&self) -> Result<Pkcs11, Problem> {
        let away = |error: Error| Problem::Away(format!("PKCS#11 module: {}", brief(&error)));
        let pkcs11 = Pkcs11::new(&self.path).map_err(away)?;
        // Not by cryptoki, which cannot hand over what NSS wants. "Already initialised" is a success there.
        let initialised = self.raw.initialize(self.parameters.as_deref());
        initialised.map_err(|fail| {
            Problem::Away(format!("PKCS#11 module: {} returned {:#x}", fail.function, fail.code))
        })?;
        Ok(pkcs11)
    }

    /// Finalises the library unless another token is in it; with `reload` in any case. Whether it did.
    pub(super) fn finalise(&self, seat: usize, reload: bool) -> Result<bool, Problem> {
        if self.is_shared(seat) && !reload {
            return Ok(false);
        }
        let mut state = exclusive(&self.state)?;
        // Once more: another token may have come while this waited.
        if self.is_shared(seat) && !reload {
            return Ok(false);
        }
        if let Some(pkcs11) = state.running.take()
            // A library that cannot be finalised is initialised again all the same; "already
            // initialised" is a success there.
            && let Err(error) = pkcs11.finalize()
        {
            tracing::debug!(error = &error as &dyn std::error::Error, "C_Finalize failed");
        }
        Ok(true)
    }
}

/// Proof that the library is initialised and stays so while this value lives.
pub(super) struct Inside<'a>(RwLockReadGuard<'a, State>);

impl Inside<'_> {
    pub(super) fn pkcs11(&self) -> &Pkcs11 {
        #[expect(clippy::expect_used, reason = "this value is made from a checked option only")]
        self.0.running.as_ref().expect("entered only while initialised")
    }

    pub(super) fn generation(&self) -> u64 {
        self.0.generation
    }
}

/// cryptoki's texts quote whole paragraphs of the standard; the name is enough.
pub(super) fn brief(error: &Error) -> String {
    match error {
        Error::Pkcs11(rv, function) => format!("{function:?} returned {rv:?}"),
        other => other.to_string(),
    }
}
