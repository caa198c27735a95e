//! What the sealer process gives up before it loads a module.
//!
//! A module is anybody's code and nobody knows which system calls it needs, so this forbids what none
//! needs rather than permitting what one did: other programs, other processes, their memory and their
//! end, new namespaces, the kernel's own affairs, and sockets beyond the host. A forbidden call fails with
//! EPERM; it does not end the process, because a module that merely tries would end it again and again.

use std::collections::BTreeMap;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
};

/// Forbidden whatever their arguments.
const NEVER: &[i64] = &[
    // Programs and processes. Threads are made by clone, below.
    libc::SYS_execve,
    libc::SYS_execveat,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_fork,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_vfork,
    libc::SYS_unshare,
    libc::SYS_setns,
    // The memory, descriptors and life of other processes.
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_process_madvise,
    libc::SYS_pidfd_getfd,
    libc::SYS_pidfd_send_signal,
    libc::SYS_kcmp,
    libc::SYS_tkill,
    libc::SYS_rt_sigqueueinfo,
    libc::SYS_rt_tgsigqueueinfo,
    // Ways around a filter of system calls.
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    // The kernel's affairs.
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_userfaultfd,
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_keyctl,
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_pivot_root,
    libc::SYS_chroot,
    libc::SYS_move_mount,
    libc::SYS_open_tree,
    libc::SYS_fsopen,
    libc::SYS_fsmount,
    libc::SYS_open_by_handle_at,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_kexec_load,
    libc::SYS_reboot,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_acct,
    libc::SYS_settimeofday,
    libc::SYS_clock_settime,
    libc::SYS_adjtimex,
    libc::SYS_clock_adjtime,
    libc::SYS_sethostname,
    libc::SYS_setdomainname,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_iopl,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_ioperm,
];

/// Closes every descriptor behind standard error. The daemon opens its own so that they stay its own, but
/// hands on what it was itself started with. Call it before this process has opened anything.
#[expect(unsafe_code, reason = "nobody in this process owns these descriptors yet")]
pub(super) fn close_inherited() {
    // SAFETY: takes numbers only; the descriptors were left behind by another program.
    unsafe { libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, 0) };
}

/// Confines this thread and all that it starts, for good. Call it while there is no other.
pub(super) fn apply(network: bool) -> Result<(), String> {
    let own = u64::from(std::process::id());
    // clone3 takes its flags by address, where no filter can see them; the C library then uses clone.
    let mut unknown = BTreeMap::new();
    unknown.insert(libc::SYS_clone3, Vec::new());
    for (rules, errno) in [(forbidden(network, own)?, libc::EPERM), (unknown, libc::ENOSYS)] {
        let program = compile(rules, errno.unsigned_abs())?;
        seccompiler::apply_filter(&program).map_err(|error| error.to_string())?;
    }
    Ok(())
}

fn compile(rules: BTreeMap<i64, Vec<SeccompRule>>, errno: u32) -> Result<BpfProgram, String> {
    let here = std::env::consts::ARCH.try_into().map_err(|_| "seccomp: unknown processor".to_owned())?;
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, SeccompAction::Errno(errno), here);
    filter.and_then(TryInto::try_into).map_err(|error| error.to_string())
}

fn forbidden(network: bool, own: u64) -> Result<BTreeMap<i64, Vec<SeccompRule>>, String> {
    use SeccompCmpArgLen::{Dword, Qword};
    use SeccompCmpOp::{MaskedEq, Ne};
    let rule = |conditions: Vec<(u8, SeccompCmpArgLen, SeccompCmpOp, u64)>| {
        let conditions = conditions.into_iter().map(|(argument, len, op, value)| {
            SeccompCondition::new(argument, len, op, value).map_err(|error| error.to_string())
        });
        let conditions = conditions.collect::<Result<_, _>>()?;
        SeccompRule::new(conditions).map(|rule| vec![rule]).map_err(|error| error.to_string())
    };
    let mut rules: BTreeMap<_, _> = NEVER.iter().map(|number| (*number, Vec::new())).collect();
    // A process, not a thread.
    let thread = u64::from(libc::CLONE_THREAD.unsigned_abs());
    rules.insert(libc::SYS_clone, rule(vec![(0, Qword, MaskedEq(thread), 0)])?);
    // Signals to others than itself; abort() and raise() are tgkill to itself.
    rules.insert(libc::SYS_kill, rule(vec![(0, Dword, Ne, own)])?);
    rules.insert(libc::SYS_tgkill, rule(vec![(0, Dword, Ne, own)])?);
    // The limits of others; its own it may ask for by 0 or by name.
    rules.insert(libc::SYS_prlimit64, rule(vec![(0, Dword, Ne, 0), (0, Dword, Ne, own)])?);
    // Sockets of the host: pcscd, pkcsslotd, p11-kit, syslog. netlink is how names are resolved.
    let mut families = vec![libc::AF_UNIX];
    if network {
        families.extend([libc::AF_INET, libc::AF_INET6, libc::AF_NETLINK]);
    }
    let others = families.into_iter().map(|family| (0, Dword, Ne, u64::from(family.unsigned_abs())));
    rules.insert(libc::SYS_socket, rule(others.collect())?);
    Ok(rules)
}

#[cfg(test)]
mod tests {
    use super::{compile, forbidden};

    #[test]
    fn both_filters_compile() {
        for network in [false, true] {
            assert!(!compile(forbidden(network, 42).unwrap(), 1).unwrap().is_empty());
        }
    }
}
