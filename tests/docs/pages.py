"""What the pages of docs/ hold: links, and the blocks that a reader would copy."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
# Pages whose blocks are run in order, in one folder.
GUIDES = sorted([*(DOCS / "tutorials").glob("*.md"), *(DOCS / "howto").glob("*.md")])
REFERENCE = sorted((DOCS / "reference").glob("*.md"))
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def blocks(text: str) -> list[tuple[str, str]]:
    """Fenced blocks as (language, content)."""
    return _FENCE.findall(text)


def links(text: str) -> list[str]:
    """Targets of links outside code."""
    return _LINK.findall(re.sub(r"`[^`\n]+`", "", _FENCE.sub("", text)))


def anchors(text: str) -> set[str]:
    """The names that headings get: lower case, blanks as dashes, other signs left out."""
    heads = re.findall(r"^#+ (.+)$", _FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def broken_links(file: Path) -> Iterator[str]:
    """Links of a page that lead to no file, or to no heading of it."""
    for target in links(file.read_text("utf-8")):
        path, _, anchor = target.partition("#")
        if re.match(r"\w+:", path):
            continue
        there = (file.parent / path).resolve() if path else file
        if not there.exists():
            yield f"{file.name}: {target} does not exist"
        elif anchor and there.suffix == ".md" and anchor not in anchors(there.read_text("utf-8")):
            yield f"{file.name}: {target} is no heading there"


def script(text: str, values: Mapping[str, str]) -> str:
    """A page as one bash script, its variables given other values.

    Bash blocks stay as they are; a Python block is run, or written to the file that its first line
    names. Blocks of other languages show and do nothing.
    """
    parts = ["set -euo pipefail"]
    for language, content in blocks(text):
        if language == "bash":
            parts.append(_given(content, values, "export {name}={value}"))
        elif language == "python":
            content = _given(content, values, "{name} = {value}")
            name = re.match(r"# ([\w/]+\.py)\n", content)
            start = f"cat > {name[1]}" if name else "python -"
            parts.append(f"{start} <<'END_OF_PYTHON'\n{content}END_OF_PYTHON")
    return "\n".join(parts) + "\n"


def _given(content: str, values: Mapping[str, str], form: str) -> str:
    """Lines that set a variable, with the value that is given for it."""
    for name, value in values.items():
        line = form.format(name=name, value=f'"{value}"').replace("\\", r"\\")
        content = re.sub(rf"^{name} ?= ?.*$", line, content, flags=re.MULTILINE)
    return content
