//! A guest of KVM whose memory is merged: it copies pages, and the host reads and writes them too.

use std::arch::x86_64::__cpuid;
use std::path::Path;
use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering;
use std::time::Duration;
use std::time::Instant;

use anyhow::Context;
use anyhow::Result;
use anyhow::bail;
use anyhow::ensure;
use ksm_e2e::Region;
use ksm_e2e::memory;
use ksm_e2e::memory::Mapping;
use ksm_e2e::memory::PAGE;
use ksm_e2e::trace::Trace;
use ksm_e2e::wait;
use kvm_bindings::kvm_regs;
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::Kvm;
use kvm_ioctls::VcpuExit;
use kvm_ioctls::VcpuFd;
use nix::sys::signal::SaFlags;
use nix::sys::signal::SigAction;
use nix::sys::signal::SigHandler;
use nix::sys::signal::SigSet;
use nix::sys::signal::Signal;
use nix::sys::signal::sigaction;
use nix::unistd::alarm;

use crate::actor::Stage;

/// `rep movsw; hlt`: copies CX words from DS:SI to ES:DI.
const CODE: [u8; 3] = [0xf3, 0xa5, 0xf4];

/// Where the guest finds its program; its other memory begins at 0.
const CODE_AT: u64 = 0x40_0000;

/// How long the guest may take for a page, on a fast kernel; so much that it is stuck if it takes longer.
const LIMIT: Duration = Duration::from_secs(60);

/// How often it is asked whether it is stuck, in seconds.
const ASKED: u32 = 2;

/// How long a guest that is stuck is watched, in seconds.
const WATCHED: u32 = 1;

/// How many events are told of it.
const TOLD: usize = 200;

/// How many guests the emulated CPU may lose in one round; one in hours was seen.
const LOSSES: u32 = 2;

/// How many it has lost.
static LOST: AtomicU32 = AtomicU32::new(0);

/// Where the kernel's own addresses begin.
const KERNEL: u64 = 1 << 63;

/// Bit 1 of the flags, which is always set.
const FLAGS: u64 = 2;

/// Whether this machine has KVM.
pub fn available() -> bool {
    Path::new("/dev/kvm").exists()
}

/// How a guest's copying ended.
enum Outcome {
    Copied,
    /// What the vCPU executes is not the guest's program any more, and no fault of its memory: it has the registers of the kernel
    /// that runs it, and goes on behind that kernel's VMRUN. Seen with QEMU 7.2's emulation of SVM, which must have left
    /// the guest twice.
    Lost,
}

/// Whether QEMU emulates this CPU.
fn emulated() -> bool {
    let leaf = __cpuid(0x4000_0000);
    [leaf.ebx, leaf.ecx, leaf.edx]
        .map(u32::to_le_bytes)
        .concat()
        == b"TCGTCGTCGTCG"
}

/// Whether [`Outcome::Lost`]: the guest, which does not touch its descriptor table, has none at such an address.
fn is_lost(vcpu: &VcpuFd) -> Result<bool> {
    Ok(emulated() && vcpu.get_sregs()?.gdt.base >= KERNEL)
}

/// See the module.
pub fn guest(stage: &mut Stage) -> Result<()> {
    // Without SA_RESTART, so that the guest is interrupted.
    let ignore = SigAction::new(
        SigHandler::Handler(interrupt),
        SaFlags::empty(),
        SigSet::empty(),
    );
    // SAFETY: The handler does nothing.
    unsafe { sigaction(Signal::SIGALRM, &ignore) }?;
    let pages = stage.rng.usize(20..150);
    let region = stage.mergeable(pages)?;
    let code = stage.map(Mapping::pages(1))?;
    // SAFETY: The page was just mapped.
    unsafe { memory::write(code.addr, &CODE) };

    let kvm = Kvm::new().context("/dev/kvm")?;
    let vm = loop {
        match kvm.create_vm() {
            // Everybody may have been frozen and thawed.
            Err(error) if error.errno() == libc::EINTR => stage.beat(),
            made => break made.context("KVM_CREATE_VM")?,
        }
    };
    for (slot, memory, at) in [(0, region, 0), (1, code, CODE_AT)] {
        let memory = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: at,
            memory_size: memory.len() as u64,
            userspace_addr: memory.addr as u64,
        };
        // SAFETY: The memory is mapped until the step ends, when there is no guest any more.
        unsafe { vm.set_user_memory_region(memory) }.context("KVM_SET_USER_MEMORY_REGION")?;
    }
    let mut vcpu = vm.create_vcpu(0).context("KVM_CREATE_VCPU")?;
    'life: for _ in 0..stage.rng.usize(2..10) {
        if stage.rng.bool() {
            stage.let_merge(region)?;
        }
        for _ in 0..stage.rng.usize(1..300) {
            let (from, to) = (stage.rng.usize(..pages), stage.rng.usize(..pages));
            stage.doing("a guest copies");
            let outcome = copy(&mut vcpu, from, to).with_context(|| {
                // SAFETY: The page is mapped until the step ends.
                let code = unsafe { *(code.addr as *const [u8; 16]) };
                format!("copying page {from} to {to} with the program {code:x?}")
            })?;
            if let Outcome::Lost = outcome {
                println!(
                    "soak: kvm: the emulated CPU lost a guest that copied page {from} to {to}"
                );
                let lost = LOST.fetch_add(1, Ordering::Relaxed) + 1;
                ensure!(
                    lost <= LOSSES,
                    "{lost} guests were lost, which proves nothing"
                );
                // It may have written to any of its pages.
                stage.paint(region)?;
                break 'life;
            }
            let from = region.part(from, 1);
            stage.ledger.note_copied(from, region.page(to))?;
        }
        stage.check(region)?;
        match stage.rng.u32(..4) {
            0 => stage.paint_some(region, 20)?,
            1 => unmerge_some(stage, region)?,
            // Shared with a child for a while, and so copied when the guest writes.
            2 => stage.fork(|stage| stage.check(region))?.join()?,
            _ => {}
        }
    }
    drop(vcpu);
    drop(vm);
    stage.let_merge(region)?;
    stage.check(region)
}

fn unmerge_some(stage: &mut Stage, region: Region) -> Result<()> {
    let part = region.part(0, stage.rng.usize(1..=region.pages));
    memory::advise(part, libc::MADV_UNMERGEABLE)?;
    stage.check(part)?;
    memory::advise(part, libc::MADV_MERGEABLE)?;
    Ok(())
}

/// Lets the guest copy one of its pages to another.
fn copy(vcpu: &mut VcpuFd, from: usize, to: usize) -> Result<Outcome> {
    let mut sregs = vcpu.get_sregs().context("KVM_GET_SREGS")?;
    // Real mode, but with bases that no real machine's segments have.
    for (segment, base) in [
        (&mut sregs.cs, CODE_AT),
        (&mut sregs.ds, (from * PAGE) as u64),
        (&mut sregs.es, (to * PAGE) as u64),
    ] {
        segment.base = base;
    }
    // Not even one handler: an exception, for which there is no reason, ends the guest, and does not go on somewhere.
    sregs.idt.limit = 0;
    vcpu.set_sregs(&sregs).context("KVM_SET_SREGS")?;
    let regs = kvm_regs {
        rcx: (PAGE / 2) as u64,
        rflags: FLAGS,
        ..kvm_regs::default()
    };
    vcpu.set_regs(&regs).context("KVM_SET_REGS")?;
    let limit = LIMIT * wait::slowness();
    let begun = Instant::now();
    loop {
        alarm::set(ASKED);
        let exit = vcpu.run();
        alarm::cancel();
        let (halted, other) = match exit {
            Ok(VcpuExit::Hlt) => (true, None),
            Ok(other) => (false, Some(format!("{other:?}"))),
            Err(error) if error.errno() == libc::EINTR => (false, None),
            Err(error) => (false, Some(error.to_string())),
        };
        if is_lost(vcpu)? {
            return Ok(Outcome::Lost);
        }
        if halted {
            return Ok(Outcome::Copied);
        }
        if let Some(other) = other {
            let (regs, sregs) = (vcpu.get_regs()?, vcpu.get_sregs()?);
            let events = vcpu.get_vcpu_events()?;
            bail!("the guest ended with {other}; {regs:x?} {sregs:x?} {events:x?}");
        }
        if begun.elapsed() > limit {
            let what = what_it_does(vcpu).context("looking what a guest does that does not end")?;
            bail!("the guest does not end within {limit:?}: {what}");
        }
    }
}

extern "C" fn interrupt(_: libc::c_int) {}

/// Watches a guest that is stuck, and says what KVM does meanwhile.
fn what_it_does(vcpu: &mut VcpuFd) -> Result<String> {
    let before = vcpu.get_regs()?;
    let trace = Trace::new()?;
    for group in ["kvm", "kvmmmu"] {
        trace.event(group, None)?;
    }
    alarm::set(WATCHED);
    let exit = format!("{:?}", vcpu.run());
    alarm::cancel();
    trace.silence()?;
    let after = vcpu.get_regs()?;
    let (sregs, events) = (vcpu.get_sregs()?, vcpu.get_vcpu_events()?);
    let mut lines = trace.lines()?;
    let skipped = lines.len().saturating_sub(TOLD);
    let lines = lines.split_off(skipped).join("\n");
    Ok(format!(
        "{exit}; {before:x?}, and after {WATCHED} s {after:x?}; {sregs:x?} {events:x?}; {skipped} events and then\n{lines}"
    ))
}
