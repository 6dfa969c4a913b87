//! Parameters of the module: the kernel makes numbers of them, the module says which ones it takes.

use kernel::str::parse_int::ParseInt;
use kernel::str::BStr;
use proptest::prelude::*;

use crate::knobs;
use crate::knobs::Run;
use crate::text::any_text;
use crate::text::c_string;

/// A number as Rust modules take it: after a minus sign, perhaps; in the base that its beginning says, or decimal; after a
/// plus sign, perhaps; from 0 to `most`.
fn number(text: &[u8], most: u64) -> Option<u64> {
    let (negative, text) = match text {
        [b'-', rest @ ..] => (true, rest),
        _ => (false, text),
    };
    let (base, digits) = match text {
        [b'0', b'x' | b'X', rest @ ..] => (16, rest),
        [b'0', b'o' | b'O', rest @ ..] => (8, rest),
        [b'0', b'b' | b'B', rest @ ..] => (2, rest),
        [b'0', ..] => (8, text),
        _ => (10, text),
    };
    let digits = digits.strip_prefix(b"+").unwrap_or(digits);
    let mut value = 0u128;
    for digit in digits {
        let digit = char::from(*digit).to_digit(base)?;
        value = (value * u128::from(base) + u128::from(digit)).min(1 << 100);
    }
    let most = if negative { 0 } else { u128::from(most) };
    (!digits.is_empty() && value <= most).then_some(value as u64)
}

/// Compares what becomes of a parameter with what the rules say.
pub(crate) fn check(text: &[u8]) -> Result<(), TestCaseError> {
    let text = c_string(text.to_vec());
    let bytes = text.as_bytes();
    let given = BStr::from_bytes(bytes);

    let run = u32::from_str(given).ok().and_then(Run::from_number);
    let wanted = number(bytes, 2).map(|at| [Run::Stop, Run::Merge, Run::Unmerge][at as usize]);
    prop_assert_eq!(run, wanted);

    let drop_in = u8::from_str(given).ok().and_then(knobs::drop_in);
    prop_assert_eq!(drop_in, number(bytes, 1).map(|number| number == 1));

    let address = u64::from_str(given).ok();
    prop_assert_eq!(address, number(bytes, u64::MAX));
    Ok(())
}

proptest! {
    #[test]
    fn parameters_take_what_makes_sense_and_nothing_else(text in any_text()) {
        check(&text)?;
    }

    #[test]
    fn no_number_but_those_that_make_sense_is_taken(number in any::<u32>(), small in any::<u8>()) {
        prop_assert_eq!(Run::from_number(number).map(|run| run as u32), (number <= 2).then_some(number));
        prop_assert_eq!(knobs::drop_in(small).map(u8::from), (small <= 1).then_some(small));
    }
}
