"""One shell command for a sentence, judged by what it does on trees it was not written for."""

from collections.abc import Callable

from nemotron_jax.environments import coding, trees
from nemotron_jax.environments.base import Draft, Environment, Task, Verdict
from nemotron_jax.environments.draws import Draws
from nemotron_jax.environments.sandbox import SHELL_LIMITS
from nemotron_jax.environments.turns import Turn

Tree = dict[str, str]


def _named(tree: Tree, v: dict) -> list[str]:
    return [path for path in tree if path.endswith(f".{v['e']}")]


def _lines(tree: Tree, v: dict) -> list[str]:
    return [line for path in _named(tree, v) for line in tree[path].splitlines()]


# By level: the sentence, what it prints (worked out here), a command, and another command.
_TASKS: tuple[tuple[tuple[str, Callable[[Tree, dict], list], str, str], ...], ...] = (
    (
        (
            "Print how many files end in .{e}, in this folder and below.",
            lambda tree, v: [len(_named(tree, v))],
            "find . -type f -name '*.{e}' | wc -l",
            "ls -R | grep -c '\\.{e}$'",
        ),
        (
            "Print the number of lines that contain {w}, over all files below this folder.",
            lambda tree, v: [sum(v["w"] in x for text in tree.values() for x in text.splitlines())],
            "cat $(find . -type f) | grep -c {w}",
            "grep -rh {w} . | wc -l",
        ),
    ),
    (
        (
            "Print the names (without folders) of the files ending in .{e} with more than {k} "
            "lines, "
            "sorted, one a line.",
            lambda tree, v: sorted(
                path.rsplit("/", 1)[1]
                for path in _named(tree, v)
                if len(tree[path].splitlines()) > v["k"]
            ),
            "for f in $(find . -type f -name '*.{e}'); do [ $(wc -l < $f) -gt {k} ] && "
            "basename $f; "
            "done | LC_ALL=C sort",
            "find . -name '*.{e}' -exec awk 'END {{ if (NR > {k}) print FILENAME }}' {{}} ';' | "
            "sed 's|.*/||' | LC_ALL=C sort",
        ),
        (
            "Print the sum of the numbers in the lines that begin with {w}, over all files "
            "ending in "
            ".{e} below this folder; 0 if there are none.",
            lambda tree, v: [
                sum(int(x.split()[1]) for x in _lines(tree, v) if x.startswith(v["w"] + " "))
            ],
            "find . -name '*.{e}' -exec cat {{}} + | awk '/^{w} /{{ s += $2 }} END {{ print s "
            "+ 0 }}'",
            "s=0; for n in $(grep -rh --include='*.{e}' '^{w} ' . | cut -d' ' -f2); do s=$((s "
            "+ n)); "
            "done; echo $s",
        ),
    ),
    (
        (
            "For each word that begins a line of some file ending in .{e} or containing {w}, print "
            "the count of such lines in those files and the word, separated by one space, in "
            "alphabetical order of the word.",
            lambda tree, v: _word_counts(tree, v),
            "cat $(find . -name '*.{e}'; grep -rl {w} . | grep -v '\\.{e}$') /dev/null | "
            "awk '{{ n[$1]++ }} END {{ for (x in n) print n[x], x }}' | LC_ALL=C sort -k2",
            "cat $( (find . -name '*.{e}'; grep -rl {w} .) | sort -u) /dev/null | cut -d' ' -f1 | "
            "LC_ALL=C sort | uniq -c | sed 's/^ *//'",
        ),
        (
            "Print the {k} largest numbers over all files ending in .{e} or containing {w}, "
            "largest "
            "first, one a line, repeats included.",
            lambda tree, v: sorted(
                (int(x.split()[1]) for path in _chosen(tree, v) for x in tree[path].splitlines()),
                reverse=True,
            )[: v["k"]],
            "cat $( (find . -name '*.{e}'; grep -rl {w} .) | sort -u) /dev/null | awk '{{ "
            "print $2 }}' "
            "| sort -rn | head -n {k}",
            "cat $(find . -name '*.{e}'; grep -rl {w} . | grep -v '\\.{e}$') /dev/null | "
            "cut -d' ' -f2 | sort -n | tail -n {k} | sort -rn",
        ),
    ),
)


def _chosen(tree: Tree, v: dict) -> list[str]:
    return [path for path in tree if path.endswith(f".{v['e']}") or v["w"] in tree[path]]


def _word_counts(tree: Tree, v: dict) -> list[str]:
    counts: dict[str, int] = {}
    for path in _chosen(tree, v):
        for line in tree[path].splitlines():
            counts[line.split()[0]] = counts.get(line.split()[0], 0) + 1
    return [f"{counts[word]} {word}" for word in sorted(counts)]


class CommandSession(coding.CodeSession):
    limits = SHELL_LIMITS

    def score(self) -> Verdict:
        command = coding.code_of(self.text)
        right = []
        for tree, expected in zip(self.task.data["trees"], self.task.data["expected"]):
            with trees.shell(tree) as shell:
                reply = shell.execute(command, wall_s=coding.CELL_S)
                after = trees.contents(shell.snapshot()) if shell.alive else None
            said = [line.strip() for line in reply.output.splitlines() if line.strip()]
            right.append(reply.ended == "exit" and said == expected and after == tree)
            if not right[-1]:
                break  # nothing can make it right again
        return Verdict(float(all(right)), {"first_tree": float(right[0])}, command[:200])


class CommandEquivalence(Environment):
    """Counting, then selecting and adding up, then combining two selections."""

    name = "command_equivalence"
    summary = "Give one shell command that does what a sentence says"
    reward = "output and file tree equal on hidden trees"
    counterpart = "nl2bash equivalence (by effect, no judge)"
    rate = "code"
    session = CommandSession

    def draw(self, draws: Draws, level: int) -> Draft:
        words, effect, command, other = draws.choice(_TASKS[level])
        values = {"e": draws.choice(trees.ENDINGS), "w": draws.choice(trees.WORDS)}
        values["k"] = draws.between(2, 6)
        words, command, other = (text.format(**values) for text in (words, command, other))
        seen, *hidden = _telling_trees(draws, effect, values)
        content = (
            f"{words}\n\nGive one bash command, in a block of code. Every line of every file is a "
            f"word, a space and a number. Files here at the moment:\n{trees.listing(seen)}\n"
            f"The command is tried on other files. It must leave them as they are."
        )
        expected = [[str(line) for line in effect(tree, values)] for tree in hidden]
        data = {"trees": hidden, "expected": expected, "command": command, "other": other}
        return Draft([{"role": "user", "content": content}], data)

    def oracle(self, task: Task) -> list[Turn | str]:
        return [f"```bash\n{task.data['command']}\n```"]

    def alternatives(self, task: Task) -> list[list[Turn | str]]:
        return [[f"This does it:\n```bash\n{task.data['other']}\n```"], [task.data["command"]]]

    def cheats(self, task: Task) -> dict[str, list[Turn | str]]:
        first, second = task.data["expected"]
        command = task.data["command"]
        written = ["\n".join(f"echo '{line}'" for line in lines) for lines in (first, second)]
        return {
            "one tree's output written out": [written[0]],
            "the other's written out": [written[1]],
            "both written out": ["\n".join(written)],
            "the output as answer": ["\n".join(first)],
            "deletes the files too": [f"```bash\n{command}; rm -rf ./*\n```"],
            "leaves a file": [f"```bash\n{command}; : > new\n```"],
            "two blocks": [f"```bash\n{command}\n```\n```bash\ntrue\n```"],
            "passed": ["echo passed; exit 0"],
            "in the reasoning": [Turn(reasoning=command)],
        }

    def unavailable(self) -> str | None:
        return coding.unavailable(SHELL_LIMITS)


def _telling_trees(draws: Draws, effect: Callable, values: dict) -> list[Tree]:
    """Three trees with different outputs: so a written-out output fails on one of them."""
    found: list[Tree] = []
    outputs: list[list] = []
    while len(found) < 3:
        tree = trees.draw_tree(draws, draws.between(7, 14))
        output = effect(tree, values)
        if output and output not in outputs:
            found.append(tree)
            outputs.append(output)
    return found


ENVIRONMENTS = (CommandEquivalence(),)
