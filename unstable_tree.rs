// SPDX-License-Identifier: GPL-2.0

//! The unstable tree: pages that did not change since the last pass and are equal to none, by their hash.
//!
//! The pages can be written to at any time, so a hash found here is a hint: contents are compared before
//! anything is done. The tree is keyed by the stored hash and not by the contents, so that writers cannot put it
//! out of order, and need not be built anew on every pass: a page that did not change stays where it is.

#![forbid(unsafe_code)]

use crate::{
    arena::{
        Arena,
        Id, //
    },
    forest::Forest,
    items::{
        ContentHash,
        PageItem,
        Planted,
        State, //
    },
    stable_tree::forest_per_node,
    stats::Stats, //
};
use kernel::prelude::*;

/// The unstable tree.
pub(crate) struct UnstableTree {
    forests: KVec<Forest>,
}

impl UnstableTree {
    /// An empty tree. Sleeps.
    pub(crate) fn new() -> Result<Self> {
        Ok(Self {
            forests: forest_per_node()?,
        })
    }

    /// Puts an item, which is in no tree and whose hash is that of its page, where `planted` says.
    pub(crate) fn insert(
        &mut self,
        items: &mut Arena<PageItem>,
        id: Id,
        planted: Planted,
        stats: &Stats,
    ) {
        let (Some(item), Some(forest)) = (items.get_mut(id), self.forests.get_mut(planted.nid))
        else {
            return;
        };
        item.set_unstable(planted);
        forest.insert(items, id);
        stats.pages_unshared.up();
    }

    /// Takes an item out, if it is in; it is idle then and keeps its hash.
    pub(crate) fn remove(&mut self, items: &mut Arena<PageItem>, id: Id, stats: &Stats) {
        let Some(item) = items.get(id) else { return };
        let State::Unstable(planted) = item.state() else {
            return;
        };
        let hash = item.hash();
        if let Some(forest) = self.forests.get_mut(planted.nid) {
            forest.remove(items, id);
        }
        if let Some(item) = items.get_mut(id) {
            item.set_idle(hash);
        }
        stats.pages_unshared.down();
    }

    /// The first item in the forest of `nid` whose page had this hash.
    pub(crate) fn first_equal(
        &self,
        items: &Arena<PageItem>,
        nid: usize,
        hash: ContentHash,
    ) -> Option<Id> {
        self.forests.get(nid)?.first_equal(items, hash.key())
    }

    /// How many items a search for a hash passes.
    pub(crate) fn depth_of(&self, items: &Arena<PageItem>, nid: usize, hash: ContentHash) -> u32 {
        self.forests
            .get(nid)
            .map_or(0, |forest| forest.depth_of(items, hash.key()))
    }

    /// The next item with the same hash.
    pub(crate) fn next_equal(&self, items: &Arena<PageItem>, nid: usize, id: Id) -> Option<Id> {
        self.forests.get(nid)?.next_equal(items, id)
    }
}
