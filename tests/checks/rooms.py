#!/usr/bin/env python3
"""Checks which module of qrelay uses which: no circles, and no room uses a room above it.

The script reads the `use` statements and the other paths (`crate::…`, `super::…`, `qrelay_…::…`)
of every crate, without comments, strings and `#[cfg(test)]` items. A path that leads to a
re-export counts as a use of the module where the item is defined.

It fails on

- a circle: modules that use each other, directly or through others. A module may use what its
  parent defines, because a folder is one thing: such a use is left out when circles are searched.
- a use that goes up, or sideways, by the table ORDER.
- a room that ORDER doesn't name.
- a module that reaches what UNREACHABLE forbids to its room, directly or through others.

    tests/checks/rooms.py           checks the workspace
    tests/checks/rooms.py --list    prints every use, one per line
"""

import re
import sys
from collections import defaultdict
from pathlib import Path

CRATES = ["cli", "supervisor", "worker", "shared"]

# The children of a module (or of a crate) from top to bottom. Each may use those below it. Those on
# one line don't use each other.
ORDER = {
    "supervisor": [
        "daemon",
        "accept admin generations services workers",  # The owners, which only send each other events.
        "event",
        "backoff connected descriptors signals system watch",
        "ids",
    ],
    "worker": [
        "process",
        "threads lua",
        "session",
        "delivery",
        "mail",
        "client job_channel",
        "flight",
        "clock",
    ],
    "worker::lua": [
        "script",
        "state",
        "config",
        "library",
        "engine",
        "binding",
    ],
}

# Rooms, and what none of their modules reaches, directly or through others.
PROTOCOLS = "address beng_control endpoint header netstring network pond qmqp"
UNREACHABLE = {
    # The supervisor looks at no byte of a mail: it has no use for what takes mails apart.
    "supervisor": ["shared::header", "shared::qmqp::request", "shared::qmqp::outgoing"],
    # Protocols are bytes in and values out.
    **{f"shared::{name}": ["shared::ipc", "shared::sys"] for name in PROTOCOLS.split()},
}

# --- Reading one file ----------------------------------------------------------------------------

QUIET = re.compile(
    r"""//[^\n]*
      | /\*.*?\*/
      | \bb?r(\#*)".*?"\1
      | b?"(?:\\.|[^"\\])*"
      | b?'(?:\\[^\n]+?|[^\\'\n])'""",
    re.VERBOSE | re.DOTALL,
)
TEST_ITEM = re.compile(r"#\[cfg\(test\)\]")
VISIBILITY = re.compile(r"\bpub\s*\([^)]*\)")
USE = re.compile(r"(?:\b(pub)\s+)?\buse\s+([^;]+);")
MODULE = re.compile(r"\bmod\s+(\w+)\s*([;{])")
PATH = re.compile(r"(?<![\w:.])\w+(?:\s*::\s*\w+)+")
FIRST = re.compile(r"crate|super|self|qrelay_\w+")


def blank(text):
    """Spaces in place of `text`, so that positions and line numbers stay the same."""
    return re.sub(r"[^\n]", " ", text)


def end_of_item(text, start):
    """Returns the position behind the item that begins at `start`."""
    depth = 0
    for position in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0 and text[position] in ";}":
            return position + 1
    return len(text)


def code_of(text):
    """Returns `text` with comments, strings and test items blanked."""
    text = QUIET.sub(lambda match: blank(match[0]), text)
    while match := TEST_ITEM.search(text):
        end = end_of_item(text, match.end())
        text = text[: match.start()] + blank(text[match.start() : end]) + text[end:]
    return VISIBILITY.sub(lambda match: "pub" + blank(match[0][3:]), text)


def split_at_commas(text):
    """Splits the inside of a brace group into its members."""
    part, depth = "", 0
    for char in text:
        depth += {"{": 1, "}": -1}.get(char, 0)
        if char == "," and depth == 0:
            yield part
            part = ""
        else:
            part += char
    yield part


def expand(tree, prefix=()):
    """Yields each path of a `use` tree with the name that it gets."""
    head, brace, inside = tree.partition("{")
    *segments, last = [segment.strip() for segment in head.split("::")]
    prefix = (*prefix, *(segment for segment in segments if segment))
    if brace:
        for part in split_at_commas(inside.rpartition("}")[0]):
            if part.strip():
                yield from expand(part, prefix)
        return
    last, _, alias = last.partition(" as ")
    path = prefix if last == "self" else (*prefix, last.strip())
    yield path, alias.strip() or path[-1]


class Module:
    """A module with a file of its own."""

    def __init__(self, name, file):
        self.name = name
        self.file = file
        self.code = code_of(file.read_text())
        self.children = [m[1] for m in MODULE.finditer(self.code) if m[2] == ";"]
        self.blocks = [
            (m.start(), end_of_item(self.code, m.start()))
            for m in MODULE.finditer(self.code)
            if m[2] == "{"
        ]
        # What a name stands for that a `use` makes known: `mail::This` after `use crate::mail`.
        self.imports = {
            name: (match.start(), path)
            for match in USE.finditer(self.code)
            for path, name in expand(match[2])
            if FIRST.fullmatch(path[0])
        }

    @property
    def parent(self):
        return self.name.rpartition("::")[0]

    def paths(self):
        """Yields each path in the code: its position, its segments, the name that it re-exports."""
        for match in USE.finditer(self.code):
            for path, name in expand(match[2]):
                yield match.start(), path, name if match[1] else None
        for match in PATH.finditer(USE.sub(lambda match: blank(match[0]), self.code)):
            path = tuple(re.split(r"\s*::\s*", match[0]))
            if path[0] in self.children or path[0] in self.imports or FIRST.fullmatch(path[0]):
                yield match.start(), path, None

    def place(self, position):
        return f"{self.file}:{self.code.count(chr(10), 0, position) + 1}"


# --- The modules of all crates and what they use -------------------------------------------------


def modules_of(crate, directory):
    """Returns the modules of a crate, found from its `mod` lines."""
    source = directory / "src"
    top = next(file for file in (source / "lib.rs", source / "main.rs") if file.exists())
    found = {}
    todo = [(crate, top, source)]
    while todo:
        name, file, folder = todo.pop()
        module = found[name] = Module(name, file)
        for child in module.children:
            files = [folder / f"{child}.rs", folder / child / "mod.rs"]
            existing = next(filter(Path.exists, files), None)
            if existing is None:
                sys.exit(f"{file}: there is no file for `mod {child}`")
            todo.append((f"{name}::{child}", existing, folder / child))
    return found


class Workspace:
    """All modules, and their uses of each other with the place of the first one."""

    def __init__(self, root, crates):
        self.modules = {}
        for crate in crates:
            self.modules |= modules_of(crate, root / crate)
        self.exports = defaultdict(dict)
        for module in self.modules.values():
            for position, path, name in module.paths():
                if name:
                    self.exports[module.name][name] = self.absolute(module, position, path)
        self.uses = {}
        self.own_exports = set()
        for module in self.modules.values():
            for position, path, name in module.paths():
                target = self.resolve(self.absolute(module, position, path))
                if target and target != module.name:
                    self.uses.setdefault((module.name, target), module.place(position))
                    if name and target.startswith(module.name + "::"):
                        self.own_exports.add((module.name, target))

    def absolute(self, module, position, path):
        """Returns the path from its crate on; an empty one if it leads out of the workspace."""
        first, *rest = path
        if first.startswith("qrelay_"):
            return (first.removeprefix("qrelay_"), *rest)
        if first == "crate":
            return (module.name.partition("::")[0], *rest)
        here = module.name.split("::")
        if first in module.children:
            return (*here, *path)
        if first in module.imports:
            return (*self.absolute(module, *module.imports[first]), *rest)
        if first not in ("self", "super"):
            return ()
        here += ["{"] * sum(start < position < end for start, end in module.blocks)
        while path and path[0] in ("self", "super"):
            here = here[:-1] if path[0] == "super" else here
            path = path[1:]
        return (*(segment for segment in here if segment != "{"), *path)

    def resolve(self, path, depth=0):
        """Returns the name of the module in which the item is defined, or None."""
        if not path or path[0] not in self.modules or depth > 20:
            return None
        module = path[0]
        for index, segment in enumerate(path[1:], 1):
            if f"{module}::{segment}" in self.modules:
                module = f"{module}::{segment}"
            elif self.exports[module].get(segment):
                target = self.exports[module][segment]
                return self.resolve((*target, *path[index + 1 :]), depth + 1) or module
            else:
                break
        return module


# --- The rules -----------------------------------------------------------------------------------


def route(graph, start, goal):
    """Returns the shortest way from `start` to `goal` by at least one step, or None."""
    before = {}
    level = [start]
    while level:
        following = []
        for module in level:
            for target in graph[module]:
                if target == goal:
                    way = [target, module]
                    while way[-1] != start:
                        way.append(before[way[-1]])
                    return way[::-1]
                if target not in before and target != start:
                    before[target] = module
                    following.append(target)
        level = following
    return None


def graph_of(uses):
    graph = defaultdict(list)
    for source, target in sorted(uses):
        graph[source].append(target)
    return graph


def steps(workspace, way):
    """Describes a way, one line per step."""
    lines = []
    for source, target in zip(way, way[1:]):
        lines.append(f"    {source} uses {target} ({workspace.uses[source, target]})")
    return "\n".join(lines)


def circles(workspace):
    """Yields circles until each module that is in one has been named."""
    uses = [use for use in workspace.uses if workspace.modules[use[0]].parent != use[1]]
    graph = graph_of(uses)
    named = set()
    for module in workspace.modules:
        way = None if module in named else route(graph, module, module)
        if way:
            named.update(way)
            yield f"circle of {len(way) - 1} modules:\n{steps(workspace, way)}"


def common_room(source, target):
    """Returns the nearest module around both, and its child around each of them."""
    left, right = source.split("::"), target.split("::")
    depth = 0
    while depth < min(len(left), len(right)) and left[depth] == right[depth]:
        depth += 1
    child = [name[depth] if depth < len(name) else None for name in (left, right)]
    return "::".join(left[:depth]), *child


def upward(workspace, order):
    """Yields each use that goes up or sideways by the table."""
    level = {
        (room, name): number
        for room, lines in order.items()
        for number, line in enumerate(lines)
        for name in line.split()
    }
    for (source, target), place in sorted(workspace.uses.items()):
        room, upper, lower = common_room(source, target)
        if room in order and upper and lower:
            if level.get((room, upper), 0) >= level.get((room, lower), 0):
                yield f"{room}: {upper} must not use {lower}: {target} in {place}"


def unnamed(workspace, order):
    """Yields each room that the table lacks, and each name in the table that is no room."""
    for room, lines in order.items():
        names = {name for line in lines for name in line.split()}
        children = set(workspace.modules[room].children)
        for name in sorted(children - names):
            yield f"{room}::{name} has no place in the table ORDER"
        for name in sorted(names - children):
            yield f"the table ORDER names {room}::{name}, which does not exist"


def forbidden(workspace, unreachable):
    """Yields the way to each forbidden module. A re-export of a child alone is no use of it."""
    uses = [use for use in workspace.uses if use not in workspace.own_exports]
    graph = graph_of(uses)
    for room, targets in unreachable.items():
        for name in {room, *targets} - set(workspace.modules):
            yield f"the table UNREACHABLE names {name}, which does not exist"
        modules = [name for name in workspace.modules if f"{name}::".startswith(f"{room}::")]
        for target in targets:
            ways = [route(graph, module, target) for module in modules]
            way = min((way for way in ways if way), key=len, default=None)
            if way:
                yield f"{room} must not reach {target}:\n{steps(workspace, way)}"


def problems(workspace, order, unreachable):
    """Returns everything that is wrong, as texts."""
    return [
        *unnamed(workspace, order),
        *circles(workspace),
        *upward(workspace, order),
        *forbidden(workspace, unreachable),
    ]


def main():
    workspace = Workspace(Path("."), CRATES)
    if "--list" in sys.argv[1:]:
        for (source, target), place in sorted(workspace.uses.items()):
            print(f"{source} -> {target}  {place}")
        return 0
    found = problems(workspace, ORDER, UNREACHABLE)
    print("\n".join(found))
    print(f"{len(workspace.modules)} modules, {len(workspace.uses)} uses, {len(found)} problems")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
