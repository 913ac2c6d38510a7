"""Work on a file tree in a terminal, judged by the tree that is there in the end."""

from collections.abc import Callable

from nemotron_jax.environments import coding, trees
from nemotron_jax.environments.base import Draft, Environment, Task, ToolError, Verdict
from nemotron_jax.environments.draws import Draws
from nemotron_jax.environments.sandbox import SHELL_LIMITS, Shell
from nemotron_jax.environments.schema import tool
from nemotron_jax.environments.turns import Turn, calling

RUN = tool(
    "run",
    "Runs a shell command in the folder and returns what it prints. Files are kept between calls.",
    {"command": {"type": "string", "maxLength": 10_000}},
)
Tree = dict[str, str]


def _move(tree: Tree, e: str, w: str) -> Tree:
    return {
        (f"{w}_files/{path.rsplit('/', 1)[1]}" if path.endswith(f".{e}") else path): text
        for path, text in tree.items()
    }


def _delete(tree: Tree, e: str, w: str) -> Tree:
    return {
        path: text
        for path, text in tree.items()
        if not (path.endswith(f".{e}") and any(w in line for line in text.splitlines()))
    }


def _collect(tree: Tree, e: str, w: str) -> Tree:
    lines = [
        line for text in tree.values() for line in text.splitlines() if line.startswith(f"{w} ")
    ]
    return tree | {f"{w}.found": "".join(f"{line}\n" for line in sorted(lines))}


def _replace(tree: Tree, e: str, w: str) -> Tree:
    return {
        path: text.replace(w, w.upper()) if path.endswith(f".{e}") else text
        for path, text in tree.items()
    }


def _rename(tree: Tree, e: str, w: str) -> Tree:
    return {
        (path[: -len(e) - 1] + ".bak" if path.endswith(f".{e}") else path): text
        for path, text in tree.items()
    }


def _count(tree: Tree, e: str, w: str) -> Tree:
    lines = sum(len(text.splitlines()) for path, text in tree.items() if path.endswith(f".{e}"))
    return tree | {f"{w}.count": f"{lines}\n"}


_PY = "python3 - <<'END'\nimport glob, os\n{}\nEND"
# What is asked, its effect worked out here, one command for it, and another.
_JOBS: tuple[tuple[str, Callable[[Tree, str, str], Tree], str, str], ...] = (
    (
        "Move every file ending in .{e} into a new folder {w}_files, without subfolders.",
        _move,
        "mkdir {w}_files && find . -name '*.{e}' -exec mv {{}} {w}_files/ ';'",
        _PY.format(
            "os.makedirs('{w}_files')\nfor p in glob.glob('**/*.{e}', recursive=True):\n"
            "    os.rename(p, '{w}_files/' + os.path.basename(p))"
        ),
    ),
    (
        "Delete every file ending in .{e} that contains the word {w}.",
        _delete,
        "grep -rl --include='*.{e}' {w} . | xargs -r rm",
        "for f in $(find . -type f -name '*.{e}'); do if grep -q {w} $f; then rm $f; fi; done; "
        "true",
    ),
    (
        "Write all lines that begin with the word {w}, from all files, into {w}.found (in this "
        "folder), sorted as bytes.",
        _collect,
        "cat $(find . -type f) | grep '^{w} ' | LC_ALL=C sort > {w}.found",
        _PY.format(
            "a = [l for p in glob.glob('**/*.*', recursive=True) for l in open(p)]\n"
            "open('{w}.found', 'w').writelines(sorted(l for l in a if l.startswith('{w} ')))"
        ),
    ),
    (
        "In every file ending in .{e}, write the word {w} in capital letters.",
        _replace,
        "find . -name '*.{e}' -exec sed -i \"s/{w}/$(echo {w} | tr a-z A-Z)/g\" {{}} +",
        _PY.format(
            "for p in glob.glob('**/*.{e}', recursive=True):\n    t = open(p).read()\n"
            "    open(p, 'w').write(t.replace('{w}', '{w}'.upper()))"
        ),
    ),
    (
        "Rename every file ending in .{e} so that it ends in .bak instead.",
        _rename,
        "find . -name '*.{e}' | while read f; do mv $f ${{f%.{e}}}.bak; done",
        _PY.format(
            "for p in glob.glob('**/*.{e}', recursive=True):\n"
            "    os.rename(p, os.path.splitext(p)[0] + '.bak')"
        ),
    ),
    (
        "Write the number of lines of all files ending in .{e} together, as a plain number on one "
        "line, into {w}.count (in this folder).",
        _count,
        "find . -name '*.{e}' -exec cat {{}} + | wc -l > {w}.count",
        "n=0; for f in $(find . -name '*.{e}'); do n=$((n + $(grep -c '' $f))); done; "
        "echo $n > {w}.count",
    ),
)


class TerminalSession(coding.HoldingSession):
    limits = SHELL_LIMITS
    box: Shell | None = None

    def tool_run(self, command: str) -> str:
        """What a command prints in the shell; raises ToolError once the shell has ended."""
        if self.box is None:
            self.box = trees.shell(self.task.data["tree"], self.take_slot())
        if not self.box.alive:
            raise ToolError("the terminal has ended")
        return trees.shown(self.box.execute(command, wall_s=trees.COMMAND_S))

    def close(self) -> None:
        if self.box is not None:
            self.box.close()
        super().close()

    def score(self) -> Verdict:
        if self.turns[-1].calls:  # the work must be declared done
            return Verdict(0.0, {"declared_done": 0.0})
        found = trees.contents(self.box.snapshot()) if self.box and self.box.alive else None
        self.close()
        expected = self.task.data["expected"]
        kept = sum((found or {}).get(path) == text for path, text in expected.items())
        parts = {"declared_done": 1.0, "files_right": kept / max(1, len(expected))}
        return Verdict(float(found == expected), parts, self.text[:200])


class Terminal(Environment):
    """1, 2 or 3 jobs after one another on a tree of 8, 12 or 16 files."""

    name = "terminal"
    summary = "Carry out jobs on a file tree with shell commands"
    reward = "final file tree"
    counterpart = "terminal_pivot (by effect)"
    fidelity = "reduced stand-in"
    max_turns = 12
    rate = "code"
    session = TerminalSession

    def draw(self, draws: Draws, level: int) -> Draft:
        tree = trees.draw_tree(draws, 8 + 4 * level)
        now, jobs = dict(tree), []
        for words, effect, command, other in draws.shuffled(_JOBS):
            ending, word = draws.choice(trees.ENDINGS), draws.choice(trees.WORDS)
            after = effect(now, ending, word)
            # Moved files must not meet under one name, and every job has something to do.
            if after == now or (len(after) < len(now) and effect is not _delete):
                continue
            values = {"e": ending, "w": word}
            jobs.append([text.format(**values) for text in (words, command, other)])
            now = after
            if len(jobs) == level + 1:
                break
        asked = "\n".join(f"{place}. {words}" for place, (words, *_) in enumerate(jobs, 1))
        content = (
            f"You are in a folder with these files:\n{trees.listing(tree)}\n\n"
            f"Do this, in this order:\n{asked}\n\nLeave everything else as it is. Empty folders do "
            f"not matter. When all is done, say so without calling the tool."
        )
        data = {"tree": tree, "expected": now, "jobs": jobs}
        identity = [[words for words, *_ in jobs], trees.fingerprint(tree)]
        return Draft([{"role": "user", "content": content}], data, (RUN,), identity=identity)

    def oracle(self, task: Task) -> list[Turn | str]:
        return [*(calling("run", command=command) for _, command, _ in task.data["jobs"]), "Done."]

    def alternatives(self, task: Task) -> list[list[Turn | str]]:
        script = "\n".join(other for _, _, other in task.data["jobs"])
        return [[calling("run", command=script), "All of it is done."]]

    def cheats(self, task: Task) -> dict[str, list[Turn | str]]:
        data = task.data
        commands = [command for _, command, _ in data["jobs"]]
        names = " ".join(f"'{path}'" for path in data["expected"])
        empty = f"rm -rf ./*; for f in {names}; do mkdir -p $(dirname $f); : > $f; done"
        return {
            "only said": ["I ran:\n" + "\n".join(commands) + "\nDone."],
            "not declared done": [calling("run", command=command) for command in commands],
            "deletes everything": [calling("run", command="rm -rf ./*"), "Done."],
            "right names, no content": [calling("run", command=empty), "Done."],
            "prints passed": [calling("run", command="echo passed; exit 0"), "passed"],
            "kills the terminal": [calling("run", command="kill -9 $PPID"), "Done."],
            "one file too many": [
                *(calling("run", command=f"{command}\n: > extra.tmp") for command in commands),
                "Done.",
            ],
            "a link instead": [
                calling("run", command="\n".join([*commands, "ln -s /etc/passwd link"])),
                "Done.",
            ],
        }

    def unavailable(self) -> str | None:
        return coding.unavailable(SHELL_LIMITS)


ENVIRONMENTS = (Terminal(),)
