// SPDX-License-Identifier: GPL-2.0

//! The unstable tree: pages that did not change since the last pass and are equal to none, by their hash.
//!
//! The pages can be written to at any time, so a hash found here is a hint: contents are compared before
//! anything is done, and the tree starts empty on every pass. It is keyed by the stored hash and not by
//! the contents, so that writers cannot put it out of order.

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
        Pass,
        Planted,
        State, //
    },
    rbtree::{
        Links,
        Node, //
    },
    stable_tree::forest_per_node,
    stats::Stats, //
};
use kernel::prelude::*;

/// The unstable tree.
pub(crate) struct UnstableTree {
    forests: KVec<Forest>,
    /// Which items that say so are in the forests: those of this pass.
    pass: Pass,
}

impl UnstableTree {
    /// An empty tree. Sleeps.
    pub(crate) fn new() -> Result<Self> {
        Ok(Self {
            forests: forest_per_node()?,
            pass: Pass::FIRST,
        })
    }

    /// Forgets all items: a new pass begins.
    pub(crate) fn clear(&mut self) {
        for forest in self.forests.iter_mut() {
            forest.clear();
        }
        self.pass = self.pass.next();
    }

    /// Puts an item, whose hash is that of its page, into the forest of `nid`.
    pub(crate) fn insert(
        &mut self,
        items: &mut Arena<PageItem>,
        id: Id,
        nid: usize,
        stats: &Stats,
    ) {
        let (Some(item), Some(forest)) = (items.get_mut(id), self.forests.get_mut(nid)) else {
            return;
        };
        item.set_unstable(Planted {
            nid,
            pass: self.pass,
        });
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
        if planted.pass == self.pass {
            if let Some(forest) = self.forests.get_mut(planted.nid) {
                forest.remove(items, id);
            }
        }
        if let Some(item) = items.get_mut(id) {
            // Those of an item that `clear()` left behind lead nowhere.
            *item.links_mut() = Links::new();
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
