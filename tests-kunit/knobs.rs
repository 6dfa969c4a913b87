// SPDX-License-Identifier: GPL-2.0

//! Tests of what the files of `/sys/kernel/mm/ksm_rs` take.

#![forbid(unsafe_code)]

use crate::{
    domain::Scope,
    knobs::{
        advisor_mode,
        any_uint,
        any_ulong,
        max_page_sharing,
        merge_across_nodes,
        merge_scope,
        run,
        smart_scan,
        target_scan_time,
        Knobs,
        Run, //
    }, //
};
use kernel::prelude::*;

#[kunit_tests(ksm_rs_knobs)]
mod tests {
    use super::*;

    /// What no number parser of the kernel takes.
    const NO_NUMBERS: [&CStr; 9] = [
        c"", c"\n", c" ", c" 1", c"1 ", c"1\n\n", c"one", c"0x1", c"1 2",
    ];

    #[test]
    fn run_takes_three_states_only() {
        assert_eq!(run(c"0"), Ok(Run::Stop));
        assert_eq!(run(c"1\n"), Ok(Run::Merge));
        assert_eq!(run(c"2"), Ok(Run::Unmerge));
        assert_eq!(run(c"+1"), Ok(Run::Merge));
        assert_eq!(run(c"002\n"), Ok(Run::Unmerge));
        for text in [c"3", c"4", c"-1", c"4294967296", c"99999999999999999999"] {
            assert_eq!(run(text), Err(EINVAL));
        }
        for text in NO_NUMBERS {
            assert_eq!(run(text), Err(EINVAL));
        }
    }

    #[test]
    fn any_uint_takes_the_whole_range() {
        assert_eq!(any_uint(c"0"), Ok(0));
        assert_eq!(any_uint(c"4294967295\n"), Ok(u32::MAX));
        for text in [c"4294967296", c"-1", c"-0", c"99999999999999999999"] {
            assert_eq!(any_uint(text), Err(EINVAL));
        }
        for text in NO_NUMBERS {
            assert_eq!(any_uint(text), Err(EINVAL));
        }
    }

    #[test]
    fn the_advisor_is_known_by_its_names() {
        assert_eq!(advisor_mode(c"scan-time"), Ok(true));
        assert_eq!(advisor_mode(c"scan-time\n"), Ok(true));
        assert_eq!(advisor_mode(c"none\n"), Ok(false));
        for text in [
            c"",
            c"\n",
            c"1",
            c"scan",
            c"Scan-time",
            c"scan-time ",
            c"none\n\n",
            c" none",
            c"[none]",
        ] {
            assert_eq!(advisor_mode(text), Err(EINVAL));
        }
    }

    #[test]
    fn a_scope_is_known_by_its_name() {
        assert_eq!(merge_scope(c"global"), Ok(Scope::Global));
        assert_eq!(merge_scope(c"cgroup\n"), Ok(Scope::Cgroup));
        assert_eq!(merge_scope(c"user"), Ok(Scope::User));
        assert_eq!(merge_scope(c"process\n"), Ok(Scope::Process));
        for text in [
            c"",
            c"\n",
            c"0",
            c"glob",
            c"globals",
            c"Global",
            c" user",
            c"user ",
            c"user\n\n",
            c"[user]",
            c"user process",
            c"[global] cgroup user process",
        ] {
            assert_eq!(merge_scope(text), Err(EINVAL));
        }
    }

    #[test]
    fn the_advisor_s_limits_take_an_unsigned_long() {
        assert_eq!(any_ulong(c"18446744073709551615\n"), Ok(u64::MAX));
        assert_eq!(any_ulong(c"18446744073709551616"), Err(EINVAL));
        assert_eq!(any_ulong(c"-1"), Err(EINVAL));
        assert_eq!(target_scan_time(c"1"), Ok(1));
        assert_eq!(target_scan_time(c"0"), Err(EINVAL));
        for text in NO_NUMBERS {
            assert_eq!(any_ulong(text), Err(EINVAL));
            assert_eq!(target_scan_time(text), Err(EINVAL));
        }
    }

    #[test]
    fn smart_scan_takes_a_truth_value_in_words() {
        assert_eq!(smart_scan(c"y"), Ok(true));
        assert_eq!(smart_scan(c"off\n"), Ok(false));
        assert_eq!(smart_scan(c"2"), Err(EINVAL));
    }

    #[test]
    fn the_advisor_brings_its_own_pages_to_scan_and_takes_them_along() {
        let knobs = Knobs::new();
        knobs.set_pages_to_scan(7);
        knobs.set_advisor_min_pages(1234);
        knobs.set_advisor(true);
        assert_eq!(knobs.pages_to_scan(), 1234);
        knobs.set_advisor(false);
        assert_eq!(knobs.pages_to_scan(), 100);
    }

    #[test]
    fn merge_across_nodes_takes_a_truth_value_in_digits() {
        assert_eq!(merge_across_nodes(c"0\n"), Ok(false));
        assert_eq!(merge_across_nodes(c"1"), Ok(true));
        for text in [c"2", c"-1", c"y", c"18446744073709551615"] {
            assert_eq!(merge_across_nodes(text), Err(EINVAL));
        }
        assert_eq!(merge_across_nodes(c"18446744073709551616"), Err(ERANGE));
        for text in NO_NUMBERS {
            assert_eq!(merge_across_nodes(text), Err(EINVAL));
        }
    }

    #[test]
    fn max_page_sharing_takes_two_and_more() {
        assert_eq!(max_page_sharing(c"2"), Ok(2));
        assert_eq!(
            max_page_sharing(c"2147483647\n"),
            Ok(i32::MAX.unsigned_abs())
        );
        for text in [c"1", c"0", c"-1", c"-2147483648"] {
            assert_eq!(max_page_sharing(text), Err(EINVAL));
        }
        for text in [c"2147483648", c"-2147483649", c"99999999999999999999"] {
            assert_eq!(max_page_sharing(text), Err(ERANGE));
        }
        for text in NO_NUMBERS {
            assert_eq!(max_page_sharing(text), Err(EINVAL));
        }
    }
}
