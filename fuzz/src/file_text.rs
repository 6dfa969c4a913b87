//! What is written to the files: taken with the right value, or refused with the right error.

use std::ffi::CStr;

use kernel::prelude::*;
use proptest::prelude::*;

use crate::domain::Scope;
use crate::knobs;
use crate::knobs::Knobs;
use crate::knobs::Run;
use crate::knobs::MOST_THREADS;
use crate::text::any_text;
use crate::text::c_string;
use crate::text::decimal;
use crate::text::Outcome;

const U32: i128 = u32::MAX as i128;
const I32: i128 = i32::MAX as i128;
const U64: i128 = u64::MAX as i128;

fn outcome<T>(result: Result<T>) -> Outcome<T> {
    result.map_err(|error| match error {
        EINVAL => "EINVAL",
        ERANGE => "ERANGE",
        _ => "another error",
    })
}

/// Most files have one error for all that is wrong.
fn invalid<T>(_: &'static str) -> Outcome<T> {
    Err("EINVAL")
}

fn bounded(text: &[u8], least: i128, most: i128) -> Outcome<i128> {
    let number = decimal(text, false, 0, U64).or_else(invalid)?;
    if (least..=most).contains(&number) {
        Ok(number)
    } else {
        Err("EINVAL")
    }
}

fn truth(text: &[u8]) -> Outcome<bool> {
    let first = text.first().map(u8::to_ascii_lowercase);
    let second = text.get(1).map(u8::to_ascii_lowercase);
    match (first, second) {
        (Some(b'1' | b'y' | b't' | b'e'), _) | (Some(b'o'), Some(b'n')) => Ok(true),
        (Some(b'0' | b'n' | b'f' | b'd'), _) | (Some(b'o'), Some(b'f')) => Ok(false),
        _ => Err("EINVAL"),
    }
}

/// Compares everything that a file makes of a text with what the rules say.
pub(crate) fn check(text: &[u8]) -> Result<(), TestCaseError> {
    let text = c_string(text.to_vec());
    let (bytes, text): (&[u8], &CStr) = (text.as_bytes(), &text);

    prop_assert_eq!(
        outcome(knobs::run(text)),
        bounded(bytes, 0, 2).map(|number| [Run::Stop, Run::Merge, Run::Unmerge][number as usize])
    );
    prop_assert_eq!(
        outcome(knobs::any_uint(text)).map(i128::from),
        bounded(bytes, 0, U32)
    );
    prop_assert_eq!(
        outcome(knobs::any_ulong(text)).map(i128::from),
        bounded(bytes, 0, U64)
    );
    prop_assert_eq!(
        outcome(knobs::target_scan_time(text)).map(i128::from),
        bounded(bytes, 1, U64)
    );
    prop_assert_eq!(
        outcome(knobs::scan_threads(text)).map(i128::from),
        bounded(bytes, 1, 64)
    );
    // Two files tell a number that is too large from what is none.
    let wanted = decimal(bytes, false, 0, U64).and_then(|number| match number {
        0 => Ok(false),
        1 => Ok(true),
        _ => Err("EINVAL"),
    });
    prop_assert_eq!(outcome(knobs::merge_across_nodes(text)), wanted);
    let wanted = decimal(bytes, true, -I32 - 1, I32).and_then(|number| match number {
        2.. => Ok(number),
        _ => Err("EINVAL"),
    });
    prop_assert_eq!(
        outcome(knobs::max_page_sharing(text)).map(i128::from),
        wanted
    );
    prop_assert_eq!(outcome(knobs::use_zero_pages(text)), truth(bytes));
    prop_assert_eq!(outcome(knobs::smart_scan(text)), truth(bytes));
    let wanted = match bytes {
        b"none" | b"none\n" => Ok(false),
        b"scan-time" | b"scan-time\n" => Ok(true),
        _ => Err("EINVAL"),
    };
    prop_assert_eq!(outcome(knobs::advisor_mode(text)), wanted);
    let wanted = match bytes.strip_suffix(b"\n").unwrap_or(bytes) {
        b"global" => Ok(Scope::Global),
        b"cgroup" => Ok(Scope::Cgroup),
        b"user" => Ok(Scope::User),
        b"process" => Ok(Scope::Process),
        _ => Err("EINVAL"),
    };
    prop_assert_eq!(outcome(knobs::merge_scope(text)), wanted);
    Ok(())
}

proptest! {
    #[test]
    fn files_take_what_the_kernel_s_rules_say_and_nothing_else(text in any_text()) {
        check(&text)?;
    }

    #[test]
    fn nothing_out_of_bounds_gets_through(text in any_text()) {
        let text = c_string(text);
        if let Ok(threads) = knobs::scan_threads(&text) {
            prop_assert!(threads >= 1 && threads as usize <= MOST_THREADS);
        }
        if let Ok(limit) = knobs::max_page_sharing(&text) {
            prop_assert!(limit >= 2 && limit <= i32::MAX.unsigned_abs());
        }
        if let Ok(seconds) = knobs::target_scan_time(&text) {
            prop_assert!(seconds >= 1);
        }
    }

    #[test]
    fn what_was_set_is_what_is_read(number in any::<u64>(), on in any::<bool>()) {
        let knobs = Knobs::new();
        knobs.set_advisor_min_pages(number);
        knobs.set_advisor(on);
        let pages = if on { number as u32 } else { 100 };
        prop_assert_eq!((knobs.advisor(), knobs.pages_to_scan()), (on, pages));
        knobs.set_pages_to_scan(number as u32);
        knobs.set_max_page_sharing(number as u32);
        prop_assert_eq!((knobs.pages_to_scan(), knobs.max_page_sharing()), (number as u32, number as u32));
    }
}
