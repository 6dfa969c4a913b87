// SPDX-License-Identifier: GPL-2.0

//! Tests of which domains are the same.

#![forbid(unsafe_code)]

use crate::domain::{
    Domain,
    Scope,
    User, //
};
use kernel::prelude::*;

#[kunit_tests(ksm_rs_domain)]
mod tests {
    use super::*;

    const fn user(ids: [u32; 3]) -> User {
        User {
            ids,
            dumpable: true,
        }
    }

    #[test]
    fn a_user_has_a_domain_if_no_other_s_rights_are_there() {
        for id in [0, 1, 1000, 100_000, u32::MAX - 1] {
            let domain = Domain::of_user(&user([id; 3]));
            assert!(domain.is_some());
            assert!(domain != Domain::of_user(&user([id + 1; 3])));
            for differing in 0..3 {
                let mut ids = [id; 3];
                ids[differing] = id + 1;
                assert_eq!(Domain::of_user(&user(ids)), None);
            }
            let secretive = User {
                dumpable: false,
                ..user([id; 3])
            };
            assert_eq!(Domain::of_user(&secretive), None);
        }
    }

    #[test]
    fn a_process_is_in_nobody_else_s_domain() {
        for number in [0, 1, 2, 1000, u64::from(u32::MAX)] {
            let alone = Domain::of_process(number);
            assert!(alone != Domain::of_process(number + 1));
            for other in [number, number + 1, 2 * number, 2 * number + 1] {
                assert!(alone != Domain::of_cgroup(other));
                assert!(Some(alone) != Domain::of_user(&user([other as u32; 3])));
            }
            assert!(alone != Domain::COMMON);
        }
    }

    #[test]
    fn cgroups_that_differ_in_any_bit_are_different() {
        for bit in 0..62 {
            assert!(Domain::of_cgroup(1 << bit) != Domain::of_cgroup(0));
            assert!(Domain::of_cgroup(1 << bit) != Domain::of_cgroup(3 << bit));
        }
    }

    #[test]
    fn a_scope_is_shown_among_all_of_them() {
        for scope in Scope::ALL {
            let shown = scope.choice().to_bytes();
            let (mut names, mut chosen) = (0, 0);
            for (word, known) in shown.split(|byte| *byte == b' ').zip(Scope::ALL) {
                let name = known.name().to_bytes();
                names += 1;
                if word == name {
                    assert!(known != scope);
                } else {
                    chosen += 1;
                    assert!(known == scope);
                    assert!(word.first() == Some(&b'[') && word.last() == Some(&b']'));
                    assert!(word.get(1..word.len() - 1) == Some(name));
                }
            }
            assert_eq!((names, chosen), (4, 1));
        }
    }
}
