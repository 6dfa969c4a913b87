//! A guest of KVM whose memory is merged: it copies pages, and the host reads and writes them too.

use std::path::Path;

use anyhow::Context;
use anyhow::Result;
use anyhow::bail;
use ksm_e2e::Region;
use ksm_e2e::memory;
use ksm_e2e::memory::Mapping;
use ksm_e2e::memory::PAGE;
use kvm_bindings::kvm_regs;
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::Kvm;
use kvm_ioctls::VcpuExit;
use kvm_ioctls::VcpuFd;

use crate::actor::Stage;

/// `rep movsw; hlt`: copies CX words from DS:SI to ES:DI.
const CODE: [u8; 3] = [0xf3, 0xa5, 0xf4];

/// Where the guest finds its program; its other memory begins at 0.
const CODE_AT: u64 = 0x40_0000;

/// Bit 1 of the flags, which is always set.
const FLAGS: u64 = 2;

/// Whether this machine has KVM.
pub fn available() -> bool {
    Path::new("/dev/kvm").exists()
}

/// See the module.
pub fn guest(stage: &mut Stage) -> Result<()> {
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
    for _ in 0..stage.rng.usize(2..10) {
        if stage.rng.bool() {
            stage.let_merge(region)?;
        }
        for _ in 0..stage.rng.usize(1..300) {
            let (from, to) = (stage.rng.usize(..pages), stage.rng.usize(..pages));
            stage.doing("a guest copies");
            copy(&mut vcpu, from, to).with_context(|| {
                // SAFETY: The page is mapped until the step ends.
                let code = unsafe { *(code.addr as *const [u8; 16]) };
                format!("copying page {from} to {to} with the program {code:x?}")
            })?;
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
fn copy(vcpu: &mut VcpuFd, from: usize, to: usize) -> Result<()> {
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
    loop {
        match vcpu.run() {
            Ok(VcpuExit::Hlt) => return Ok(()),
            Ok(other) => {
                let other = format!("{other:?}");
                let (regs, sregs) = (vcpu.get_regs()?, vcpu.get_sregs()?);
                let events = vcpu.get_vcpu_events()?;
                bail!("the guest ended with {other}; {regs:x?} {sregs:x?} {events:x?}");
            }
            Err(error) if error.errno() == libc::EINTR => {}
            Err(error) => return Err(error).context("KVM_RUN"),
        }
    }
}
