//! How a call meets a rule.
//!
//! A call without a rule costs two atomic loads and one atomic addition. New rules are seen at the
//! next call when the generation in the counters' file was raised (tests do that), else within 20 ms
//! by the thread that looks at the control file (for people with an editor).

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock};
use std::time::Duration;

use cryptoki_sys::{CK_FUNCTION_LIST, CK_RV, CK_SLOT_ID, CKR_OK};

use crate::counts::{Counts, Extra};
use crate::forward::{NAMES, Subject};
use crate::gcm::{ForeignIv, LateIvs, is_bad};
use crate::rules::{Action, Rule};

const LOOK_EVERY: Duration = Duration::from_millis(20);
const HANG_STEP: Duration = Duration::from_millis(2);

/// PKCS#11 functions have no context argument, so a module's state is global by nature.
static SHIM: OnceLock<Result<Shim, String>> = OnceLock::new();

/// Everything that a call needs.
pub struct Shim {
    real: &'static CK_FUNCTION_LIST,
    counts: Counts,
    control: Option<PathBuf>,
    rules: RwLock<Arc<Vec<Rule>>>,
    armed: [AtomicBool; NAMES.len()],
    generation: AtomicU64,
    read: Mutex<Stamp>,
    late_ivs: LateIvs,
    /// What slot numbers are greater by for the caller.
    slots: AtomicU64,
}

/// What tells one state of the control file from another; all zero for a missing file.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
struct Stamp {
    inode: u64,
    len: u64,
    seconds: i64,
    nanos: i64,
}

impl From<fs::Metadata> for Stamp {
    fn from(meta: fs::Metadata) -> Self {
        Self { inode: meta.ino(), len: meta.len(), seconds: meta.mtime(), nanos: meta.mtime_nsec() }
    }
}

/// Loads the real module and the rules, once.
pub fn load() -> Result<(), &'static str> {
    SHIM.get_or_init(Shim::start).as_ref().map_err(String::as_str)?;
    static WATCH: OnceLock<()> = OnceLock::new();
    WATCH.get_or_init(|| {
        if shim().control.is_some() {
            let _ = std::thread::Builder::new().name("lacre-shim".into()).spawn(|| shim().watch());
        }
    });
    Ok(())
}

/// The state. Functions are reached through the list that [`load`] gave out, so it is there.
pub fn shim() -> &'static Shim {
    match SHIM.get() {
        Some(Ok(shim)) => shim,
        _ => std::process::abort(),
    }
}

impl Shim {
    fn start() -> Result<Self, String> {
        let path = |name| std::env::var_os(name).map(PathBuf::from);
        let module = path("LACRE_SHIM_MODULE").ok_or("LACRE_SHIM_MODULE does not name the real module")?;
        let counts = Counts::open(path("LACRE_SHIM_COUNTS").as_deref())
            .map_err(|error| format!("LACRE_SHIM_COUNTS: {error}"))?;
        let shim = Self {
            real: real_list(&module).map_err(|reason| format!("{}: {reason}", module.display()))?,
            counts,
            control: path("LACRE_SHIM_CONTROL"),
            rules: RwLock::default(),
            armed: [const { AtomicBool::new(false) }; NAMES.len()],
            generation: AtomicU64::new(0),
            read: Mutex::default(),
            late_ivs: LateIvs::default(),
            slots: AtomicU64::new(0),
        };
        shim.generation.store(shim.counts.generation(), Ordering::Release);
        shim.read_if_changed(&mut shim.lock());
        Ok(shim)
    }

    fn lock(&self) -> MutexGuard<'_, Stamp> {
        self.read.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn watch(&self) {
        loop {
            std::thread::sleep(LOOK_EVERY);
            self.read_if_changed(&mut self.lock());
        }
    }

    /// Reads the rules again if a test said that they changed.
    fn sync(&self) {
        let wanted = self.counts.generation();
        if self.generation.load(Ordering::Acquire) != wanted {
            let mut stamp = self.lock();
            self.read_if_changed(&mut stamp);
            self.generation.store(wanted, Ordering::Release);
        }
    }

    /// Reads the control file unless it is the one that was read last: reading starts all counting anew.
    fn read_if_changed(&self, stamp: &mut Stamp) {
        let Some(path) = &self.control else { return };
        let mut text = String::new();
        let now = match File::open(path) {
            Ok(mut file) => {
                let now = file.metadata().map(Stamp::from).unwrap_or_default();
                if now == *stamp || file.read_to_string(&mut text).is_err() {
                    return;
                }
                now
            }
            Err(_) => Stamp::default(),
        };
        if now != *stamp {
            *stamp = now;
            self.replace(&text);
        }
    }

    fn replace(&self, text: &str) {
        let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
        let mut rules = Vec::new();
        for line in lines {
            match Rule::parse(line) {
                Ok(rule) => rules.push(rule),
                Err(reason) => {
                    eprintln!("lacre-shim: rule {line:?} ignored: {reason}");
                    self.counts.extra(Extra::BadRules);
                }
            }
        }
        let offset = rules.iter().find_map(|rule| match rule.action {
            Action::Slots(offset) => Some(offset),
            _ => None,
        });
        self.slots.store(offset.unwrap_or(0), Ordering::Release);
        let armed: Vec<usize> = rules.iter().map(|rule| rule.function).collect();
        *self.rules.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(rules);
        for (function, flag) in self.armed.iter().enumerate() {
            flag.store(armed.contains(&function), Ordering::Release);
        }
    }

    /// The real module's number of a slot. One from before the numbers changed becomes one that nobody has.
    pub fn real_slot(&self, slot: CK_SLOT_ID) -> CK_SLOT_ID {
        slot.wrapping_sub(self.slots.load(Ordering::Acquire) as CK_SLOT_ID)
    }

    /// # Safety
    /// The arguments are those of a call that succeeded.
    unsafe fn show_slots(&self, subject: Subject) {
        let offset = self.slots.load(Ordering::Acquire) as CK_SLOT_ID;
        match subject {
            Subject::Slots(list, count) if offset != 0 && !list.is_null() && !count.is_null() => {
                // SAFETY: after success there are `count` numbers.
                let slots = unsafe { std::slice::from_raw_parts_mut(list, *count as usize) };
                slots.iter_mut().for_each(|slot| *slot = slot.wrapping_add(offset));
            }
            Subject::SessionInfo(info) if offset != 0 => {
                // SAFETY: filled by the real module.
                if let Some(info) = unsafe { info.as_mut() } {
                    info.slotID = info.slotID.wrapping_add(offset);
                }
            }
            _ => {}
        }
    }

    fn rules(&self) -> Arc<Vec<Rule>> {
        self.rules.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// One call: count it, do what the rules say before it, make it, do what the rules say after it.
    ///
    /// # Safety
    /// `subject` holds the caller's own arguments of this call.
    pub unsafe fn call(
        &self,
        function: usize,
        subject: Subject,
        call: impl FnOnce(&CK_FUNCTION_LIST) -> CK_RV,
    ) -> CK_RV {
        self.counts.call(function);
        // SAFETY: as promised.
        if let Subject::Gcm(_, mechanism) = subject
            && unsafe { is_bad(mechanism) }
        {
            self.counts.extra(Extra::BadGcmParams);
        }
        self.sync();
        let actions =
            if self.armed[function].load(Ordering::Acquire) { self.fired(function) } else { Vec::new() };
        let mut late = None;
        for (action, line) in &actions {
            // SAFETY: as promised.
            match unsafe { self.before(function, action, line, subject) } {
                Before::Go => {}
                Before::Answer(code) => return code,
                Before::ShowLater(iv) => late = Some(iv),
            }
        }
        let mut code = call(self.real);
        if let (Some(iv), Subject::Gcm(session, _)) = (late, subject) {
            // SAFETY: the caller's parameters outlive its call.
            unsafe { iv.hide() };
            self.late_ivs.keep(session, iv);
        }
        if let (Subject::Encrypt(session, ..), CKR_OK) = (subject, code) {
            // SAFETY: the rule's documented demand on the caller.
            unsafe { self.late_ivs.show(session) };
        }
        if let (Subject::List(list), CKR_OK) = (subject, code) {
            // SAFETY: the host's own argument; the real module has just written to it.
            unsafe { *list = crate::forward::list() };
        }
        if code == CKR_OK {
            // SAFETY: as promised.
            unsafe { self.show_slots(subject) };
        }
        for (action, _) in &actions {
            match action {
                Action::ReturnAfter(other) => code = *other,
                Action::AbortAfter => std::process::abort(),
                Action::Translate(from, to) if code == *from => code = *to,
                // SAFETY: after success the outputs are there.
                _ if code == CKR_OK => unsafe { subject.change(action) },
                _ => {}
            }
        }
        code
    }

    fn fired(&self, function: usize) -> Vec<(Action, String)> {
        let rules = self.rules();
        let fired: Vec<_> = rules
            .iter()
            .filter(|rule| rule.function == function && rule.matches())
            .map(|rule| (rule.action.clone(), rule.line.clone()))
            .collect();
        for _ in &fired {
            self.counts.extra(Extra::RulesFired);
        }
        fired
    }

    /// # Safety
    /// As [`Shim::call`].
    unsafe fn before(&self, function: usize, action: &Action, line: &str, subject: Subject) -> Before {
        match action {
            Action::Return(code) => return Before::Answer(*code),
            Action::Sleep(time) => std::thread::sleep(*time),
            Action::Attempt(name) => crate::attempt::attempt(name),
            Action::Hang => self.hang(function, line),
            Action::Abort => std::process::abort(),
            // SAFETY: none; a fault is what was asked for.
            Action::Segv => unsafe { std::ptr::without_provenance_mut::<u8>(8).write_volatile(0) },
            Action::CloseAllSessions => self.close_all_sessions(),
            Action::WriteIv | Action::WriteIvLate | Action::SameIv => {
                if let Subject::Gcm(_, mechanism) = subject {
                    // SAFETY: as promised.
                    let iv = unsafe { ForeignIv::write(mechanism, matches!(action, Action::SameIv)) };
                    if let (Some(iv), Action::WriteIvLate) = (iv, action) {
                        return Before::ShowLater(iv);
                    }
                }
            }
            _ => {}
        }
        Before::Go
    }

    fn hang(&self, function: usize, line: &str) {
        while self.rules().iter().any(|rule| rule.function == function && rule.line == line) {
            std::thread::sleep(HANG_STEP);
            self.sync();
        }
    }

    fn close_all_sessions(&self) {
        let (Some(slots), Some(close)) = (self.real.C_GetSlotList, self.real.C_CloseAllSessions) else {
            return;
        };
        let mut ids = [0; 64];
        let mut count = ids.len() as cryptoki_sys::CK_ULONG;
        // SAFETY: room for `count` slots, as the standard wants it.
        if unsafe { slots(1, ids.as_mut_ptr(), &mut count) } != CKR_OK {
            return;
        }
        for slot in ids.iter().take(count as usize) {
            // SAFETY: a slot that the module has just named.
            unsafe { close(*slot) };
        }
    }
}

/// What follows from an action that acts before the call.
enum Before {
    Go,
    Answer(CK_RV),
    ShowLater(ForeignIv),
}

fn real_list(path: &std::path::Path) -> Result<&'static CK_FUNCTION_LIST, String> {
    // SAFETY: a PKCS#11 module that the user named; its initialisers run here as in any host.
    let library = unsafe { libloading::Library::new(path) }.map_err(|error| error.to_string())?;
    // Never unloaded: other threads may be inside it for as long as the process lives.
    let library = Box::leak(Box::new(library));
    type GetList = unsafe extern "C" fn(*mut *mut CK_FUNCTION_LIST) -> CK_RV;
    // SAFETY: the standard gives the symbol this type.
    let get: libloading::Symbol<GetList> =
        unsafe { library.get(b"C_GetFunctionList\0") }.map_err(|error| error.to_string())?;
    let mut list = std::ptr::null_mut();
    // SAFETY: room for one pointer.
    let code = unsafe { get(&mut list) };
    if code != CKR_OK || list.is_null() {
        return Err(format!("C_GetFunctionList answered {code:#x}"));
    }
    // SAFETY: a module's list lives as long as the module.
    Ok(unsafe { &*list })
}
