//! The files of the directory: names, modes, formats, and what they accept.

use std::os::unix::fs::MetadataExt;

use anyhow::Context;
use anyhow::Result;
use anyhow::ensure;
use ksm_e2e::Child;
use ksm_e2e::Content;
use ksm_e2e::Ksm;
use ksm_e2e::Passes;
use ksm_e2e::ksm::Counters;
use ksm_e2e::runner;
use ksm_e2e::wait::PATIENCE;
use libtest_mimic::Trial;
use nix::errno::Errno;
use nix::unistd::Uid;
use nix::unistd::seteuid;

/// Writable files and their values when nobody has changed them.
const WRITABLE: [(&str, u64); 5] = [
    ("run", 0),
    ("pages_to_scan", 100),
    ("sleep_millisecs", 20),
    ("merge_across_nodes", 1),
    ("max_page_sharing", 256),
];

const READ_ONLY: [&str; 6] = [
    "pages_shared",
    "pages_sharing",
    "pages_unshared",
    "pages_volatile",
    "pages_scanned",
    "full_scans",
];

ksm_e2e::tests![
    run_accepts_what_it_should,
    pages_to_scan_accepts_what_it_should,
    sleep_millisecs_accepts_what_it_should,
    merge_across_nodes_accepts_what_it_should,
    max_page_sharing_accepts_what_it_should,
    read_only_files_refuse_writes,
    only_root_may_write,
    a_new_sleeping_time_ends_the_sleep,
    pages_to_scan_limits_what_is_scanned_at_a_time,
    pages_scanned_and_full_scans_count,
];

/// Tests that must find what nobody has touched.
pub fn untouched_tests() -> Vec<Trial> {
    let tests: [(&str, runner::Body); 2] = [
        (
            "e2e::knobs::names_and_modes_are_right",
            names_and_modes_are_right,
        ),
        ("e2e::knobs::defaults_are_right", defaults_are_right),
    ];
    tests
        .map(|(name, body)| runner::untouched_test(name, body))
        .into()
}

fn names_and_modes_are_right(ksm: &Ksm) -> Result<()> {
    let files = WRITABLE
        .map(|(file, _)| (file, 0o644))
        .into_iter()
        .chain(READ_ONLY.map(|file| (file, 0o444)));
    for (file, mode) in files {
        let metadata = std::fs::metadata(ksm.dir().join(file)).context(file)?;
        let seen = metadata.mode() & 0o7777;
        ensure!(seen == mode, "{file} has mode {seen:o} instead of {mode:o}");
        ensure!(
            (metadata.uid(), metadata.gid()) == (0, 0),
            "{file} is not root's"
        );
        ensure!(
            metadata.size() == 4096,
            "{file} has size {}",
            metadata.size()
        );
        let text = ksm.text(file)?;
        let digits = text
            .strip_suffix('\n')
            .with_context(|| format!("{file} does not end its line: {text:?}"))?;
        let canonical = digits
            .parse::<u64>()
            .is_ok_and(|number| number.to_string() == digits);
        ensure!(
            canonical,
            "{file} contains {text:?} instead of a plain number"
        );
    }
    Ok(())
}

fn defaults_are_right(ksm: &Ksm) -> Result<()> {
    for (file, value) in WRITABLE {
        ensure!(
            ksm.read(file)? == value,
            "{file} is {} instead of {value}",
            ksm.read(file)?
        );
    }
    ksm.expect(Counters::merged(0, 0))
}

/// What a write of some bytes leads to.
type Case<'a> = (&'a [u8], Result<u64, Errno>);

/// Inputs that are no number in any file.
const NO_NUMBERS: [&[u8]; 24] = [
    b"\n", b"\0", b" ", b" 2", b"2 ", b"\t2", b"2\t", b"2\n\n", b"2\n2", b"2 3", b"2,", b"0x2",
    b"0b10", b"2.0", b"2e0", b"x", b"two", b"+", b"-", b"++2", b"+-2", b"--2", b"2-", b"\xff2",
];

/// Writes everything to the file; a refused write must leave the value, an accepted one must be taken whole.
fn check(ksm: &Ksm, file: &str, start: u64, cases: &[Case]) -> Result<()> {
    let refused = NO_NUMBERS.iter().map(|input| (*input, Err(Errno::EINVAL)));
    for (input, wanted) in cases.iter().copied().chain(refused) {
        ksm.write(file, start)?;
        let shown = String::from_utf8_lossy(&input[..input.len().min(40)]).into_owned();
        match (ksm.write_bytes(file, input), wanted) {
            (Ok(written), Ok(value)) => {
                ensure!(
                    written == input.len(),
                    "{file} took {written} of {} bytes of {shown:?}",
                    input.len()
                );
                let seen = ksm.text(file)?;
                ensure!(
                    seen == format!("{value}\n"),
                    "{file} is {seen:?} instead of {value} after {shown:?}"
                );
            }
            (Err(errno), Err(wanted)) => {
                ensure!(
                    errno == wanted,
                    "{file} refuses {shown:?} with {errno:?} instead of {wanted:?}"
                );
                ensure!(
                    ksm.read(file)? == start,
                    "{file} has changed though it refused {shown:?}"
                );
            }
            (result, wanted) => {
                anyhow::bail!("{file} given {shown:?}: {result:?} instead of {wanted:?}")
            }
        }
    }
    // Writing nothing does nothing.
    ksm.write(file, start)?;
    let written = ksm.write_bytes(file, b"");
    ensure!(
        written == Ok(0) && ksm.read(file)? == start,
        "{file} given nothing: {written:?}"
    );
    // The kernel passes on a page at most: here 4096 digits, of which the rest is not seen.
    let long = [b'0'; 5000];
    let taken = ksm.write_bytes(file, &long);
    let wanted = if start == 2 && file == "max_page_sharing" {
        Err(Errno::EINVAL)
    } else {
        Ok(4096)
    };
    ensure!(
        taken == wanted,
        "{file} given 5000 zeroes: {taken:?} instead of {wanted:?}"
    );
    ksm.write(file, start)
}

/// `digit` after so many zeroes that the text fills a page.
fn padded(digit: u8) -> Vec<u8> {
    let mut text = vec![b'0'; 4096];
    text[4095] = digit;
    text
}

const TOO_LONG: [u8; 200] = [b'9'; 200];

fn run_accepts_what_it_should(ksm: &Ksm) -> Result<()> {
    let padded = padded(b'2');
    let refused = Err(Errno::EINVAL);
    let cases: &[Case] = &[
        (b"0", Ok(0)),
        (b"1", Ok(1)),
        (b"2", Ok(2)),
        (b"1\n", Ok(1)),
        (b"+1", Ok(1)),
        (b"01", Ok(1)),
        (b"0002\n", Ok(2)),
        (b"1\0", Ok(1)),
        (b"1\n\0", Ok(1)),
        (b"2\0garbage", Ok(2)),
        (&padded, Ok(2)),
        (b"3", refused),
        (b"4", refused),
        (b"5", refused),
        (b"-1", refused),
        (b"-0", refused),
        (b"4294967296", refused),
        (b"4294967297", refused),
        (b"18446744073709551617", refused),
        (&TOO_LONG, refused),
    ];
    check(ksm, "run", 0, cases)?;
    check(ksm, "run", 2, cases)
}

/// Files that hold any 32-bit number and refuse everything else with the same error.
fn check_unsigned(ksm: &Ksm, file: &str) -> Result<()> {
    let padded = padded(b'7');
    let refused = Err(Errno::EINVAL);
    let cases: &[Case] = &[
        (b"0", Ok(0)),
        (b"1", Ok(1)),
        (b"42\n", Ok(42)),
        (b"+42", Ok(42)),
        (b"0042", Ok(42)),
        (b"42\0", Ok(42)),
        (b"42\0 garbage", Ok(42)),
        (b"2147483648", Ok(1 << 31)),
        (b"4294967295", Ok(u32::MAX.into())),
        (&padded, Ok(7)),
        (b"4294967296", refused),
        (b"18446744073709551615", refused),
        (b"18446744073709551616", refused),
        (&TOO_LONG, refused),
        (b"-1", refused),
        (b"-0", refused),
        (b"0xff", refused),
        (b"1k", refused),
    ];
    check(ksm, file, 33, cases)
}

fn pages_to_scan_accepts_what_it_should(ksm: &Ksm) -> Result<()> {
    check_unsigned(ksm, "pages_to_scan")
}

fn sleep_millisecs_accepts_what_it_should(ksm: &Ksm) -> Result<()> {
    check_unsigned(ksm, "sleep_millisecs")
}

fn merge_across_nodes_accepts_what_it_should(ksm: &Ksm) -> Result<()> {
    let padded = padded(b'1');
    let (refused, too_large) = (Err(Errno::EINVAL), Err(Errno::ERANGE));
    let cases: &[Case] = &[
        (b"0", Ok(0)),
        (b"1", Ok(1)),
        (b"0\n", Ok(0)),
        (b"+0", Ok(0)),
        (b"+1", Ok(1)),
        (b"001", Ok(1)),
        (b"0\0x", Ok(0)),
        (&padded, Ok(1)),
        (b"2", refused),
        (b"-1", refused),
        (b"-0", refused),
        (b"4294967296", refused),
        (b"18446744073709551615", refused),
        (b"18446744073709551616", too_large),
        (b"18446744073709551616x", too_large),
        (&TOO_LONG, too_large),
        (b"y", refused),
        (b"n", refused),
    ];
    check(ksm, "merge_across_nodes", 1, cases)?;
    check(ksm, "merge_across_nodes", 0, cases)
}

fn max_page_sharing_accepts_what_it_should(ksm: &Ksm) -> Result<()> {
    let padded = padded(b'7');
    let (refused, too_large) = (Err(Errno::EINVAL), Err(Errno::ERANGE));
    let cases: &[Case] = &[
        (b"2", Ok(2)),
        (b"3\n", Ok(3)),
        (b"+9", Ok(9)),
        (b"0256", Ok(256)),
        (b"9\0x", Ok(9)),
        (b"2147483647", Ok(i32::MAX as u64)),
        (&padded, Ok(7)),
        (b"1", refused),
        (b"0", refused),
        (b"-0", refused),
        (b"-1", refused),
        (b"-2", refused),
        (b"-2147483648", refused),
        (b"-2147483649", too_large),
        (b"2147483648", too_large),
        (b"4294967298", too_large),
        (b"18446744073709551618", too_large),
        (b"-9223372036854775808", too_large),
        (b"-9223372036854775809", too_large),
        (b"-18446744073709551616", too_large),
        (b"2147483648x", refused),
        (&TOO_LONG, too_large),
        (b"-+5", refused),
    ];
    check(ksm, "max_page_sharing", 2, cases)
}

fn read_only_files_refuse_writes(ksm: &Ksm) -> Result<()> {
    for file in READ_ONLY {
        let before = ksm.text(file)?;
        let result = ksm.write_bytes(file, b"0");
        ensure!(
            result == Err(Errno::EACCES),
            "writing to {file}: {result:?}"
        );
        ensure!(ksm.text(file)? == before, "{file} has changed");
    }
    Ok(())
}

fn only_root_may_write(ksm: &Ksm) -> Result<()> {
    seteuid(Uid::from_raw(65534))?;
    let attempts =
        WRITABLE.map(|(file, value)| (file, ksm.write_bytes(file, value.to_string().as_bytes())));
    let readable = WRITABLE
        .map(|(file, _)| file)
        .into_iter()
        .chain(READ_ONLY)
        .all(|file| ksm.text(file).is_ok());
    seteuid(Uid::from_raw(0))?;
    for (file, result) in attempts {
        ensure!(
            result == Err(Errno::EACCES),
            "writing to {file} as nobody: {result:?}"
        );
    }
    ensure!(readable, "a file cannot be read by everybody");
    Ok(())
}

fn a_new_sleeping_time_ends_the_sleep(ksm: &Ksm) -> Result<()> {
    let mut child = Child::spawn()?;
    child.map_mergeable(8, Content::Distinct(1))?;
    ksm.write("sleep_millisecs", 3_600_000)?;
    ksm.start()?;
    for hours in 2..5 {
        let before = ksm.read("full_scans")?;
        ksm.write("sleep_millisecs", hours * 3_600_000)?;
        ksm_e2e::wait::until("the thread wakes and makes a pass", PATIENCE, || {
            Ok(ksm.read("full_scans")? > before)
        })?;
    }
    Ok(())
}

fn pages_to_scan_limits_what_is_scanned_at_a_time(ksm: &Ksm) -> Result<()> {
    let mut child = Child::spawn()?;
    child.map_mergeable(64, Content::Distinct(1))?;
    let mut turns = Passes::of(ksm)?;
    ksm.write("pages_to_scan", 10)?;
    let start = ksm.read("pages_scanned")?;
    let mut last = start;
    while last - start < 3 * 64 {
        turns.turn()?;
        let now = ksm.read("pages_scanned")?;
        ensure!(
            (1..=10).contains(&(now - last)),
            "{} pages were scanned at a time",
            now - last
        );
        last = now;
    }
    Ok(())
}

fn pages_scanned_and_full_scans_count(ksm: &Ksm) -> Result<()> {
    let mut child = Child::spawn()?;
    child.map_mergeable(50, Content::Distinct(1))?;
    let (scanned, passes) = (ksm.read("pages_scanned")?, ksm.read("full_scans")?);
    ksm.scan_passes(5)?;
    let (scanned, passes) = (
        ksm.read("pages_scanned")? - scanned,
        ksm.read("full_scans")? - passes,
    );
    ensure!(passes >= 6, "only {passes} passes");
    ensure!(
        scanned == passes * 50,
        "{scanned} pages were scanned in {passes} passes over 50 pages"
    );
    Ok(())
}
