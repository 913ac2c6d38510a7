"""Tasks of the package reasoning-gym (the extra `rl`), with its own scorers, all or nothing."""

import functools
import importlib.util

from nemotron_jax.environments.answers import final_answer
from nemotron_jax.environments.base import Draft, Environment, InfraError, Session, Task, Verdict
from nemotron_jax.environments.draws import Draws
from nemotron_jax.environments.turns import Turn
from nemotron_jax.environments.words import ask

# Datasets whose oracle is one line and gets the full score; the package has more, some with
# several answers and none of their own.
DATASETS = (
    ("basic_arithmetic", "chain_sum", "letter_counting", "leg_counting"),
    ("base_conversion", "gcd", "lcm", "number_sorting", "simple_equations", "spell_backward"),
    ("caesar_cipher", "count_primes", "fraction_simplification", "prime_factorization", "products"),
)


@functools.lru_cache(maxsize=512)
def _entry(dataset: str, seed: int) -> tuple:
    import reasoning_gym

    made = reasoning_gym.create_dataset(dataset, size=1, seed=seed)
    return made, made[0]


class ReasoningSession(Session):
    def score(self) -> Verdict:
        answer = final_answer(self.text)
        if answer is None:
            return Verdict(0.0)
        made, entry = _entry(self.task.data["dataset"], self.task.data["seed"])
        if entry["answer"] != self.task.data["answer"]:
            raise InfraError("reasoning-gym makes another task of this seed; use one version of it")
        # Its scorers give part of the reward for answers that only hold the right one.
        try:
            score = float(made.score_answer(answer, entry))
        except Exception:  # a scorer that fails on a text does not accept it
            score = 0.0
        return Verdict(float(score >= 1.0), {"score": min(1.0, max(0.0, score))}, answer)


class ReasoningGym(Environment):
    name = "reasoning_gym"
    summary = "Tasks of reasoning-gym, if it is installed"
    reward = "the dataset's own scorer"
    counterpart = "reasoning_gym"
    session = ReasoningSession

    def unavailable(self) -> str | None:
        if importlib.util.find_spec("reasoning_gym") is None:
            return "reasoning-gym is not installed; pip install -e '.[rl]' in a checkout brings it"
        return None

    def draw(self, draws: Draws, level: int) -> Draft:
        if reason := self.unavailable():
            raise ValueError(f"{self.name}: {reason}")
        dataset, seed = draws.choice(DATASETS[level]), draws.below(2**31)
        _, entry = _entry(dataset, seed)
        text = f"{entry['question']}\nEnd with a line Answer: and the answer."
        data = {"dataset": dataset, "seed": seed, "answer": entry["answer"]}
        return Draft(ask(text), data)

    def oracle(self, task: Task) -> list[Turn | str]:
        return [f"Answer: {task.data['answer']}"]

    def alternatives(self, task: Task) -> list[list[Turn | str]]:
        return [[f"\\boxed{{{task.data['answer']}}}"]]

    def cheats(self, task: Task) -> dict[str, list[Turn | str]]:
        answer = task.data["answer"]
        return {
            "every candidate": [f"Answer: {answer}\nAnswer: {answer}0\nAnswer: 1"],
            "in the reasoning": [Turn(reasoning=f"Answer: {answer}")],
        }


ENVIRONMENTS = (ReasoningGym(),)
