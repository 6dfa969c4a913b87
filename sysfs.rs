// SPDX-License-Identifier: GPL-2.0

//! The files of `/sys/kernel/mm/ksm_rs`: names, modes and formats; what they mean is in `knobs.rs` and
//! `ksmd.rs`.

use crate::{
    delay::{
        self,
        Point, //
    },
    knobs,
    ksmd::Ksm,
    mm::{
        bindings,
        zero, //
    },
    series::set_callbacks,
    stock::Stock, //
};
use core::ptr::NonNull;
use kernel::{
    error::to_result,
    ffi,
    prelude::*,
    sync::{
        atomic::{
            Acquire,
            Atomic,
            Release, //
        },
        Arc,
        ArcBorrow, //
    }, //
};

/// Name of the directory, below `/sys/kernel/mm`.
const DIRECTORY: &CStr = c"ksm_rs";

/// What the files show and change: the address of a [`Ksm`], as files have no other way to it. Set as long
/// as the directory exists.
static SHOWN: Atomic<usize> = Atomic::new(0);

/// A file.
trait File {
    /// Name.
    const NAME: &'static CStr;
    /// Whether root may write to it.
    const WRITABLE: bool;
    /// The value that it shows.
    fn show(ksm: &Ksm) -> Shown;
    /// Carries out a write of `text`.
    fn store(ksm: ArcBorrow<'_, Ksm>, text: &CStr) -> Result;
}

/// What a file shows, with a newline behind.
enum Shown {
    Unsigned(u64),
    Signed(i64),
    Text(&'static CStr),
    /// The places of `delay.rs`, a line for each.
    #[cfg(ksm_rs_delays)]
    Delays,
}

impl From<bool> for Shown {
    fn from(truth: bool) -> Self {
        Self::Unsigned(truth.into())
    }
}

impl From<u32> for Shown {
    fn from(number: u32) -> Self {
        Self::Unsigned(number.into())
    }
}

impl From<u64> for Shown {
    fn from(number: u64) -> Self {
        Self::Unsigned(number)
    }
}

impl From<usize> for Shown {
    fn from(number: usize) -> Self {
        Self::Unsigned(number as u64)
    }
}

impl From<i64> for Shown {
    fn from(number: i64) -> Self {
        Self::Signed(number)
    }
}

impl From<&'static CStr> for Shown {
    fn from(text: &'static CStr) -> Self {
        Self::Text(text)
    }
}

fn show_as<T: Into<Shown>>(ksm: &Ksm, show: fn(&Ksm) -> T) -> Shown {
    show(ksm).into()
}

/// Makes the type of a file, from how it is shown and, if it is writable, stored.
macro_rules! file {
    ($type:ident, $name:literal, $show:expr) => {
        file!(@ $type, $name, false, $show, |_, _| Err(EIO));
    };
    ($type:ident, $name:literal, $show:expr, $store:expr) => {
        file!(@ $type, $name, true, $show, $store);
    };
    (@ $type:ident, $name:literal, $writable:literal, $show:expr, $store:expr) => {
        struct $type;

        impl File for $type {
            const NAME: &'static CStr = $name;
            const WRITABLE: bool = $writable;

            fn show(ksm: &Ksm) -> Shown {
                show_as(ksm, $show)
            }

            fn store(ksm: ArcBorrow<'_, Ksm>, text: &CStr) -> Result {
                let store: fn(ArcBorrow<'_, Ksm>, &CStr) -> Result = $store;
                store(ksm, text)
            }
        }
    };
}

file!(
    RunFile,
    c"run",
    |ksm| ksm.knobs.run() as u32,
    |ksm, text| {
        let run = knobs::run(text)?;
        delay::at(Point::Storing);
        ksm.set_run(run)
    }
);
file!(
    PagesToScan,
    c"pages_to_scan",
    |ksm| ksm.knobs.pages_to_scan(),
    |ksm, text| ksm.set_pages_to_scan(text)
);
file!(
    SleepMillisecs,
    c"sleep_millisecs",
    |ksm| ksm.knobs.sleep_millisecs(),
    |ksm, text| {
        ksm.knobs.set_sleep_millisecs(knobs::any_uint(text)?);
        ksm.registry.bell().ring();
        Ok(())
    }
);
#[cfg(CONFIG_NUMA)]
file!(
    MergeAcrossNodes,
    c"merge_across_nodes",
    |ksm| ksm.knobs.merge_across_nodes(),
    |ksm, text| ksm.set_merge_across_nodes(knobs::merge_across_nodes(text)?)
);
file!(
    MaxPageSharing,
    c"max_page_sharing",
    |ksm| ksm.knobs.max_page_sharing(),
    |ksm, text| ksm.set_max_page_sharing(knobs::max_page_sharing(text)?)
);
file!(
    MergeScope,
    c"merge_scope",
    |ksm| ksm.knobs.merge_scope().choice(),
    |ksm, text| ksm.set_merge_scope(knobs::merge_scope(text)?)
);
file!(
    UseZeroPages,
    c"use_zero_pages",
    |ksm| ksm.knobs.use_zero_pages(),
    |ksm, text| {
        ksm.knobs.set_use_zero_pages(knobs::use_zero_pages(text)?);
        Ok(())
    }
);
file!(
    PruneMillisecs,
    c"stable_node_chains_prune_millisecs",
    |ksm| ksm.knobs.prune_millisecs(),
    |ksm, text| {
        ksm.knobs.set_prune_millisecs(knobs::any_uint(text)?);
        Ok(())
    }
);
file!(
    SmartScan,
    c"smart_scan",
    |ksm| ksm.knobs.smart_scan(),
    |ksm, text| {
        ksm.knobs.set_smart_scan(knobs::smart_scan(text)?);
        Ok(())
    }
);
file!(
    ScanThreads,
    c"scan_threads",
    |ksm| ksm.knobs.scan_threads(),
    |ksm, text| ksm.set_scan_threads(knobs::scan_threads(text)?)
);
file!(
    AdvisorMode,
    c"advisor_mode",
    |ksm| if ksm.knobs.advisor() {
        c"none [scan-time]"
    } else {
        c"[none] scan-time"
    },
    |ksm, text| {
        ksm.set_advisor(knobs::advisor_mode(text)?);
        Ok(())
    }
);
file!(
    AdvisorMaxCpu,
    c"advisor_max_cpu",
    |ksm| ksm.knobs.advisor_max_cpu(),
    |ksm, text| {
        // Cut off as stock does.
        ksm.knobs
            .set_advisor_max_cpu(knobs::any_ulong(text)? as u32);
        Ok(())
    }
);
file!(
    AdvisorMinPages,
    c"advisor_min_pages_to_scan",
    |ksm| ksm.knobs.advisor_min_pages(),
    |ksm, text| {
        ksm.knobs.set_advisor_min_pages(knobs::any_ulong(text)?);
        Ok(())
    }
);
file!(
    AdvisorMaxPages,
    c"advisor_max_pages_to_scan",
    |ksm| ksm.knobs.advisor_max_pages(),
    |ksm, text| {
        ksm.knobs.set_advisor_max_pages(knobs::any_ulong(text)?);
        Ok(())
    }
);
file!(
    AdvisorTarget,
    c"advisor_target_scan_time",
    |ksm| ksm.knobs.advisor_target_scan_time(),
    |ksm, text| {
        ksm.knobs
            .set_advisor_target_scan_time(knobs::target_scan_time(text)?);
        Ok(())
    }
);
// Stock takes the count for a signed number, though it never is negative.
file!(KsmZeroPages, c"ksm_zero_pages", |_| zero::count() as i64);
file!(GeneralProfit, c"general_profit", |ksm| {
    ksm.stats.general_profit(zero::count())
});
file!(PagesShared, c"pages_shared", |ksm| {
    ksm.stats.pages_shared.get()
});
file!(PagesSharing, c"pages_sharing", |ksm| {
    ksm.stats.pages_sharing.get()
});
file!(PagesUnshared, c"pages_unshared", |ksm| {
    ksm.stats.pages_unshared.get()
});
file!(PagesVolatile, c"pages_volatile", |ksm| {
    ksm.stats.pages_volatile()
});
file!(PagesScanned, c"pages_scanned", |ksm| {
    ksm.stats.pages_scanned.get()
});
file!(PagesSkipped, c"pages_skipped", |ksm| {
    ksm.stats.pages_skipped.get()
});
file!(FullScans, c"full_scans", |ksm| ksm.stats.full_scans.get());
file!(StableNodeChains, c"stable_node_chains", |ksm| {
    ksm.stats.stable_node_chains.get()
});
file!(StableNodeDups, c"stable_node_dups", |ksm| {
    ksm.stats.stable_node_dups.get()
});
file!(AllocFailures, c"alloc_failures", |ksm| {
    ksm.stats.alloc_failures.get()
});

#[cfg(ksm_rs_delays)]
file!(Delays, c"delays", |_| DelayRows, |_, text| delay::set(text));

/// What the file `delays` shows.
#[cfg(ksm_rs_delays)]
struct DelayRows;

#[cfg(ksm_rs_delays)]
impl From<DelayRows> for Shown {
    fn from(_: DelayRows) -> Self {
        Self::Delays
    }
}

/// A `kobj_attribute` in a static.
#[repr(transparent)]
struct Attribute(bindings::kobj_attribute);

// SAFETY: The core does not write to it once the directory is made, but for lockdep's key, which it protects.
unsafe impl Sync for Attribute {}

/// The list of the group's files, which ends with a null pointer.
struct List<const N: usize>([*const bindings::attribute; N]);

// SAFETY: The core only reads it.
unsafe impl<const N: usize> Sync for List<N> {}

const fn attribute<F: File>() -> Attribute {
    // SAFETY: All zero is a valid `kobj_attribute`: null pointers, no callbacks.
    let mut attribute: bindings::kobj_attribute = unsafe { core::mem::zeroed() };
    attribute.attr.name = kernel::str::as_char_ptr_in_const_context(F::NAME);
    if F::WRITABLE {
        attribute.attr.mode = 0o644;
        set_callbacks!(attribute, show::<F>, Some(store::<F>));
    } else {
        attribute.attr.mode = 0o444;
        set_callbacks!(attribute, show::<F>, None);
    }
    Attribute(attribute)
}

macro_rules! files {
    ($($(#[$attribute:meta])* $file:ident),+ $(,)?) => {
        static LIST: List<{ [$($(#[$attribute])* stringify!($file)),+].len() + 1 }> = List([
            $($(#[$attribute])* {
                static ATTRIBUTE: Attribute = attribute::<$file>();
                &raw const ATTRIBUTE.0.attr
            },)+
            core::ptr::null(),
        ]);
    };
}

files!(
    RunFile,
    PagesToScan,
    SleepMillisecs,
    #[cfg(CONFIG_NUMA)]
    MergeAcrossNodes,
    MaxPageSharing,
    UseZeroPages,
    PruneMillisecs,
    SmartScan,
    AdvisorMode,
    AdvisorMaxCpu,
    AdvisorMinPages,
    AdvisorMaxPages,
    AdvisorTarget,
    KsmZeroPages,
    GeneralProfit,
    PagesShared,
    PagesSharing,
    PagesUnshared,
    PagesVolatile,
    PagesScanned,
    PagesSkipped,
    FullScans,
    StableNodeChains,
    StableNodeDups,
    AllocFailures,
    ScanThreads,
    #[cfg(ksm_rs_delays)]
    Delays,
    MergeScope,
);

/// Reads a file.
///
/// # Safety
///
/// `buffer` must have room for a page, as sysfs gives it.
unsafe extern "C" fn show<F: File>(
    _kobject: *mut bindings::kobject,
    _attribute: *mut bindings::kobj_attribute,
    buffer: *mut ffi::c_char,
) -> isize {
    with(|ksm| {
        // SAFETY: sysfs passes a buffer of a page; each format wants the one argument that follows it.
        let length = unsafe {
            match F::show(&ksm) {
                Shown::Unsigned(number) => {
                    bindings::sysfs_emit(buffer, c"%llu\n".as_char_ptr(), number)
                }
                Shown::Signed(number) => {
                    bindings::sysfs_emit(buffer, c"%lld\n".as_char_ptr(), number)
                }
                Shown::Text(text) => {
                    bindings::sysfs_emit(buffer, c"%s\n".as_char_ptr(), text.as_char_ptr())
                }
                #[cfg(ksm_rs_delays)]
                Shown::Delays => (0..delay::rows())
                    .filter_map(delay::row)
                    .fold(0, |at, row| {
                        let (format, name) = (c"%s %u %u %llu %llu\n", row.name.as_char_ptr());
                        at + bindings::sysfs_emit_at(
                            buffer,
                            at,
                            format.as_char_ptr(),
                            name,
                            row.arrived,
                            row.left,
                            row.came,
                            row.went,
                        )
                    }),
            }
        };
        isize::try_from(length).map_err(|_| EIO)
    })
}

/// Writes to a file.
///
/// # Safety
///
/// `text` must be a C string, which sysfs makes of what is written.
unsafe extern "C" fn store<F: File>(
    _kobject: *mut bindings::kobject,
    _attribute: *mut bindings::kobj_attribute,
    text: *const ffi::c_char,
    count: usize,
) -> isize {
    with(|ksm| {
        // SAFETY: sysfs puts a NUL behind what was written.
        F::store(ksm, unsafe { CStr::from_char_ptr(text) })?;
        isize::try_from(count).map_err(|_| EINVAL)
    })
}

fn with(work: impl FnOnce(ArcBorrow<'_, Ksm>) -> Result<isize>) -> isize {
    let ksm = SHOWN.load(Acquire) as *const Ksm;
    let result = if ksm.is_null() {
        Err(ENODEV)
    } else {
        // SAFETY: It is the address in the `Arc` of a `Directory`, which keeps it allocated until its files are gone;
        // and the removal of files waits for whoever is in them.
        work(unsafe { ArcBorrow::from_raw(ksm) })
    };
    result.unwrap_or_else(|error| error.to_errno() as isize)
}

/// The directory. Dropping it removes it and waits for whoever is in its files.
///
/// # Invariants
///
/// `kobject` is a kobject of ours in sysfs; [`SHOWN`] is `ksm`.
pub(crate) struct Directory {
    kobject: NonNull<bindings::kobject>,
    _ksm: Arc<Ksm>,
}

// SAFETY: Kobjects belong to no task.
unsafe impl Send for Directory {}
// SAFETY: `&Directory` offers nothing that needs exclusion.
unsafe impl Sync for Directory {}

impl Directory {
    /// Makes the directory. Sleeps.
    pub(crate) fn create(stock: &Stock, ksm: Arc<Ksm>) -> Result<Self> {
        let group = bindings::attribute_group {
            __bindgen_anon_2: bindings::attribute_group__bindgen_ty_2 {
                attrs: LIST.0.as_ptr().cast_mut().cast(),
            },
            ..Default::default()
        };
        // SAFETY: The parent is in sysfs for ever; the name is a C string.
        let kobject =
            unsafe { bindings::kobject_create_and_add(DIRECTORY.as_char_ptr(), stock.mm_kobj()) };
        let kobject = NonNull::new(kobject).ok_or_else(|| {
            pr_err!(
                "/sys/kernel/mm/ksm_rs cannot be made; wanted no such directory and some memory\n"
            );
            ENOMEM
        })?;
        SHOWN.store(Arc::as_ptr(&ksm) as usize, Release);
        // INVARIANT: Both have just been set.
        let directory = Self { kobject, _ksm: ksm };
        // SAFETY: sysfs copies what it needs of the group itself; the attributes are statics.
        to_result(unsafe { bindings::sysfs_create_group(kobject.as_ptr(), &group) })?;
        Ok(directory)
    }

    /// The kobject, for a symlink to it.
    pub(crate) fn kobject(&self) -> *mut bindings::kobject {
        self.kobject.as_ptr()
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        // SAFETY: The kobject is ours. Removing it from sysfs removes its files.
        unsafe {
            bindings::kobject_del(self.kobject.as_ptr());
            bindings::kobject_put(self.kobject.as_ptr());
        }
        SHOWN.store(0, Release);
    }
}
