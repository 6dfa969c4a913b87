// SPDX-License-Identifier: GPL-2.0

//! Threads that scan beside the first one, as many as `scan_threads` says.
//!
//! The first thread decides when there is something to scan; the others wait for their bell, and take part in the
//! turn that is on until its budget is spent (`ksmd.rs`).

#![forbid(unsafe_code)]

use crate::{
    ksmd::Ksm,
    kthread::{
        self,
        Bell,
        Thread,
        Work, //
    },
    scan::Batch, //
};
use kernel::{
    new_mutex,
    prelude::*,
    sync::{
        Arc,
        Mutex, //
    }, //
};

/// What a further thread works with.
#[pin_data]
struct Worker {
    ksm: Arc<Ksm>,
    #[pin]
    batch: Mutex<Batch>,
    bell: Arc<Bell>,
}

impl Work for Worker {
    fn run(&self) {
        while !kthread::should_stop() {
            self.bell.wait(None);
            if !kthread::should_stop() {
                self.ksm.take_part(&mut self.batch.lock());
            }
        }
    }
}

/// The further threads. Dropping them stops them; each holds the [`Ksm`] that holds them, so that it must be done by
/// hand.
#[derive(Default)]
pub(crate) struct Workers {
    threads: KVec<Thread<Worker>>,
}

impl Workers {
    /// How many there are.
    pub(crate) fn len(&self) -> usize {
        self.threads.len()
    }

    /// Starts one more, and returns its bell. Sleeps.
    pub(crate) fn start(&mut self, ksm: Arc<Ksm>) -> Result<Arc<Bell>> {
        self.threads.reserve(1, GFP_KERNEL)?;
        let bell = Arc::pin_init(Bell::new(), GFP_KERNEL)?;
        let heard = bell.clone();
        let worker = Arc::pin_init(
            try_pin_init!(Worker {
                ksm,
                batch <- new_mutex!(Batch::new()?, "ksm_rs::batch"),
                bell: heard,
            }),
            GFP_KERNEL,
        )?;
        let number = self.len().saturating_add(1) as i32;
        let thread = Thread::start(worker, number)?;
        // There is room, as just reserved.
        self.threads
            .push_within_capacity(thread)
            .map_err(|_| ENOMEM)?;
        Ok(bell)
    }

    /// Stops the last one, and waits for its end. Sleeps.
    pub(crate) fn stop_last(&mut self) {
        drop(self.threads.pop());
    }
}
