// SPDX-License-Identifier: GPL-2.0

//! Linking a record into a tree.

#![forbid(unsafe_code)]

use super::{
    child,
    colour,
    is_linked,
    parent,
    set_child,
    set_colour,
    side_of,
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

/// A free place in a tree: a side of a node without a child there, or the top of an empty tree.
#[derive(Clone, Copy)]
struct Place {
    parent: Id,
    side: Side,
}

impl Root {
    /// Links `id` after all nodes that do not come after it.
    ///
    /// `before` tells whether the new record belongs before a node; among nodes that it equals it
    /// becomes the last. Returns false, with nothing done, if there is no such record or it is in a
    /// tree already.
    #[inline]
    pub(crate) fn insert_by<T: Node>(
        &mut self,
        arena: &mut Arena<T>,
        id: Id,
        mut before: impl FnMut(&T) -> bool,
    ) -> bool {
        let mut place = Place {
            parent: Id::NIL,
            side: Side::Left,
        };
        let mut at = self.top();
        for _ in 0..MAX_HEIGHT {
            let Some(node) = arena.get(at) else {
                break;
            };
            place = Place {
                parent: at,
                side: if before(node) {
                    Side::Left
                } else {
                    Side::Right
                },
            };
            at = node.links().child(place.side);
        }
        self.link(arena, id, place)
    }

    /// Links `id` at a free place and repairs the tree.
    fn link<T: Node>(&mut self, arena: &mut Arena<T>, id: Id, place: Place) -> bool {
        if arena.get(id).is_none() || is_linked(arena, id) {
            return false;
        }
        update(arena, id, |links| {
            *links = Links::new();
            links.set_parent(place.parent);
        });
        if place.parent.is_nil() {
            *self = Self::at(id);
        } else {
            set_child(arena, place.parent, place.side, id);
        }
        self.settle(arena, id);
        true
    }

    /// Repairs a tree in which the one thing wrong is that `id`, which is red, is at the top or has
    /// a red parent.
    pub(super) fn settle<T: Node>(&mut self, arena: &mut Arena<T>, mut id: Id) {
        for _ in 0..MAX_HEIGHT {
            let mother = parent(arena, id);
            if mother.is_nil() {
                set_colour(arena, id, Colour::Black);
                return;
            }
            if colour(arena, mother) == Colour::Black {
                return;
            }
            // A red node is not at the top, so that there is a grandmother, and she is black.
            let grandmother = parent(arena, mother);
            let side = side_of(arena, grandmother, mother);
            let aunt = child(arena, grandmother, side.opposite());

            if colour(arena, aunt) == Colour::Red {
                // The grandmother's blackness moves down a level on both sides. She is red now, and
                // may clash with her own parent.
                set_colour(arena, mother, Colour::Black);
                set_colour(arena, aunt, Colour::Black);
                set_colour(arena, grandmother, Colour::Red);
                id = grandmother;
                continue;
            }

            // The aunt cannot take any red: it is spread by a rotation that puts the middle one of
            // the three in order on top. If that is `id`, it has to get past its mother first.
            let middle = if side_of(arena, mother, id) == side {
                mother
            } else {
                self.rotate(arena, mother, side);
                id
            };
            set_colour(arena, middle, Colour::Black);
            set_colour(arena, grandmother, Colour::Red);
            self.rotate(arena, grandmother, side.opposite());
            return;
        }
    }
}
