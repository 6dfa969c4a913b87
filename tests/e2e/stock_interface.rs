//! The files of ksm_rs against those of the kernel's own KSM: the same is done to both, in one boot, and must
//! have the same outcome.
//!
//! What files there are is read from the directory of the kernel's own KSM.

use std::collections::HashSet;
use std::fmt::Write as _;
use std::fs;
use std::fs::File;
use std::fs::OpenOptions;
use std::io;
use std::io::IoSlice;
use std::io::Read;
use std::io::Seek;
use std::io::SeekFrom;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::os::unix::fs::MetadataExt;
use std::os::unix::fs::OpenOptionsExt;

use anyhow::Context;
use anyhow::Result;
use anyhow::ensure;
use ksm_e2e::Child;
use ksm_e2e::Content;
use ksm_e2e::Ksm;
use ksm_e2e::child;
use ksm_e2e::ksm::Counters;
use ksm_e2e::ksm::OURS;
use ksm_e2e::ksm::STOCK;
use ksm_e2e::module;
use ksm_e2e::record::Record;
use ksm_e2e::settings;
use ksm_e2e::settings::Files;
use ksm_e2e::settings::Settings;
use ksm_e2e::settings::Values;
use nix::errno::Errno;
use nix::unistd::Gid;
use nix::unistd::Uid;

ksm_e2e::tests![module_test:
    names_modes_and_defaults_are_those_of_stock,
    every_write_to_untouched_files_ends_as_with_stock,
    every_write_to_changed_files_ends_as_with_stock,
    long_rows_of_writes_end_as_with_stock,
    files_open_read_and_write_in_pieces_as_with_stock,
    other_users_may_do_what_they_may_with_stock,
    // The last, for it is the one that uses stock.
    every_write_while_pages_are_shared_ends_as_with_stock,
];

/// Files that stock does not have, and why we do.
const OUR_OWN: [(&str, &str); 3] = [
    (
        "alloc_failures",
        "counts what stock keeps silent about: pages left alone for want of kernel memory",
    ),
    ("merge_scope", "stock merges everybody's pages"),
    ("scan_threads", "stock has one thread"),
];

/// Answers that may differ from stock's: topic, question, reason. An empty question stands for all.
const EXCUSED: [(&str, &str, &str); 0] = [];

fn excused(topic: &str, question: &str) -> bool {
    OUR_OWN.iter().any(|(file, _)| *file == topic)
        || EXCUSED
            .iter()
            .any(|(file, what, _)| *file == topic && (what.is_empty() || *what == question))
}

/// Observes stock, which nobody has used since boot, then ksm_rs: through the link in stock's place and in its own
/// directory. `observe` is given the names of stock's files.
fn compare(observe: impl Fn(&Ksm, &[String]) -> Result<Record>) -> Result<()> {
    // What stock counts of earlier use would be compared with a module that was not there then.
    ensure!(
        Ksm::at(STOCK).read("pages_scanned")? == 0,
        "stock KSM has been used since boot; this test must come before all that use it"
    );
    let stock = Ksm::at(STOCK);
    let names = settings::names(&stock)?;
    ensure!(names.len() > 10, "{STOCK} has hardly any files: {names:?}");
    let observe = |ksm: &Ksm| {
        let settings = Settings::remember(ksm)?;
        let record = observe(ksm, &names)?;
        settings.bring_back()?;
        ensure!(!record.is_empty(), "nothing was observed");
        Ok(record)
    };
    let wanted = observe(&stock).context("with stock KSM")?;
    stock.stop()?;
    module::load("")?;
    ensure!(
        fs::symlink_metadata(STOCK)?.is_symlink(),
        "{STOCK} is not a link"
    );
    let through_link = observe(&stock).context("with ksm_rs through the link")?;
    wanted.expect_same("stock", &through_link, "ksm_rs through the link", excused)?;
    let ours = observe(&Ksm::at(OURS)).context("with ksm_rs")?;
    wanted.expect_same("stock", &ours, "ksm_rs", excused)
}

/// What a call returned, in words.
fn outcome(result: io::Result<usize>) -> String {
    match result {
        Ok(number) => number.to_string(),
        Err(error) => match error.raw_os_error() {
            Some(number) => format!("{:?}", Errno::from_raw(number)),
            None => error.to_string(),
        },
    }
}

fn names_modes_and_defaults_are_those_of_stock(_: &Ksm) -> Result<()> {
    compare(|ksm, _| {
        let mut record = Record::default();
        let directory = fs::metadata(ksm.dir())?;
        record.note(
            "the directory",
            "mode and owner",
            format!(
                "{:o} {} {}",
                directory.mode(),
                directory.uid(),
                directory.gid()
            ),
        );
        for name in settings::names(ksm)? {
            let metadata = fs::symlink_metadata(ksm.dir().join(&name))?;
            record.note(&name, "mode", format!("{:o}", metadata.mode()));
            record.note(&name, "owner", metadata.uid());
            record.note(&name, "group", metadata.gid());
            record.note(&name, "size", metadata.size());
            record.note(&name, "links", metadata.nlink());
            record.note(&name, "text", ksm.text(&name)?);
        }
        Ok(record)
    })
}

/// Something to write, and how to call it.
struct Input {
    name: String,
    bytes: Vec<u8>,
}

impl Input {
    fn text(text: impl AsRef<[u8]>) -> Self {
        let bytes = text.as_ref().to_vec();
        Self {
            name: format!("\"{}\"", bytes.escape_ascii()),
            bytes,
        }
    }

    fn named(name: &str, bytes: Vec<u8>) -> Self {
        Self {
            name: name.to_owned(),
            bytes,
        }
    }
}

/// Everything that is written to every file.
fn inputs() -> Vec<Input> {
    // Small values, the defaults and limits of all files, and the edges of all types of numbers, each with its
    // neighbours.
    let around = [
        1,
        9,
        16,
        70,
        100,
        200,
        256,
        500,
        1000,
        2000,
        30_000,
        1 << 16,
        1 << 31,
        1 << 32,
        1 << 33,
        1 << 63,
        1 << 64,
        1 << 65,
        10_u128.pow(30),
    ];
    let mut numbers: Vec<u128> = around
        .into_iter()
        .flat_map(|number| number - 1..=number + 1)
        .collect();
    numbers.extend([3, 4, 5, 6, u128::MAX]);
    numbers.sort_unstable();
    numbers.dedup();
    let negative = [
        0,
        1,
        2,
        256,
        (1 << 31) - 1,
        1 << 31,
        (1 << 31) + 1,
        1 << 32,
        1 << 63,
        (1 << 63) + 1,
        1 << 64,
    ];
    let mut inputs: Vec<Input> = numbers
        .iter()
        .map(|number| Input::text(number.to_string()))
        .collect();
    inputs.extend(negative.map(|number: u128| Input::text(format!("-{number}"))));

    for number in ["0", "1", "2", "33"] {
        for (before, after) in [
            ("", "\n"),
            ("", "\n\n"),
            ("\n", ""),
            ("", "\r\n"),
            (" ", ""),
            ("", " "),
            ("", " \n"),
            ("\t", ""),
            ("", "\t"),
            ("+", ""),
            ("+", "\n"),
            ("++", ""),
            ("+-", ""),
            ("-+", ""),
            ("+ ", ""),
            ("0", ""),
            ("0000000000000000000000000", "\n"),
            ("0x", ""),
            ("0X", ""),
            ("0b", ""),
            ("0o", ""),
            ("", ".0"),
            ("", "e0"),
            ("", ","),
            ("", "k"),
            ("", "u"),
            ("", "_0"),
            ("", " 1"),
            ("", "\n1"),
            ("", "x"),
            ("", "\0"),
            ("", "\n\0"),
            ("", "\0\n"),
            ("", "\0garbage"),
            ("\0", ""),
            ("\"", "\""),
            ("\u{feff}", ""),
        ] {
            inputs.push(Input::text(format!("{before}{number}{after}")));
        }
    }
    inputs.extend(
        [
            "",
            "\n",
            "\n\n",
            "\0",
            "\0\0\n",
            " ",
            "  \n",
            "\t",
            "\r",
            "+",
            "-",
            "+\n",
            "0x",
            "0x\n",
            "0x10",
            "0x1g",
            "010",
            "ff",
            "1e9",
            "nan",
            "one",
            "\u{ff11}",
            "\u{661}",
            "y",
            "Y",
            "n",
            "N",
            "yes",
            "no",
            "y\n",
            "n\n",
            "nope",
            "yet",
            "t",
            "f",
            "true",
            "false",
            "True",
            "T\n",
            "on",
            "off",
            "On",
            "OFF",
            "oN",
            "oF",
            "o",
            "of",
            "o\n",
            "on\n",
            "off\n",
            "once",
            "offer",
            " on",
            "none",
            "none\n",
            "none\n\n",
            "none ",
            " none",
            "none\0",
            "none\0x",
            "NONE",
            "non",
            "nones",
            "[none]",
            "[none] scan-time",
            "[none] scan-time\n",
            "none [scan-time]",
            "none scan-time",
            "scan-time",
            "scan-time\n",
            "scan-time\n\n",
            "scan-time\0",
            "scan-time\n\0",
            "scan-time\0\n",
            "scan-time ",
            "scan-timex",
            "scan-tim",
            "scan_time",
            "Scan-Time",
            "scan-time none",
            "scan-time,none",
        ]
        .map(Input::text),
    );
    inputs.extend([
        Input::text(b"\xff"),
        Input::text(b"\xff1"),
        Input::text(b"1\xff"),
        Input::text(b"\x011"),
        Input::text(b"1\x80\n"),
        Input::named("all bytes", (0..=255).collect()),
        Input::named("all bytes from the last", (0..=255).rev().collect()),
    ]);

    for len in [21, 200, 4094, 4095, 4096, 4097, 5000, 8192, 70_000] {
        for (what, byte) in [
            ("zeroes", b'0'),
            ("ones", b'1'),
            ("nines", b'9'),
            ("spaces", b' '),
            ("newlines", b'\n'),
            ("NULs", 0),
            ("y", b'y'),
        ] {
            inputs.push(Input::named(&format!("{len} {what}"), vec![byte; len]));
        }
        for (what, text) in [("1", "1"), ("2\\n", "2\n"), ("scan-time", "scan-time")] {
            for (filler, byte) in [("zeroes", b'0'), ("spaces", b' '), ("NULs", 0)] {
                let mut bytes = vec![byte; len];
                bytes[..text.len()].copy_from_slice(text.as_bytes());
                inputs.push(Input::named(
                    &format!("{what} and {filler}, {len} bytes"),
                    bytes.clone(),
                ));
                bytes.rotate_left(text.len());
                inputs.push(Input::named(
                    &format!("{filler} and {what}, {len} bytes"),
                    bytes,
                ));
            }
        }
    }
    let mut seen = HashSet::new();
    inputs.retain(|input| seen.insert(input.bytes.clone()));
    inputs
}

/// Writes every input to each of the files, from the same values each time, and notes what comes of it: what write(2)
/// returned, and which files have changed.
fn write_everything(
    record: &mut Record,
    ksm: &Ksm,
    names: &[String],
    start: &Values,
    files: &Files,
) -> Result<()> {
    let inputs = inputs();
    for name in names.iter().filter(|name| ksm.has(name)) {
        for input in &inputs {
            let path = ksm.dir().join(name);
            let mut file = match OpenOptions::new().write(true).open(path) {
                Ok(file) => file,
                Err(error) => {
                    // Nothing was written, so that one look at the end is enough.
                    record.note(name, &input.name, format!("open: {}", outcome(Err(error))));
                    continue;
                }
            };
            let result = outcome(file.write(&input.bytes));
            let after = files.values()?;
            // Whoever opens the file afresh sees the same.
            let same = ksm.text(name)? == after[name];
            record.note(
                name,
                &input.name,
                format!(
                    "{result}{}{}",
                    settings::changes(start, &after),
                    if same { "" } else { ", and two readers differ" }
                ),
            );
            if after != *start {
                files.restore(start)?;
            }
        }
        record.note(
            name,
            "is left different",
            settings::changes(start, &files.values()?),
        );
    }
    Ok(())
}

fn every_write_to_untouched_files_ends_as_with_stock(_: &Ksm) -> Result<()> {
    compare(|ksm, names| {
        let files = Files::open(ksm, names)?;
        let mut record = Record::default();
        write_everything(&mut record, ksm, names, &files.values()?, &files)?;
        Ok(record)
    })
}

fn every_write_to_changed_files_ends_as_with_stock(_: &Ksm) -> Result<()> {
    compare(|ksm, names| {
        let files = Files::open(ksm, names)?;
        let mut record = Record::default();
        let start = files.change_all()?;
        for (name, text) in &start {
            record.note(name, "changed to", text);
        }
        write_everything(&mut record, ksm, names, &start, &files)?;
        Ok(record)
    })
}

fn every_write_while_pages_are_shared_ends_as_with_stock(_: &Ksm) -> Result<()> {
    let content = Content::Distinct(1);
    let mut child = Child::spawn()?;
    let here = child.map_mergeable(8, content)?;
    let there = child.map_mergeable(8, content)?;
    compare(|ksm, names| {
        let settings = Settings::remember(ksm)?;
        ksm.scan_fast()?;
        ksm.merge_until(Counters::merged(8, 8))?;
        // Whether `run` can be written is another matter: 2 would end this state.
        let names: Vec<String> = names
            .iter()
            .filter(|name| *name != "run")
            .cloned()
            .collect();
        let files = Files::open(ksm, &names)?;
        let mut record = Record::default();
        // The state of the counters is that of a pass that nobody has counted, so only changes are noted.
        write_everything(&mut record, ksm, &names, &files.values()?, &files)?;
        ksm.expect(Counters::merged(8, 8))?;
        ensure!(
            child.ksm_pages(here)? == 8 && child.ksm_pages(there)? == 8,
            "writing to files has unmerged pages"
        );
        for (step, input) in ["0", "3", "2", "0", "2", "2"].into_iter().enumerate() {
            let result = ksm.write_bytes("run", input.as_bytes());
            let result = outcome(result.map_err(io::Error::from));
            record.note(
                "run",
                format!("step {step}: {input}"),
                format!("{result} {}", ksm.counters()?),
            );
        }
        settings.bring_back()?;
        Ok(record)
    })?;
    child.verify(here, content)?;
    child.verify(there, content)
}

fn long_rows_of_writes_end_as_with_stock(_: &Ksm) -> Result<()> {
    const SEEDS: [u64; 3] = [1, 2, 3];
    const STEPS: usize = 800;
    let inputs = inputs();
    // Most inputs are refused most of the time; these are what changes files.
    let taken = ["0", "1", "2", "3", "100", "500", "none", "scan-time"].map(Input::text);
    let seeds = ksm_e2e::seeds(&SEEDS)?;
    compare(|ksm, names| {
        let files = Files::open(ksm, names)?;
        let writable: Vec<&String> = files.writable().collect();
        let start = files.values()?;
        let mut record = Record::default();
        for seed in &seeds {
            let mut random = fastrand::Rng::with_seed(*seed);
            let mut before = files.values()?;
            for step in 0..STEPS {
                let name = if random.u32(..8) == 0 {
                    &names[random.usize(..names.len())]
                } else {
                    writable[random.usize(..writable.len())]
                };
                let from: &[Input] = if random.bool() { &taken } else { &inputs };
                let input = &from[random.usize(..from.len())];
                let result = ksm.write_bytes(name, &input.bytes);
                let result = outcome(result.map_err(io::Error::from));
                let after = files.values()?;
                record.note(
                    format!("seed {seed}"),
                    format!("{step:03} {} to {name}", input.name),
                    format!("{result}{}", settings::changes(&before, &after)),
                );
                before = after;
            }
            files.restore(&start)?;
        }
        Ok(record)
    })
}

/// Opens a file in many ways, and does to it what there is to do besides plain reads and writes.
fn open_read_and_write(record: &mut Record, ksm: &Ksm, name: &str, files: &Files) -> Result<()> {
    let path = ksm.dir().join(name);
    let start = files.values()?;
    let mut note = |what: &str, result: io::Result<usize>| -> Result<()> {
        let changes = settings::changes(&start, &files.values()?);
        record.note(name, what, format!("{}{changes}", outcome(result)));
        files.restore(&start)
    };
    let open = |flags: i32| {
        let access = flags & libc::O_ACCMODE;
        OpenOptions::new()
            .read(access != libc::O_WRONLY)
            .write(access != libc::O_RDONLY)
            .custom_flags(flags & !libc::O_ACCMODE)
            .open(&path)
    };
    for (access_name, access) in [
        ("O_RDONLY", libc::O_RDONLY),
        ("O_WRONLY", libc::O_WRONLY),
        ("O_RDWR", libc::O_RDWR),
    ] {
        for (flag_name, flag) in [
            ("", 0),
            ("|O_TRUNC", libc::O_TRUNC),
            ("|O_APPEND", libc::O_APPEND),
            ("|O_CREAT", libc::O_CREAT),
            ("|O_CREAT|O_EXCL", libc::O_CREAT | libc::O_EXCL),
            ("|O_NONBLOCK", libc::O_NONBLOCK),
            ("|O_DIRECT", libc::O_DIRECT),
            ("|O_SYNC", libc::O_SYNC),
            ("|O_NOFOLLOW", libc::O_NOFOLLOW),
            ("|O_DIRECTORY", libc::O_DIRECTORY),
        ] {
            let opened = open(access | flag);
            note(
                &format!("open {access_name}{flag_name}"),
                opened.as_ref().map(|_| 0).map_err(errno_of),
            )?;
            let Ok(mut file) = opened else { continue };
            note(
                &format!("read after {access_name}{flag_name}"),
                file.read(&mut [0; 100]),
            )?;
            let mut file = open(access | flag)?;
            note(
                &format!("write after {access_name}{flag_name}"),
                file.write(b"2"),
            )?;
        }
    }

    // Reading in pieces and at any offset.
    if let Ok(mut file) = open(libc::O_RDONLY) {
        let mut text = String::new();
        loop {
            let mut byte = [0];
            match file.read(&mut byte)? {
                0 => break,
                _ => text.push(byte[0] as char),
            }
        }
        note("byte by byte", Ok(text.len()))?;
        ensure!(
            text == start[name],
            "{name} is {text:?} byte by byte instead of {:?}",
            start[name]
        );
        note("read at the end", file.read(&mut [0; 10]))?;
        for offset in (0..24).chain([4095, 4096, 4097, 1 << 31, 1 << 32, i64::MAX as u64]) {
            let mut bytes = [b'?'; 3];
            let result = file.read_at(&mut bytes, offset);
            note(
                &format!(
                    "pread at {offset} of {:?}",
                    bytes.escape_ascii().to_string()
                ),
                result,
            )?;
        }
        note("read nothing", file.read(&mut []))?;
        for (what, to) in [
            ("start", SeekFrom::Start(1)),
            ("current", SeekFrom::Current(1)),
            ("end", SeekFrom::End(0)),
            ("before the start", SeekFrom::Current(-100)),
        ] {
            let position = file.seek(to).map(|position| position as usize);
            note(&format!("seek {what}"), position)?;
        }
    } else {
        note("open for reading", Err(io::Error::last_os_error()))?;
    }

    // Writing at any offset, in pieces, and reading what was written through the same descriptor.
    if let Ok(file) = open(libc::O_WRONLY) {
        for offset in [0, 1, 2, 4095, 4096, 1 << 32, i64::MAX as u64] {
            for text in ["2", "0\n", "scan-time", "x", ""] {
                let result = file.write_at(text.as_bytes(), offset);
                note(&format!("pwrite {text:?} at {offset}"), result)?;
            }
        }
        note("ftruncate", file.set_len(0).map(|()| 0))?;
        note("fsync", file.sync_all().map(|()| 0))?;
    }
    for pieces in [
        &["2", "\n"] as &[&str],
        &["1", "0"],
        &["0", "0", "1"],
        &["", "2"],
        &["scan", "-time"],
        &["scan-time", "none"],
    ] {
        let Ok(mut file) = open(libc::O_RDWR) else {
            continue;
        };
        let slices: Vec<IoSlice> = pieces
            .iter()
            .map(|piece| IoSlice::new(piece.as_bytes()))
            .collect();
        note(
            &format!("{pieces:?} with writev"),
            file.write_vectored(&slices),
        )?;
        let mut file = open(libc::O_RDWR)?;
        let mut seen = String::new();
        for piece in pieces {
            let _ = write!(seen, " {}", outcome(file.write(piece.as_bytes())));
        }
        let mut bytes = [b'?'; 8];
        let result = file.read(&mut bytes);
        note(
            &format!(
                "{pieces:?} one by one:{seen}, then read {:?}",
                bytes.escape_ascii().to_string()
            ),
            result,
        )?;
    }
    note(
        "truncate",
        nix::unistd::truncate(&path, 0)
            .map(|()| 0)
            .map_err(io::Error::from),
    )?;
    Ok(())
}

fn errno_of(error: &io::Error) -> io::Error {
    io::Error::from_raw_os_error(error.raw_os_error().unwrap_or(0))
}

fn files_open_read_and_write_in_pieces_as_with_stock(_: &Ksm) -> Result<()> {
    compare(|ksm, names| {
        let files = Files::open(ksm, names)?;
        let mut record = Record::default();
        for name in names.iter().filter(|name| ksm.has(name)) {
            open_read_and_write(&mut record, ksm, name, &files).with_context(|| name.clone())?;
        }
        Ok(record)
    })
}

fn other_users_may_do_what_they_may_with_stock(_: &Ksm) -> Result<()> {
    compare(|ksm, names| {
        let files = Files::open(ksm, names)?;
        let start = files.values()?;
        let mut record = Record::default();
        let nobody = 65534;
        for (who, uid, gid) in [
            ("nobody", nobody, nobody),
            ("nobody in root's group", nobody, 0),
            ("root", 0, 0),
        ] {
            // What root has opened stays open for others.
            let opened: Vec<Option<File>> = names
                .iter()
                .map(|name| {
                    OpenOptions::new()
                        .write(true)
                        .open(ksm.dir().join(name))
                        .ok()
                })
                .collect();
            let answers = child::in_a_fork(|| {
                nix::unistd::setgroups(&[])?;
                nix::unistd::setgid(Gid::from_raw(gid))?;
                nix::unistd::setuid(Uid::from_raw(uid))?;
                let mut answers = Vec::new();
                for (name, opened) in names.iter().zip(&opened) {
                    let mut answer = String::new();
                    let read = fs::read_to_string(ksm.dir().join(name));
                    let _ = write!(answer, "read {}", outcome(read.map(|text| text.len())));
                    for input in ["2", "nonsense", "", "0\n"] {
                        let write = ksm.write_bytes(name, input.as_bytes());
                        let write = outcome(write.map_err(io::Error::from));
                        let _ = write!(answer, ", write {input:?} {write}");
                    }
                    if let Some(file) = opened {
                        let write = outcome(file.write_at(b"2", 0));
                        let _ = write!(answer, ", write to what root has opened {write}");
                    }
                    answers.push(answer);
                }
                Ok(answers)
            })?;
            for (name, answer) in names.iter().zip(answers) {
                if ksm.has(name) {
                    record.note(name, who, answer);
                }
            }
            let changes = settings::changes(&start, &files.values()?);
            record.note(who, "has changed", changes);
            files.restore(&start)?;
        }
        Ok(record)
    })
}
