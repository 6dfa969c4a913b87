// SPDX-License-Identifier: GPL-2.0

//! Unlinking a record from a tree.

#![forbid(unsafe_code)]

use super::{
    child,
    colour,
    extreme,
    is_linked,
    parent,
    set_child,
    set_colour,
    set_parent,
    side_of,
    take_links,
    update,
    Colour,
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
    /// Unlinks `id`, which must be in this tree.
    ///
    /// Returns false, with nothing done, if there is no such record or it is in no tree.
    pub(crate) fn erase<T: Node>(&mut self, arena: &mut Arena<T>, id: Id) -> bool {
        if !is_linked(arena, id) {
            return false;
        }
        let left = child(arena, id, Side::Left);
        let right = child(arena, id, Side::Right);
        if !left.is_nil() && !right.is_nil() {
            self.sink(arena, id, right);
        }

        // One child at most now. It moves up into the place of `id`.
        let above = parent(arena, id);
        let side = side_of(arena, above, id);
        let mut below = child(arena, id, Side::Left);
        if below.is_nil() {
            below = child(arena, id, Side::Right);
        }
        self.change_child(arena, above, id, below);
        set_parent(arena, below, above);
        if take_links(arena, id).colour() == Colour::Black {
            self.restore(arena, above, side);
        }
        true
    }

    /// Lets `id`, whose right child is `right`, change places with its successor, which has no left
    /// child.
    ///
    /// The order of the two is wrong until `id` is gone. So is the parent of the right child that
    /// `id` gets, which moves into its place.
    fn sink<T: Node>(&mut self, arena: &mut Arena<T>, id: Id, right: Id) {
        let successor = extreme(arena, right, Side::Left);
        let Some(node) = arena.get(successor) else {
            return;
        };
        let low = *node.links();
        let Some(node) = arena.get(id) else {
            return;
        };
        let high = *node.links();

        self.change_child(arena, high.parent(), id, successor);
        update(arena, successor, |links| *links = high);
        update(arena, id, |links| *links = low);
        set_parent(arena, high.child(Side::Left), successor);
        if successor == right {
            // The two are neighbours: the links between them would lead to themselves.
            set_child(arena, successor, Side::Right, id);
            set_parent(arena, id, successor);
        } else {
            set_parent(arena, right, successor);
            set_child(arena, low.parent(), Side::Left, id);
        }
    }

    /// Repairs a tree in which the paths through the `side` of `above` are one black node short.
    fn restore<T: Node>(&mut self, arena: &mut Arena<T>, mut above: Id, mut side: Side) {
        for _ in 0..MAX_HEIGHT {
            let short = if above.is_nil() {
                self.top()
            } else {
                child(arena, above, side)
            };
            if above.is_nil() || colour(arena, short) == Colour::Red {
                // Either the missing one is replaced, or all paths are short of it.
                set_colour(arena, short, Colour::Black);
                return;
            }

            let mut sister = child(arena, above, side.opposite());
            if colour(arena, sister) == Colour::Red {
                // Her children are black. One of them becomes the sister.
                set_colour(arena, sister, Colour::Black);
                set_colour(arena, above, Colour::Red);
                self.rotate(arena, above, side);
                sister = child(arena, above, side.opposite());
            }
            let near = child(arena, sister, side);
            let far = child(arena, sister, side.opposite());

            if colour(arena, near) == Colour::Black && colour(arena, far) == Colour::Black {
                // Now the sister's paths are short as well: the whole of `above` is.
                set_colour(arena, sister, Colour::Red);
                let next = parent(arena, above);
                side = side_of(arena, next, above);
                above = next;
                continue;
            }

            // There is a red niece: a rotation brings a node over from her side, and she takes the
            // place of the one that is missing there.
            let (sister, far) = if colour(arena, far) == Colour::Red {
                (sister, far)
            } else {
                self.rotate(arena, sister, side.opposite());
                (near, sister)
            };
            let top = colour(arena, above);
            set_colour(arena, sister, top);
            set_colour(arena, above, Colour::Black);
            set_colour(arena, far, Colour::Black);
            self.rotate(arena, above, side);
            return;
        }
    }
}
