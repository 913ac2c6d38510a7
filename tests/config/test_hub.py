"""Hub configurations in all spellings give one ModelConfig; what is written reads back the same."""

import json
import math
import pathlib
import warnings

import pytest

from configs import models
from nemotron_jax.config.hub_writer import to_hf
from nemotron_jax.config.model import MLPConfig, ModelConfig

PUBLIC = pathlib.Path(__file__).parents[1] / "golden" / "public"
SETS = sorted(path.name for path in PUBLIC.iterdir() if path.is_dir())
PRESETS = (models.super_120b, models.nano_30b, models.ultra_550b, models.tiny)


def hub_keys(**changes: object) -> dict:
    return {**to_hf(models.tiny()), **changes}


@pytest.mark.parametrize("name", SETS)
def test_every_spelling_gives_the_same_model(name: str) -> None:
    written = ModelConfig.from_hf(PUBLIC / name / "checkpoint")
    for file in (PUBLIC / name).glob("config_hub_*.json"):
        assert ModelConfig.from_hf(str(file)) == written
        assert ModelConfig.from_hf(json.loads(file.read_text())) == written
    assert ModelConfig.from_hf(PUBLIC / name / "checkpoint" / "config.json") == written


def test_values_of_the_latent_checkpoint_arrive_in_their_fields() -> None:
    config = ModelConfig.from_hf(PUBLIC / "hybrid_moe_latent" / "checkpoint")
    assert (config.vocab_size, config.width, config.pattern) == (192, 64, "MEM*EME")
    assert (config.mamba.num_heads, config.mamba.head_dim) == (8, 12)
    assert (config.mamba.state_size, config.mamba.num_groups, config.mamba.chunk) == (16, 2, 16)
    assert (config.attention.num_heads, config.attention.num_kv_heads) == (4, 2)
    assert config.attention.head_dim == 24
    assert (config.moe.num_experts, config.moe.experts_per_token) == (8, 3)
    assert (config.moe.expert_width, config.moe.shared_width, config.moe.latent_width) == (
        24,
        56,
        32,
    )
    assert config.moe.weight_scale == 2.5 and config.moe.normalize_weights
    assert config.mtp.pattern == "*E" and config.mlp is None and config.max_length == 512


def test_parts_that_no_block_uses_are_left_out() -> None:
    dense = ModelConfig.from_hf(PUBLIC / "dense" / "checkpoint")
    assert dense.moe is None and dense.mtp is None and dense.mlp == MLPConfig(width=112)
    assert ModelConfig.from_hf(PUBLIC / "dt_limit" / "checkpoint").mlp is None


def test_the_mtp_pattern_alone_can_need_a_part() -> None:
    config = ModelConfig.from_hf({"hybrid_override_pattern": "M", "num_nextn_predict_layers": 3})
    assert config.mtp.pattern == "*E"
    assert config.attention is not None and config.moe is not None and config.mlp is None


@pytest.mark.parametrize("build", PRESETS)
def test_a_preset_reads_back_from_its_own_hub_keys(build) -> None:
    strict = json.dumps(to_hf(build(), dtype="bfloat16"), allow_nan=False)
    assert ModelConfig.from_hf(json.loads(strict)) == build()


@pytest.mark.parametrize("name", SETS)
def test_a_published_config_reads_back_from_its_own_hub_keys(name: str) -> None:
    config = ModelConfig.from_hf(PUBLIC / name / "checkpoint")
    assert ModelConfig.from_hf(json.loads(json.dumps(to_hf(config), allow_nan=False))) == config


def test_hub_keys_of_super_are_the_published_ones() -> None:
    keys = to_hf(models.super_120b())
    published = {
        "model_type": "nemotron_h",
        "hidden_size": 4096,
        "num_hidden_layers": 88,
        "vocab_size": 131_072,
        "num_attention_heads": 32,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "mamba_num_heads": 128,
        "mamba_head_dim": 64,
        "ssm_state_size": 128,
        "n_groups": 8,
        "conv_kernel": 4,
        "chunk_size": 128,
        "n_routed_experts": 512,
        "num_experts_per_tok": 22,
        "moe_latent_size": 1024,
        "moe_intermediate_size": 2688,
        "intermediate_size": 2688,
        "moe_shared_expert_intermediate_size": 5376,
        "routed_scaling_factor": 5.0,
        "num_nextn_predict_layers": 1,
        "mtp_hybrid_override_pattern": "*E",
        "use_conv_bias": True,
        "mlp_bias": False,
    }
    assert {key: keys[key] for key in published} == published
    assert "time_step_limit" not in keys


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("absent", (0.0, math.inf)),
        (None, (0.0, math.inf)),
        ([0.0, math.inf], (0.0, math.inf)),
        ([0.0, {"__float__": "Infinity"}], (0.0, math.inf)),
        ([0, 1], (0.0, 1.0)),
        ([0.02, 0.2], (0.02, 0.2)),
        ([0.0, 1e308], (0.0, math.inf)),
    ],
)
def test_time_step_limits(written: object, expected: tuple) -> None:
    keys = hub_keys() if written == "absent" else hub_keys(time_step_limit=written)
    assert ModelConfig.from_hf(keys).mamba.time_step_limit == expected
    assert ModelConfig.from_hf(to_hf(ModelConfig.from_hf(keys))).mamba.time_step_limit == expected


def test_a_lower_time_step_limit_alone_is_written_as_strict_json() -> None:
    config = ModelConfig.from_hf(hub_keys(time_step_limit=[0.01, math.inf]))
    text = json.dumps(to_hf(config), allow_nan=False)
    assert ModelConfig.from_hf(json.loads(text)) == config


def test_keys_without_effect_change_nothing() -> None:
    decoys = {
        "rope_theta": 1e6,
        "expand": 7,
        "moe_shared_expert_overlap": True,
        "torch_dtype": "bfloat16",
        "dtype": "float16",
        "quantization_config": {"quant_method": "modelopt"},
    }
    assert ModelConfig.from_hf(hub_keys(**decoys)) == models.tiny()


def test_absent_keys_take_the_family_s_defaults() -> None:
    config = ModelConfig.from_hf({"hybrid_override_pattern": "M*E-"})
    assert config.mlp.width == 21_504
    assert (config.vocab_size, config.width, config.init_std) == (131_072, 4096, 0.02)
    assert (config.mamba.num_heads, config.mamba.head_dim) == (128, 64)
    assert (config.attention.num_heads, config.attention.num_kv_heads) == (32, 8)
    assert (config.moe.num_experts, config.moe.experts_per_token) == (8, 2)
    assert (config.moe.expert_width, config.moe.weight_scale) == (7688, 1.0)
    assert config.mtp is None and config.norm_epsilon == 1e-5


def test_either_spelling_of_epsilon_and_biases() -> None:
    keys = hub_keys(
        norm_eps=1e-3, mamba_proj_bias=True, use_bias=True, mlp_bias=True, use_conv_bias=False
    )
    del keys["layer_norm_epsilon"]
    config = ModelConfig.from_hf(keys)
    assert config.norm_epsilon == 1e-3
    assert config.mamba.projection_bias and config.moe.projection_bias
    assert not config.mamba.conv_bias
    assert ModelConfig.from_hf(to_hf(config)) == config


@pytest.mark.parametrize(
    ("key", "spelling", "value"),
    [
        ("n_groups", "mamba_n_groups", 1),
        ("conv_kernel", "mamba_d_conv", 3),
        ("chunk_size", "mamba_chunk_size", 32),
        ("use_conv_bias", "mamba_conv_bias", False),
        ("time_step_min", "mamba_dt_min", 0.002),
        ("time_step_max", "mamba_dt_max", 0.2),
        ("time_step_floor", "mamba_dt_init_floor", 0.01),
        ("time_step_limit", "mamba_dt_limit", [0.0, 0.5]),
        ("n_routed_experts", "num_local_experts", 32),
        ("head_dim", "attention_head_dim", 24),
        ("layer_norm_epsilon", "rms_norm_eps", 1e-3),
    ],
)
def test_every_spelling_of_a_key_is_read(key: str, spelling: str, value: object) -> None:
    keys = hub_keys()
    assert keys.pop("norm_eps") == keys.pop(key, None) or key != "layer_norm_epsilon"
    read = ModelConfig.from_hf({**keys, spelling: value})
    assert read == ModelConfig.from_hf({**keys, key: value}) != models.tiny()
    assert ModelConfig.from_hf({**keys, key: None, spelling: value}) == read


def test_layer_types_are_the_blocks() -> None:
    kinds = ["linear_attention", "moe", "full_attention", "mlp"]
    assert ModelConfig.from_hf({"layer_types": kinds}).pattern == "ME*-"


def test_null_key_value_heads_are_as_many_as_query_heads() -> None:
    config = ModelConfig.from_hf(hub_keys(num_key_value_heads=None))
    assert config.attention.num_kv_heads == config.attention.num_heads


def test_dropout_is_told_to_be_ignored() -> None:
    with pytest.warns(UserWarning, match="attention_dropout=0.1 is ignored"):
        assert ModelConfig.from_hf(hub_keys(attention_dropout=0.1)) == models.tiny()


def test_a_list_of_stop_tokens_gives_its_first() -> None:
    assert ModelConfig.from_hf(hub_keys(eos_token_id=[2, 11])).eos_token == 2
    assert ModelConfig.from_hf(hub_keys(pad_token_id=None)).pad_token == 0


def test_a_conflicting_number_of_layers_warns_and_the_blocks_decide() -> None:
    with pytest.warns(UserWarning, match="num_hidden_layers=88"):
        assert ModelConfig.from_hf(hub_keys(num_hidden_layers=88)) == models.tiny()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ModelConfig.from_hf(hub_keys())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hybrid_override_pattern": None}, "hybrid_override_pattern=None"),
        ({"hybrid_override_pattern": "MEX"}, "hybrid_override_pattern='MEX'"),
        ({"hybrid_override_pattern": ""}, "hybrid_override_pattern=''"),
        ({"hybrid_override_pattern": None, "layers_block_type": ["mamba", "gru"]}, r"\[1\]='gru'"),
        ({"hybrid_override_pattern": None, "layers_block_type": []}, r"layers_block_type=\[\]"),
        ({"layers_block_type": ["mamba"]}, "contradicts layers_block_type"),
        ({"model_type": "llama"}, "model_type='llama'.*nemotron_h"),
        ({"hidden_size": "128"}, "hidden_size='128'.*integer"),
        ({"hidden_size": True}, "hidden_size=True"),
        ({"hidden_size": 128.0}, "hidden_size=128.0"),
        ({"hidden_size": None}, "hidden_size=None"),
        ({"hidden_size": 0}, "width=0"),
        ({"mlp_bias": 1}, "mlp_bias=1.*true or false"),
        ({"mlp_hidden_act": "silu"}, "mlp_hidden_act='silu'.*relu2"),
        ({"layer_norm_epsilon": math.nan}, "layer_norm_epsilon=nan"),
        ({"routed_scaling_factor": "5"}, "routed_scaling_factor='5'"),
        ({"time_step_limit": [0.1]}, "time_step_limit"),
        ({"time_step_limit": [0.2, 0.1]}, "time_step_limit"),
        ({"moe_latent_size": 1.5}, "moe_latent_size=1.5"),
        ({"num_nextn_predict_layers": -1}, "num_nextn_predict_layers=-1"),
        ({"mtp_hybrid_override_pattern": "ME"}, "MTPConfig.pattern='ME'"),
        ({"num_experts_per_tok": 17}, "experts_per_token=17"),
        ({"sliding_window": 4096}, "sliding_window=4096.*must be None"),
        ({"residual_in_fp32": True}, "residual_in_fp32=True.*must be False"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"mamba_proj_bias": True}, "mamba_proj_bias=True"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings=True"),
        ({"n_shared_experts": 2}, "n_shared_experts=2.*must be 1"),
        ({"attention_head_dim": 7}, "head_dim=.*contradicts attention_head_dim=7"),
        ({"mamba_n_groups": 4}, "n_groups=.*contradicts mamba_n_groups=4"),
        ({"num_local_experts": 3}, "n_routed_experts=.*contradicts num_local_experts=3"),
        ({"norm_eps": 1e-6}, "layer_norm_epsilon=1e-05.*contradicts norm_eps=1e-06"),
    ],
)
def test_a_bad_value_is_named(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_hf(hub_keys(**changes))


def test_missing_blocks_are_named() -> None:
    with pytest.raises(ValueError, match="hybrid_override_pattern=None.*layers_block_type"):
        ModelConfig.from_hf({"hidden_size": 64})


def test_a_broken_file_is_named(tmp_path: pathlib.Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json cannot be read"):
        ModelConfig.from_hf(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="JSON object"):
        ModelConfig.from_hf(tmp_path)
    with pytest.raises(FileNotFoundError, match="absent.json"):
        ModelConfig.from_hf(tmp_path / "absent.json")


def test_biases_that_the_hub_cannot_tell_apart_are_refused() -> None:
    config = ModelConfig.from_hf(
        {"hybrid_override_pattern": "E-", "intermediate_size": 8, "mlp_bias": True}
    )
    mixed = ModelConfig(vocab_size=8, width=8, pattern="E-", moe=config.moe, mlp=MLPConfig(width=8))
    with pytest.raises(ValueError, match="mlp_bias"):
        to_hf(mixed)
