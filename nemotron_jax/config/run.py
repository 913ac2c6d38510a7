"""Everything that a run file in configs/ decides, as one checked dataclass."""

import dataclasses
import math
import operator

from nemotron_jax.config.checks import (
    at_least_one,
    check,
    counts,
    is_finite,
    is_integer,
    local_path,
    not_negative,
    one_of,
    positive,
)
from nemotron_jax.config.distill import DistillConfig, DraftObjective
from nemotron_jax.config.execution import Execution
from nemotron_jax.config.lora import LoRAConfig
from nemotron_jax.config.model import ModelConfig
from nemotron_jax.config.rl import RLConfig
from nemotron_jax.config.sft import SFTConfig

STAGES = ("pretrain", "sft", "grpo", "distill")

TRAINS = ("all", "mtp", "lora")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where text comes from and how it becomes rows.

    A source is `python_stdlib`, or `hf:PATH` naming a .jsonl, .parquet or text file, or a folder of
    them, each up to 2 GB; or `shards:DIR`, text of any size that was made into token shards before,
    see docs/data.md. Stage `sft` has its own sources, see SFTConfig. `tokenizer` is `train` (a BPE
    of the model's vocabulary size, trained on the training split; with shards, theirs), for stage
    `sft` also `train_phrases` (tokens may span words, so that a small model meets short
    conversations), or the path of a tokenizer.json.
    """

    sources: tuple[str, ...] = ("python_stdlib",)
    source_weights: tuple[float, ...] = (1.0,)
    tokenizer: str = "train"
    sequence_length: int = 512
    batch_size: int = 8  # rows of one optimizer step
    held_out_fraction: float = 0.05  # of text sources; shards have their own
    prefetch: int = 4  # batches made ahead of the step

    def __post_init__(self) -> None:
        at_least_one(self, "sequence_length", "batch_size", "prefetch")
        check(self, "sources", len(self.sources) > 0, "must name at least one source")
        for source in self.sources:  # a name, or KIND:PATH
            local_path("DataConfig", "sources", source.partition(":")[2])
        local_path("DataConfig", "tokenizer", self.tokenizer)
        matched = len(self.source_weights) == len(self.sources)
        rule = f"must give one weight for each of the {len(self.sources)} sources"
        check(self, "source_weights", matched, rule)
        valid = all(is_finite(weight) and weight > 0 for weight in self.source_weights)
        check(self, "source_weights", valid, "must all be positive and finite")
        inside = is_finite(self.held_out_fraction) and 0 < self.held_out_fraction < 1
        check(self, "held_out_fraction", inside, "must lie between 0 and 1")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW on matrices and vectors alike, decay on matrices only."""

    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        not_negative(self, "beta1", "beta2", "weight_decay")
        check(self, "beta1", self.beta1 < 1, "must lie in [0, 1)")
        check(self, "beta2", self.beta2 < 1, "must lie in [0, 1)")
        positive(self, "epsilon", "clip_norm")


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    """Warm-up, stable, minus-square-root decay (WSD), counted in tokens."""

    peak_learning_rate: float
    final_learning_rate: float
    warmup_tokens: int
    decay_tokens: int
    total_tokens: int

    def __post_init__(self) -> None:
        positive(self, "peak_learning_rate")
        not_negative(self, "final_learning_rate")
        counts(self, "warmup_tokens", "decay_tokens", "total_tokens")
        peak, parts = self.peak_learning_rate, self.warmup_tokens + self.decay_tokens
        rule = f"must lie between 0 and peak_learning_rate={peak}"
        check(self, "final_learning_rate", self.final_learning_rate <= peak, rule)
        rule = (
            f"must be at least warmup_tokens={self.warmup_tokens} + "
            f"decay_tokens={self.decay_tokens}"
        )
        check(self, "total_tokens", self.total_tokens >= parts, rule)


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """The pre-training loop and its losses."""

    steps: int
    schedule: ScheduleConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    micro_batches: int = 1  # gradient accumulation: batch_size splits into this many
    loss_chunk: int = 512  # tokens of one logits chunk
    mtp_depths: int = 2
    mtp_loss_scale: float = 0.3  # shared equally by the depths
    aux_loss_scale: float = 1e-4
    router_bias_rate: float = 1e-3
    max_skipped_steps: int = 10  # consecutive non-finite steps before the run stops
    freeze_routers: bool = False  # their weights stay; selection biases still balance the load
    trains: str = "all"  # which parameters move: all, mtp (the block of the drafts) or lora

    def __post_init__(self) -> None:
        at_least_one(self, "steps", "micro_batches", "loss_chunk", "max_skipped_steps")
        check(self, "steps", self.steps < 2**31, "must be below 2147483648, where counters end")
        counts(self, "mtp_depths")
        one_of(self, "trains", TRAINS)
        drafts = self.trains != "mtp" or self.mtp_depths > 0
        check(self, "mtp_depths", drafts, "must be at least 1 where trains='mtp'")
        not_negative(self, "mtp_loss_scale", "aux_loss_scale", "router_bias_rate")


@dataclasses.dataclass(frozen=True)
class LoggingConfig:
    """What a run reports and keeps, in optimizer steps; free to change on resume.

    `suites`, as eval.py's --suites, are measured at each evaluation, and their means are in its
    record as SUITE/VALUE.
    """

    log_every: int = 10
    evaluate_every: int = 200
    evaluate_rows: int = 32  # held-out rows of each evaluation
    checkpoint_every: int = 200
    keep_checkpoints: int = 3
    sample_tokens: int = 200
    merge_window: int = 0  # newest checkpoints averaged at the end; 0 leaves merging off
    suites: str = ""

    def __post_init__(self) -> None:
        at_least_one(self, "log_every", "evaluate_every", "evaluate_rows")
        at_least_one(self, "checkpoint_every", "keep_checkpoints")
        counts(self, "sample_tokens", "merge_window")
        rule = (
            f"must be at most keep_checkpoints={self.keep_checkpoints}, the checkpoints there are"
        )
        check(self, "merge_window", self.merge_window <= self.keep_checkpoints, rule)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How many devices lie along each axis of the mesh.

    `data`, `fsdp` and `expert` share the rows of a batch; `fsdp` and `expert` also share parameters
    and their moments, of which each device gathers one layer at a time. Routed experts stay with
    their devices along `expert`: tokens travel to them. Devices along `tensor` share heads, Mamba's
    groups, hidden units, vocabulary and experts, and have the same rows. On a CPU a device is a
    share of its cores: XLA runs the many small products of a step on one core, so two devices train
    nearly twice as fast as one on two cores. `context` is named for checkpoints' sake, and must
    be 1.
    """

    data: int = 1
    fsdp: int = 1
    expert: int = 1
    tensor: int = 1
    context: int = 1

    @property
    def size(self) -> int:
        """Devices of the mesh."""
        return math.prod(dataclasses.astuple(self))

    @property
    def row_shards(self) -> int:
        """Parts that the rows of a batch are cut into."""
        return self.data * self.fsdp * self.expert

    @property
    def named(self) -> str:
        """The axes as a sentence names them: data and fsdp, and what else is above 1."""
        sizes = dataclasses.asdict(self).items()
        shown = [f"{name}={size}" for name, size in sizes if size > 1 or name in ("data", "fsdp")]
        return " times ".join(shown)

    def __post_init__(self) -> None:
        at_least_one(self, "data", "fsdp", "expert", "tensor", "context")
        rule = "must be 1: no layer is split along it yet; use data, fsdp, expert and tensor"
        check(self, "context", self.context == 1, rule)


@dataclasses.dataclass(frozen=True)
class WarmStart:
    """The fine-tuning that a run of stage `grpo` begins with, in the same directory."""

    training: TrainingConfig
    data: DataConfig


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """One run of train.py."""

    model: ModelConfig
    training: TrainingConfig
    data: DataConfig = DataConfig()
    execution: Execution = Execution()
    mesh: MeshConfig = MeshConfig()
    logging: LoggingConfig = LoggingConfig()
    stage: str = "pretrain"
    objective: DraftObjective = DraftObjective()  # of drafts that are trained alone
    distill: DistillConfig = DistillConfig()  # of stage distill alone
    sft: SFTConfig = SFTConfig()  # of stage sft, and of a warm start
    rl: RLConfig = RLConfig()  # of stage grpo alone
    warm_start: WarmStart | None = None  # fine-tuning before stage grpo
    lora: LoRAConfig | None = None  # adapters on the model, of training.trains='lora'
    seed: int = 0
    init_from: str = ""  # a hub's or a run's directory whose parameters the run begins with

    @property
    def warm_start_run(self) -> "RunConfig":
        """The fine-tuning run that comes before stage `grpo`; there must be one."""
        first = self.warm_start
        lora = self.lora if first.training.trains == "lora" else None
        return dataclasses.replace(
            self, stage="sft", training=first.training, data=first.data, warm_start=None, lora=lora
        )

    @property
    def tokenizer_from(self) -> str:
        """The directory whose tokenizer the run uses where its data names none: what it begins
        with, or else its teacher; empty for one of its own."""
        return self.init_from or (self.distill.teacher if self.stage == "distill" else "")

    def __post_init__(self) -> None:
        one_of(self, "stage", STAGES)
        local_path("RunConfig", "init_from", self.init_from)
        rule = f"must be an integer from 0 to {2**32 - 1}"
        check(self, "seed", is_integer(self.seed) and 0 <= self.seed < 2**32, rule)
        rule = (
            f"and training.trains={self.training.trains!r} belong together: adapters are there to "
            "be trained alone; set both or neither"
        )
        check(self, "lora", (self.training.trains == "lora") == (self.lora is not None), rule)
        rule = f"must name a matrix of the model, whose blocks are {self.model.pattern!r}"
        check(self, "lora.targets", self.lora is None or self.lora.chosen(self.model), rule)
        if self.stage == "grpo" and self.lora is not None:
            rule = (
                "must be 0 in stage grpo: the policy that learns is the one that played, whole; "
                "set lora.dropout=0"
            )
            check(self.lora, "dropout", self.lora.dropout == 0, rule)
        parts, rows = self.training.micro_batches * self.mesh.row_shards, self.data.batch_size
        fewer = max(parts, rows - rows % parts)
        rule = (
            f"must be a multiple of training.micro_batches={self.training.micro_batches} times "
            f"the {self.mesh.row_shards} devices of mesh.data={self.mesh.data}, "
            f"mesh.fsdp={self.mesh.fsdp} and mesh.expert={self.mesh.expert}, such as {fewer} or "
            f"{fewer + parts}"
        )
        check(self, "data.batch_size", rows % parts == 0, rule)
        _check_divided(self)
        _check_learned_from(self)
        has_mtp = self.training.mtp_depths == 0 or self.model.mtp is not None
        rule = "needs a model with mtp; set it to 0 or configure model.mtp"
        check(self, "training.mtp_depths", has_mtp, rule)
        within = self.training.mtp_depths <= self.data.sequence_length
        rule = (
            f"reaches past a whole row of data.sequence_length={self.data.sequence_length} tokens"
        )
        check(self, "training.mtp_depths", within, rule)


def _check_divided(config: RunConfig) -> None:
    """Raise ValueError where an axis of the mesh does not divide what the model puts along it."""
    model, mesh = config.model, config.mesh
    owners = f"mesh.expert={mesh.expert} times mesh.tensor={mesh.tensor}"
    tensor = f"mesh.tensor={mesh.tensor}"
    each = [
        (True, "data.sequence_length", mesh.context, f"mesh.context={mesh.context}"),
        (model.moe, "model.moe.num_experts", mesh.expert * mesh.tensor, owners),
        (model.attention, "model.attention.num_heads", mesh.tensor, tensor),
        (model.mamba, "model.mamba.num_groups", mesh.tensor, tensor),
    ]
    for used, field, devices, named in each:
        whole = not used or operator.attrgetter(field)(config) % devices == 0
        check(config, field, whole, f"must be a multiple of {named}; change one of them")


def _check_learned_from(config: RunConfig) -> None:
    """Raise ValueError where there is no teacher, or where drafts cannot learn from the model."""
    distill, trains = config.stage == "distill", config.training.trains
    rule = "must name the directory of a run or of a hub model in stage 'distill'"
    check(config, "distill.teacher", not distill or config.distill.teacher != "", rule)
    rule = "moves nothing that a teacher's predictions reach; use all or lora in stage 'distill'"
    check(config, "training.trains", not distill or trains != "mtp", rule)
    fixed = trains == "mtp" and config.stage in ("pretrain", "sft")
    boosted, own = config.objective.mtp == "kl", config.objective.text == "own"
    rule = "needs training.trains='mtp' in stage pretrain or sft: the backbone is the teacher"
    check(config, "objective.mtp", not boosted or fixed, rule)
    rule = "must name the model whose drafts are to improve where objective.mtp='kl'"
    check(config, "init_from", not boosted or config.init_from != "", rule)
    rule = "needs training.trains='mtp' in stage pretrain: what writes the text stays fixed"
    check(config, "objective.text", not own or (fixed and config.stage == "pretrain"), rule)
    rule = f"must be below data.sequence_length={config.data.sequence_length}, which holds them"
    fits = config.objective.prompt_tokens < config.data.sequence_length
    check(config, "objective.prompt_tokens", not own or fits, rule)
