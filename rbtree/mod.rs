// SPDX-License-Identifier: GPL-2.0

//! Intrusive red-black trees of the records of an arena.
//!
//! A record that wants to be in a tree embeds [`Links`] and says so with [`Node`]. The links are
//! [`Id`]s, not pointers: they take half the room, and all of this is safe code. The arena is
//! borrowed by each operation, so one arena can serve any number of trees.
//!
//! A tree does not know what it is ordered by. Who inserts gives the place, and who looks something
//! up steers the descent; the order must be the same, and it must not change while a record is
//! linked.
//!
//! What goes wrong elsewhere stays harmless here: an id without a record is taken for
//! [`Id::NIL`], and every walk along links is bounded by the greatest height that a tree can have.
//! A damaged tree gives wrong answers. It does not give a loop without end, or a panic.
//!
//! - `mod.rs`: the types, walking, replacing, checking;
//! - `insert.rs`: linking a record, and the repair after it;
//! - `erase.rs`: unlinking a record, and the repair after it;
//! - `join.rs`: making one tree out of two, and two out of one.

#![forbid(unsafe_code)]

mod erase;
mod insert;
mod join;

use crate::arena::{
    Arena,
    Id,
    Record, //
};
use core::mem;

/// No path from the top of a tree is longer.
///
/// A red-black tree of n nodes is at most 2 log2(n + 1) high, and there are fewer than 2^31 ids.
const MAX_HEIGHT: usize = 62;

/// The bit of [`Links::parent_and_colour`] that makes a node red.
const RED: u32 = 1 << 31;

/// The parent of a node that has none.
const NO_PARENT: u32 = RED - 1;

/// Where a child hangs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Side {
    /// What comes earlier in the order of the tree.
    Left,
    /// What comes later.
    Right,
}

impl Side {
    /// Returns the other side.
    #[inline]
    const fn opposite(self) -> Self {
        match self {
            Self::Left => Self::Right,
            Self::Right => Self::Left,
        }
    }
}

/// Colour of a node; a missing one is black.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Colour {
    Red,
    Black,
}

/// The links of a record that can be in one tree at a time.
///
/// # Invariants
///
/// `parent_and_colour` is [`Links::UNLINKED`], that is red without a parent, iff the record is in no
/// tree: the top of a tree is black, and every other node has a parent.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Links {
    /// [`RED`] or not, and the parent's id in the other bits, or [`NO_PARENT`] there.
    parent_and_colour: u32,
    left: u32,
    right: u32,
}

impl Links {
    const UNLINKED: u32 = RED | NO_PARENT;

    /// Creates the links of a record that is in no tree.
    pub(crate) const fn new() -> Self {
        Self {
            parent_and_colour: Self::UNLINKED,
            left: Id::NIL.raw(),
            right: Id::NIL.raw(),
        }
    }

    /// Returns whether the record is in a tree.
    ///
    /// Also true for a record of a tree whose [`Root`] was dropped without unlinking it.
    #[inline]
    pub(crate) const fn is_linked(&self) -> bool {
        self.parent_and_colour != Self::UNLINKED
    }

    #[inline]
    const fn child(&self, side: Side) -> Id {
        match side {
            Side::Left => Id::from_raw(self.left),
            Side::Right => Id::from_raw(self.right),
        }
    }

    #[inline]
    fn set_child(&mut self, side: Side, child: Id) {
        match side {
            Side::Left => self.left = child.raw(),
            Side::Right => self.right = child.raw(),
        }
    }

    #[inline]
    const fn parent(&self) -> Id {
        match self.parent_and_colour & !RED {
            NO_PARENT => Id::NIL,
            raw => Id::from_raw(raw),
        }
    }

    #[inline]
    fn set_parent(&mut self, parent: Id) {
        // The top bit of `Id::NIL` falls off, which leaves `NO_PARENT`.
        self.parent_and_colour = (self.parent_and_colour & RED) | (parent.raw() & !RED);
    }

    #[inline]
    const fn colour(&self) -> Colour {
        if self.parent_and_colour & RED != 0 {
            Colour::Red
        } else {
            Colour::Black
        }
    }

    #[inline]
    fn set_colour(&mut self, colour: Colour) {
        match colour {
            Colour::Red => self.parent_and_colour |= RED,
            Colour::Black => self.parent_and_colour &= !RED,
        }
    }
}

impl Default for Links {
    fn default() -> Self {
        Self::new()
    }
}

/// A record that can be in a tree.
pub(crate) trait Node: Record {
    /// Returns the record's links; always the same ones.
    fn links(&self) -> &Links;

    /// Returns the record's links; always the same ones.
    fn links_mut(&mut self) -> &mut Links;
}

/// What [`Root::check`] found wrong.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[cfg_attr(not(ksm_rs_kunit), allow(dead_code))]
pub(crate) enum Damage {
    /// A link leads to no record, or to one that says it is in no tree.
    Missing,
    /// A node is not the parent of its child.
    Parent,
    /// A red node has a red child, or the top is red.
    Colour,
    /// Two paths from the top have different numbers of black nodes.
    Height,
    /// A node does not come before its successor.
    Order,
    /// There are more nodes in the tree than records in the arena.
    Loop,
}

/// The top of a tree.
///
/// Dropping it forgets the tree, and leaves its nodes with the links that they have.
///
/// It holds the complement of an id, so that zeroed memory is an array of empty trees.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
#[repr(transparent)]
pub(crate) struct Root(u32);

impl Root {
    /// Creates an empty tree.
    #[inline]
    pub(crate) const fn new() -> Self {
        Self(!Id::NIL.raw())
    }

    #[inline]
    const fn at(id: Id) -> Self {
        Self(!id.raw())
    }

    /// Returns whether the tree has no nodes.
    #[inline]
    pub(crate) const fn is_empty(self) -> bool {
        self.top().is_nil()
    }

    /// Returns the node at the top, where descents begin.
    #[inline]
    pub(crate) const fn top(self) -> Id {
        Id::from_raw(!self.0)
    }

    /// Returns the first node in order, or [`Id::NIL`].
    pub(crate) fn first<T: Node>(self, arena: &Arena<T>) -> Id {
        extreme(arena, self.top(), Side::Left)
    }

    /// Returns the first node in order for which `before` is false, or [`Id::NIL`].
    ///
    /// `before` must be true for some number of nodes at the front of the order, and false for all
    /// others.
    #[inline]
    pub(crate) fn partition_point<T: Node>(
        self,
        arena: &Arena<T>,
        mut before: impl FnMut(&T) -> bool,
    ) -> Id {
        let mut found = Id::NIL;
        let mut at = self.top();
        for _ in 0..MAX_HEIGHT {
            let Some(node) = arena.get(at) else {
                break;
            };
            at = if before(node) {
                node.links().child(Side::Right)
            } else {
                found = at;
                node.links().child(Side::Left)
            };
        }
        found
    }

    /// Puts `new`, which is in no tree, in the place of `old`, which is in this one.
    ///
    /// `new` must compare with the other nodes as `old` does. Returns false, with nothing done, if
    /// one of them is not as described.
    #[cfg_attr(not(ksm_rs_kunit), allow(dead_code))]
    pub(crate) fn replace<T: Node>(&mut self, arena: &mut Arena<T>, old: Id, new: Id) -> bool {
        if !is_linked(arena, old) || arena.get(new).is_none_or(|node| node.links().is_linked()) {
            return false;
        }
        let links = links(arena, old);
        update(arena, new, |slot| *slot = links);
        update(arena, old, |slot| *slot = Links::new());
        self.change_child(arena, links.parent(), old, new);
        for side in [Side::Left, Side::Right] {
            set_parent(arena, links.child(side), new);
        }
        true
    }

    /// Verifies the tree and returns how many nodes it has.
    ///
    /// `in_order` tells whether its first argument may stand right before its second one. Takes
    /// O(n log n) time for n nodes.
    ///
    /// # Errors
    ///
    /// The first [`Damage`] that was found.
    #[cfg_attr(not(ksm_rs_kunit), allow(dead_code))]
    pub(crate) fn check<T: Node>(
        self,
        arena: &Arena<T>,
        mut in_order: impl FnMut(&T, &T) -> bool,
    ) -> Result<usize, Damage> {
        if self.is_empty() {
            return Ok(0);
        }
        let top = arena.get(self.top()).ok_or(Damage::Missing)?.links();
        if !top.parent().is_nil() {
            return Err(Damage::Parent);
        }
        if top.colour() == Colour::Red {
            return Err(Damage::Colour);
        }

        let mut nodes: usize = 0;
        let mut height = None;
        let mut previous: Option<&T> = None;
        let mut at = self.first(arena);
        while !at.is_nil() {
            nodes = nodes.wrapping_add(1);
            if nodes > arena.len() {
                return Err(Damage::Loop);
            }
            let node = arena.get(at).ok_or(Damage::Missing)?;
            if previous.is_some_and(|previous| !in_order(previous, node)) {
                return Err(Damage::Order);
            }
            let links = node.links();
            if !links.is_linked() {
                return Err(Damage::Missing);
            }
            for side in [Side::Left, Side::Right] {
                let child = links.child(side);
                if child.is_nil() {
                    // A path ends here.
                    let blacks = blacks_above(arena, at);
                    if *height.get_or_insert(blacks) != blacks {
                        return Err(Damage::Height);
                    }
                    continue;
                }
                let child = arena.get(child).ok_or(Damage::Missing)?.links();
                if !child.is_linked() {
                    return Err(Damage::Missing);
                }
                if child.parent() != at {
                    return Err(Damage::Parent);
                }
                if links.colour() == Colour::Red && child.colour() == Colour::Red {
                    return Err(Damage::Colour);
                }
            }
            previous = Some(node);
            at = next(arena, at);
        }
        Ok(nodes)
    }

    /// Makes `parent`, or the root if it is nil, lead to `new` where it led to `old`.
    fn change_child<T: Node>(&mut self, arena: &mut Arena<T>, parent: Id, old: Id, new: Id) {
        if parent.is_nil() {
            *self = Self::at(new);
        } else {
            let side = side_of(arena, parent, old);
            set_child(arena, parent, side, new);
        }
    }

    /// Turns the tree at `down`, which moves to `side`; its child on the other side takes its place.
    fn rotate<T: Node>(&mut self, arena: &mut Arena<T>, down: Id, side: Side) {
        let parent = parent(arena, down);
        let up = child(arena, down, side.opposite());
        if arena.get(up).is_none() {
            return;
        }
        let middle = child(arena, up, side);

        set_child(arena, down, side.opposite(), middle);
        set_parent(arena, middle, down);
        self.change_child(arena, parent, down, up);
        set_parent(arena, up, parent);
        set_child(arena, up, side, down);
        set_parent(arena, down, up);
    }
}

/// Returns the node after `id` in the order of its tree, or [`Id::NIL`].
pub(crate) fn next<T: Node>(arena: &Arena<T>, id: Id) -> Id {
    let right = child(arena, id, Side::Right);
    if !right.is_nil() {
        return extreme(arena, right, Side::Left);
    }
    // Up to the first node that this is on the left of.
    let mut below = id;
    for _ in 0..MAX_HEIGHT {
        let above = parent(arena, below);
        if above.is_nil() || side_of(arena, above, below) == Side::Left {
            return above;
        }
        below = above;
    }
    Id::NIL
}

/// Returns the outermost node on `side` below and including `top`, or [`Id::NIL`].
fn extreme<T: Node>(arena: &Arena<T>, top: Id, side: Side) -> Id {
    let mut found = Id::NIL;
    let mut at = top;
    for _ in 0..MAX_HEIGHT {
        let Some(node) = arena.get(at) else {
            break;
        };
        found = at;
        at = node.links().child(side);
    }
    found
}

/// Returns the number of black nodes from `id` to the top, both included.
#[cfg_attr(not(ksm_rs_kunit), allow(dead_code))]
fn blacks_above<T: Node>(arena: &Arena<T>, id: Id) -> usize {
    let mut blacks: usize = 0;
    let mut at = id;
    for _ in 0..MAX_HEIGHT {
        let Some(node) = arena.get(at) else {
            break;
        };
        if node.links().colour() == Colour::Black {
            blacks = blacks.wrapping_add(1);
        }
        at = node.links().parent();
    }
    blacks
}

// What follows reads and writes the links of one node. A missing one is black and has no relatives,
// as the nil leaves of the textbooks; writing to it does nothing.

#[inline]
fn links<T: Node>(arena: &Arena<T>, id: Id) -> Links {
    match arena.get(id) {
        Some(node) => *node.links(),
        None => Links {
            parent_and_colour: NO_PARENT,
            ..Links::new()
        },
    }
}

#[inline]
fn is_linked<T: Node>(arena: &Arena<T>, id: Id) -> bool {
    arena.get(id).is_some_and(|node| node.links().is_linked())
}

#[inline]
fn child<T: Node>(arena: &Arena<T>, id: Id, side: Side) -> Id {
    links(arena, id).child(side)
}

#[inline]
fn parent<T: Node>(arena: &Arena<T>, id: Id) -> Id {
    links(arena, id).parent()
}

#[inline]
fn colour<T: Node>(arena: &Arena<T>, id: Id) -> Colour {
    links(arena, id).colour()
}

/// Returns on which side of `parent` its child `id` hangs.
#[inline]
fn side_of<T: Node>(arena: &Arena<T>, parent: Id, id: Id) -> Side {
    if child(arena, parent, Side::Left) == id {
        Side::Left
    } else {
        Side::Right
    }
}

#[inline]
fn update<T: Node>(arena: &mut Arena<T>, id: Id, change: impl FnOnce(&mut Links)) {
    if let Some(node) = arena.get_mut(id) {
        change(node.links_mut());
    }
}

#[inline]
fn set_child<T: Node>(arena: &mut Arena<T>, id: Id, side: Side, child: Id) {
    update(arena, id, |links| links.set_child(side, child));
}

#[inline]
fn set_parent<T: Node>(arena: &mut Arena<T>, id: Id, parent: Id) {
    update(arena, id, |links| links.set_parent(parent));
}

#[inline]
fn set_colour<T: Node>(arena: &mut Arena<T>, id: Id, colour: Colour) {
    update(arena, id, |links| links.set_colour(colour));
}

/// Takes the links of a node out of it.
fn take_links<T: Node>(arena: &mut Arena<T>, id: Id) -> Links {
    let mut taken = links(arena, Id::NIL);
    update(arena, id, |links| taken = mem::take(links));
    taken
}
