//! A real workload: the virtual machines of `make demo`, scanned as the demo does it.

use std::fs;
use std::fs::File;
use std::path::Path;
use std::process::Child;
use std::process::Command;
use std::process::Stdio;
use std::thread::sleep;
use std::time::Duration;
use std::time::Instant;

use anyhow::Context;
use anyhow::Result;
use anyhow::bail;
use anyhow::ensure;

use crate::record::Metric;
use crate::session::Session;
use crate::session::Turn;

/// How many guests there are.
const GUESTS: usize = 3;

/// Memory of each, in MiB.
const MIB: usize = 96;

/// Limit for guests to boot, and for savings to settle: under emulation in emulation.
const PATIENCE: Duration = Duration::from_secs(1200);

/// Savings have settled when they changed by less than 1 % in this many passes, and at least this long.
const SETTLED_PASSES: u64 = 3;
const SETTLED_TIME: Duration = Duration::from_secs(9);

/// A running QEMU, which ends with this.
struct Guest(Child);

impl Drop for Guest {
    fn drop(&mut self) {
        // What has ended by itself needs neither.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Boots guests for each turn, and scans them until nothing is left to save.
pub fn run(session: &mut Session) -> Result<()> {
    let images = session.images()?;
    session.note(format!(
        "{GUESTS} guests of {MIB} MiB; pages_to_scan=500 sleep_millisecs=20 smart_scan=1"
    ));
    session.alternate(|turn| {
        let guests = boot(&images)?;
        settle(turn)?;
        drop(guests);
        turn.clear()
    })
}

fn boot(images: &Path) -> Result<Vec<Guest>> {
    let mut guests = Vec::new();
    let mut consoles = Vec::new();
    for number in 1..=GUESTS {
        let console = format!("/tmp/guest{number}");
        let child = Command::new("qemu-system-x86_64")
            .args(["-accel", "kvm", "-cpu", "qemu64", "-smp", "1"])
            .args(["-m", &MIB.to_string(), "-nodefaults", "-display", "none"])
            .args(["-no-reboot", "-serial", "stdio"])
            .arg("-kernel")
            .arg(images.join("bzImage"))
            .arg("-initrd")
            .arg(images.join("initramfs.gz"))
            .arg("-append")
            .arg(format!(
                "console=ttyS0 quiet panic=-1 mce=off demo.name=guest{number}"
            ))
            // Its end would end QEMU.
            .stdin(Stdio::piped())
            .stdout(File::create(&console)?)
            .spawn()
            .context("starting qemu-system-x86_64")?;
        guests.push(Guest(child));
        consoles.push(console);
    }
    let deadline = Instant::now() + PATIENCE;
    for (guest, console) in guests.iter_mut().zip(&consoles) {
        loop {
            let said = String::from_utf8_lossy(&fs::read(console)?).into_owned();
            if said.contains(" ready") {
                break;
            }
            let ended = guest.0.try_wait()?;
            if ended.is_some() || Instant::now() > deadline {
                bail!("a guest does not boot ({ended:?}); it said: {said}");
            }
            sleep(Duration::from_millis(100));
        }
    }
    Ok(guests)
}

/// Scans until savings have settled; records what it cost until 95 % of them were there.
fn settle(turn: &mut Turn<'_>) -> Result<()> {
    let ksm = turn.ksm;
    ksm.write("pages_to_scan", 500)?;
    ksm.write("sleep_millisecs", 20)?;
    ksm.write("smart_scan", 1)?;
    let start = Instant::now();
    let cpu = ksm.cpu()?;
    let mut samples = Vec::new();
    let mut mark = (0, 0, start);
    ksm.start()?;
    loop {
        sleep(Duration::from_millis(250));
        let saved = ksm.read("pages_sharing")?;
        let passes = ksm.read("full_scans")?;
        samples.push((saved, ksm.cpu()? - cpu));
        let change = saved.abs_diff(mark.0);
        if saved == 0 || change * 100 >= mark.0 {
            mark = (saved, passes, Instant::now());
        } else if passes >= mark.1 + SETTLED_PASSES && mark.2.elapsed() >= SETTLED_TIME {
            break;
        }
        ensure!(start.elapsed() < PATIENCE, "savings do not settle");
    }
    ksm.stop()?;
    let last = samples.last().map_or(0, |&(saved, _)| saved);
    let reached = samples
        .iter()
        .find(|&&(saved, _)| saved * 100 >= last * 95)
        .context("nothing was saved")?;
    turn.record(
        "guests",
        None,
        Metric::CpuSecondsTo95,
        reached.1.as_secs_f64(),
    );
    turn.record("guests", None, Metric::MibSaved, last as f64 / 256.0);
    Ok(())
}
