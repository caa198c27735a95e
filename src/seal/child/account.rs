//! The user that the sealer process runs as, with all groups of that user.
//!
//! Device nodes, sockets and token files often belong to a group (`tss`, `nfast`, `pkcs11`, `softhsm`), and a
//! user is let in as one of its members: the primary group alone would not do. Users and members are those
//! of /etc/passwd and /etc/group, read when the daemon starts; groups that only a directory service knows
//! are not given.

use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;

/// Who the process runs as.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Account {
    user: u32,
    group: u32,
    /// The primary group, and those that name the user as a member.
    groups: Vec<u32>,
}

impl Account {
    /// The account of a name in /etc/passwd or of a number; `None` if that is who this process is.
    pub(super) fn find(name: &str) -> Result<Option<Self>, String> {
        let read = |path: &str| std::fs::read_to_string(path).map_err(|error| format!("{path}: {error}"));
        let found = Self::parse(&read("/etc/passwd")?, &read("/etc/group")?, name)
            .ok_or_else(|| format!("no user {name} in /etc/passwd"))?;
        let own = rustix::process::geteuid();
        if own.as_raw() == found.user {
            return Ok(None);
        }
        if !own.is_root() {
            return Err(format!("only root can start the sealer process as user {name}"));
        }
        Ok(Some(found))
    }

    fn parse(passwd: &str, groups: &str, name: &str) -> Option<Self> {
        let (known, user, group) = passwd.lines().find_map(|line| {
            let mut fields = line.split(':');
            let (known, user, group) = (fields.next()?, fields.nth(1)?, fields.next()?);
            let is_it = known == name || user == name;
            is_it.then(|| Some((known, user.parse().ok()?, group.parse().ok()?))).flatten()
        })?;
        let mut all = vec![group];
        for line in groups.lines() {
            let mut fields = line.split(':').skip(2);
            // A line that is not understood gives nobody anything.
            let (Some(Ok(id)), Some(members)) = (fields.next().map(str::parse), fields.next()) else {
                continue;
            };
            if members.split(',').any(|member| member.trim() == known) && !all.contains(&id) {
                all.push(id);
            }
        }
        Some(Self { user, group, groups: all })
    }

    /// Has the command run as this account.
    #[expect(unsafe_code, reason = "std can set a user and a group, and takes all other groups away")]
    pub(super) fn put_on(&self, command: &mut Command) {
        let Self { user, group, groups } = self.clone();
        let become_it = move || {
            // Groups first: whoever is not root any more cannot change them.
            // SAFETY: the list is as long as is said and lives as long as this closure.
            let done = unsafe {
                libc::setgroups(groups.len(), groups.as_ptr()) == 0
                    && libc::setgid(group) == 0
                    && libc::setuid(user) == 0
            };
            if done { Ok(()) } else { Err(io::Error::last_os_error()) }
        };
        // SAFETY: it runs between fork and exec, where it makes three system calls and allocates nothing.
        unsafe { command.pre_exec(become_it) };
    }
}

#[cfg(test)]
mod tests {
    use super::Account;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nhsm:x:990:985::/:/usr/sbin/nologin\n";
    const GROUP: &str = "root:x:0:\ntss:x:110:tss,hsm\nhsm:x:985:\nbroken\nworse:x:y:hsm\nother:x:111:hs,hsm2\n\
                         pkcs11:x:112:root,hsm\nagain:x:985:hsm\nlast:x:113:hsm";

    #[test]
    fn a_user_is_found_by_name_and_by_number_with_all_its_groups() {
        let hsm = Account { user: 990, group: 985, groups: vec![985, 110, 112, 113] };
        assert_eq!(Account::parse(PASSWD, GROUP, "hsm"), Some(hsm.clone()));
        assert_eq!(Account::parse(PASSWD, GROUP, "990"), Some(hsm));
        let alone = Account { user: 990, group: 985, groups: vec![985] };
        assert_eq!(Account::parse(PASSWD, "", "hsm"), Some(alone));
        assert_eq!(Account::parse(PASSWD, GROUP, "hs"), None);
        assert_eq!(Account::parse("x", GROUP, "x"), None);
    }
}
