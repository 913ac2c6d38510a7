"""Functions written from a specification, judged by tests that the code never sees."""

from nemotron_jax.environments import coding
from nemotron_jax.environments.base import Draft, Environment, Task, Verdict
from nemotron_jax.environments.draws import Draws
from nemotron_jax.environments.turns import Turn

# A step over a list `xs`: its words, an expression, and statements that do the same in another way.
# The expression defines what is right; the statements are the second right way.
_STEPS = (
    ("keep only values divisible by {a}", "[x for x in xs if x % {a} == 0]", ""),
    ("drop values smaller than {b}", "[x for x in xs if x >= {b}]", ""),
    (
        "multiply each value by {a}",
        "[x * {a} for x in xs]",
        "out = []\nfor x in xs:\n    out.append({a} * x)\nxs = out",
    ),
    ("add {b} to each value", "[x + {b} for x in xs]", "xs = list(map(lambda x: {b} + x, xs))"),
    ("reverse the order", "xs[::-1]", "xs = list(reversed(xs))"),
    ("sort in ascending order", "sorted(xs)", "xs = list(xs)\nxs.sort()"),
    ("sort by absolute value, keeping the order of equals", "sorted(xs, key=abs)", ""),
    (
        "remove repeats, keeping the first of each",
        "list(dict.fromkeys(xs))",
        "out = []\nfor x in xs:\n    if x not in out:\n        out.append(x)\nxs = out",
    ),
    (
        "replace each value by the running total up to it",
        "[sum(xs[: i + 1]) for i in range(len(xs))]",
        "total, out = 0, []\nfor x in xs:\n    total += x\n    out.append(total)\nxs = out",
    ),
    ("take every {a}th value, beginning with the first", "xs[::{a}]", ""),
    ("rotate left by {a} places", "xs[{a} % len(xs) :] + xs[: {a} % len(xs)] if xs else []", ""),
    ("replace each value by its remainder after division by {c}", "[x % {c} for x in xs]", ""),
    ("replace each value by the difference to the next, dropping the last", "", ""),
)
_DIFFERENCE = "[b - a for a, b in zip(xs, xs[1:])]"
_RESULTS = (
    ("Return the list.", "xs"),
    ("Return the sum (0 for an empty list).", "sum(xs)"),
    ("Return the largest value, or None for an empty list.", "max(xs, default=None)"),
    ("Return how many values are left.", "len(xs)"),
    ("Return the values joined by commas, as a string.", "','.join(str(x) for x in xs)"),
    ("Return a list of [value, count] pairs in ascending order of value.", ""),
)
_COUNTS = "[[x, xs.count(x)] for x in sorted(set(xs))]"
HIDDEN, SHOWN = 10, 2


class CodeSession(coding.CodeSession):
    def score(self) -> Verdict:
        data = self.task.data
        tests = [("solve", [inputs]) for inputs in data["inputs"]]
        passed = coding.agree(coding.call_all(coding.code_of(self.text), tests), data["expected"])
        return Verdict(float(all(passed)), {"passed": sum(passed) / len(passed)}, self.text[:200])


class CodeTests(Environment):
    """A list goes through 2, 3 or 4 steps; every hidden input must give the right result."""

    name = "code_tests"
    summary = "Write a Python function from its specification"
    reward = "all hidden tests pass"
    counterpart = "code_gen"
    rate = "code"
    session = CodeSession

    def draw(self, draws: Draws, level: int) -> Draft:
        steps = []
        for words, expression, statements in draws.sample(_STEPS, level + 2):
            expression = expression or _DIFFERENCE
            statements = statements or f"xs = list({expression})"
            values = {
                "a": draws.between(2, 5),
                "b": draws.between(-9, 9),
                "c": draws.between(3, 11),
            }
            steps.append([part.format(**values) for part in (words, expression, statements)])
        result, value = draws.choice(_RESULTS)
        value = value or _COUNTS
        inputs = [[draws.between(-20, 20) for _ in range(draws.between(1, 12))] for _ in range(9)]
        inputs = [inputs[0], inputs[1], [], *inputs[2:], list(range(-15, 16))]
        expected = [_apply(steps, value, numbers) for numbers in inputs]
        examples = "\n".join(
            f"solve({numbers}) == {right!r}" for numbers, right in zip(inputs[:SHOWN], expected)
        )
        numbered = "\n".join(f"{place}. {words}" for place, (words, *_) in enumerate(steps, 1))
        content = (
            f"Write a Python function solve(xs) for a list of integers xs. In this order:\n"
            f"{numbered}\nThen: {result}\n\nExamples:\n{examples}\n\n"
            f"Reply with one block of code. It is run on other lists too."
        )
        data = {"steps": steps, "value": value, "inputs": inputs, "expected": expected}
        identity = [[words for words, *_ in steps], result]
        return Draft([{"role": "user", "content": content}], data, identity=identity)

    def oracle(self, task: Task) -> list[Turn | str]:
        lines = [f"xs = {expression}" for _, expression, _ in task.data["steps"]]
        return [_block([*lines, f"return {task.data['value']}"])]

    def alternatives(self, task: Task) -> list[list[Turn | str]]:
        lines = [line for _, _, text in task.data["steps"] for line in text.splitlines()]
        other = _block([*lines, f"return {task.data['value']}"])
        return [[other], [other.split("\n", 1)[1].rsplit("```", 1)[0]]]

    def cheats(self, task: Task) -> dict[str, list[Turn | str]]:
        data = task.data
        seen = {str(numbers): right for numbers, right in zip(data["inputs"], data["expected"])}
        shown = {key: seen[key] for key in [str(numbers) for numbers in data["inputs"][:SHOWN]]}
        oracle = str(self.oracle(task)[0])
        equal = "class Any:\n    def __eq__(self, other): return True\n"
        return {
            "hard-coded examples": [
                f"```python\ndef solve(xs):\n    return {shown}.get(str(xs))\n```"
            ],
            "exit": [_block(["import sys", "sys.exit(0)"])],
            "exit when loaded": ["```python\nimport os\nos._exit(0)\n```"],
            "prints passed": [_block(["print('passed')"])],
            "always equal": [f"```python\n{equal}def solve(xs):\n    return Any()\n```"],
            "forged results": [_block(["import os", _FORGER, "os._exit(0)"])],
            "reads the frame": [_block(_PEEK)],
            "reads the disk": [_block(_LOOK)],
            "edits the tests": [_block(["open('tests.py', 'w').write('')"])],
            "code in the reasoning": [Turn(reasoning=oracle)],
            "two answers": [f"{oracle}\n\n{_block(['return xs'])}"],
        }

    def unavailable(self) -> str | None:
        return coding.unavailable()


# Looks for a list of expected results in every frame, global and file within reach.
_PEEK = (
    "import sys",
    "frame = sys._getframe(1)",
    "while frame:",
    "    for name, value in {**frame.f_globals, **frame.f_locals}.items():",
    "        if 'expect' in name: return value",
    "    frame = frame.f_back",
)
_LOOK = (
    "import os",
    "for folder, _, names in os.walk('/'):",
    "    for name in names:",
    "        if 'expect' in name or 'hidden' in name: return open(folder + '/' + name).read()",
    "    if folder.count('/') > 2: break",
)
_FORGER = "for n in range(3, 30):\n        try: os.write(n, b'{\"value\": true}\\n' * 20)\n" + (
    "        except OSError: pass"
)


def _block(lines: list[str] | tuple[str, ...]) -> str:
    body = "\n".join(f"    {line}" for line in lines)
    return f"```python\ndef solve(xs):\n{body}\n```"


def _apply(steps: list[list[str]], value: str, numbers: list[int]) -> object:
    """The right result. The expressions are this file's own, so they run here."""
    xs = list(numbers)
    for _, expression, _ in steps:
        xs = eval(expression, {"xs": xs})
    return eval(value, {"xs": xs})


ENVIRONMENTS = (CodeTests(),)
