//! Looks at memory the way an attacker would, and makes the conditions in which to look.
//!
//! Reading goes through `/proc` and `process_vm_readv`, as another process would do it; the rest are
//! system calls that change this process for good, so only role processes (`roles.rs`) call them.

#![expect(unsafe_code, reason = "reads memory by address and calls libc")]

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use rustix::process::{Resource, Rlimit};

/// A user without any rights; 65534 is `nobody`.
pub const NOBODY: u32 = 65534;
/// Another one.
pub const SOMEBODY_ELSE: u32 = 65533;

/// Reads `len` bytes at `address` of process `pid` through its `/proc` file.
pub fn read_proc_mem(pid: u32, address: usize, len: usize) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; len];
    File::open(format!("/proc/{pid}/mem"))?.read_exact_at(&mut bytes, address as u64)?;
    Ok(bytes)
}

/// Reads `len` bytes at `address` of process `pid` with `process_vm_readv(2)`.
pub fn read_vm(pid: u32, address: usize, len: usize) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0_u8; len];
    let local = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: len };
    let remote = libc::iovec { iov_base: address as *mut libc::c_void, iov_len: len };
    // SAFETY: writes at most `len` bytes to `bytes`; the remote address is checked by the kernel.
    let read =
        unsafe { libc::process_vm_readv(pid.cast_signed(), &raw const local, 1, &raw const remote, 1, 0) };
    if read < 0 { Err(io::Error::last_os_error()) } else { Ok(bytes) }
}

/// Counts what `/proc/self/mem` shows of `needle` in writable memory: hits of either half of it, so
/// that a copy whose start was overwritten still counts. The needle itself has to lie in memory that
/// cannot be read that way, or it is counted too.
pub fn copies_in_own_memory(needle: &[u8]) -> usize {
    const CHUNK: usize = 1 << 20;
    let half = needle.len() / 2;
    let memory = File::open("/proc/self/mem").unwrap();
    let mut chunk = vec![0_u8; CHUNK];
    // The scanner must not find what it has just read itself.
    let own = chunk.as_ptr() as usize..chunk.as_ptr() as usize + CHUNK;
    let mut hits = 0;
    for range in writable_ranges() {
        let mut start = range.start;
        while start + half <= range.end {
            let len = CHUNK.min(range.end - start);
            if memory.read_exact_at(&mut chunk[..len], start as u64).is_ok() {
                let found = [&needle[..half], &needle[half..]].map(|part| offsets(&chunk[..len], part));
                hits += found.iter().flatten().filter(|offset| !own.contains(&(start + **offset))).count();
            }
            // The next chunk begins where a hit across the border would begin.
            start += if len == CHUNK { CHUNK - (half - 1) } else { len };
        }
    }
    hits
}

fn offsets(haystack: &[u8], part: &[u8]) -> Vec<usize> {
    let mut found = Vec::new();
    let mut from = 0;
    while let Some(next) = haystack[from..].iter().position(|byte| *byte == part[0]) {
        if haystack[from + next..].starts_with(part) {
            found.push(from + next);
        }
        from += next + 1;
    }
    found
}

fn writable_ranges() -> Vec<Range<usize>> {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let range = |line: &str| {
        let (range, rest) = line.split_once(' ')?;
        let (start, end) = range.split_once('-')?;
        let address = |hex| usize::from_str_radix(hex, 16).ok();
        rest.starts_with("rw").then_some(address(start)?..address(end)?)
    };
    maps.lines().filter_map(range).collect()
}

/// The kernel's flags of the pages at `address` (proc(5), `VmFlags` in smaps).
pub fn page_flags(address: usize) -> String {
    let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let start = format!("{address:x}-");
    let mut lines = smaps.lines().skip_while(|line| !line.starts_with(&start));
    lines.find(|line| line.starts_with("VmFlags:")).unwrap().to_owned()
}

/// Reads one byte past a buffer of one page, to die of it.
pub fn read_past_the_page(page: &[u8]) -> u8 {
    // SAFETY: none, on purpose. The address is the guard page behind a slot and the read must kill
    // the role process that makes it.
    unsafe { page.as_ptr().add(4096).read_volatile() }
}

/// Becomes the given user without any capability, if this process may choose. As another user it
/// stays what it is, which is as good: no test here needs a particular one.
pub fn become_user(uid: u32) {
    // SAFETY: plain system calls; the role process does not go on as root if one of them fails.
    unsafe {
        if libc::geteuid() != 0 {
            return;
        }
        assert_eq!(libc::setgroups(0, std::ptr::null()), 0, "setgroups");
        assert_eq!(libc::setresgid(uid, uid, uid), 0, "setresgid");
        assert_eq!(libc::setresuid(uid, uid, uid), 0, "setresuid");
    }
}

/// Whether the tests run as root, so that they can become several users.
pub fn is_root() -> bool {
    // SAFETY: reads the user id.
    unsafe { libc::geteuid() == 0 }
}

/// Limits locked memory to `bytes`, as `ulimit -l` does.
pub fn limit_locked_memory(bytes: u64) {
    let limit = Rlimit { current: Some(bytes), maximum: Some(bytes) };
    rustix::process::setrlimit(Resource::Memlock, limit).unwrap();
}

/// Allows cores as large as the hard limit lets this process; returns whether that is any.
pub fn allow_cores() -> bool {
    let unlimited = Rlimit { current: None, maximum: None };
    if rustix::process::setrlimit(Resource::Core, unlimited).is_ok() {
        return true;
    }
    let maximum = rustix::process::getrlimit(Resource::Core).maximum;
    rustix::process::setrlimit(Resource::Core, Rlimit { current: maximum, maximum }).unwrap();
    maximum != Some(0)
}

/// Makes `memfd_secret` fail as it does under a seccomp profile that does not know it.
pub fn forbid_secretmem() {
    const NOT_IT: u8 = 1;
    let denied = libc::SECCOMP_RET_ERRNO | libc::ENOSYS.cast_unsigned();
    let number = u32::try_from(libc::SYS_memfd_secret).unwrap();
    let code = |parts: u32| u16::try_from(parts).unwrap();
    let load = code(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS);
    let equal = code(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K);
    let give = code(libc::BPF_RET | libc::BPF_K);
    let mut filter = [
        // The system call's number is the first field of seccomp_data.
        libc::sock_filter { code: load, jt: 0, jf: 0, k: 0 },
        libc::sock_filter { code: equal, jt: 0, jf: NOT_IT, k: number },
        libc::sock_filter { code: give, jt: 0, jf: 0, k: denied },
        libc::sock_filter { code: give, jt: 0, jf: 0, k: libc::SECCOMP_RET_ALLOW },
    ];
    let program = libc::sock_fprog { len: 4, filter: filter.as_mut_ptr() };
    // SAFETY: the kernel copies the program, which outlives the calls.
    unsafe {
        assert_eq!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0, "no_new_privs");
        let installed = libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program);
        assert_eq!(installed, 0, "seccomp");
    }
}

/// What a forked child sees of a byte of this process.
#[derive(Debug, PartialEq, Eq)]
pub enum InChild {
    /// The byte's value.
    Byte(u8),
    /// Nothing: the child died of touching it.
    Nothing,
}

/// Forks and lets the child read the first of `bytes`.
pub fn read_in_child(bytes: &[u8]) -> InChild {
    let first = bytes.as_ptr();
    let mut status = 0;
    // SAFETY: the child calls nothing but a read of memory and two system calls.
    unsafe {
        let child = libc::fork();
        assert!(child >= 0, "fork");
        if child == 0 {
            libc::signal(libc::SIGSEGV, libc::SIG_DFL);
            libc::_exit(i32::from(first.read_volatile()));
        }
        assert_eq!(libc::waitpid(child, &raw mut status, 0), child, "waitpid");
    }
    if libc::WIFEXITED(status) {
        InChild::Byte(libc::WEXITSTATUS(status).to_le_bytes()[0])
    } else {
        InChild::Nothing
    }
}
