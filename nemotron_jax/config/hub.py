"""A hub `config.json` of the Nemotron-H family read as the fields of a ModelConfig.

Keys and defaults are those of transformers 5.24 `NemotronHConfig`, its other spellings included; a
value given twice must be the same. Keys that no code of the family uses are ignored: `expand`,
`rope_theta`, `partial_rotary_factor`, the dtype of the weights (`torch_dtype`, `dtype`), and keys
that only steer a loader. Keys that would change the computation elsewhere are refused unless they
say what this project computes (NEUTRAL). `time_step_limit` is the exception: transformers ignores
it, the family's own code honours it, and so does this project.
"""

import math
import os
import pathlib
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from nemotron_jax.config.checks import check_value, is_finite
from nemotron_jax.config.untrusted import read_object, shown

MODEL_TYPE = "nemotron_h"
MOST_SIZE = 2**31 - 1  # of a size or a token id; shapes and ids are 32-bit integers
MOST_LAYERS = 10_000  # the largest model of the family has 108
_TEXT_PART = "llm_config"  # of a model that also sees: Nemotron 3.5 Super VL
_FAMILY = ("nemotron_h", "nemotronh")  # how a larger model's model_type begins, in small letters
BLOCK_LETTERS = {
    "mamba": "M",
    "linear_attention": "M",
    "attention": "*",
    "full_attention": "*",
    "moe": "E",
    "mlp": "-",
}
# What this project computes, where a key could ask for something else.
NEUTRAL = {
    "model_type": (MODEL_TYPE,),
    "mlp_hidden_act": ("relu2",),
    "mamba_hidden_act": ("silu",),
    "sliding_window": (None,),
    "residual_in_fp32": (False,),
    "attention_bias": (False,),
    "tie_word_embeddings": (False,),
}
# Other names of a key, which transformers or the family's own code accept.
_SPELLINGS = {
    "layers_block_type": ("layer_types",),
    "layer_norm_epsilon": ("norm_eps", "rms_norm_eps"),
    "head_dim": ("attention_head_dim",),
    "n_routed_experts": ("num_local_experts",),
    "n_groups": ("mamba_n_groups",),
    "conv_kernel": ("mamba_d_conv",),
    "chunk_size": ("mamba_chunk_size",),
    "use_conv_bias": ("mamba_conv_bias",),
    "time_step_min": ("mamba_dt_min",),
    "time_step_max": ("mamba_dt_max",),
    "time_step_floor": ("mamba_dt_init_floor",),
    "time_step_limit": ("mamba_dt_limit",),
}
# Bounds beyond the largest float32 bound nothing; published configs write 1e308 for infinity.
_LARGEST_FLOAT32 = 3.4028235e38


def read(source: Mapping | str | os.PathLike) -> dict[str, Any]:
    """The fields of the ModelConfig that a hub configuration describes, a dictionary for each part.

    `source` is the parsed dictionary, a JSON file, or a directory that holds `config.json`; of a
    model that also sees or hears, the text model under `llm_config` is read and nothing else. The
    blocks may be spelled as `hybrid_override_pattern` or as `layers_block_type` (with the hub's or
    transformers' names), an infinity as bare `Infinity` or as `{"__float__": "Infinity"}`. Parts
    whose letter no pattern uses are left None. Any positive `num_nextn_predict_layers` means one
    physical MTP block. Raises ValueError for a missing, ill-typed, contradictory or unsupported
    value, and warns when `num_hidden_layers` disagrees with the blocks, which decide, and of
    dropout.
    """
    values = source if isinstance(source, Mapping) else _read_json(pathlib.Path(source))
    keys = _Keys.of_text(values)
    _refuse_other_models(keys)
    pattern = keys.pattern("hybrid_override_pattern", "layers_block_type")
    rule = "give the blocks as this pattern, or as the list layers_block_type"
    keys.check(pattern is not None, "hybrid_override_pattern", None, rule)
    layers = keys.integer("num_hidden_layers", len(pattern))
    if layers != len(pattern):
        warnings.warn(
            f"HubConfig.num_hidden_layers={layers} is ignored: {len(pattern)} blocks are listed",
            stacklevel=2,
        )
    mtp = _mtp(keys)
    used = set(pattern) | set(mtp["pattern"] if mtp else "")
    return dict(
        vocab_size=keys.integer("vocab_size", 131_072),
        width=keys.integer("hidden_size", 4096),
        pattern=pattern,
        mamba=_mamba(keys) if "M" in used else None,
        attention=_attention(keys) if "*" in used else None,
        moe=_moe(keys) if "E" in used else None,
        mlp=_mlp(keys) if "-" in used else None,
        mtp=mtp,
        norm_epsilon=keys.positive("layer_norm_epsilon", 1e-5),
        init_std=keys.positive("initializer_range", 0.02),
        # There are no positions, so an absent key is no limit of the model: unlike transformers'
        # default of 4096, this one leaves room.
        max_length=keys.integer("max_position_embeddings", 1_048_576),
        bos_token=keys.token("bos_token_id", 1),
        eos_token=keys.token("eos_token_id", 2),
        pad_token=keys.token("pad_token_id", 0),
    )


def text_config(keys: Mapping) -> Mapping:
    """The part of a hub configuration that describes the text model: all of it, or what a model of
    text and images has under `llm_config`."""
    inner = keys.get(_TEXT_PART)
    return inner if isinstance(inner, Mapping) else keys


def with_text_config(keys: Mapping, text: Mapping) -> Mapping:
    """A hub configuration with another text model, all else as it was."""
    return text if text_config(keys) is keys else {**keys, _TEXT_PART: text}


class _Keys:
    """Typed access to a hub configuration; every failure names the key, the value and the rule."""

    def __init__(self, values: Mapping, path: str = "") -> None:
        self.values = values
        self._path = path  # before the names of keys in errors

    @classmethod
    def of_text(cls, values: Mapping) -> "_Keys":
        """The text model's keys, which may stand within those of a larger model."""
        inner = values.get(_TEXT_PART)
        if inner is None:
            return cls(values)
        outer = cls(values)
        rule = "must be an object: the text model's own configuration"
        outer.check(isinstance(inner, Mapping), _TEXT_PART, inner, rule)
        kind = values.get("model_type")
        kind_name = kind.lower() if isinstance(kind, str) else ""
        known = kind_name.startswith(_FAMILY) and "puzzle" not in kind_name
        rule = f"holds an {_TEXT_PART}, so it must be one of the family, as 'nemotron_h_omni'"
        outer.check(known, "model_type", kind, rule)
        outer.refuse_block_configs()
        return cls(inner, f"{_TEXT_PART}.")

    def value(self, key: str, default: object) -> object:
        """What the file says under any spelling of the key, null for a key that is null."""
        names = [name for name in (key, *_SPELLINGS.get(key, ())) if name in self.values]
        if not names:
            return default
        told = [name for name in names if self.values[name] is not None]
        for other in told[1:]:
            rule = f"contradicts {other}={shown(self.values[other])}, another spelling; give one"
            value = self.values[told[0]]
            self.check(_plain(value) == _plain(self.values[other]), told[0], value, rule)
        return self.values[told[0]] if told else None

    def check(self, condition: bool, key: str, value: object, rule: str) -> None:
        check_value("HubConfig", self._path + key, value, condition, rule)

    def refuse_block_configs(self) -> None:
        """Raise where single blocks have sizes of their own, as a pruned model's do."""
        value = self.values.get("block_configs")
        rule = (
            "must be absent: all blocks of a kind have the same sizes here, so these are not read"
        )
        self.check(value is None, "block_configs", value, rule)

    def only(self, key: str, *supported: object) -> None:
        value = self.value(key, supported[0])
        names = " or ".join(map(repr, supported))
        known = any(
            value is one or (value == one and type(value) is type(one)) for one in supported
        )
        self.check(known, key, value, f"must be {names}: nothing else is computed here")

    def integer(self, key: str, default: int) -> int:
        value = self.value(key, default)
        valid = type(value) is int and 0 <= value <= MOST_SIZE
        self.check(valid, key, value, f"must be an integer from 0 to {MOST_SIZE}")
        return value

    def token(self, key: str, default: int) -> int:
        """A token id; of a list the first counts, and null means the family's own."""
        value = self.value(key, default)
        if isinstance(value, Sequence) and not isinstance(value, str) and value:
            value = value[0]
        value = default if value is None else value
        valid = type(value) is int and 0 <= value <= MOST_SIZE
        self.check(valid, key, value, "must be a token id or a list of them")
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
            valid = isinstance(letters, str) and 0 < len(letters) <= MOST_LAYERS
            valid = valid and set(letters) <= known
            rule = f"must be a string of the letters M*E-, at most {MOST_LAYERS}"
            self.check(valid, pattern_key, letters, rule)
        if kinds is None:
            return letters
        names = ", ".join(BLOCK_LETTERS)
        valid = isinstance(kinds, list | tuple) and 0 < len(kinds) <= MOST_LAYERS
        self.check(valid, list_key, kinds, f"must be a list of 1 to {MOST_LAYERS} names")
        for index, kind in enumerate(kinds):
            known = isinstance(kind, str) and kind in BLOCK_LETTERS
            self.check(known, f"{list_key}[{index}]", kind, f"must be one of {names}")
        listed = "".join(BLOCK_LETTERS[kind] for kind in kinds)
        self.check(
            letters in (None, listed),
            pattern_key,
            letters,
            f"contradicts {list_key}, which spells {shown(listed)}; give one of them",
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
        low, high = map(float, pair)
        return (low, math.inf if high > _LARGEST_FLOAT32 else high)


def _refuse_other_models(keys: _Keys) -> None:
    """Raise for a key that asks for another computation than this project's."""
    keys.refuse_block_configs()
    for key, supported in NEUTRAL.items():
        keys.only(key, *supported)
    # transformers builds `use_bias` and ignores this key; the family's own code wrote them alike.
    keys.only("mamba_proj_bias", False, keys.boolean("use_bias", False))
    pattern = keys.pattern("hybrid_override_pattern", "layers_block_type") or ""
    if "E" in pattern:
        keys.only("n_shared_experts", 1)
    for key in ("attention_dropout", "hidden_dropout"):
        if value := keys.value(key, 0.0):
            warnings.warn(
                f"HubConfig.{key}={shown(value)} is ignored: nothing is dropped here", stacklevel=4
            )


def _mamba(keys: _Keys) -> dict[str, Any]:
    return dict(
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


def _attention(keys: _Keys) -> dict[str, Any]:
    heads = keys.integer("num_attention_heads", 32)
    alike = keys.value("num_key_value_heads", 8) is None  # null: as many as query heads
    return dict(
        num_heads=heads,
        num_kv_heads=heads if alike else keys.integer("num_key_value_heads", 8),
        head_dim=keys.integer("head_dim", 128),
    )


def _moe(keys: _Keys) -> dict[str, Any]:
    latent = keys.value("moe_latent_size", None)
    return dict(
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


def _mlp(keys: _Keys) -> dict[str, Any]:
    return dict(
        width=keys.integer("intermediate_size", 21_504),
        projection_bias=keys.boolean("mlp_bias", False),
    )


def _mtp(keys: _Keys) -> dict[str, Any] | None:
    depths = keys.value("num_nextn_predict_layers", None)
    if depths is None or keys.integer("num_nextn_predict_layers", 0) == 0:
        return None
    pattern = keys.pattern("mtp_hybrid_override_pattern", "mtp_layers_block_type")
    return dict(pattern=pattern or "*E")


def _read_json(path: pathlib.Path) -> Mapping:
    file = path / "config.json" if path.is_dir() else path
    if not file.exists():
        raise FileNotFoundError(f"from_hf: there is no {file}; name a hub model's directory")
    return read_object(file, "name a hub model's config.json")


def _decoded_float(value: object) -> object:
    """transformers' strict-JSON spelling of an infinity as a float; anything else unchanged."""
    if isinstance(value, Mapping) and set(value) == {"__float__"}:
        names = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}
        return names.get(value["__float__"], value)
    return value


def _plain(value: object) -> object:
    """A value to compare another spelling's with."""
    if isinstance(value, list | tuple):
        return [_decoded_float(entry) for entry in value]
    return _decoded_float(value)


def _is_number(value: object) -> bool:
    return value in (math.inf, -math.inf) or is_finite(value)
