"""Every environment has the properties that check.py names, and check.py finds what is wrong."""

import pytest

from nemotron_jax.environments import (
    Draft,
    Draws,
    Environment,
    Session,
    Task,
    Turn,
    Verdict,
    registry,
)
from nemotron_jax.environments.check import check, distinct

# Released reward kinds that need each at least one environment.
RELEASED = (
    "math_with_judge", "mcqa", "equivalence_llm_judge", "lc_judge", "reasoning_gym",
    "instruction_following", "structured_outputs_json", "multichallenge", "inverse_if", "calendar",
    "workplace_assistant", "single_step_tool_use_with_argument_comparison", "search_pivot",
    "toolcall_schema", "math_formal_lean", "jailbreak_detection", "over_refusal_detection",
    "genrm_compare", "code_gen", "ns_tools", "nl2bash", "terminal_pivot", "swerl_gen",
)  # fmt: skip


def usable(name: str) -> Environment:
    if reason := registry[name].unavailable():
        pytest.skip(reason)
    return registry[name]


@pytest.mark.parametrize("name", registry)
def test_properties(name: str) -> None:
    # A hostile turn is a run in the sandbox there: the slow test sends them.
    code = registry[name].rate == "code"
    assert not check(usable(name), tasks=1 if code else 4, fuzz=0 if code else 1).faults


@pytest.mark.slow
@pytest.mark.parametrize("name", registry)
def test_properties_of_many_tasks(name: str) -> None:
    fuzz = 2 if registry[name].rate == "code" else 12
    assert not check(usable(name), tasks=200, fuzz=fuzz, seed=1).faults


@pytest.mark.slow
@pytest.mark.parametrize("name", registry)
def test_ten_thousand_tasks_are_distinct_and_in_one_split(name: str) -> None:
    found, shared = distinct(usable(name), 10_000)
    assert found >= 10_000 and shared == 0


def test_the_registry_covers_the_released_reward_kinds() -> None:
    assert len(registry) >= 21
    everything = registry.everything().values()
    counterparts = " ".join(environment.counterpart for environment in everything)
    assert [kind for kind in RELEASED if kind not in counterparts] == []
    assert {one.fidelity for one in everything} <= {
        "same reward kind", "reduced stand-in", "templates"}  # fmt: skip


@pytest.mark.parametrize("name", registry)
def test_level_0_is_short(name: str) -> None:
    environment = usable(name)
    if environment.rate == "code" or name in ("reasoning_gym", "preference", "search_pivot"):
        pytest.skip("the task itself needs more words")
    lengths = [
        sum(len(m["content"]) for m in environment.split(0, "train", i, level=0).messages)
        for i in range(10)
    ]
    assert max(lengths) <= 160


class Broken(Environment):
    """An environment with one fault, named by `fault`."""

    name, summary, reward, counterpart = "broken", "Say it", "exact", "none"

    def __init__(self, fault: str) -> None:
        self.fault = fault
        self.drawn = 0

    class session(Session):  # noqa: N801
        def score(self) -> Verdict:
            word, text = self.task.data["word"], self.text
            fault = self.task.data["fault"]
            if fault == "crash" and len(text) > 1000:
                raise RecursionError
            if fault == "generous" and not text:
                return Verdict(0.5)
            if fault == "mutates":
                self.task.data["seen"] = text
            return Verdict(float(word in text if fault == "contains" else word == text))

    def draw(self, draws: Draws, level: int) -> Draft:
        self.drawn += 1
        word = f"{draws.below(10**6)}"
        if self.fault == "impure":
            word += f".{self.drawn}"
        shown = "Say it" if self.fault == "leaks" else f"Say {word}"
        data = {"word": word, "fault": self.fault}
        return Draft([{"role": "user", "content": shown}], data, identity=word)

    def oracle(self, task: Task) -> list[Turn | str]:
        return [task.data["word"] + ("." if self.fault == "oracle" else "")]

    def alternatives(self, task: Task) -> list[list[Turn | str]]:
        return [[task.data["word"] + "!"]] if self.fault == "alternative" else []

    def cheats(self, task: Task) -> dict[str, list[Turn | str]]:
        return {"named": [f"not {task.data['word']}"]}


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("oracle", "the oracle gets"),
        ("alternative", "right way 0 gets"),
        ("contains", "the cheat 'named' gets"),
        ("contains", "the cheat 'copied prompt' gets"),
        ("generous", "the cheat 'empty' gets"),
        ("leaks", "are in both splits"),
        ("impure", "the same arguments give another task"),
        ("mutates", "playing the task changed it"),
        ("crash", "broke it"),
    ],
)
def test_the_check_finds_a_fault(fault: str, words: str) -> None:
    assert not check(Broken("none"), tasks=3, fuzz=1).faults
    assert any(words in found for found in check(Broken(fault), tasks=3, fuzz=1).faults)


def test_a_missing_package_is_said_and_leaves_the_rest_alone() -> None:
    environment = registry["reasoning_gym"]
    if environment.unavailable() is None:
        pytest.skip("reasoning-gym is installed")
    assert "reasoning_gym" not in list(registry) and "reasoning_gym" in registry.everything()
    with pytest.raises(ValueError, match=r"pip install -e '.\[rl\]' in a checkout brings it"):
        environment.split(0, "train", 0)
