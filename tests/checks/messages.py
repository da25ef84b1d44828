#!/usr/bin/env python3
"""Checks that docs/operations.md explains every message that the processes log, and no other one.

The script reads the messages of the macros `error!`, `warn!` and `info!` of slog in the sources,
without tests, and the first column of the tables in the section "Every log line". A placeholder of
a message (`{}`) and an ellipsis of the page stand for any text.

It fails on

- a message that no line of the page explains;
- a line of the page that no text of the sources is like. Some messages are put together from
  several texts, so any text of the sources will do.

A message that has nothing but placeholders comes from elsewhere, such as the script, and is left
out.

    tests/checks/messages.py           checks the working directory
    tests/checks/messages.py --list    prints every message with the place where it is logged
"""

import re
import sys
from pathlib import Path

SOURCES = ["supervisor/src", "worker/src", "shared/src"]
PAGE = "docs/operations.md"
SECTION = "### Every log line"

MACRO = re.compile(r"\b(?:slog::)?(error|warn|info)!\s*\(")
STRING = re.compile(r'"((?:[^"\\]|\\.)*)"', re.DOTALL)
PLACEHOLDER = re.compile(r"\{[^{}]*\}")
FIELD = re.compile(r" [a-z_]+=")
CODE = re.compile(r"`([^`]+)`")


def unquoted(text):
    """Returns what a string literal stands for, as far as messages need it."""
    text = re.sub(r"\\\n\s*", "", text)
    return text.replace('\\"', '"').replace("{{", "{").replace("}}", "}")


def messages(code):
    """Yields the position and the message of each macro, with an ellipsis for each placeholder."""
    code = code.split("#[cfg(test)]\nmod tests {")[0]
    for match in MACRO.finditer(code):
        line = code[code.rfind("\n", 0, match.start()) + 1 : match.start()]
        if "//" in line:
            continue
        # The logger, and perhaps a tag, come before the message.
        rest = code[match.end() :]
        rest = re.sub(r'\A([^,"]*,\s*)#\s*"[^"]*"\s*,', r"\1", rest)
        literal = STRING.search(rest)
        if literal and ";" not in rest[: literal.start()]:
            yield match.start(), PLACEHOLDER.sub("…", unquoted(literal[1]))


def explained(page):
    """Yields what the first columns of the section's tables explain."""
    section = page.split(SECTION, 1)[1].split("\n## ", 1)[0]
    for line in section.splitlines():
        if line.startswith("| `"):
            cell = line.split(" | ", 1)[0]
            yield from CODE.findall(cell)


def pattern(text):
    """Returns an expression for texts that `text` can stand for."""
    return ".*".join(re.escape(part) for part in text.split("…"))


def fits(message, line):
    """Tells whether a line of the page explains a message."""
    words = FIELD.split(line, maxsplit=1)[0]
    if re.fullmatch(pattern(words), message) or re.fullmatch(pattern(message), words):
        return True
    # Texts with placeholders on both sides: what is fixed in one may be free in the other.
    head, head_of_line = message.split("…")[0], words.split("…")[0]
    shorter = min(len(head), len(head_of_line))
    return "…" in message and "…" in words and shorter > 0 and (
        head[:shorter] == head_of_line[:shorter] and ": " not in head[shorter:] + "x"
    )


def is_fixed(message):
    """Tells whether a message has words of its own."""
    return bool(message.strip("… :"))


def check(sources, texts, page):
    """Returns the complaints about sources, which are pairs of a place and a message, and texts."""
    lines = list(explained(page))
    complaints = [
        f"{place}: no line of {PAGE} explains '{message}'"
        for place, message in sources
        if is_fixed(message) and not any(fits(message, line) for line in lines)
    ]
    complaints += [
        f"{PAGE}: no message is like '{line}'"
        for line in lines
        if not any(is_fixed(text) and fits(text, line) for text in texts)
    ]
    return complaints


def main():
    sources, texts = [], set()
    for root in SOURCES:
        for file in sorted(Path(root).rglob("*.rs")):
            if file.name.endswith("tests.rs") or "tests" in file.parts or file.name == "fake.rs":
                continue
            code = file.read_text()
            literals = STRING.finditer(code.split("#[cfg(test)]\nmod tests {")[0])
            texts.update(PLACEHOLDER.sub("…", unquoted(literal[1])) for literal in literals)
            for position, message in messages(code):
                place = f"{file}:{code.count(chr(10), 0, position) + 1}"
                sources.append((place, message))
    if "--list" in sys.argv[1:]:
        for place, message in sources:
            print(f"{place}: {message}")
        return 0
    complaints = check(sources, texts, Path(PAGE).read_text())
    for complaint in complaints:
        print(complaint)
    print(f"{len(sources)} messages, {len(complaints)} problems")
    return 1 if complaints or not sources else 0


if __name__ == "__main__":
    sys.exit(main())
