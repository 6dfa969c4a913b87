// SPDX-License-Identifier: GPL-2.0

//! Trust domains: whose pages may be merged with whose.
//!
//! A write to a merged page takes longer than one to a page of one's own, and where a page is shared, so are the traces
//! that its use leaves in the caches: both tell a process what others have in their memory. So pages are merged within a
//! domain only, and `merge_scope` says what makes one.
//!
//! Domains are compared exactly before anything is merged. They are mixed into the hashes too, so that pages of other
//! domains are not in the way of a search, and a page whose domain changes looks for its like anew.

#![forbid(unsafe_code)]

use kernel::prelude::*;

/// What the address spaces of a domain have in common.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Scope {
    /// Nothing: all of them are one domain.
    Global,
    /// The memory cgroup.
    Cgroup,
    /// The user.
    User,
    /// Each is a domain of its own.
    Process,
}

impl Scope {
    /// All of them, in the order in which they are shown.
    pub(crate) const ALL: [Self; 4] = [Self::Global, Self::Cgroup, Self::User, Self::Process];

    /// Its name.
    pub(crate) fn name(self) -> &'static CStr {
        match self {
            Self::Global => c"global",
            Self::Cgroup => c"cgroup",
            Self::User => c"user",
            Self::Process => c"process",
        }
    }

    /// All names, with this one in brackets.
    pub(crate) fn choice(self) -> &'static CStr {
        match self {
            Self::Global => c"[global] cgroup user process",
            Self::Cgroup => c"global [cgroup] user process",
            Self::User => c"global cgroup [user] process",
            Self::Process => c"global cgroup user [process]",
        }
    }
}

/// Who runs in an address space.
#[derive(Clone, Copy, Debug)]
pub(crate) struct User {
    /// The real, the effective and the saved id, as the core knows them outside of all user namespaces.
    pub(crate) ids: [u32; 3],
    /// Whether its user may read the memory, by a debugger or in a core dump: not that of a program that was started with
    /// more rights than its user has (set-user-ID, set-group-ID, file capabilities), of one that has changed its
    /// rights since it was started, or of one that says so (`PR_SET_DUMPABLE`).
    pub(crate) dumpable: bool,
}

/// Address spaces that may share pages. Domains of different scopes are never compared: a scope changes only while
/// nothing is merged.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Domain(u64);

impl Domain {
    /// That of everybody.
    pub(crate) const COMMON: Self = Self(0);

    /// That of a memory cgroup, by the number that the core never gives to another one. It leaves the top bit alone.
    pub(crate) const fn of_cgroup(number: u64) -> Self {
        Self(number << 1)
    }

    /// That of a user. `None` if the process has rights of several users, or others that its user lacks, and so
    /// memory that none of them may see.
    pub(crate) fn of_user(user: &User) -> Option<Self> {
        let [real, effective, saved] = user.ids;
        let ordinary = real == effective && effective == saved && user.dumpable;
        ordinary.then_some(Self(u64::from(real) << 1))
    }

    /// That of an address space alone, by its number, among those of any scope.
    pub(crate) const fn of_process(number: u64) -> Self {
        Self(number << 1 | 1)
    }

    /// What a hash is mixed with, so that equal pages of different domains are found apart; 0 for everybody's.
    pub(crate) fn mix(self) -> u64 {
        // Odd, and with bits all over: numbers that differ in low bits make keys that differ in high ones.
        self.0.wrapping_mul(0x9e37_79b9_7f4a_7c15)
    }
}
