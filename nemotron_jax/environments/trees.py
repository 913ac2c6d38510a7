"""Generated file trees, what should become of them, and how to tell: for the shell environments."""

import hashlib

from nemotron_jax.environments import coding
from nemotron_jax.environments.base import InfraError
from nemotron_jax.environments.draws import Draws
from nemotron_jax.environments.sandbox import FileEntry, Output, Shell

WORDS = ("amber", "basil", "cedar", "delta", "ember", "fjord", "grove", "heron", "iris", "jade")
ENDINGS = ("txt", "log", "csv", "md", "cfg")
FOLDERS = ("src", "docs", "data", "old", "web")
COMMAND_S = 5.0


def draw_tree(draws: Draws, files: int) -> dict[str, str]:
    """Files in a few folders, by path; each holds some lines of words and numbers."""
    folders = draws.sample(FOLDERS, 3)
    tree: dict[str, str] = {}
    while len(tree) < files:
        folder = draws.choice([*folders, f"{folders[0]}/{folders[1]}"])
        name = f"{draws.choice(WORDS)}{draws.between(1, 99)}.{draws.choice(ENDINGS)}"
        lines = [
            f"{draws.choice(WORDS)} {draws.between(1, 500)}" for _ in range(draws.between(1, 8))
        ]
        tree[f"{folder}/{name}"] = "\n".join(lines) + "\n"
    return tree


def shell(tree: dict[str, str], slot: int | None = None) -> Shell:
    """A shell among a tree's files, in a slot that was taken or in one of its own."""
    try:
        return Shell(coding.sandbox(), files=tree, slot=slot)
    except (OSError, ValueError) as error:
        raise InfraError(str(error)) from error


def contents(entries: dict[str, FileEntry] | None) -> dict[str, str] | None:
    """The files of a snapshot by path, as text; None where there is something that is no file."""
    if entries is None:
        return None
    if any(entry.kind in ("link", "other") for entry in entries.values()):
        return None
    return {
        path: entry.content.decode("utf-8", "replace")
        for path, entry in entries.items()
        if entry.kind == "file"
    }


def shown(reply: Output) -> str:
    """A command's reply as the model reads it."""
    if reply.ended == "died":
        return "error: the shell ended; nothing of it is left"
    notes = {"wall": f"\n(stopped after {COMMAND_S:.0f} s)", "output": "\n(cut here and stopped)"}
    note = notes.get(reply.ended, f"\n(exit code {reply.exit_code})" if reply.exit_code else "")
    return reply.output + note or "(no output)"


def fingerprint(tree: dict[str, str]) -> str:
    """A short name for a tree, to tell tasks apart."""
    text = "\0".join(f"{path}\1{content}" for path, content in sorted(tree.items()))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def listing(tree: dict[str, str]) -> str:
    """The tree's paths with their sizes, one a line."""
    return "\n".join(f"{path} ({len(tree[path])} bytes)" for path in sorted(tree))
