//! System calls that a module has no business with, tried from inside the program that loaded it.
//!
//! What came of it goes to standard error, one line each: `lacre-shim: NAME: done` or the error.

use std::io;

/// What can be tried, by name.
pub const NAMES: [&str; 8] =
    ["execve", "fork", "socket-inet", "socket-unix", "socket-packet", "ptrace", "kill-parent", "read-parent"];

/// Tries it.
pub fn attempt(name: &str) {
    let outcome = match run(name) {
        -1 => io::Error::last_os_error().to_string(),
        _ => "done".to_owned(),
    };
    eprintln!("lacre-shim: {name}: {outcome}");
}

fn socket(family: i32, kind: i32) -> i64 {
    // SAFETY: takes numbers only; the descriptor is ours to close.
    unsafe {
        let socket = libc::socket(family, kind, 0);
        if socket >= 0 {
            libc::close(socket);
        }
        i64::from(socket)
    }
}

fn run(name: &str) -> i64 {
    match name {
        // An address that is none: past a filter the kernel says EFAULT or ENOENT, before it EPERM.
        // SAFETY: the path is a constant, and nothing is found there.
        "execve" => unsafe {
            libc::syscall(
                libc::SYS_execve,
                c"/nowhere/at/all".as_ptr(),
                std::ptr::null::<u8>(),
                std::ptr::null::<u8>(),
            )
        },
        "fork" => {
            // SAFETY: the child does nothing but end.
            let child = unsafe { libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0) };
            if child == 0 {
                // SAFETY: ends the child.
                unsafe { libc::_exit(0) };
            }
            child
        }
        "socket-inet" => socket(libc::AF_INET, libc::SOCK_STREAM),
        "socket-unix" => socket(libc::AF_UNIX, libc::SOCK_STREAM),
        "socket-packet" => socket(libc::AF_PACKET, libc::SOCK_RAW),
        // SAFETY: PTRACE_SEIZE of a process that does not exist.
        "ptrace" => unsafe { libc::syscall(libc::SYS_ptrace, 0x4206, i32::MAX, 0, 0) },
        // SAFETY: signal 0 only asks whether a signal could be sent.
        "kill-parent" => i64::from(unsafe { libc::kill(libc::getppid(), 0) }),
        "read-parent" => {
            // SAFETY: no memory is named on either side.
            unsafe { libc::syscall(libc::SYS_process_vm_readv, libc::getppid(), 0, 0, 0, 0, 0) }
        }
        _ => -1,
    }
}
