"""A ModelConfig written as a hub `config.json` of the Nemotron-H family."""

import math

from nemotron_jax.config.checks import check_value
from nemotron_jax.config.hub import MODEL_TYPE
from nemotron_jax.config.model import MambaConfig, ModelConfig, MoEConfig

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


def to_hf(config: ModelConfig, *, dtype: str | None = None) -> dict:
    """The hub `config.json` of a model, as a dictionary that is strict JSON.

    Blocks are written as `hybrid_override_pattern`. `time_step_limit` is left out when there is no
    limit, since its absence means so and JSON has no infinity. `dtype` (as "bfloat16") is written
    as `torch_dtype` when given. `ModelConfig.from_hf` returns the same config, provided that every
    part is used by some block. Raises ValueError when MLP and MoE disagree on biases: the hub has
    one key.
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
    bias = config.mlp and config.mlp.projection_bias
    rule = "must equal moe.projection_bias: the hub has one key, mlp_bias, for both"
    check_value("ModelConfig", "mlp.projection_bias", bias, len(biases) <= 1, rule)
    keys["mlp_bias"] = biases == {True}
    return keys


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
