//! What the module does not load with, and what is left of it then: nothing, but one line in the log that says what was
//! found, what was wanted, and what to do.

use std::collections::BTreeMap;
use std::fs;
use std::fs::File;
use std::path::Path;

use anyhow::Context;
use anyhow::Result;
use anyhow::ensure;
use ksm_e2e::Child;
use ksm_e2e::Content;
use ksm_e2e::Ksm;
use ksm_e2e::Region;
use ksm_e2e::doctor::Image;
use ksm_e2e::kmsg::Log;
use ksm_e2e::ksm::Counters;
use ksm_e2e::ksm::STOCK;
use ksm_e2e::ksm::UNMERGE;
use ksm_e2e::module;
use ksm_e2e::procfs;
use ksm_e2e::trace::Trace;
use nix::errno::Errno;
use nix::kmod::ModuleInitFlags;
use nix::kmod::finit_module;

ksm_e2e::tests![module_test:
    wrong_parameters_are_refused,
    parameters_that_do_not_exist_are_named,
    a_second_load_is_refused,
    a_kernel_whose_own_ksm_is_in_use_is_refused,
    a_kernel_without_a_symbol_is_refused,
    a_kernel_that_hides_its_symbols_is_refused,
    a_kernel_with_other_structures_is_refused,
    the_address_of_kallsyms_lookup_name_takes_the_place_of_a_kprobe,
    a_failure_late_in_loading_takes_everything_back,
];

const CONTENT: Content = Content::Distinct(1);
const PAGES: usize = 16;

const OTHER_KERNEL: &str =
    "this kernel is too new or too old for this module: get a version of ksm_rs that supports it";

fn stock() -> Ksm {
    Ksm::at(STOCK)
}

/// Two processes with equal pages.
struct Pair([(Child, Region); 2]);

impl Pair {
    fn spawn() -> Result<Self> {
        let mapped = || -> Result<_> {
            let mut child = Child::spawn()?;
            let region = child.map_mergeable(PAGES, CONTENT)?;
            Ok((child, region))
        };
        Ok(Self([mapped()?, mapped()?]))
    }

    fn verify(&mut self) -> Result<()> {
        for (child, region) in &mut self.0 {
            child.verify(*region, CONTENT)?;
        }
        Ok(())
    }
}

/// Merges a pair of processes: the module that is loaded works.
fn expect_work(ksm: &Ksm) -> Result<()> {
    let mut pair = Pair::spawn()?;
    ksm.scan_fast()?;
    ksm.merge_until(Counters::merged(PAGES as u64, PAGES as u64))?;
    pair.verify()?;
    ksm.unmerge()?;
    pair.verify()
}

fn names_in(dir: &str) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(dir).with_context(|| dir.to_owned())? {
        names.push(entry?.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    Ok(names)
}

/// What a module could leave behind.
#[derive(Debug, PartialEq)]
struct System {
    stock: BTreeMap<String, (u32, String)>,
    folders: BTreeMap<&'static str, Vec<String>>,
    files: BTreeMap<&'static str, String>,
    caches: Vec<String>,
    thread: Option<i32>,
}

impl System {
    fn now() -> Result<Self> {
        let mut folders = BTreeMap::new();
        for dir in [
            "/sys/kernel/mm",
            "/sys/module",
            "/sys/kernel/debug",
            "/sys/kernel/slab",
        ] {
            folders.insert(dir, names_in(dir)?);
        }
        let mut files = BTreeMap::new();
        for file in [
            "/sys/kernel/debug/kprobes/list",
            "/sys/kernel/tracing/enabled_functions",
        ] {
            files.insert(file, fs::read_to_string(file).context(file)?);
        }
        let slabs = fs::read_to_string("/proc/slabinfo")?;
        let caches = slabs
            .lines()
            .filter_map(|line| line.split_whitespace().next());
        Ok(Self {
            stock: stock().snapshot()?,
            folders,
            files,
            caches: caches.map(str::to_owned).collect(),
            thread: procfs::pid_of("ksmd_rs")?,
        })
    }

    fn expect_unchanged(&self) -> Result<()> {
        let now = Self::now()?;
        ensure!(
            now == *self,
            "something was left behind: {self:#?} became {now:#?}"
        );
        // A probe that was left would be called now, at an address where nothing is any more.
        let mut pair = Pair::spawn()?;
        let mut fork = pair.0[0].0.fork()?;
        fork.verify(pair.0[0].1, CONTENT)?;
        fork.exit()?;
        pair.verify()
    }
}

/// Expects a changed copy of the module to be refused with this error and this line, and to leave nothing.
fn expect_refusal(image: &Image, wanted: Errno, line: &str) -> Result<()> {
    let before = System::now()?;
    let seen = module::expect_refusal(wanted, || module::try_load_image(image.bytes(), ""))?;
    ensure!(seen == line, "the log says {seen:?} instead of {line:?}");
    before.expect_unchanged()
}

fn wrong_parameters_are_refused(ksm: &Ksm) -> Result<()> {
    let before = System::now()?;
    // What is no number, or no truth, the kernel refuses by itself.
    let cases = [
        ("run=3", "parameter run=3 makes no sense; wanted 0, 1 or 2"),
        (
            "run=4294967295",
            "parameter run=4294967295 makes no sense; wanted 0, 1 or 2",
        ),
        ("run=4294967296", "`4294967296' invalid for parameter `run'"),
        ("run=-1", "`-1' invalid for parameter `run'"),
        ("run=x", "`x' invalid for parameter `run'"),
        ("run=", "`' invalid for parameter `run'"),
        ("run=1x", "`1x' invalid for parameter `run'"),
        ("run", "`' invalid for parameter `run'"),
        ("drop_in=maybe", "`maybe' invalid for parameter `drop_in'"),
        ("drop_in=256", "`256' invalid for parameter `drop_in'"),
        (
            "drop_in=2",
            "parameter drop_in=2 makes no sense; wanted 0 or 1",
        ),
        (
            "kallsyms_lookup_name=where",
            "`where' invalid for parameter `kallsyms_lookup_name'",
        ),
        (
            "kallsyms_lookup_name=-1",
            "`-1' invalid for parameter `kallsyms_lookup_name'",
        ),
    ];
    for (parameters, wanted) in cases {
        let line = module::expect_refusal(Errno::EINVAL, || module::try_load(parameters))
            .with_context(|| format!("loading with {parameters:?}"))?;
        ensure!(
            line == wanted,
            "loading with {parameters:?}: the log says {line:?} instead of {wanted:?}"
        );
    }
    // Nor may one be given twice.
    let twice = "run=1 drop_in=0 run=2";
    let line = module::expect_refusal(Errno::EEXIST, || module::try_load(twice))
        .with_context(|| format!("loading with {twice:?}"))?;
    ensure!(
        line == "`2' invalid for parameter `run'",
        "loading with {twice:?}: the log says {line:?}"
    );
    before.expect_unchanged()?;
    module::load("")?;
    expect_work(ksm)
}

fn parameters_that_do_not_exist_are_named(ksm: &Ksm) -> Result<()> {
    // They are not the module's to refuse: the kernel says so in the log, and loads it.
    let mut log = Log::from_now()?;
    module::load("no_such_parameter=1")?;
    let lines = log.lines()?;
    let told: Vec<&String> = lines
        .iter()
        .filter(|line| line.contains("no_such_parameter"))
        .collect();
    ensure!(
        told == ["ksm_rs: unknown parameter 'no_such_parameter' ignored"],
        "the log does not say that the parameter is unknown: {lines:#?}"
    );
    expect_work(ksm)
}

fn a_second_load_is_refused(ksm: &Ksm) -> Result<()> {
    module::load("")?;
    let mut pair = Pair::spawn()?;
    ksm.scan_fast()?;
    ksm.merge_until(Counters::merged(PAGES as u64, PAGES as u64))?;
    let files = ksm.snapshot()?;
    let image = Image::read()?;
    let copy = format!("/run/ksm-e2e-copy-{}.ko", std::process::id());
    fs::write(&copy, image.bytes())?;
    let file = File::open(&copy)?;
    fs::remove_file(&copy)?;
    let results = [
        module::try_load("")?,
        module::try_load("run=1")?,
        // It is the name inside that counts.
        finit_module(&file, c"", ModuleInitFlags::empty()),
        module::try_load_image(image.bytes(), "")?,
    ];
    ensure!(
        results == [Err(Errno::EEXIST); 4],
        "loading it twice: {results:?}"
    );
    ensure!(
        ksm.snapshot()? == files,
        "the second load has changed something"
    );
    ensure!(
        fs::read_link(STOCK)? == Path::new("ksm_rs"),
        "the link leads elsewhere"
    );
    ksm.expect(Counters::merged(PAGES as u64, PAGES as u64))?;
    pair.verify()
}

fn a_kernel_whose_own_ksm_is_in_use_is_refused(ksm: &Ksm) -> Result<()> {
    let mut pair = Pair::spawn()?;
    let knobs = stock().remember()?;
    stock().scan_fast()?;
    if stock().has("smart_scan") {
        stock().write("smart_scan", 0)?;
    }
    stock().merge_until(Counters::merged(PAGES as u64, PAGES as u64))?;
    let refused = |run: u64, shared: u64| -> Result<()> {
        let before = System::now()?;
        let line = module::expect_refusal(Errno::EBUSY, || module::try_load(""))?;
        let wanted = format!(
            "the kernel's own KSM is in use (run={run} pages_shared={shared}); wanted run=0 pages_shared=0: echo 2 > /sys/kernel/mm/ksm/run; echo 0 > /sys/kernel/mm/ksm/run"
        );
        ensure!(
            line == wanted,
            "the log says {line:?} instead of {wanted:?}"
        );
        before.expect_unchanged()
    };
    refused(0, PAGES as u64).context("with pages merged")?;
    // Its thread sleeps all the time, so that its counters do not change under our eyes.
    stock().write("sleep_millisecs", 3_600_000)?;
    stock().unmerge()?;
    refused(UNMERGE, 0).context("with run=2")?;
    // What the line says helps.
    stock().stop()?;
    pair.verify()?;
    drop(pair);
    module::load("")?;
    expect_work(ksm)?;
    module::unload()?;
    knobs.finish()
}

fn a_kernel_without_a_symbol_is_refused(ksm: &Ksm) -> Result<()> {
    let image = Image::read()?;
    // A function and a variable.
    let (function, variable) = (
        ("folio_free_swap", "folio_free_swxp"),
        ("ksm_thread_mutex", "ksm_thread_mutix"),
    );
    let cases = [vec![function], vec![variable], vec![function, variable]];
    for names in cases {
        let mut doctored = image.clone();
        for (old, new) in &names {
            doctored = doctored.replace_name(old, new)?;
        }
        let missing: Vec<&str> = names.iter().map(|(_, new)| *new).collect();
        let line = format!(
            "this kernel has no symbol {}; wanted all of them: load on a kernel built with CONFIG_KSM=y CONFIG_KALLSYMS_ALL=y CONFIG_DEBUG_INFO_BTF=y",
            missing.join(" ")
        );
        expect_refusal(&doctored, Errno::ENOENT, &line)?;
    }
    module::load("")?;
    expect_work(ksm)
}

fn a_kernel_that_hides_its_symbols_is_refused(ksm: &Ksm) -> Result<()> {
    let doctored = Image::read()?.replace_name("kallsyms_lookup_name", "kallsyms_lookup_nome")?;
    expect_refusal(
        &doctored,
        Errno::ENOENT,
        "a kprobe on kallsyms_lookup_name failed with error -2; pass its address from /proc/kallsyms as kallsyms_lookup_name=0x...",
    )?;
    module::load("")?;
    expect_work(ksm)
}

fn a_kernel_with_other_structures_is_refused(ksm: &Ksm) -> Result<()> {
    let image = Image::read()?;
    let (structure, member) = ("ksm_stable_node", "kpfn");
    let (shifted, offset) = image.clone().shift_member(structure, member)?;
    let wanted = offset + 8;
    let line = format!(
        "struct {structure}: {member} found at offset {offset}, wanted at offset {wanted}; {OTHER_KERNEL}"
    );
    expect_refusal(&shifted, Errno::EINVAL, &line)?;

    let renamed = image.clone().replace(member.as_bytes(), b"kpfx")?;
    let line =
        format!("struct {structure}: kpfx not found, wanted at offset {offset}; {OTHER_KERNEL}");
    expect_refusal(&renamed, Errno::EINVAL, &line)?;

    let structure = "ksm_rmap_item";
    let renamed = image.replace(structure.as_bytes(), b"ksm_rmap_itex")?;
    let line = format!("struct ksm_rmap_itex: not found, 64 bytes wanted; {OTHER_KERNEL}");
    expect_refusal(&renamed, Errno::EINVAL, &line)?;

    module::load("")?;
    expect_work(ksm)
}

/// The address of a function of the kernel.
fn address_of(function: &str) -> Result<u64> {
    let symbols = fs::read_to_string("/proc/kallsyms")?;
    let address = symbols.lines().find_map(|line| {
        let mut words = line.split_whitespace();
        let address = words.next()?;
        (words.nth(1)? == function && words.next().is_none()).then_some(address)
    });
    let address = u64::from_str_radix(address.context("/proc/kallsyms")?, 16)?;
    ensure!(address != 0, "/proc/kallsyms hides addresses");
    Ok(address)
}

fn the_address_of_kallsyms_lookup_name_takes_the_place_of_a_kprobe(ksm: &Ksm) -> Result<()> {
    let address = address_of("kallsyms_lookup_name")?;
    let kprobes = |parameters: &str| -> Result<usize> {
        let trace = Trace::new()?;
        trace.function("register_kprobe")?;
        module::load(parameters)?;
        Ok(trace.lines()?.len())
    };
    for parameters in [
        format!("kallsyms_lookup_name={address:#x}"),
        format!("kallsyms_lookup_name={address}"),
    ] {
        let set = kprobes(&parameters)?;
        ensure!(
            set == 0,
            "with {parameters:?} there were {set} kprobes nevertheless"
        );
        expect_work(ksm)?;
        module::unload()?;
    }
    let set = kprobes("")?;
    ensure!(set == 1, "there were {set} kprobes");
    let left = fs::read_to_string("/sys/kernel/debug/kprobes/list")?;
    ensure!(left.is_empty(), "a kprobe was left behind: {left}");
    expect_work(ksm)
}

fn a_failure_late_in_loading_takes_everything_back(ksm: &Ksm) -> Result<()> {
    // The module's folder gets a name that is taken: by then the thread runs, and may have merged pages.
    let taken = names_in("/sys/kernel/mm")?
        .into_iter()
        .find(|name| name.len() <= 6 && name != "ksm")
        .context("no folder in /sys/kernel/mm has a short name")?;
    let mut name = taken.into_bytes();
    name.resize(7, 0);
    // The folder of its events has the same name.
    let image = Image::read()?.replace_all(b"ksm_rs\0", &name)?;
    let mut pair = Pair::spawn()?;
    let before = System::now()?;
    for run in [0, 1, 1, 1, 2] {
        let result = module::try_load_image(image.bytes(), &format!("run={run}"))?;
        ensure!(result == Err(Errno::ENOMEM), "loading: {result:?}");
        ensure!(
            !module::loaded()?,
            "the module is there though it was refused"
        );
        before.expect_unchanged()?;
        for (child, region) in &pair.0 {
            ensure!(
                child.ksm_pages(*region)? == 0,
                "process {} has merged pages",
                child.pid()
            );
        }
        pair.verify()?;
    }
    drop(pair);
    module::load("")?;
    expect_work(ksm)
}
