// SPDX-License-Identifier: GPL-2.0

//! The stable tree: all KSM pages by the hash of their contents, a forest per NUMA node.
//!
//! KSM pages cannot be written to, so neither can their hashes change. Several with equal contents stand
//! side by side once the first ones have as many mappings as `max_page_sharing` allows.

#![forbid(unsafe_code)]

use crate::{
    arena::{
        self,
        Arena,
        Id,
        Record, //
    },
    domain::Domain,
    engine::merge_flags,
    forest::{
        Forest,
        Keyed, //
    },
    items::ContentHash,
    mm::{
        self,
        node::StableNode, //
    },
    rbtree::{
        Links,
        Node, //
    },
    stats::Stats, //
};
use kernel::{
    alloc::AllocError,
    prelude::*,
    sync::Arc, //
};

/// In a key: the node is full, or without any mapping that is known. Such nodes stand behind those of the same hash that
/// are neither, so that however many there are a search does not see them. Hashes leave the bit alone.
const FULL: u64 = 1;

/// A KSM page in the tree.
#[derive(Default)]
pub(crate) struct StableEntry {
    links: Links,
    /// NUMA node of the forest that it is in.
    nid: u32,
    key: u64,
    /// The only one whose pages it is mapped in the place of.
    domain: Domain,
    /// Its neighbours in the list of orphans, if it stands there.
    before: Id,
    behind: Id,
    /// The structure that the core reads; `None` only in an empty record.
    node: Option<StableNode>,
}

impl Record for StableEntry {
    type Page = [Self; arena::slots::<Self>()];
}

impl Node for StableEntry {
    fn links(&self) -> &Links {
        &self.links
    }

    fn links_mut(&mut self) -> &mut Links {
        &mut self.links
    }
}

impl Keyed for StableEntry {
    fn key(&self) -> u64 {
        self.key
    }
}

/// The stable tree.
pub(crate) struct StableTree {
    entries: Arena<StableEntry>,
    /// One for each NUMA node; only the first is used if pages merge across nodes.
    forests: KVec<Forest>,
    /// The first node of the list of those without any mapping that is known.
    orphans: Id,
    /// The node of that list which comes next in the sweep that is going on.
    unswept: Option<Id>,
    /// Where nodes with the same contents are counted.
    stats: Arc<Stats>,
}

impl StableTree {
    /// An empty tree. Sleeps.
    pub(crate) fn new(stats: Arc<Stats>) -> Result<Self> {
        Ok(Self {
            entries: Arena::new(),
            forests: forest_per_node()?,
            orphans: Id::NIL,
            unswept: None,
            stats,
        })
    }

    /// A node for a KSM page to come. It is in no forest until [`StableTree::plant`]. Sleeps.
    pub(crate) fn prepare(&mut self) -> Result<Id, AllocError> {
        let flags = merge_flags();
        let id = self.entries.insert(StableEntry::default(), flags)?;
        match StableNode::new(id, flags) {
            Ok(node) => {
                if let Some(entry) = self.entries.get_mut(id) {
                    entry.node = Some(node);
                }
                Ok(id)
            }
            Err(error) => {
                self.entries.remove(id);
                Err(error)
            }
        }
    }

    /// Lists a node as an orphan: it has no mapping any more that is known. A sweep that is going on does not come to it.
    pub(crate) fn list_orphan(&mut self, id: Id) {
        let first = self.orphans;
        if self.is_orphan(id) {
            return;
        }
        let Some(entry) = self.entries.get_mut(id) else {
            return;
        };
        entry.behind = first;
        if let Some(entry) = self.entries.get_mut(first) {
            entry.before = id;
        }
        self.orphans = id;
    }

    /// Takes a node off the list of orphans, if it is there.
    pub(crate) fn unlist_orphan(&mut self, id: Id) {
        if !self.is_orphan(id) {
            return;
        }
        let Some(entry) = self.entries.get_mut(id) else {
            return;
        };
        let before = core::mem::take(&mut entry.before);
        let behind = core::mem::take(&mut entry.behind);
        match self.entries.get_mut(before) {
            Some(entry) => entry.behind = behind,
            None => self.orphans = behind,
        }
        if let Some(entry) = self.entries.get_mut(behind) {
            entry.before = before;
        }
        if self.unswept == Some(id) {
            self.unswept = Some(behind);
        }
    }

    /// Whether a node stands in the list of orphans: it has a neighbour there, or is the first.
    fn is_orphan(&self, id: Id) -> bool {
        self.entries.get(id).is_some_and(|entry| {
            !entry.before.is_nil() || !entry.behind.is_nil() || self.orphans == id
        })
    }

    /// The orphan that was listed last.
    pub(crate) fn first_orphan(&self) -> Option<Id> {
        (!self.orphans.is_nil()).then_some(self.orphans)
    }

    /// The next orphan of a sweep over all of them, which begins if none is going on. `None`: that was all, and the sweep is
    /// over.
    pub(crate) fn next_orphan(&mut self) -> Option<Id> {
        let id = self.unswept.unwrap_or(self.orphans);
        self.unswept = self.entries.get(id).map(|entry| entry.behind);
        self.unswept.map(|_| id)
    }

    /// Lets the sweep that is going on begin again.
    pub(crate) fn restart_sweep(&mut self) {
        self.unswept = None;
    }

    /// Whether there is no node.
    pub(crate) fn is_empty(&self) -> bool {
        self.first().is_none()
    }

    /// Puts a prepared node into the forest of `nid`, for pages of `domain`, of which `hash` is one.
    pub(crate) fn plant(&mut self, id: Id, hash: ContentHash, domain: Domain, nid: usize) {
        if let Some(entry) = self.entries.get_mut(id) {
            entry.key = hash.key();
            entry.domain = domain;
            entry.nid = nid as u32;
        }
        self.root(id);
    }

    /// Takes a node out for good, whether planted or only prepared. The caller drops it.
    pub(crate) fn remove(&mut self, id: Id) -> Option<StableNode> {
        self.uproot(id);
        self.unlist_orphan(id);
        self.entries.remove(id)?.node
    }

    /// Puts a node into its forest, and counts it if it is not the only one for its contents.
    fn root(&mut self, id: Id) {
        let Some((nid, key, domain)) = self
            .entries
            .get(id)
            .map(|entry| (entry.nid as usize, entry.key, entry.domain))
        else {
            return;
        };
        if let Some(forest) = self.forests.get_mut(nid) {
            forest.insert(&mut self.entries, id);
        }
        match self.copies(nid, key, domain) {
            0 | 1 => {}
            2 => {
                self.stats.stable_node_chains.up();
                self.stats.stable_node_dups.add(2);
            }
            _ => self.stats.stable_node_dups.up(),
        }
    }

    /// Takes a node out of its forest, if it is in one.
    fn uproot(&mut self, id: Id) {
        let Some(entry) = self.entries.get(id) else {
            return;
        };
        if !entry.links.is_linked() {
            return;
        }
        let nid = entry.nid as usize;
        match self.copies(nid, entry.key, entry.domain) {
            0 | 1 => {}
            2 => {
                self.stats.stable_node_chains.down();
                self.stats.stable_node_dups.subtract(2);
            }
            _ => self.stats.stable_node_dups.down(),
        }
        if let Some(forest) = self.forests.get_mut(nid) {
            forest.remove(&mut self.entries, id);
        }
    }

    /// How many nodes there are for the contents of `key` in the forest of `nid` and in a domain, full or not; counts to
    /// three.
    fn copies(&self, nid: usize, key: u64, domain: Domain) -> usize {
        let Some(forest) = self.forests.get(nid) else {
            return 0;
        };
        let from = |key| forest.first_equal(&self.entries, key);
        let all =
            |key| core::iter::successors(from(key), |id| forest.next_equal(&self.entries, *id));
        Iterator::chain(all(key & !FULL), all(key | FULL))
            .filter(|id| self.domain(*id) == Some(domain))
            .take(3)
            .count()
    }

    /// Says whether a node has as many mappings as it may have, or none. Such a one is not found by its hash.
    pub(crate) fn set_full(&mut self, id: Id, full: bool) {
        let Some(entry) = self.entries.get(id) else {
            return;
        };
        if (entry.key & FULL != 0) == full || !entry.links.is_linked() {
            return;
        }
        let Some(forest) = self.forests.get_mut(entry.nid as usize) else {
            return;
        };
        forest.remove(&mut self.entries, id);
        if let Some(entry) = self.entries.get_mut(id) {
            entry.key ^= FULL;
        }
        forest.insert(&mut self.entries, id);
    }

    /// Moves a node to the forest of another NUMA node, as its page has moved there.
    pub(crate) fn rehome(&mut self, id: Id, nid: usize) {
        if !self
            .entries
            .get(id)
            .is_some_and(|entry| entry.links.is_linked())
        {
            // No node, or none that is in a forest: an id may be out of date.
            return;
        }
        self.uproot(id);
        if let Some(entry) = self.entries.get_mut(id) {
            entry.nid = nid as u32;
        }
        self.root(id);
    }

    /// The node with an id.
    pub(crate) fn node(&self, id: Id) -> Option<&StableNode> {
        self.entries.get(id)?.node.as_ref()
    }

    /// The node with an id.
    pub(crate) fn node_mut(&mut self, id: Id) -> Option<&mut StableNode> {
        self.entries.get_mut(id)?.node.as_mut()
    }

    /// NUMA node of the forest that a node is in.
    pub(crate) fn nid(&self, id: Id) -> Option<usize> {
        Some(self.entries.get(id)?.nid as usize)
    }

    /// The domain whose pages a node is for.
    pub(crate) fn domain(&self, id: Id) -> Option<Domain> {
        let entry = self.entries.get(id)?;
        entry.node.as_ref().map(|_| entry.domain)
    }

    /// The first node in the forest of `nid` and of `domain` whose page has this hash, and which is not full.
    pub(crate) fn first_equal(&self, nid: usize, hash: ContentHash, domain: Domain) -> Option<Id> {
        let forest = self.forests.get(nid)?;
        let first = forest.first_equal(&self.entries, hash.key())?;
        if self.domain(first) == Some(domain) {
            return Some(first);
        }
        self.next_of(first, domain)
    }

    /// How many nodes a search for a hash passes.
    pub(crate) fn depth_of(&self, nid: usize, hash: ContentHash) -> u32 {
        self.forests
            .get(nid)
            .map_or(0, |forest| forest.depth_of(&self.entries, hash.key()))
    }

    /// The next node with the same hash and of the same domain.
    pub(crate) fn next_equal(&self, id: Id) -> Option<Id> {
        self.next_of(id, self.domain(id)?)
    }

    /// The next node with the same hash as `id` and of `domain`. There are others only if domain and contents hash to the
    /// same by accident.
    fn next_of(&self, id: Id, domain: Domain) -> Option<Id> {
        let forest = self.forests.get(self.nid(id)?)?;
        core::iter::successors(Some(id), |id| forest.next_equal(&self.entries, *id))
            .skip(1)
            .find(|id| self.domain(*id) == Some(domain))
    }

    /// The first of all nodes.
    pub(crate) fn first(&self) -> Option<Id> {
        self.first_from(0)
    }

    fn first_from(&self, nid: usize) -> Option<Id> {
        self.forests
            .iter()
            .skip(nid)
            .find_map(|forest| forest.first(&self.entries))
    }

    /// The node behind another one, going through all forests.
    pub(crate) fn next(&self, id: Id) -> Option<Id> {
        let nid = self.nid(id)?;
        self.forests
            .get(nid)?
            .next(&self.entries, id)
            .or_else(|| self.first_from(nid.saturating_add(1)))
    }
}

/// A forest for each NUMA node.
pub(crate) fn forest_per_node() -> Result<KVec<Forest>> {
    let mut forests = KVec::with_capacity(mm::nr_nodes(), GFP_KERNEL)?;
    for _ in 0..mm::nr_nodes() {
        forests
            .push_within_capacity(Forest::new())
            .map_err(|_| ENOMEM)?;
    }
    Ok(forests)
}
