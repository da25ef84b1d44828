#!/usr/bin/env python3
"""Tests of the checks in this folder: each rule is seen failing, on made-up trees and texts.

    python3 tests/checks/test_checks.py
"""

import tempfile
import unittest
from pathlib import Path

import messages
import rooms
import widths

ORDER = {"top": ["upper", "left right", "lower"]}


def workspace(files, crates=("top",)):
    """Returns the workspace that these files make; crates without a lib.rs get an empty one."""
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        for crate in crates:
            files.setdefault(f"{crate}/src/lib.rs", "")
        for name, text in files.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(text)
        return rooms.Workspace(root, crates)


def four_rooms(**texts):
    """Returns the workspace of one crate with the rooms of ORDER."""
    names = ("upper", "left", "right", "lower")
    files = {f"top/src/{name}.rs": texts.get(name, "") for name in names}
    files["top/src/lib.rs"] = "".join(f"pub mod {name};\n" for name in names)
    return workspace(files)


class Rooms(unittest.TestCase):
    def assert_found(self, found, *parts):
        """Exactly one problem is found for each of `parts`, which it contains."""
        found = list(found)
        self.assertEqual(len(found), len(parts), found)
        for text, part in zip(found, parts):
            self.assertIn(part, text)

    def test_a_use_that_goes_down_is_fine(self):
        tree = four_rooms(upper="use crate::left::A;", left="use crate::lower::{self, B};")
        self.assertEqual(rooms.problems(tree, ORDER, {}), [])
        self.assertEqual(set(tree.uses), {("top::upper", "top::left"), ("top::left", "top::lower")})

    def test_a_use_that_goes_up(self):
        tree = four_rooms(lower="//! Comment\nuse crate::upper::A;")
        self.assert_found(rooms.upward(tree, ORDER), "lower must not use upper")
        self.assertIn("lower.rs:2", next(rooms.upward(tree, ORDER)))

    def test_a_use_that_goes_sideways(self):
        tree = four_rooms(left="fn f() { crate::right::g() }")
        self.assert_found(rooms.upward(tree, ORDER), "left must not use right")

    def test_every_way_to_write_a_use(self):
        for text in (
            "use crate::upper::A;",
            "pub(crate) use crate::{lower::B, upper::{C, D}};",
            "use super::upper;",
            "use crate::upper as other;",
            "use crate::upper::*;",
            "fn f() { let x = super::upper::g::<u8>(); }",
            "struct A(crate::upper::B);",
            "mod inside { use super::super::upper::A; }",
            "fn f(c: char) -> bool { c == '\"' && crate::upper::g(\"\") }",
        ):
            with self.subTest(text):
                tree = four_rooms(lower=text)
                self.assertIn(("top::lower", "top::upper"), tree.uses)

    def test_what_is_no_use(self):
        for text in (
            "// use crate::upper::A;",
            "/// See [`crate::upper::A`].",
            "/* use crate::upper::A; */",
            'const A: &str = "crate::upper::A";',
            'const A: &str = r#"use crate::upper::A; ""#;',
            "pub(in crate::upper) fn f() {}",
            "#[cfg(test)] mod tests { use crate::upper::A; fn f() { {} } }",
            "#[cfg(test)]\n#[path = \"x.rs\"]\nmod tests;",
            "#[cfg(test)] use crate::upper::A;",
            "mod inside { use super::A; }",
            "use std::upper::A;",
            "use upper::A;",
        ):
            with self.subTest(text):
                self.assertEqual(four_rooms(lower=text).uses, {})

    def test_code_behind_tests_counts(self):
        tree = four_rooms(lower="#[cfg(test)] mod tests { fn f() {} }\nuse crate::upper::A;")
        self.assertIn(("top::lower", "top::upper"), tree.uses)

    def test_a_path_that_begins_with_an_import(self):
        files = {
            "top/src/lib.rs": "mod a;\nmod b;",
            "top/src/a.rs": "mod deep;",
            "top/src/a/deep.rs": "",
            "top/src/b.rs": "use crate::a;\nfn f() { a::deep::g() }",
        }
        self.assertIn(("top::b", "top::a::deep"), workspace(files).uses)

    def test_a_circle_of_two(self):
        tree = four_rooms(left="use crate::lower::A;", lower="use crate::left::B;")
        self.assert_found(rooms.circles(tree), "circle of 2 modules")

    def test_a_circle_of_three(self):
        tree = four_rooms(
            upper="use crate::left::A;", left="use crate::lower::A;", lower="use crate::upper::A;"
        )
        self.assert_found(rooms.circles(tree), "circle of 3 modules")

    def test_two_circles(self):
        tree = four_rooms(
            upper="use crate::left::A;",
            left="use crate::upper::A;",
            right="use crate::lower::A;",
            lower="use crate::right::A;",
        )
        self.assertEqual(len(list(rooms.circles(tree))), 2)

    def folder(self, **texts):
        """Returns the uses of a module `room` with the children `a` and `b`."""
        files = {f"top/src/room/{name}.rs": texts.get(name, "") for name in ("a", "b")}
        files["top/src/room.rs"] = "mod a;\npub mod b;\n" + texts.get("room", "")
        files["top/src/lib.rs"] = "mod room;\nmod other;\n"
        files["top/src/other.rs"] = texts.get("other", "")
        return workspace(files)

    def test_parent_and_child_may_use_each_other(self):
        tree = self.folder(room="use a::A;", a="use super::B;")
        down, up = ("top::room", "top::room::a"), ("top::room::a", "top::room")
        self.assertEqual(set(tree.uses), {down, up})
        self.assertEqual(list(rooms.circles(tree)), [])

    def test_a_circle_by_way_of_a_re_export(self):
        exports = "pub use a::A;\npub use b::B;"
        tree = self.folder(room=exports, a="use super::B;", b="use super::A;")
        self.assert_found(rooms.circles(tree), "circle of 2 modules")
        tree = self.folder(room=exports, a="use crate::other::B;", other="use crate::room::A;")
        self.assert_found(rooms.circles(tree), "circle of 2 modules")

    def test_a_circle_by_way_of_the_parent(self):
        room = "fn f() { a::g() }"
        tree = self.folder(room=room, a="use crate::other::B;", other="use crate::room;")
        self.assert_found(rooms.circles(tree), "circle of 3 modules")

    def test_a_room_without_a_place(self):
        tree = four_rooms()
        order = {"top": ["upper left", "right"]}
        self.assert_found(rooms.unnamed(tree, order), "top::lower has no place")
        order = {"top": ["upper left", "right lower gone"]}
        self.assert_found(rooms.unnamed(tree, order), "names top::gone")

    def two_crates(self, text):
        return workspace(
            {
                "top/src/lib.rs": "mod m;",
                "top/src/m.rs": text,
                "shared/src/lib.rs": "pub mod a;\npub mod b;\npub mod c;",
                "shared/src/a.rs": "mod one;\nmod two;\npub use one::One;\npub use two::Two;",
                "shared/src/a/one.rs": "",
                "shared/src/a/two.rs": "use crate::b::B;",
                "shared/src/b.rs": "",
                "shared/src/c.rs": "use crate::a::One;",
            },
            ("top", "shared"),
        )

    def test_what_must_not_be_reached(self):
        unreachable = {"top": ["shared::b"]}
        for text in ("use qrelay_shared::b;", "use qrelay_shared::a::Two;"):
            tree = self.two_crates(text)
            self.assert_found(rooms.forbidden(tree, unreachable), "top must not reach shared::b")
        for text in ("use qrelay_shared::a::One;", "use qrelay_shared::c::C;", ""):
            tree = self.two_crates(text)
            self.assert_found(rooms.forbidden(tree, unreachable))
        tree = self.two_crates("")
        found = rooms.forbidden(tree, {"shared::a": ["shared::b"]})
        self.assert_found(found, "shared::a::two uses shared::b")
        unreachable = {"top": ["shared::gone"]}
        self.assert_found(rooms.forbidden(tree, unreachable), "does not exist")


class Widths(unittest.TestCase):
    def test_code(self):
        self.assertEqual(list(widths.wide_code(["x" * 100, "é" * 100, "// " + "x" * 98])), [3])

    def test_prose(self):
        wide = "word " * 25
        lines = [wide, f"| {wide} |", "```lua", wide, "```", wide, "    " + wide]
        self.assertEqual(list(widths.wide_prose(lines)), [1, 6, 7])

    def test_a_fence_in_a_fence(self):
        wide = "word " * 25
        lines = ["````", "```", wide, "```", wide, "````", wide]
        self.assertEqual(list(widths.wide_prose(lines)), [7])

    def test_links(self):
        address = "https://example.org/" + "x" * 90
        for line in (address, f"- <{address}>", f"[a text]({address}),", f"[1]: {address}"):
            self.assertEqual(list(widths.wide_prose([line])), [], line)
        for line in (f"See {address}", f"[a]({address}) says more"):
            self.assertEqual(list(widths.wide_prose([line])), [1], line)

    def test_doc_comments(self):
        text = "//! It.\n//! Second\n\n/// A.\n/// It.\nfn f() {}\n  /// Those.\n//// no\n// It"
        found = [(1, "It."), (4, "A."), (7, "Those.")]
        self.assertEqual(list(widths.doc_comments(text.splitlines())), found)

    def test_pointing_words(self):
        for comment in ("It is", "Its name", "Those that", "What is", "So many bytes", "Others."):
            self.assertTrue(widths.POINTING.match(comment), comment)
        for comment in ("Items", "Thistle", "The sameness", "Otherwise, a", "Whatever", "An It"):
            self.assertFalse(widths.POINTING.match(comment), comment)

    def test_the_whole(self):
        file = Path("a.rs")
        texts = [(file, "/// A.\nx\n" * 97 + "/// It.\nx\n" * 3 + "x" * 101)]
        wrong, pointing, total = widths.check(texts)
        self.assertEqual(wrong, ["a.rs:201: more than 100 columns"])
        self.assertEqual((len(pointing), total), (3, 100))



class Messages(unittest.TestCase):
    PAGE = "### Every log line\n\n| Line |\n|---|\n| `worker died: …` | x |\n| `stopped` | y |\n## Next"

    def check(self, code, page=PAGE):
        found = [("a.rs", message) for _, message in messages.messages(code)]
        return messages.check(found, [message for _, message in found], page)

    def test_what_is_explained_passes(self):
        code = """
            error!(log, "worker died: {cause}"; "worker" => 7);
            info!(self.log, # "tag,name", "stopped");
            // warn!(log, "not code");
            slog::warn!(log, "{}", text);
            debug!(log, "not for administrators");
        """
        self.assertEqual(self.check(code), [])

    def test_what_is_not_explained_is_found(self):
        code = 'error!(log, "worker died: {c}"); info!(log, "stopped"); warn!(log, "a new \\\n   fault");'
        self.assertEqual(len(self.check(code)), 1)
        self.assertIn("a new fault", self.check(code)[0])

    def test_what_is_never_logged_is_found(self):
        found = self.check('error!(log, "worker died: {c}");')
        self.assertEqual(found, ["docs/operations.md: no message is like 'stopped'"])

    def test_tests_are_left_out(self):
        code = 'error!(log, "worker died: {c}"); info!(log, "stopped");\n#[cfg(test)]\nmod tests { warn!(log, "x"); }'
        self.assertEqual(self.check(code), [])


if __name__ == "__main__":
    unittest.main()
