// SPDX-License-Identifier: GPL-2.0

//! The functions and variables of the core that are not exported: found once at load, then called
//! directly through static calls (`helpers.c`).
//!
//! A producer of KSM pages needs parts of mm that no module was meant to call. `kallsyms_lookup_name()`
//! knows where they are, and a kprobe knows where it is itself. Resolution is all or nothing.

use crate::mm::bindings;
use kernel::{ffi, prelude::*};

/// Tells a static call in `helpers.c` the address of its function.
type Bind = unsafe extern "C" fn(ffi::c_ulong);

/// An unexported function.
struct Function {
    name: &'static CStr,
    bind: Bind,
}

macro_rules! functions {
    ($($(#[$attribute:meta])* $name:ident => $bind:ident,)+) => {
        &[$($(#[$attribute])* Function {
            name: match CStr::from_bytes_with_nul(concat!(stringify!($name), "\0").as_bytes()) {
                Ok(name) => name,
                Err(_) => c"",
            },
            bind: bindings::$bind,
        }),+]
    };
}

/// Every function we call without its being exported. `helpers.h` has their types.
const FUNCTIONS: &[Function] = functions! {
    kallsyms_lookup_name => ksm_rs_bind_kallsyms_lookup_name,
    walk_page_range_vma => ksm_rs_bind_walk_page_range_vma,
    vm_normal_page => ksm_rs_bind_vm_normal_page,
    mm_find_pmd => ksm_rs_bind_mm_find_pmd,
    pte_offset_map_lock => ksm_rs_bind_pte_offset_map_lock,
    ptep_clear_flush => ksm_rs_bind_ptep_clear_flush,
    folio_add_anon_rmap_ptes => ksm_rs_bind_folio_add_anon_rmap_ptes,
    folio_add_new_anon_rmap => ksm_rs_bind_folio_add_new_anon_rmap,
    folio_add_lru_vma => ksm_rs_bind_folio_add_lru_vma,
    folio_remove_rmap_ptes => ksm_rs_bind_folio_remove_rmap_ptes,
    memcmp_pages => ksm_rs_bind_memcmp_pages,
    folio_free_swap => ksm_rs_bind_folio_free_swap,
    __put_anon_vma => ksm_rs_bind___put_anon_vma,
    lru_add_drain_all => ksm_rs_bind_lru_add_drain_all,
    task_sched_runtime => ksm_rs_bind_task_sched_runtime,
    #[cfg(CONFIG_MEMCG)]
    __mem_cgroup_charge => ksm_rs_bind___mem_cgroup_charge,
    #[cfg(CONFIG_MIGRATION)]
    migration_entry_wait => ksm_rs_bind_migration_entry_wait,
    #[cfg(CONFIG_MMU_NOTIFIER)]
    __mmu_notifier_invalidate_range_start => ksm_rs_bind___mmu_notifier_invalidate_range_start,
    #[cfg(CONFIG_MMU_NOTIFIER)]
    __mmu_notifier_invalidate_range_end => ksm_rs_bind___mmu_notifier_invalidate_range_end,
    #[cfg(CONFIG_TRANSPARENT_HUGEPAGE)]
    vm_normal_page_pmd => ksm_rs_bind_vm_normal_page_pmd,
    #[cfg(CONFIG_TRANSPARENT_HUGEPAGE)]
    __split_huge_page_to_list_to_order => ksm_rs_bind___split_huge_page_to_list_to_order,
};

/// The variables of the core that we use, by address; all of them are static, so they never move.
pub(crate) struct Variables {
    /// `/sys/kernel/mm`.
    pub(crate) mm_kobj: usize,
    /// Stock's `run`; the core looks at it when it swaps in a KSM page.
    pub(crate) ksm_run: usize,
    /// Protects `ksm_run`.
    pub(crate) ksm_thread_mutex: usize,
    /// Stable nodes that the stock KSM holds.
    pub(crate) ksm_pages_shared: usize,
    /// The files of `/sys/kernel/mm/ksm`.
    pub(crate) ksm_attr_group: usize,
    /// Count of mappings of the zero page that were made for KSM.
    pub(crate) ksm_zero_pages: usize,
    /// First byte of the kernel's type information.
    pub(crate) btf_start: usize,
    /// First byte behind it.
    pub(crate) btf_end: usize,
}

/// Most names that can be missing: every function's, and the members' of [`Variables`].
const MOST_MISSING: usize = FUNCTIONS.len() + size_of::<Variables>() / size_of::<usize>();

/// Names of symbols that were not found. Needs no memory, so that the refusal always says them.
struct Missing {
    names: [Option<&'static CStr>; MOST_MISSING],
}

impl Missing {
    fn none() -> Self {
        Self {
            names: [None; MOST_MISSING],
        }
    }

    fn lookup(&mut self, name: &'static CStr) -> usize {
        // SAFETY: The static call was bound by `resolve()` before; the name is a C string.
        let address = unsafe { bindings::ksm_rs_kallsyms_lookup_name(name.as_char_ptr()) };
        if address == 0 {
            if let Some(free) = self.names.iter_mut().find(|place| place.is_none()) {
                *free = Some(name);
            }
        }
        address
    }

    fn any(&self) -> bool {
        self.names.iter().any(Option::is_some)
    }
}

/// The names, one after the other.
impl kernel::fmt::Display for Missing {
    fn fmt(&self, f: &mut kernel::fmt::Formatter<'_>) -> kernel::fmt::Result {
        for (index, name) in self.names.iter().flatten().enumerate() {
            let space = if index == 0 { "" } else { " " };
            f.write_fmt(fmt!("{space}{name}"))?;
        }
        Ok(())
    }
}

/// Finds every function and variable and binds the static calls. `kallsyms` is the address of
/// `kallsyms_lookup_name()` where the user had to supply it, else 0. Sleeps.
///
/// `Err(ENOENT)` after one line in the log that names every symbol that is missing.
pub(crate) fn resolve(kallsyms: usize) -> Result<Variables> {
    let kallsyms = match kallsyms {
        0 => find_kallsyms()?,
        address => check_kallsyms(address)?,
    };
    // SAFETY: It is the address of the function, as the kernel's symbol table says.
    unsafe { bindings::ksm_rs_bind_kallsyms_lookup_name(kallsyms) };

    let mut missing = Missing::none();
    for function in FUNCTIONS {
        let address = missing.lookup(function.name);
        if address != 0 {
            // SAFETY: The kernel's own symbol table says that the function of this name, whose type `helpers.h` takes
            // from the kernel's header, is there.
            unsafe { (function.bind)(address) };
        }
    }
    let variables = Variables {
        mm_kobj: missing.lookup(c"mm_kobj"),
        ksm_run: missing.lookup(c"ksm_run"),
        ksm_thread_mutex: missing.lookup(c"ksm_thread_mutex"),
        ksm_pages_shared: missing.lookup(c"ksm_pages_shared"),
        ksm_attr_group: missing.lookup(c"ksm_attr_group"),
        ksm_zero_pages: missing.lookup(c"ksm_zero_pages"),
        btf_start: missing.lookup(c"__start_BTF"),
        btf_end: missing.lookup(c"__stop_BTF"),
    };
    if missing.any() {
        pr_err!(
            "this kernel has no symbol {missing}; wanted all of them: load on a kernel built with CONFIG_KSM=y CONFIG_KALLSYMS_ALL=y CONFIG_DEBUG_INFO_BTF=y\n"
        );
        return Err(ENOENT);
    }
    Ok(variables)
}

/// The address, if it is that of `kallsyms_lookup_name()`: another boot's is not.
fn check_kallsyms(address: usize) -> Result<usize> {
    let length = bindings::KSM_RS_KSYM_SYMBOL_LEN as usize;
    let mut text: KVec<ffi::c_char> = KVec::from_elem(0, length, GFP_KERNEL)?;
    // SAFETY: The buffer is as large as the function wants it, and gets a C string; any address may be asked for.
    let name = unsafe {
        bindings::sprint_symbol(text.as_mut_ptr(), address);
        CStr::from_char_ptr(text.as_ptr())
    };
    if name.to_bytes().starts_with(b"kallsyms_lookup_name+0x0/") {
        return Ok(address);
    }
    pr_err!(
        "parameter kallsyms_lookup_name={address:#x} is {name}; wanted the function's own address: take it from /proc/kallsyms after each boot\n"
    );
    Err(EINVAL)
}

/// Address of `kallsyms_lookup_name()`, from a kprobe on it for a moment.
///
/// The probe is never armed. To disarm one takes memory, and where there is none the core would keep it, and use it at the
/// next call of the function, though it has long been freed.
#[cfg(CONFIG_KPROBES)]
fn find_kallsyms() -> Result<usize> {
    let mut probe = KBox::new(
        bindings::kprobe {
            symbol_name: c"kallsyms_lookup_name".as_char_ptr(),
            flags: bindings::KPROBE_FLAG_DISABLED,
            ..Default::default()
        },
        GFP_KERNEL,
    )?;
    // SAFETY: The probe stays allocated, at one place, until it is unregistered, which cannot fail for one that is
    // disabled; it has no handlers.
    let address = unsafe {
        let error = bindings::register_kprobe(&mut *probe);
        if error != 0 {
            pr_err!(
                "a kprobe on kallsyms_lookup_name failed with error {error}; pass its address from /proc/kallsyms as kallsyms_lookup_name=0x...\n"
            );
            return Err(Error::from_errno(error));
        }
        let address = probe.addr as usize;
        bindings::unregister_kprobe(&mut *probe);
        address
    };
    Ok(address)
}

#[cfg(not(CONFIG_KPROBES))]
fn find_kallsyms() -> Result<usize> {
    pr_err!(
        "this kernel has no kprobes to find kallsyms_lookup_name with; pass its address from /proc/kallsyms as kallsyms_lookup_name=0x...\n"
    );
    Err(EOPNOTSUPP)
}
