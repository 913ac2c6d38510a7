"""How a model plays tasks, and how what it earned moves it: reinforcement learning."""

import dataclasses
from urllib.parse import urlsplit

from nemotron_jax.config.checks import (
    at_least_one,
    at_most,
    check,
    counts,
    is_finite,
    not_negative,
    one_of,
    positive,
)
from nemotron_jax.config.engine import MOST_DRAFTS
from nemotron_jax.config.playing import PlayConfig

RATIOS = ("one", "clipped")
INVALID_TURNS = ("penalise", "mask")
CUT_OFF_CALLS = ("invalid", "keep")
OVERLONG = ("keep", "mask")
SAMPLERS = ("side_by_side", "engine")
WORKER_KINDS = ("processes", "ray")
JUDGE_FORMATS = ("words", "genrm")
# Mathematics, science and code: where Super's recipe asks for low effort.
LOW_EFFORT_ENVIRONMENTS = (
    *("arithmetic", "equational_proof", "equations", "python_tool"),
    *("multiple_choice", "science_units"),
    *("bug_repair", "code_tests", "sql"),
)

# Far above any use, so that a slip of the keyboard is found before hours of fine-tuning: slots and
# workers are made at the start, tasks are drawn and held at the start, and waits outlast a run.
MOST_SLOTS, MOST_WORKERS, MOST_TASKS, LONGEST_WAIT_S = 65_536, 4_096, 1_000_000, 604_800


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """Group-relative policy optimisation with the corrections of Nemotron 3 Super.

    `ratio`: `one` forces the policy ratio to 1, which is right where each batch of episodes is used
    for one update; `clipped` is PPO's, within 1 - clip_low … 1 + clip_high. `invalid_turns`: a turn
    that breaks the chat format gets the advantage -turn_penalty, or no loss at all. Reasoning that
    is cut off breaks nothing; `cut_off_calls` says whether a call that is cut off does. `overlong`:
    episodes that were cut off are learned from as they are, or only counted in the means of their
    groups. Defaults are the released ones. Source: the stage-one config of NVIDIA's Super recipe,
    NeMo RL branch super-v3.
    """

    ratio: str = "one"
    clip_low: float = 0.2
    clip_high: float = 0.28
    importance_cap: float = 5.0  # of trainer over generator, a token's weight
    sequence_limit: float = 2.0  # mean exp|log ratio| beyond which an episode is left out
    advantage_clip: float = 50.0
    turn_penalty: float = 5.0
    invalid_turns: str = "penalise"
    cut_off_calls: str = "invalid"  # as turns that break the format, or "keep" them for `overlong`
    overlong: str = "keep"
    kl_weight: float = 0.0  # of k3 to the model that the run began with

    def __post_init__(self) -> None:
        one_of(self, "ratio", RATIOS)
        one_of(self, "invalid_turns", INVALID_TURNS)
        one_of(self, "cut_off_calls", CUT_OFF_CALLS)
        one_of(self, "overlong", OVERLONG)
        not_negative(self, "clip_low", "clip_high", "turn_penalty", "kl_weight")
        check(self, "clip_low", self.clip_low < 1, "must be below 1")
        positive(self, "importance_cap", "sequence_limit", "advantage_clip")
        rule = "must be at least 1, which equal policies have"
        for field in ("importance_cap", "sequence_limit"):
            check(self, field, getattr(self, field) >= 1, rule)


@dataclasses.dataclass(frozen=True)
class RolloutConfig(PlayConfig):
    """Episodes of one optimizer step: `prompts` tasks, each played `generations` times.

    `environments` are `NAME` or `NAME/LEVEL`, with `MODULE:CLASS` for a name where it is a class of
    one's own (in a module of the current folder, of the config's, or that is installed), or
    `rows:FILE`. Prompts are shared out by `shares`, equally without. How they are played are the
    values of `PlayConfig`; `temperature` is that of the policy that plays and is learned.
    `sampler`: `side_by_side` keeps every conversation in one batch on all devices; `engine` serves
    them on slots and pages, and reads beginnings that it knows no second time. With `speculative`
    so many tokens at a time are drafted by the MTP block, which changes no distribution.
    """

    environments: tuple[str, ...] = ()
    shares: tuple[float, ...] = ()
    prompts: int = 16
    generations: int = 16
    sampler: str = "side_by_side"  # or "engine": see RolloutConfig
    slots: int = 64  # conversations that the engine decodes at one time
    speculative: int = 0  # tokens drafted at a time; 0 drafts none
    low_effort: float = 0.0  # share of prompts that ask for low effort, with its length reward
    low_effort_environments: tuple[str, ...] = LOW_EFFORT_ENVIRONMENTS  # names of those that ask
    low_effort_tokens: int = 3000  # of the last turn at which that reward turns negative
    workers: int = 0  # that play environments; 0 plays them in this process
    worker_kind: str = "processes"  # or "ray": actors of a cluster (extra `rl`)
    timeout_s: float = 60.0  # for a session's turn: half for its calls, then a worker is hung

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_one(self, "prompts", "generations", "low_effort_tokens", "slots")
        counts(self, "workers", "speculative")
        at_most(self, MOST_SLOTS, "slots")
        at_most(self, MOST_WORKERS, "workers")
        at_most(self, MOST_DRAFTS, "speculative")
        rule = "must be at least 2: what an episode is worth is seen beside the others of its group"
        check(self, "generations", self.generations > 1, rule)
        positive(self, "temperature", "timeout_s")
        at_most(self, LONGEST_WAIT_S, "timeout_s")
        not_negative(self, "low_effort")
        check(self, "low_effort", self.low_effort <= 1, "must be a share, at most 1")
        valid = all(is_finite(share) and share > 0 for share in self.shares)
        matched = len(self.shares) in (0, len(self.environments))
        rule = f"must give each of the {len(self.environments)} environments a positive share"
        check(self, "shares", valid and matched, rule)
        one_of(self, "sampler", SAMPLERS)
        one_of(self, "worker_kind", WORKER_KINDS)


@dataclasses.dataclass(frozen=True)
class PreferenceConfig:
    """Rewards by comparing the answers of a group with each other, pair by pair in a ring.

    `environments` are the names of those that are paid so, 1 to 5; the others pay their own rewards
    beside them. `judge`: empty for the environments' own rewards everywhere, `rules` for a
    comparison of those, or the address of a server of OpenAI's chat completions, such as
    `http://host:8000/v1`. `judge_format`: `words` asks any model which answer is better; `genrm`
    has NVIDIA's generative reward models score both (roles response_1, response_2 and, where it is
    set, principle). The weights are those of the released stage of verified rewards;
    configs/rlhf_super.py has those of the stage of preferences.
    """

    judge: str = ""
    environments: tuple[str, ...] = ()  # all of the run where none is named
    judge_model: str = ""
    judge_format: str = "words"
    judge_principle: str = ""  # what a genrm judge is to go by, if its template has that role
    judge_key_variable: str = ""  # the environment variable that holds the server's key
    judge_timeout_s: float = 120.0  # from a question to the end of its reply
    judge_calls: int = 64  # comparisons that are asked for at one time
    reasoning_weight: float = 0.1  # for short reasoning
    answer_weight: float = 0.1  # for short answers
    style_weight: float = 0.1  # for few headers, lists, bold words and emoji
    shortest_bonus: float = 0.5  # for the shortest reasoning, the shortest answer of the best fifth

    def __post_init__(self) -> None:
        known = self.judge in ("", "rules") or _is_address(self.judge)
        rule = "must be empty, 'rules' or the address of a server, such as http://host:8000/v1"
        check(self, "judge", known, rule)
        not_negative(self, "reasoning_weight", "answer_weight", "style_weight", "shortest_bonus")
        one_of(self, "judge_format", JUDGE_FORMATS)
        plain = not self.judge_principle or self.judge_format == "genrm"
        check(self, "judge_principle", plain, "must be empty without judge_format='genrm'")
        positive(self, "judge_timeout_s")
        at_most(self, LONGEST_WAIT_S, "judge_timeout_s")
        at_least_one(self, "judge_calls")
        at_most(self, MOST_WORKERS, "judge_calls")


def _is_address(text: str) -> bool:
    """Whether a request can be sent to it: of http or https, with a host, in printable ASCII."""
    try:
        parts = urlsplit(text)
        named = parts.hostname and parts.port != 0
    except ValueError:  # a port that is no number, an open bracket
        return False
    plain = all("!" <= letter <= "~" for letter in text)
    return bool(parts.scheme in ("http", "https") and named and plain)


@dataclasses.dataclass(frozen=True)
class RLConfig:
    """Stage `grpo`: episodes, objective, and the held-out tasks that tell what was learned."""

    rollout: RolloutConfig = RolloutConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    preference: PreferenceConfig = PreferenceConfig()
    updates: int = 1  # optimizer steps on each batch of episodes
    held_out_tasks: int = 128  # of each environment, played once at each evaluation
    result_tasks: int = 512  # of each environment, played before and after for result.json
    max_age: int = 0  # 1: the next batch is begun before the step, with weights that old
    early_turns: int = 1  # of the next batch that are played before the step, at max_age 1
    pool_tasks: int = 0  # tasks of each environment that are tried before; 0 plays fresh ones
    pool_samples: int = 4  # plays of each; what always succeeds is dropped, the rest sorted
    transcripts: int = 16  # episodes of each batch that are written down
    easy_slip: str = ""  # tasks that this slip gets right are reported apart, as easy ones

    def __post_init__(self) -> None:
        at_least_one(self, "updates", "held_out_tasks", "result_tasks", "early_turns")
        at_least_one(self, "pool_samples")
        counts(self, "max_age", "pool_tasks", "transcripts")
        at_most(self, MOST_TASKS, "held_out_tasks", "result_tasks", "pool_tasks", "pool_samples")
        check(self, "max_age", self.max_age <= 1, "must be 0 or 1")
        on_policy = self.updates == 1 or self.objective.ratio == "clipped"
        rule = "must be 1 where objective.ratio='one', since later ones are off the policy; set "
        check(self, "updates", on_policy, f"{rule}objective.ratio='clipped'")
