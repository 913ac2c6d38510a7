"""What a run learns from another model's predictions: a teacher's, or its own backbone's."""

import dataclasses

from nemotron_jax.config.checks import at_least_one, check, is_finite, local_path, one_of, positive

MTP_LOSSES = ("cross_entropy", "kl")
MTP_HIDDENS = ("sampled", "last")
TEXTS = ("corpus", "own")
TEACHER_DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class DistillConfig:
    """Stage `distill`: the next token as a teacher predicts it, in place of the text's own.

    The loss is `weight` times T^2 KL(teacher || student), both softened by the `temperature` T,
    plus the rest of 1 times cross entropy. The teacher computes in high precision, whatever
    `execution.precision` says of the student, and in the dtype that its matrices are held in. In
    the end teacher and student are compared on `result_rows` held-out rows.
    """

    teacher: str = ""  # a run's or a hub's directory
    temperature: float = 1.0
    weight: float = 1.0
    dtype: str = "float32"  # of the teacher's matrices
    result_rows: int = 64

    def __post_init__(self) -> None:
        local_path("DistillConfig", "teacher", self.teacher)
        positive(self, "temperature")
        inside = is_finite(self.weight) and 0 <= self.weight <= 1
        check(self, "weight", inside, "must lie between 0 and 1")
        one_of(self, "dtype", TEACHER_DTYPES)
        at_least_one(self, "result_rows")


@dataclasses.dataclass(frozen=True)
class DraftObjective:
    """What drafts are to predict, and on which text, in stages `pretrain` and `sft`.

    `mtp`: the text's own tokens, `cross_entropy`, or with `kl` what the backbone itself predicts
    there, T^2 KL(backbone || draft) at `mtp_temperature` T; the backbone stays as it is, so
    `training.trains` must be `mtp`. `mtp_hidden`: with `kl` depth d reads, at each place, the
    hidden state of one of depths 1 to d - 1, `sampled`, or always of the `last`. `text`: of the
    corpus, or the model's `own`: rows begin with `prompt_tokens` of the corpus and go on as the
    model draws them at temperature 1; `own_steps` batches are written together. With `kl` the
    drafts of `result_prompts` held-out beginnings are counted before and after.
    """

    mtp: str = "cross_entropy"
    mtp_temperature: float = 2.0
    mtp_hidden: str = "sampled"
    text: str = "corpus"
    prompt_tokens: int = 32
    own_steps: int = 8
    result_prompts: int = 64

    def __post_init__(self) -> None:
        one_of(self, "mtp", MTP_LOSSES)
        positive(self, "mtp_temperature")
        one_of(self, "mtp_hidden", MTP_HIDDENS)
        one_of(self, "text", TEXTS)
        at_least_one(self, "prompt_tokens", "own_steps", "result_prompts")
