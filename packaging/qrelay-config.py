#!/usr/bin/env python3
"""Writes the manual page qrelay-config(5) from docs/configuration.md and the pages in docs/lua/.

    packaging/qrelay-config.py >qrelay-config.5

The page has the same text as the documentation, in the order of docs/lua/README.md. Links become
their text. A table becomes a list: its first column is the tag.
"""

import re
import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent.parent / "docs"

BOLD, ITALIC, END = "\\fB", "\\fI", "\\fR"


def escaped(text):
    """Returns text without anything that roff would take for its own."""
    text = text.replace("\\", "\\e").replace("-", "\\-").replace("'", "\\(aq").replace("^", "\\(ha")
    text = text.replace("`", "\\(ga").replace("~", "\\(ti").replace('"', "\\(dq")
    return "".join(c if ord(c) < 128 else f"\\[u{ord(c):04X}]" for c in text)


def inline(text):
    """Returns a piece of Markdown as roff: code and strong text bold, emphasis italic."""
    result = []
    token = re.compile(
        r"`(?P<code>[^`]+)`|\[(?P<link>(?:[^\]`]|`[^`]*`)+)\]\((?P<to>[^)]+)\)"
        r"|\*\*(?P<strong>[^*]+)\*\*|\*(?P<emphasis>[^*]+)\*|\\(?P<literal>.)"
    )
    end = 0
    for match in token.finditer(text):
        result.append(escaped(text[end : match.start()]))
        end = match.end()
        if match["code"]:
            result.append(BOLD + escaped(match["code"]) + END)
        elif match["link"]:
            result.append(inline(match["link"]))
            if match["to"].startswith("http"):
                result.append(" <" + escaped(match["to"]) + ">")
        elif match["strong"]:
            result.append(BOLD + inline(match["strong"]) + END)
        elif match["emphasis"]:
            result.append(ITALIC + inline(match["emphasis"]) + END)
        else:
            result.append(escaped(match["literal"]))
    result.append(escaped(text[end:]))
    return "".join(result)


def line(text):
    """Returns a line of text, which roff must not take for a request."""
    return "\\&" + text if text.startswith((".", "\\(aq")) else text


def cells(row):
    return [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", row)[1:-1]]


def table(rows):
    """Yields a list of the table's rows. A header says what a column between the others means."""
    header = cells(rows[0])
    for row in rows[2:]:
        row = cells(row)
        yield ".TP"
        yield line(inline(row[0]))
        between = [
            f"{name}: {value}." if name else f"({value})"
            for name, value in zip(header[1:-1], row[1:-1])
            if value
        ]
        yield line(inline(" ".join(between + row[-1:])))
    yield ".PP"


def blocks(text):
    """Yields the blocks of a page: a kind and its lines."""
    lines = text.split("\n")
    while lines:
        first = lines.pop(0)
        if not first.strip():
            continue
        if first.startswith("```"):
            end = lines.index("```")
            yield "code", lines[:end]
            del lines[: end + 1]
            continue
        block = [first]
        if first.startswith("#"):
            yield "heading", block
            continue
        while lines and lines[0].strip() and not lines[0].startswith(("```", "#")):
            if lines[0].startswith("- ") or (lines[0].startswith("|") != first.startswith("|")):
                break
            block.append(lines.pop(0))
        kind = "table" if first.startswith("|") else "item" if first.startswith("- ") else "text"
        yield kind, block


def page(text, deepest):
    """Yields the page as roff. `deepest` is the number of # that make a section."""
    for kind, block in blocks(text):
        if kind == "heading":
            hashes, title = block[0].split(" ", 1)
            if len(hashes) <= deepest:
                yield f".SH {inline(title.upper())}"
            elif len(hashes) == deepest + 1:
                yield f".SS {inline(title)}"
            else:
                yield from [".PP", BOLD + inline(title) + END, ".PP"]
        elif kind == "table":
            yield from table(block)
        elif kind == "code":
            yield from [".PP", ".RS 4", ".nf"]
            yield from (line(escaped(text)) for text in block)
            yield from [".fi", ".RE", ".PP"]
        elif kind == "item":
            yield ".IP \\(bu 2"
            yield line(inline(" ".join(text.strip() for text in block)[2:]))
        else:
            yield ".PP"
            yield line(inline(" ".join(text.strip() for text in block)))


def tidy(lines):
    """Yields the lines without paragraphs that begin nothing."""
    lines = list(lines)
    others = (".PP", ".SH", ".SS", ".TP", ".IP")
    for before, this, after in zip([".SH"] + lines, lines, lines[1:] + [".SH"]):
        if this != ".PP" or not (before.startswith(others[1:3]) or after.startswith(others)):
            yield this


def manual():
    """Yields the whole manual page."""
    date = re.search(r"^\.Dd (.*)$", (DOCS / "man/qrelay.8").read_text(), re.M)[1]
    yield f'.TH QRELAY\\-CONFIG 5 "{date}" qrelay "File Formats Manual"'
    yield from [".SH NAME", "qrelay\\-config \\- the configuration of qrelay, a script in Lua"]
    yield from [".SH SYNOPSIS", "/etc/cm4all/qrelay/config.lua", ".SH DESCRIPTION"]
    text = (DOCS / "configuration.md").read_text()
    yield from page(text.split("\n", 1)[1], 2)
    index = (DOCS / "lua/README.md").read_text()
    for name in re.findall(r"^\| \[(\w+\.md)\]\(\1\)", index, re.M):
        yield from page((DOCS / "lua" / name).read_text(), 1)
    yield from [".SH SEE ALSO", ".BR qrelay (8)"]


def main():
    sys.stdout.write("\n".join(tidy(manual())) + "\n")


if __name__ == "__main__":
    main()
