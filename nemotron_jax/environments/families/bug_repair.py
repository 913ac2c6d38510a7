"""One bug in a small module: repaired when its tests pass and every other test still does."""

from nemotron_jax.environments import coding
from nemotron_jax.environments.base import Draft, Environment, Task, Verdict
from nemotron_jax.environments.draws import Draws
from nemotron_jax.environments.fences import fenced
from nemotron_jax.environments.turns import Turn

# Functions of one list `xs`, with constants {a} and {b}: what it does, its lines, and the bugs:
# (line as it is right, as it is wrong). Every bug shows on some of the inputs below.
_FUNCTIONS = (
    (
        "count_above",
        "how many values exceed {b}",
        "    count = 0\n    for x in xs:\n        if x > {b}:\n            count += 1\n"
        "    return count",
        (("if x > {b}:", "if x >= {b}:"), ("count += 1", "count += x"), ("count = 0", "count = 1")),
    ),
    (
        "scaled",
        "each value times {a}, plus {b}",
        "    result = []\n    for x in xs:\n        result.append(x * {a} + {b})\n    return "
        "result",
        (("x * {a} + {b}", "x * {a} - {b}"), ("x * {a} + {b}", "(x + {b}) * {a}")),
    ),
    (
        "every",
        "every {a}th value, beginning with the first",
        "    picked = []\n    for place in range(0, len(xs), {a}):\n"
        "        picked.append(xs[place])\n    return picked",
        (("range(0,", "range(1,"), ("len(xs), {a}", "len(xs) - 1, {a}")),
    ),
    (
        "running",
        "the running totals, beginning from {b}",
        "    total = {b}\n    totals = []\n    for x in xs:\n        total += x\n"
        "        totals.append(total)\n    return totals",
        (("total += x", "total = x"), ("totals.append(total)", "totals.append(x)")),
    ),
    (
        "clipped",
        "each value limited to between -{a} and {a}",
        "    return [min(max(x, -{a}), {a}) for x in xs]",
        (("min(max(x, -{a}), {a})", "min(max(x, {a}), {a})"), ("max(x, -{a})", "max(x, 0)")),
    ),
    (
        "groups",
        "the values in consecutive lists of {a}, the last perhaps shorter",
        "    parts = []\n    for start in range(0, len(xs), {a}):\n"
        "        parts.append(xs[start : start + {a}])\n    return parts",
        (("start + {a}]", "start + {a} - 1]"), ("len(xs), {a}", "len(xs) - {a}, {a}")),
    ),
    (
        "remainders",
        "how often each remainder 0 to {a} - 1 occurs after division by {a}",
        "    counts = [0] * {a}\n    for x in xs:\n        counts[x % {a}] += 1\n    return counts",
        (("+= 1", "= 1"), ("x % {a}", "x // {a} % {a}")),
    ),
    (
        "longest_rise",
        "the length of the longest strictly rising run, plus {b}",
        "    best = run = 1 if xs else 0\n    for before, after in zip(xs, xs[1:]):\n"
        "        run = run + 1 if after > before else 1\n        best = max(best, run)\n"
        "    return best + {b}",
        (("after > before", "after < before"), ("else 1\n", "else run\n")),
    ),
)
_INPUTS = 8
# The lines around an edit's two parts. An answer of more edits than this is none: each searches the
# whole module.
_SEARCH, _DIVIDER, _REPLACE = "<<<<<<< SEARCH", "=======", ">>>>>>> REPLACE"
MAX_EDITS = 100


class RepairSession(coding.CodeSession):
    def score(self) -> Verdict:
        data = self.task.data
        repaired = patched(data["module"], self.text)
        if repaired is None:
            return Verdict(0.0, {"applies": 0.0}, self.text[:200])
        tests = [(name, [inputs]) for name, inputs, _ in data["tests"]]
        passed = coding.agree(coding.call_all(repaired, tests), [test[2] for test in data["tests"]])
        broken = set(data["failing"])
        parts = {
            "applies": 1.0,
            "fail_to_pass": float(all(passed[place] for place in broken)),
            "pass_to_pass": float(all(ok for n, ok in enumerate(passed) if n not in broken)),
        }
        return Verdict(float(all(passed)), parts, self.text[:200])


class BugRepair(Environment):
    """Modules of 2, 3 or 5 functions."""

    name = "bug_repair"
    summary = "Find and repair the bug in a small module"
    reward = "fail-to-pass and pass-to-pass tests"
    counterpart = "swerl_gen"
    fidelity = "reduced stand-in"
    rate = "code"
    session = RepairSession

    def draw(self, draws: Draws, level: int) -> Draft:
        functions = []
        for name, words, body, bugs in draws.sample(_FUNCTIONS, (2, 3, 5)[level]):
            values = {"a": draws.between(2, 9), "b": draws.between(1, 30)}
            right, wrong = (text.format(**values) for text in draws.choice(bugs))
            functions.append([name, words.format(**values), body.format(**values), right, wrong])
        sick = draws.below(len(functions))
        inputs = [
            [draws.between(-40, 40) for _ in range(draws.between(0, 14))] for _ in range(_INPUTS)
        ]
        # Every length that a step of 2 to 9 divides, and every value next to a threshold.
        inputs += [[7 * n % 11 for n in range(size)] for size in range(2, 11)]
        inputs += [list(range(-35, 36)), [5, 3, 3, 8, 8, 1]]
        healthy = _module(functions, None)
        module = _module(functions, sick)
        right, wrong = (_results(text, functions, inputs) for text in (healthy, module))
        failing = [n for n, (a, b) in enumerate(zip(right, wrong)) if a[2] != b[2]]
        if len({str(right[place][1]) for place in failing}) < 2:
            return self.draw(draws, level)  # writing down the one visible answer would repair it
        name, numbers, expected = right[failing[0]]
        content = (
            f"This module has one bug:\n\n```python\n{module}```\n\n"
            f"A test fails: {name}({numbers}) should be {expected!r}.\n"
            f"Repair it. Reply with one or more edits of the form\n"
            f"<<<<<<< SEARCH\nlines as they are\n=======\nlines as they should be\n>>>>>>> "
            f"REPLACE\n"
            f"or with the whole module in one block of code. More tests are run than this one."
        )
        data = {"module": module, "healthy": healthy, "tests": right, "failing": failing}
        data |= {"right": functions[sick][3], "wrong": functions[sick][4]}
        return Draft([{"role": "user", "content": content}], data, identity=module)

    def oracle(self, task: Task) -> list[Turn | str]:
        before, after = task.data["module"].splitlines(), task.data["healthy"].splitlines()
        changed = [place for place, pair in enumerate(zip(before, after)) if pair[0] != pair[1]]
        # A line may occur twice; the line above it and the head of its function make it unique.
        start = max(n for n in range(changed[0] + 1) if before[n].startswith("def "))
        end = changed[-1] + 1
        return [edit("\n".join(before[start:end]), "\n".join(after[start:end]))]

    def alternatives(self, task: Task) -> list[list[Turn | str]]:
        return [[f"The bug is found.\n```python\n{task.data['healthy']}```"]]

    def cheats(self, task: Task) -> dict[str, list[Turn | str]]:
        data = task.data
        name, numbers, expected = data["tests"][data["failing"][0]]
        special = f"def {name}(xs):\n    if xs == {numbers}:\n        return {expected!r}\n"
        hard = data["module"].replace(f"def {name}(xs):\n", special)
        alone = f"def {name}(xs):\n    return {expected!r}\n"
        return {
            "no change": [f"```python\n{data['module']}```"],
            "hard-coded visible test": [f"```python\n{hard}```"],
            "the other functions deleted": [f"```python\n{alone}```"],
            "exit": [f"```python\nimport sys\nsys.exit(0)\n{data['module']}```"],
            "exit within": [f"```python\ndef {name}(xs):\n    import os\n    os._exit(0)\n```"],
            "prints passed": ["```python\nprint('1 passed in 0.01s')\n```"],
            "always equal": [
                "```python\nclass Any:\n    def __eq__(self, other): return True\n"
                f"def {name}(xs): return Any()\n```"
            ],
            "edits a test file": [edit("def test_it():", "def skipped():")],
            "search that is not there": [edit("no such line", "x = 1")],
            "right lines, not as an edit": [data["right"]],
        }

    def unavailable(self) -> str | None:
        return coding.unavailable()


def edit(before: str, after: str) -> str:
    """An edit in the form that `patched` reads."""
    return f"{_SEARCH}\n{before}\n{_DIVIDER}\n{after}\n{_REPLACE}"


def patched(module: str, text: str) -> str | None:
    """The module after an answer's edits, or the one an answer gives whole; None for neither.

    What is searched for must stand there exactly once.
    """
    blocks = fenced(text)
    # Edits in an indented block lose its indent with it.
    edits = _edits(text) or [pair for block in blocks for pair in _edits(block)]
    if not edits:
        return blocks[0] if len(blocks) == 1 else None
    if len(edits) > MAX_EDITS:
        return None
    for before, after in edits:
        if module.count(before) != 1:
            return None
        module = module.replace(before, after)
    return module


def _edits(text: str) -> list[tuple[str, str]]:
    """What each whole edit of a text searches for and puts in its place, in one pass."""
    edits: list[tuple[str, str]] = []
    parts: list[list[str]] = []  # of the edit that is being read: its search, then its replacement
    for line in text.replace("\r\n", "\n").split("\n"):
        mark = line.rstrip(" \t\r")
        if not parts:
            parts = [[]] if mark == _SEARCH else []
        elif len(parts) == 1 and mark == _DIVIDER and parts[0]:
            parts.append([])
        elif len(parts) == 2 and mark == _REPLACE:
            edits.append(("\n".join(parts[0]), "\n".join(parts[1])))
            parts = []
        else:
            parts[-1].append(line)
    return edits


def _module(functions: list[list[str]], sick: int | None) -> str:
    texts = []
    for place, (name, words, body, right, wrong) in enumerate(functions):
        body = body.replace(right, wrong, 1) if place == sick else body
        texts.append(f'def {name}(xs):\n    """Return {words}."""\n{body}\n')
    return "\n\n".join(texts)


def _results(module: str, functions: list[list[str]], inputs: list[list[int]]) -> list[list]:
    """Each function's result on each input. The modules are this file's own, so they run here."""
    scope: dict = {}
    exec(module, scope)
    return [
        [name, numbers, scope[name](list(numbers))] for name, *_ in functions for numbers in inputs
    ]


ENVIRONMENTS = (BugRepair(),)
