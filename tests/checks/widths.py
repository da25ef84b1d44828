#!/usr/bin/env python3
"""Checks the width of lines, and the first words of doc comments.

The script fails on

- a line of more than 100 columns in a .rs file, comments included;
- a line of more than 100 columns in the prose of a .md file. Tables, code blocks, and lines that
  are one link and so can't be broken are left out;
- doc comments (`///` and `//!`) that open with a word that points at something else, such as "It"
  or "Those", if more than 3 in 100 do: a doc comment names its subject, because it is read alone.

    tests/checks/widths.py           checks every file below the working directory
    tests/checks/widths.py --list    also names the doc comments that open with such a word
"""

import re
import sys
from pathlib import Path

COLUMNS = 100
SHARE = 0.03  # of the doc comments may open with one of these words

POINTING = re.compile(
    r"(It|Its|It's|They|They're|Their|Them|Those|That|This|These|Who|Whose|Which|What|"
    r"So many|So much|The same|Others?)\b(?!')"
)
LINK = re.compile(
    r"""\s*(?:[-*>]\s+|\d+\.\s+)*          # a mark of a list or a quotation
        (?:<?https?://\S+                  # an address
         | \[[^]]*\]\([^)\s]*\)\S?         # a link
         | \[[^]]+\]:\s*\S+)\s*$           # the target of a link""",
    re.VERBOSE,
)
DOC = re.compile(r"\s*//(?:/(?!/)|!)")


def wide_code(lines):
    """Yields the number of each line that is too wide."""
    for number, line in enumerate(lines, 1):
        if len(line) > COLUMNS:
            yield number


def wide_prose(lines):
    """Yields the number of each line of prose that is too wide."""
    fence = None
    for number, line in enumerate(lines, 1):
        mark = re.match(r"\s*(```+|~~~+)", line)
        if mark and fence is None:
            fence = mark[1]
        elif fence is not None:
            if line.strip() == fence:
                fence = None
        elif len(line) > COLUMNS and not line.lstrip().startswith("|") and not LINK.match(line):
            yield number


def doc_comments(lines):
    """Yields the number and the text of the first line of each doc comment."""
    inside = False
    for number, line in enumerate(lines, 1):
        match = DOC.match(line)
        if match and not inside:
            yield number, line[match.end() :].strip()
        inside = bool(match)


def check(files):
    """Returns what is wrong, the doc comments with a pointing word, and the number of all."""
    wrong, pointing, total = [], [], 0
    for file, text in files:
        lines = text.splitlines()
        if file.suffix == ".rs":
            wide = wide_code(lines)
            for number, comment in doc_comments(lines):
                total += 1
                if POINTING.match(comment):
                    pointing.append(f"{file}:{number}: {comment}")
        else:
            wide = wide_prose(lines)
        wrong += [f"{file}:{number}: more than {COLUMNS} columns" for number in wide]
    return wrong, pointing, total


def sources(directory):
    """Yields the files to check, but for those that cargo has made."""
    for entry in directory.iterdir():
        if entry.is_dir() and entry.name != "target" and not entry.name.startswith("."):
            yield from sources(entry)
        elif entry.suffix in (".rs", ".md"):
            yield entry


def main():
    files = [(file, file.read_text()) for file in sorted(sources(Path(".")))]
    wrong, pointing, total = check(files)
    too_many = len(pointing) > SHARE * total
    if too_many or "--list" in sys.argv[1:]:
        print("\n".join(pointing))
    print("\n".join(wrong), end="\n" if wrong else "")
    print(f"{len(files)} files, {len(wrong)} lines too wide")
    print(f"{len(pointing)} of {total} doc comments open with a word that points elsewhere: "
          f"{100 * len(pointing) / max(total, 1):.1f} % (at most {100 * SHARE:.0f} %)")
    return 1 if wrong or too_many or not total else 0


if __name__ == "__main__":
    sys.exit(main())
