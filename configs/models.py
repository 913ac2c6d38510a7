"""The published models of the Nemotron 3 family, and the tiny one that trains on a CPU.

Sizes are those of the hub's config.json files; `init_std` is what training used (the hub files say
0.02). Sources: the reports of Nemotron 3 Super (arXiv:2604.12374) and Nano (arXiv:2512.20848), the
recipes of Megatron-LM and Megatron-Bridge.
"""

from ml_collections import ConfigDict

from nemotron_jax.config.convert import to_config_dict
from nemotron_jax.config.execution import Execution
from nemotron_jax.config.model import (
    AttentionConfig,
    MambaConfig,
    MLPConfig,
    ModelConfig,
    MoEConfig,
    MTPConfig,
)
from nemotron_jax.config.run import (
    DataConfig,
    MeshConfig,
    RunConfig,
    ScheduleConfig,
    TrainingConfig,
)

SUPER_PATTERN = (
    "MEMEMEM*EMEMEMEM*EMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEM*EMEMEMEME"
)
NANO_PATTERN = "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"
ULTRA_PATTERN = (
    "MEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEM*EMEMEM*EMEMEMEM*"
    "EMEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"
)


def get_config(name: str) -> ConfigDict:
    """A run of one of these models on 64 devices: for what asks of the model alone, such as
    `plan --config=configs/models.py:ultra_550b --stage=decode --estimate`.

    Raises ValueError for a name that no model has.
    """
    models = (super_120b, nano_30b, ultra_550b, tiny, agent, speculative, kernel_tiny)
    built = {model.__name__: model for model in models}
    if name not in built:
        raise ValueError(f"configs/models.py:{name}: must be one of {', '.join(built)}")
    schedule = ScheduleConfig(
        peak_learning_rate=1e-3,
        final_learning_rate=1e-5,
        warmup_tokens=0,
        decay_tokens=0,
        total_tokens=1_000_000_000_000,
    )
    return to_config_dict(
        RunConfig(
            model=built[name](),
            training=TrainingConfig(steps=1, schedule=schedule, mtp_depths=0),
            mesh=MeshConfig(fsdp=64),
            data=DataConfig(sources=("shards:/data/pretraining",), batch_size=64),
            execution=Execution(compute_dtype="bfloat16"),
        )
    )


def super_120b() -> ModelConfig:
    """Nemotron 3 Super: 120.7 billion parameters and an MTP block of 2.9 billion; 12.2 active."""
    return ModelConfig(
        vocab_size=131_072,
        width=4096,
        pattern=SUPER_PATTERN,
        mamba=MambaConfig(num_heads=128, head_dim=64, state_size=128, num_groups=8),
        attention=AttentionConfig(num_heads=32, num_kv_heads=2, head_dim=128),
        moe=MoEConfig(
            num_experts=512,
            experts_per_token=22,
            expert_width=2688,
            shared_width=5376,
            latent_width=1024,
            weight_scale=5.0,
        ),
        mtp=MTPConfig(),
        init_std=0.014,
    )


def nano_30b() -> ModelConfig:
    """Nemotron 3 Nano: 31.6 billion parameters, experts at full width, no MTP."""
    return ModelConfig(
        vocab_size=131_072,
        width=2688,
        pattern=NANO_PATTERN,
        mamba=MambaConfig(num_heads=64, head_dim=64, state_size=128, num_groups=8),
        attention=AttentionConfig(num_heads=32, num_kv_heads=2, head_dim=128),
        moe=MoEConfig(
            num_experts=128,
            experts_per_token=6,
            expert_width=1856,
            shared_width=3712,
            weight_scale=2.5,
        ),
        init_std=0.0173,
    )


def ultra_550b() -> ModelConfig:
    """Nemotron 3 Ultra: 549.3 billion parameters and an MTP block of 11.2 billion."""
    return ModelConfig(
        vocab_size=131_072,
        width=8192,
        pattern=ULTRA_PATTERN,
        mamba=MambaConfig(num_heads=256, head_dim=64, state_size=128, num_groups=8),
        attention=AttentionConfig(num_heads=64, num_kv_heads=2, head_dim=128),
        moe=MoEConfig(
            num_experts=512,
            experts_per_token=22,
            expert_width=5120,
            shared_width=10_240,
            latent_width=2048,
            weight_scale=5.0,
        ),
        mtp=MTPConfig(),
        init_std=0.0099,
    )


def tiny() -> ModelConfig:
    """Super's architecture in small: every kind of its layers, LatentMoE, MTP."""
    return ModelConfig(
        vocab_size=4096,
        width=128,
        pattern="MEM*EME",
        mamba=MambaConfig(num_heads=8, head_dim=32, state_size=32, num_groups=2, chunk=64),
        attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=32),
        moe=MoEConfig(
            num_experts=16,
            experts_per_token=4,
            expert_width=128,
            shared_width=256,
            latent_width=64,
            weight_scale=2.0,
        ),
        mtp=MTPConfig(),
        init_std=0.079,  # Super's 0.014 scaled by the square root of the widths' ratio
    )


def agent() -> ModelConfig:
    """Learns to call tools in minutes on a CPU: early attention copies numbers within 200 steps.

    With one attention layer after three others (`tiny`) 350 steps did not teach copying.
    """
    return ModelConfig(
        vocab_size=896,
        width=128,
        pattern="M*M*E",
        mamba=MambaConfig(num_heads=4, head_dim=32, state_size=16, num_groups=1, chunk=64),
        attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=32),
        moe=MoEConfig(
            num_experts=8,
            experts_per_token=2,
            expert_width=64,
            shared_width=128,
            latent_width=64,
            weight_scale=2.0,
        ),
        init_std=0.079,
    )


def speculative() -> ModelConfig:
    """Deep and narrow: a draft costs 0.08 of a step, by the parameters that each reads.

    Eight of its 22 layers are dense. With a vocabulary of 512 the head is small beside the layers,
    as it is in a large model.
    """
    return ModelConfig(
        vocab_size=512,
        width=256,
        pattern="M-MEM-M*-M-MEM-M*-M-ME",
        mamba=MambaConfig(num_heads=8, head_dim=64, state_size=16, num_groups=2, chunk=64),
        attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=32),
        moe=MoEConfig(
            num_experts=8,
            experts_per_token=2,
            expert_width=128,
            shared_width=256,
            latent_width=64,
            weight_scale=2.0,
        ),
        mlp=MLPConfig(width=512),
        mtp=MTPConfig(),
        init_std=0.056,  # Super's 0.014 scaled by the square root of the widths' ratio
    )


def kernel_tiny() -> ModelConfig:
    """The smallest model whose scan, experts and attention the TPU kernels take: published head and
    state sizes, and matrices that fill a matrix unit."""
    return ModelConfig(
        vocab_size=128,
        width=128,
        pattern="M*E",
        mamba=MambaConfig(num_heads=4, head_dim=64, state_size=128, num_groups=1),
        attention=AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=128),
        moe=MoEConfig(
            num_experts=4,
            experts_per_token=2,
            expert_width=128,
            shared_width=128,
            latent_width=128,
            weight_scale=2.0,
        ),
        init_std=0.079,
    )
