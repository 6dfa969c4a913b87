// SPDX-License-Identifier: GPL-2.0

//! Windows held open: named places in the code where a thread can be made to wait, for the tests of races.
//!
//! There are places in the test build only (`make KSM_RS_DELAYS=1`); in any other [`at`] is nothing. Whoever writes
//! `POINT MICROSECONDS THREADS` to the file `delays` makes so many threads that come to the place wait there for
//! so long, or until `POINT 0 0` is written. The file tells of each place how many threads have waited
//! there, how many of them have gone on, and when the last one came and went.

#![forbid(unsafe_code)]

#[cfg(not(ksm_rs_delays))]
pub(crate) use absent::at;
#[cfg(ksm_rs_delays)]
pub(crate) use present::{
    at,
    report,
    row,
    rows,
    set, //
};

/// The places, by how a thread may wait there.
macro_rules! points {
    ($($(#[$attribute:meta])* $point:ident $name:literal $wait:ident,)+) => {
        /// A place in the code; the tests in `tests/races/` say which pairs each belongs to.
        #[derive(Clone, Copy)]
        #[cfg_attr(not(ksm_rs_delays), allow(dead_code))]
        pub(crate) enum Point {
            $($(#[$attribute])* $point,)+
        }

        #[cfg(ksm_rs_delays)]
        static PLACES: [present::Place; [$($name),+].len()] = [
            $(present::Place::new($name, present::Wait::$wait),)+
        ];
    };
}

points! {
    /// A batch has been gathered, references and all; no lock is held.
    Gathered c"gathered" Sleeping,
    /// The pages of a batch have been read and given up; no lock is held.
    Read c"read" Sleeping,
    /// Two pages are about to be merged, both seen to be equal; the engine's mutex is held.
    Paired c"paired" Sleeping,
    /// A page is about to be replaced; its folio lock and the mmap lock are held.
    Replacing c"replacing" Sleeping,
    /// The page's entry is empty; the page table's lock is held.
    Protected c"protected" Spinning,
    /// The pages have been compared and are equal; the page table's lock is held.
    Compared c"compared" Spinning,
    /// An empty page is about to be replaced; its folio lock and the mmap lock are held.
    Emptying c"emptying" Sleeping,
    /// A page was write-protected to become a KSM page; its folio lock and the mmap lock are held.
    WriteProtected c"write_protected" Sleeping,
    /// A page has become a KSM page that belongs to no stable node yet; the engine's mutex is held.
    KsmMade c"ksm_made" Sleeping,
    /// Two pages have become one KSM page that belongs to no stable node yet; the engine's mutex is held.
    Unadopted c"unadopted" Sleeping,
    /// A KSM page was mapped at an address that is in no list yet; the engine's mutex is held.
    Mapped c"mapped" Sleeping,
    /// The frame of a stable node has been read; the engine's mutex is held.
    FrameRead c"frame_read" Sleeping,
    /// The page of a stable node has a reference but was not locked yet; the engine's mutex is held.
    NodeFound c"node_found" Sleeping,
    /// A mapping is about to be taken off a node's list; the engine's mutex is held.
    Unlinking c"unlinking" Sleeping,
    /// A node is about to part from its page, which nobody maps; the folio lock is held.
    Releasing c"releasing" Sleeping,
    /// A KSM page was found that is to be unshared; the mmap lock is held.
    Unsharing c"unsharing" Sleeping,
    /// One step of unmerging everything is done; `control` is held.
    Unmerging c"unmerging" Sleeping,
    /// An address space was adopted but has no slot yet; the engine's mutex is held.
    Adopting c"adopting" Sleeping,
    /// A dead address space was buried but not forgotten; no lock is held.
    Burying c"burying" Sleeping,
    /// Memory is going offline, and everybody has been told; the core's locks for that are held.
    Offlining c"offlining" Sleeping,
    /// Somebody is in a file of ours; the file cannot go away meanwhile.
    Storing c"storing" Sleeping,
    /// The tracepoint says that an address space enters.
    Entering c"entering" Spinning,
    /// The tracepoint says that an address space exits.
    Exiting c"exiting" Spinning,
    /// Everything is undone for unload, but the probes are still there.
    Dismantled c"dismantled" Sleeping,
}

#[cfg(not(ksm_rs_delays))]
mod absent {
    use super::Point;

    /// Nothing.
    #[inline(always)]
    pub(crate) fn at(_point: Point) {}
}

#[cfg(ksm_rs_delays)]
mod present {
    use super::{
        Point,
        PLACES, //
    };
    use crate::{
        kthread,
        parse, //
    };
    use kernel::{
        prelude::*,
        sync::atomic::{
            Acquire,
            Atomic,
            Full,
            Relaxed, //
        },
        time::{
            delay::{
                fsleep,
                udelay, //
            },
            Delta, //
        }, //
    };

    /// How a thread may wait.
    #[derive(Clone, Copy)]
    pub(super) enum Wait {
        /// It holds nothing that forbids sleeping.
        Sleeping,
        /// It holds a spinlock, or is in somebody else's context.
        Spinning,
    }

    /// Longest time that a thread waits without sleeping, in microseconds.
    const MOST_SPINNING: u32 = 20_000;
    /// Longest time that one sleeps.
    const MOST_SLEEPING: u32 = 20_000_000;

    /// What is known of a place.
    pub(super) struct Place {
        name: &'static CStr,
        wait: Wait,
        micros: Atomic<u32>,
        /// How many threads are still to be held up.
        wanted: Atomic<i32>,
        /// Changed to let everybody go.
        turn: Atomic<u32>,
        arrived: Atomic<u32>,
        left: Atomic<u32>,
        came: Atomic<u64>,
        went: Atomic<u64>,
    }

    impl Place {
        pub(super) const fn new(name: &'static CStr, wait: Wait) -> Self {
            Self {
                name,
                wait,
                micros: Atomic::new(0),
                wanted: Atomic::new(0),
                turn: Atomic::new(0),
                arrived: Atomic::new(0),
                left: Atomic::new(0),
                came: Atomic::new(0),
                went: Atomic::new(0),
            }
        }

        fn pass(&self) {
            if self.wanted.load(Relaxed) <= 0 || self.wanted.fetch_sub(1, Full) <= 0 {
                return;
            }
            // Before anybody hears of it, who could end the turn.
            let turn = self.turn.load(Relaxed);
            let most = u64::from(self.micros.load(Relaxed)) * 1000;
            let start = kthread::now();
            self.came.store(start, Relaxed);
            self.arrived.fetch_add(1, Full);
            while self.turn.load(Relaxed) == turn && kthread::now().wrapping_sub(start) < most {
                match self.wait {
                    Wait::Sleeping => fsleep(Delta::from_micros(200)),
                    Wait::Spinning => udelay(Delta::from_micros(10)),
                }
            }
            self.went.store(kthread::now(), Relaxed);
            self.left.fetch_add(1, Full);
        }

        fn set(&self, micros: u32, threads: i32) {
            let most = match self.wait {
                Wait::Sleeping => MOST_SLEEPING,
                Wait::Spinning => MOST_SPINNING,
            };
            self.wanted.store(0, Relaxed);
            self.micros.store(micros.min(most), Relaxed);
            self.turn.fetch_add(1, Full);
            self.wanted.xchg(threads, Full);
        }
    }

    /// Waits here, if somebody has asked for it.
    pub(crate) fn at(point: Point) {
        if let Some(place) = PLACES.get(point as usize) {
            place.pass();
        }
    }

    /// Carries out a write to `delays`: name, microseconds, threads. `EINVAL` for all else.
    pub(crate) fn set(text: &CStr) -> Result {
        let mut words = text
            .to_bytes()
            .split(u8::is_ascii_whitespace)
            .filter(|word| !word.is_empty());
        let name = words.next().ok_or(EINVAL)?;
        let place = PLACES.iter().find(|place| place.name.to_bytes() == name);
        let micros = number(words.next().ok_or(EINVAL)?)?;
        let threads = number(words.next().ok_or(EINVAL)?)?;
        place
            .ok_or(EINVAL)?
            .set(micros, i32::try_from(threads).map_err(|_| EINVAL)?);
        Ok(())
    }

    fn number(word: &[u8]) -> Result<u32> {
        let mut text = [0; 16];
        let Some((start, _)) = text.split_at_mut_checked(word.len()) else {
            return Err(EINVAL);
        };
        start.copy_from_slice(word);
        parse::uint(CStr::from_bytes_until_nul(&text).map_err(|_| EINVAL)?)
    }

    /// How many places there are.
    pub(crate) fn rows() -> usize {
        PLACES.len()
    }

    /// What the file shows of a place.
    #[derive(Clone, Copy)]
    pub(crate) struct Row {
        pub(crate) name: &'static CStr,
        /// How many have waited there.
        pub(crate) arrived: u32,
        /// How many of them have gone on.
        pub(crate) left: u32,
        /// When the last one came, and when the last one went, by the monotonic clock.
        pub(crate) came: u64,
        pub(crate) went: u64,
    }

    /// The row of a place.
    pub(crate) fn row(at: usize) -> Option<Row> {
        let place = PLACES.get(at)?;
        // Who has left has arrived before.
        let left = place.left.load(Acquire);
        Some(Row {
            name: place.name,
            arrived: place.arrived.load(Relaxed),
            left,
            came: place.came.load(Relaxed),
            went: place.went.load(Relaxed),
        })
    }

    /// Tells the log of the places where somebody has waited, as the file is about to go.
    pub(crate) fn report() {
        for row in (0..rows()).filter_map(row) {
            if row.arrived != 0 {
                let (came, went) = (row.came, row.went);
                pr_info!(
                    "delay {} {} {} {came} {went}\n",
                    row.name,
                    row.arrived,
                    row.left
                );
            }
        }
    }
}
