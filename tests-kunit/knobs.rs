// SPDX-License-Identifier: GPL-2.0

//! Tests of what the files of `/sys/kernel/mm/ksm_rs` take.

#![forbid(unsafe_code)]

use crate::knobs::{
    any_uint,
    max_page_sharing,
    merge_across_nodes,
    run,
    Run, //
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
