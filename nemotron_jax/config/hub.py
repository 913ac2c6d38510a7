"""A hub `config.json` of the Nemotron-H family read into a ModelConfig, and written from one.

Keys and defaults are those of transformers 5.23 `NemotronHConfig`. Keys that its model never uses
are ignored here too: `expand`, `rope_theta`, `partial_rotary_factor`, `sliding_window`,
`attention_bias`, `mamba_proj_bias`, `residual_in_fp32`, `tie_word_embeddings`, `n_shared_experts`,
the dtype of the weights (`torch_dtype`, `dtype`), and keys that only steer a loader.
`time_step_limit` is the exception: transformers ignores it, the family's own code honours it, and
so does this project.
"""

import json
import math
import os
import pathlib
import warnings
from collections.abc import Mapping, Sequence

from nemotron_jax.config.model import (
    AttentionConfig,
    MambaConfig,
    MLPConfig,
    ModelConfig,
    MoEConfig,
    MTPConfig,
    require,
)

MODEL_TYPE = "nemotron_h"
BLOCK_LETTERS = {
    "mamba": "M",
    "linear_attention": "M",
    "attention": "*",
    "full_attention": "*",
    "moe": "E",
    "mlp": "-",
}
# Written for readers other than transformers; each value says what the model does.
_CONSTANT_KEYS = {
    "architectures": ["NemotronHForCausalLM"],
    "model_type": MODEL_TYPE,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "mamba_hidden_act": "silu",
    "mamba_proj_bias": False,
    "mamba_ssm_cache_dtype": "float32",
    "mlp_hidden_act": "relu2",
    "n_shared_experts": 1,
    "num_logits_to_keep": 1,
    "rescale_prenorm_residual": True,
    "residual_in_fp32": False,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_cache": True,
}


def from_hf(source: Mapping | str | os.PathLike) -> ModelConfig:
    """The model that a hub configuration describes.

    `source` is the parsed dictionary, a JSON file, or a directory that holds `config.json`. The
    blocks may be spelled as `hybrid_override_pattern` or as `layers_block_type` (with the hub's or
    transformers' names), an infinity as bare `Infinity` or as `{"__float__": "Infinity"}`. Parts
    whose letter no pattern uses are left None. Any positive `num_nextn_predict_layers` means one
    physical MTP block. Raises ValueError for a missing, ill-typed or unsupported value, and warns
    when `num_hidden_layers` disagrees with the blocks, which decide.
    """
    keys = _Keys(source if isinstance(source, Mapping) else _read_json(pathlib.Path(source)))
    keys.only("model_type", MODEL_TYPE)
    keys.only("mlp_hidden_act", "relu2")
    keys.only("mamba_hidden_act", "silu")
    pattern = keys.pattern("hybrid_override_pattern", "layers_block_type")
    require(
        pattern is not None,
        "HubConfig",
        "hybrid_override_pattern",
        None,
        "give the blocks as this pattern, or as the list layers_block_type",
    )
    layers = keys.integer("num_hidden_layers", len(pattern))
    if layers != len(pattern):
        warnings.warn(
            f"HubConfig.num_hidden_layers={layers} is ignored: {len(pattern)} blocks are listed",
            stacklevel=2,
        )
    mtp = _mtp(keys)
    used = set(pattern) | set(mtp.pattern if mtp else "")
    return ModelConfig(
        vocab_size=keys.integer("vocab_size", 131_072),
        width=keys.integer("hidden_size", 4096),
        pattern=pattern,
        mamba=_mamba(keys) if "M" in used else None,
        attention=_attention(keys) if "*" in used else None,
        moe=_moe(keys) if "E" in used else None,
        mlp=_mlp(keys) if "-" in used else None,
        mtp=mtp,
        norm_epsilon=keys.positive(keys.first("layer_norm_epsilon", "norm_eps"), 1e-5),
        init_std=keys.positive("initializer_range", 0.02),
        # There are no positions, so an absent key is no limit of the model: unlike transformers'
        # default of 4096, this one leaves room.
        max_length=keys.integer("max_position_embeddings", ModelConfig.max_length),
        bos_token=keys.token("bos_token_id", 1),
        eos_token=keys.token("eos_token_id", 2),
        pad_token=keys.token("pad_token_id", 0),
    )


def to_hf(config: ModelConfig, *, dtype: str | None = None) -> dict:
    """The hub `config.json` of a model, as a dictionary that is strict JSON.

    Blocks are written as `hybrid_override_pattern`. `time_step_limit` is left out when there is no
    limit, since its absence means so and JSON has no infinity. `dtype` (as "bfloat16") is written
    as `torch_dtype` when given. `from_hf` returns the same config, provided that every part is used
    by some block. Raises ValueError when MLP and MoE disagree on biases: the hub has one key.
    """
    keys = {
        **_CONSTANT_KEYS,
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.num_layers,
        "hybrid_override_pattern": config.pattern,
        "num_nextn_predict_layers": 1 if config.mtp else 0,
        "layer_norm_epsilon": config.norm_epsilon,
        "norm_eps": config.norm_epsilon,
        "initializer_range": config.init_std,
        "max_position_embeddings": config.max_length,
        "bos_token_id": config.bos_token,
        "eos_token_id": config.eos_token,
        "pad_token_id": config.pad_token,
    }
    if dtype is not None:
        keys["torch_dtype"] = dtype
    if config.mtp:
        keys["mtp_hybrid_override_pattern"] = config.mtp.pattern
    if config.mamba:
        keys |= _mamba_keys(config.mamba)
    if config.attention:
        keys["num_attention_heads"] = config.attention.num_heads
        keys["num_key_value_heads"] = config.attention.num_kv_heads
        keys["head_dim"] = config.attention.head_dim
    if config.mlp:
        keys["intermediate_size"] = config.mlp.width
    if config.moe:
        keys |= _moe_keys(config.moe)
        keys.setdefault("intermediate_size", config.moe.expert_width)
    biases = {part.projection_bias for part in (config.moe, config.mlp) if part}
    require(
        len(biases) <= 1,
        "ModelConfig",
        "mlp.projection_bias",
        config.mlp and config.mlp.projection_bias,
        "must equal moe.projection_bias: the hub has one key, mlp_bias, for both",
    )
    keys["mlp_bias"] = biases == {True}
    return keys


class _Keys:
    """Typed access to a hub configuration; every failure names the key, the value and the rule."""

    def __init__(self, values: Mapping) -> None:
        self.values = values

    def value(self, key: str, default: object) -> object:
        return self.values.get(key, default)

    def check(self, condition: bool, key: str, value: object, rule: str) -> None:
        require(condition, "HubConfig", key, value, rule)

    def first(self, *names: str) -> str:
        """The first of several spellings that is present, else the first."""
        return next((name for name in names if name in self.values), names[0])

    def only(self, key: str, supported: str) -> None:
        value = self.value(key, supported)
        self.check(value == supported, key, value, f"must be {supported!r}, the only one supported")

    def integer(self, key: str, default: int) -> int:
        value = self.value(key, default)
        self.check(type(value) is int and value >= 0, key, value, "must be an integer >= 0")
        return value

    def token(self, key: str, default: int) -> int:
        """A token id; of a list the first counts, and null means the family's own."""
        value = self.value(key, default)
        if isinstance(value, Sequence) and not isinstance(value, str) and value:
            value = value[0]
        value = default if value is None else value
        self.check(type(value) is int and value >= 0, key, value, "must be a token id or a list")
        return value

    def positive(self, key: str, default: float) -> float:
        value = _decoded_float(self.value(key, default))
        valid = _is_number(value) and 0 < value < math.inf
        self.check(valid, key, value, "must be a positive finite number")
        return float(value)

    def boolean(self, key: str, default: bool) -> bool:
        value = self.value(key, default)
        self.check(isinstance(value, bool), key, value, "must be true or false")
        return value

    def pattern(self, pattern_key: str, list_key: str) -> str | None:
        """Block letters from either spelling; None when both are absent or null."""
        letters = self.value(pattern_key, None)
        kinds = self.value(list_key, None)
        if letters is not None:
            known = set(BLOCK_LETTERS.values())
            valid = isinstance(letters, str) and len(letters) > 0 and set(letters) <= known
            self.check(valid, pattern_key, letters, "must be a string of the letters M*E-")
        if kinds is None:
            return letters
        names = ", ".join(BLOCK_LETTERS)
        valid = isinstance(kinds, list | tuple) and len(kinds) > 0
        self.check(valid, list_key, kinds, "must be a list that is not empty")
        for index, kind in enumerate(kinds):
            known = isinstance(kind, str) and kind in BLOCK_LETTERS
            self.check(known, f"{list_key}[{index}]", kind, f"must be one of {names}")
        listed = "".join(BLOCK_LETTERS[kind] for kind in kinds)
        self.check(
            letters in (None, listed),
            pattern_key,
            letters,
            f"contradicts {list_key}, which spells {listed!r}; give one of them",
        )
        return listed

    def limits(self, key: str) -> tuple[float, float]:
        value = self.value(key, None)
        if value is None:
            return (0.0, math.inf)
        valid = isinstance(value, list | tuple) and len(value) == 2
        pair = tuple(_decoded_float(bound) for bound in value) if valid else ()
        valid = valid and all(_is_number(bound) for bound in pair)
        self.check(valid, key, value, "must be a pair of numbers [low, high]")
        return (float(pair[0]), float(pair[1]))


def _mamba(keys: _Keys) -> MambaConfig:
    return MambaConfig(
        num_heads=keys.integer("mamba_num_heads", 128),
        head_dim=keys.integer("mamba_head_dim", 64),
        state_size=keys.integer("ssm_state_size", 128),
        num_groups=keys.integer("n_groups", 8),
        conv_width=keys.integer("conv_kernel", 4),
        chunk=keys.integer("chunk_size", 128),
        conv_bias=keys.boolean("use_conv_bias", True),
        projection_bias=keys.boolean("use_bias", False),
        time_step_min=keys.positive("time_step_min", 0.001),
        time_step_max=keys.positive("time_step_max", 0.1),
        time_step_floor=keys.positive("time_step_floor", 1e-4),
        time_step_limit=keys.limits("time_step_limit"),
    )


def _mamba_keys(mamba: MambaConfig) -> dict:
    keys = {
        "mamba_num_heads": mamba.num_heads,
        "mamba_head_dim": mamba.head_dim,
        "ssm_state_size": mamba.state_size,
        "n_groups": mamba.num_groups,
        "conv_kernel": mamba.conv_width,
        "chunk_size": mamba.chunk,
        "use_conv_bias": mamba.conv_bias,
        "use_bias": mamba.projection_bias,
        "time_step_min": mamba.time_step_min,
        "time_step_max": mamba.time_step_max,
        "time_step_floor": mamba.time_step_floor,
    }
    low, high = mamba.time_step_limit
    if (low, high) != (0.0, math.inf):
        keys["time_step_limit"] = [low, {"__float__": "Infinity"} if high == math.inf else high]
    return keys


def _attention(keys: _Keys) -> AttentionConfig:
    return AttentionConfig(
        num_heads=keys.integer("num_attention_heads", 32),
        num_kv_heads=keys.integer("num_key_value_heads", 8),
        head_dim=keys.integer("head_dim", 128),
    )


def _moe(keys: _Keys) -> MoEConfig:
    latent = keys.value("moe_latent_size", None)
    return MoEConfig(
        num_experts=keys.integer("n_routed_experts", 8),
        experts_per_token=keys.integer("num_experts_per_tok", 2),
        expert_width=keys.integer("moe_intermediate_size", 7688),
        shared_width=keys.integer("moe_shared_expert_intermediate_size", 7688),
        latent_width=None if latent is None else keys.integer("moe_latent_size", 0),
        num_expert_groups=keys.integer("n_group", 1),
        groups_per_token=keys.integer("topk_group", 1),
        normalize_weights=keys.boolean("norm_topk_prob", True),
        weight_scale=keys.positive("routed_scaling_factor", 1.0),
        projection_bias=keys.boolean("mlp_bias", False),
    )


def _moe_keys(moe: MoEConfig) -> dict:
    return {
        "n_routed_experts": moe.num_experts,
        "num_experts_per_tok": moe.experts_per_token,
        "moe_intermediate_size": moe.expert_width,
        "moe_shared_expert_intermediate_size": moe.shared_width,
        "moe_latent_size": moe.latent_width,
        "n_group": moe.num_expert_groups,
        "topk_group": moe.groups_per_token,
        "norm_topk_prob": moe.normalize_weights,
        "routed_scaling_factor": moe.weight_scale,
    }


def _mlp(keys: _Keys) -> MLPConfig:
    return MLPConfig(
        width=keys.integer("intermediate_size", 21_504),
        projection_bias=keys.boolean("mlp_bias", False),
    )


def _mtp(keys: _Keys) -> MTPConfig | None:
    depths = keys.value("num_nextn_predict_layers", None)
    if depths is None or keys.integer("num_nextn_predict_layers", 0) == 0:
        return None
    pattern = keys.pattern("mtp_hybrid_override_pattern", "mtp_layers_block_type")
    return MTPConfig(pattern=pattern or "*E")


def _read_json(path: pathlib.Path) -> Mapping:
    file = path / "config.json" if path.is_dir() else path
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"from_hf: {file} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"from_hf: {file} holds {type(values).__name__}; a JSON object is needed")
    return values


def _decoded_float(value: object) -> object:
    """transformers' strict-JSON spelling of an infinity as a float; anything else unchanged."""
    if isinstance(value, Mapping) and set(value) == {"__float__"}:
        names = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}
        return names.get(value["__float__"], value)
    return value


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)
