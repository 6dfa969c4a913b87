// SPDX-License-Identifier: GPL-2.0

//! Tests of the scan time advisor, with figures worked out by hand.

#![forbid(unsafe_code)]

use crate::advisor::{
    Advice,
    Advisor,
    Limits,
    Spent, //
};
use kernel::prelude::*;

const DEFAULTS: Limits = Limits {
    target_scan_time: 200,
    max_cpu: 70,
    min_pages: 500,
    max_pages: 30_000,
};

fn spent(seconds: u64, cpu_percent: u64) -> Spent {
    Spent {
        millisecs: seconds * 1000 + 999,
        cpu_millisecs: seconds * 10 * cpu_percent,
    }
}

#[kunit_tests(ksm_rs_advisor)]
mod tests {
    use super::*;

    #[test]
    fn a_pass_that_took_too_long_makes_the_next_one_scan_more() {
        let mut advisor = Advisor::default();
        // Twice the target: factor 50. The first change counts 30 %: 1000 * 2 * 0.3.
        let first = advisor.advise(spent(400, 20), 1000, DEFAULTS);
        assert_eq!(
            first,
            Advice {
                pages_to_scan: 600,
                scan_time: 400,
                cpu_percent: 20
            }
        );
        // As long again: change 0.7 * 30 + 0.3 * 100 = 51.
        assert_eq!(
            advisor.advise(spent(400, 20), 2000, DEFAULTS).pages_to_scan,
            2040
        );
        // Half as long, on target: change 0.7 * 51 + 0.3 * 50 = 50 (50.7).
        assert_eq!(
            advisor.advise(spent(200, 20), 3000, DEFAULTS).pages_to_scan,
            1500
        );
    }

    #[test]
    fn the_share_of_a_cpu_is_bounded_from_both_sides() {
        let mut advisor = Advisor::default();
        // 10 times too slow, but at 70 % already: 1000 / 70 = 14 pages a percent.
        let advice = advisor.advise(spent(2000, 70), 1000, DEFAULTS);
        assert_eq!(advice.cpu_percent, 70);
        assert_eq!(advice.pages_to_scan, 980);
        // 100 times faster than wanted: 10 % of a CPU are allowed in any case, 20000 / 4 * 10 capped.
        let advice = Advisor::default().advise(spent(2, 4), 1000, DEFAULTS);
        assert_eq!(advice.pages_to_scan, 2500);
        let tight = Limits {
            max_cpu: 5,
            ..DEFAULTS
        };
        let advice = Advisor::default().advise(spent(2000, 10), 10_000, tight);
        assert_eq!(advice.pages_to_scan, 10_000);
    }

    #[test]
    fn the_number_of_pages_is_bounded_from_both_sides() {
        let advice = Advisor::default().advise(spent(20_000, 1), 20_000, DEFAULTS);
        assert_eq!(advice.pages_to_scan, 30_000);
        let advice = Advisor::default().advise(spent(200, 60), 100, DEFAULTS);
        assert_eq!(advice.pages_to_scan, 500);
        // The upper bound wins over a lower one that is above it.
        let crossed = Limits {
            min_pages: 900,
            max_pages: 700,
            ..DEFAULTS
        };
        let advice = Advisor::default().advise(spent(200, 60), 100, crossed);
        assert_eq!(advice.pages_to_scan, 700);
    }

    #[test]
    fn nothing_overflows_or_divides_by_zero() {
        let numbers = [0, 1, 99, u64::from(u32::MAX), u64::MAX - 1, u64::MAX];
        for millisecs in numbers {
            for target_scan_time in [1, u64::MAX] {
                for pages in [0, 1, u32::MAX] {
                    for limit in numbers {
                        let mut advisor = Advisor::default();
                        let limits = Limits {
                            target_scan_time,
                            max_cpu: limit as u32,
                            min_pages: limit,
                            max_pages: limit,
                        };
                        let spent = Spent {
                            millisecs,
                            cpu_millisecs: limit,
                        };
                        for _ in 0..3 {
                            let advice = advisor.advise(spent, pages, limits);
                            assert!(advice.scan_time >= 1 && advice.cpu_percent >= 1);
                            assert_eq!(u64::from(advice.pages_to_scan), limit.min(u32::MAX.into()));
                        }
                    }
                }
            }
        }
    }
}
