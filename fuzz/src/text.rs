//! Text that somebody might write to a file or give as a parameter, and the rule by which the kernel takes it for a
//! number, in our own words.

use std::ffi::CString;

use proptest::prelude::*;

/// What comes of a text: a value, or the name of an error.
pub(crate) type Outcome<T> = Result<T, &'static str>;

/// A decimal number from `least` to `most`, after a plus sign or, if `signed`, a minus sign, perhaps; a newline may
/// follow.
///
/// Digits that are too many for any of the kernel's integers make `ERANGE` before anything else is looked at, a number
/// that is only too large for the type does so after.
pub(crate) fn decimal(text: &[u8], signed: bool, least: i128, most: i128) -> Outcome<i128> {
    let (negative, digits) = match text.split_first() {
        Some((b'+', rest)) => (false, rest),
        Some((b'-', rest)) if signed => (true, rest),
        _ => (false, text),
    };
    let len = digits
        .iter()
        .take_while(|byte| byte.is_ascii_digit())
        .count();
    let (digits, rest) = digits.split_at(len);
    let mut value = 0u128;
    for digit in digits {
        // Once it is beyond 64 bits it stays so.
        value = (10 * value + u128::from(digit - b'0')).min(1 << 100);
    }
    if value > u128::from(u64::MAX) {
        return Err("ERANGE");
    }
    if digits.is_empty() || !matches!(rest, [] | [b'\n']) {
        return Err("EINVAL");
    }
    let value = if negative {
        -(value as i128)
    } else {
        value as i128
    };
    if (least..=most).contains(&value) {
        Ok(value)
    } else {
        Err("ERANGE")
    }
}

/// Text, as C takes it: up to the first NUL.
pub(crate) fn c_string(mut text: Vec<u8>) -> CString {
    let len = text.iter().position(|byte| *byte == 0);
    text.truncate(len.unwrap_or(text.len()));
    CString::new(text).expect("no NUL is left")
}

/// The edges of all types of numbers, and of what files take.
fn edges() -> impl Strategy<Value = i128> {
    let around = prop::sample::select(vec![
        0,
        1,
        2,
        8,
        64,
        100,
        256,
        1 << 8,
        1 << 16,
        1 << 31,
        1 << 32,
        1 << 63,
        1 << 64,
        1 << 65,
        1 << 100,
    ]);
    (around, -2i128..=2, any::<bool>()).prop_map(|(edge, step, negative)| {
        let number: i128 = edge + step;
        if negative {
            -number
        } else {
            number
        }
    })
}

/// A number, in some base, with something before and behind it.
fn decorated() -> impl Strategy<Value = Vec<u8>> {
    let number = prop_oneof![
        3 => edges(),
        1 => any::<i64>().prop_map(i128::from),
        1 => -3i128..70,
    ];
    let before = prop::sample::select(vec![
        "",
        "",
        "",
        "",
        "",
        "+",
        "-",
        "++",
        "+-",
        " ",
        "\n",
        "0",
        "000",
        "+00",
        "0x",
        "0X",
        "0b",
        "0o",
        "-0x",
        "+0x",
        "\t",
        "0000000000000000000000000000000000000000",
    ]);
    let behind = prop::sample::select(vec![
        "",
        "",
        "",
        "",
        "\n",
        "\n",
        "\n\n",
        " ",
        "\r\n",
        "\0",
        "\0x",
        "\n\0",
        "\n1",
        "0",
        "00000000000000000000",
        "x",
        ".0",
        "e1",
        "k",
        "_",
        "u",
    ]);
    (before, number, behind, 0u8..8).prop_map(|(before, number, behind, base)| {
        let (sign, size) = (if number < 0 { "-" } else { "" }, number.unsigned_abs());
        let digits = match base {
            0 => format!("{size:x}"),
            1 => format!("{size:o}"),
            2 => format!("{size:b}"),
            _ => size.to_string(),
        };
        format!("{sign}{before}{digits}{behind}").into_bytes()
    })
}

/// One of the words that some file takes, or nearly.
fn worded() -> impl Strategy<Value = Vec<u8>> {
    let words = prop::sample::select(vec![
        "none",
        "scan-time",
        "user",
        "global",
        "cgroup\n",
        "process",
        "y",
        "Y",
        "n",
        "N",
        "t",
        "f",
        "true",
        "False",
        "on",
        "off",
        "On",
        "OFF",
        "o",
        "O",
        "oops",
        "enable",
        "disabled",
        "e",
        "d",
        "yes",
        "no",
    ]);
    let behind = prop::sample::select(vec!["", "\n", "\n\n", " ", "x", "\0", "\0x", "\n\0"]);
    let change = prop::option::of((any::<prop::sample::Index>(), any::<u8>()));
    (words, behind, change).prop_map(|(word, behind, change)| {
        let mut text = format!("{word}{behind}").into_bytes();
        if let Some((at, byte)) = change {
            let at = at.index(text.len());
            text[at] = byte;
        }
        text
    })
}

/// Any text, mostly such as is nearly right.
pub(crate) fn any_text() -> impl Strategy<Value = Vec<u8>> {
    let near = prop::sample::select(b"+-0123456789 \n\txXbo.ef".to_vec());
    prop_oneof![
        6 => decorated(),
        2 => worded(),
        2 => prop::collection::vec(near, 0..12),
        1 => prop::collection::vec(any::<u8>(), 0..40),
        1 => (prop::sample::select(b"019 \n".to_vec()), 0usize..5000).prop_map(|(byte, len)| vec![byte; len]),
    ]
}
