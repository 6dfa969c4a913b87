// SPDX-License-Identifier: GPL-2.0

//! Making one tree out of two, and two out of one.
//!
//! Neither takes more than a walk or two between the top and the bottom for each level of the tree,
//! whatever the trees hold: a root array that doubles or halves need not move nodes one by one.

#![forbid(unsafe_code)]

use super::{
    child,
    colour,
    extreme,
    set_child,
    set_colour,
    set_parent,
    take_links,
    update,
    Colour,
    Links,
    Node,
    Root,
    Side,
    MAX_HEIGHT, //
};
use crate::arena::{
    Arena,
    Id, //
};

impl Root {
    /// Makes one tree of all nodes of `low`, followed by all nodes of `high`.
    ///
    /// Takes O(log n) time for n nodes.
    pub(crate) fn join<T: Node>(arena: &mut Arena<T>, low: Self, mut high: Self) -> Self {
        if low.is_empty() {
            return high;
        }
        let first = extreme(arena, high.top(), Side::Left);
        if !high.erase(arena, first) {
            return low;
        }
        Self::join_with(arena, low, first, high)
    }

    /// Makes two trees: of the nodes for which `is_low` is true, and of the others.
    ///
    /// `is_low` must be true for some number of nodes at the front of the order, and false for all
    /// others. Takes O(log^2 n) time for n nodes.
    pub(crate) fn split<T: Node>(
        self,
        arena: &mut Arena<T>,
        mut is_low: impl FnMut(&T) -> bool,
    ) -> (Self, Self) {
        let mut low = Self::new();
        let mut high = Self::new();

        // Most trees of a forest have a single node, which needs no change to be another tree.
        if let Some(node) = arena.get(self.top()) {
            let links = node.links();
            if links.child(Side::Left).is_nil() && links.child(Side::Right).is_nil() {
                return if is_low(node) {
                    (self, high)
                } else {
                    (low, self)
                };
            }
        }

        // Down to where the cut comes out at the bottom.
        let mut at = Id::NIL;
        let mut next = self.top();
        for _ in 0..MAX_HEIGHT {
            let Some(node) = arena.get(next) else {
                break;
            };
            at = next;
            next = node.links().child(if is_low(node) {
                Side::Right
            } else {
                Side::Left
            });
        }

        // Up again: each node on the way, and its child on the side away from the cut, goes to the
        // one or the other tree. What is below it has gone already.
        for _ in 0..MAX_HEIGHT {
            let Some(node) = arena.get(at) else {
                break;
            };
            let goes_low = is_low(node);
            let old = take_links(arena, at);
            if goes_low {
                let outer = Self::detach(arena, old.child(Side::Left));
                low = Self::join_with(arena, outer, at, low);
            } else {
                let outer = Self::detach(arena, old.child(Side::Right));
                high = Self::join_with(arena, high, at, outer);
            }
            at = old.parent();
        }
        (low, high)
    }

    /// Makes one tree of all nodes of `low`, then `middle`, which is in no tree, then all nodes of
    /// `high`.
    fn join_with<T: Node>(arena: &mut Arena<T>, low: Self, middle: Id, high: Self) -> Self {
        let low_height = low.black_height(arena);
        let high_height = high.black_height(arena);

        // `middle` becomes red, with the lower tree on one side and a part of the same height from
        // the edge of the higher one on the other. It hangs where that part hung, so that the
        // number of black nodes is right on all paths.
        let (mut root, side, other, mut height, wanted) = if low_height >= high_height {
            (low, Side::Right, high.top(), low_height, high_height)
        } else {
            (high, Side::Left, low.top(), high_height, low_height)
        };
        let mut above = Id::NIL;
        let mut edge = root.top();
        for _ in 0..MAX_HEIGHT {
            let black = colour(arena, edge) == Colour::Black;
            if (black && height <= wanted) || edge.is_nil() {
                break;
            }
            if black {
                height = height.wrapping_sub(1);
            }
            above = edge;
            edge = child(arena, edge, side);
        }

        update(arena, middle, |links| {
            *links = Links::new();
            links.set_parent(above);
            links.set_child(side, other);
            links.set_child(side.opposite(), edge);
        });
        set_parent(arena, other, middle);
        set_parent(arena, edge, middle);
        if above.is_nil() {
            root = Self::at(middle);
        } else {
            set_child(arena, above, side, middle);
        }
        root.settle(arena, middle);
        root
    }

    /// Makes a tree of its own out of the part of a tree that is below `top`.
    ///
    /// Whoever leads to `top` has to be told by the caller.
    fn detach<T: Node>(arena: &mut Arena<T>, top: Id) -> Self {
        set_parent(arena, top, Id::NIL);
        set_colour(arena, top, Colour::Black);
        if arena.get(top).is_some() {
            Self::at(top)
        } else {
            Self::new()
        }
    }

    /// Returns the number of black nodes on each path from the top to the bottom.
    fn black_height<T: Node>(self, arena: &Arena<T>) -> usize {
        let mut height: usize = 0;
        let mut at = self.top();
        for _ in 0..MAX_HEIGHT {
            let Some(node) = arena.get(at) else {
                break;
            };
            if node.links().colour() == Colour::Black {
                height = height.wrapping_add(1);
            }
            at = node.links().child(Side::Left);
        }
        height
    }
}
