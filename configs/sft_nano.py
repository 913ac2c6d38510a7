"""Nemotron 3 Nano fine-tuned by adapters: rank 32 on every linear of the trunk that PEFT loads.

Command:  python train.py --config=configs/sft_nano.py --workdir=runs/sft_nano \
              --config.init_from=/models/nano --config.data.tokenizer=/models/nano \
              --config.data.sources='messages:/data/own.jsonl'
Hardware: v6e:4x4, 16 chips, mesh fsdp=16, one row a chip: 18.3 of 32 GB a chip as compiled with
          a base in float32 (docs/posttraining.md, which has eight chips too), 1.2 s a step as
          estimated. The base in bfloat16 takes 4 GB a chip less.
Expected: not run here. The tests build the model's shapes and pin the adapters.
Source:   Megatron-Bridge's LoRA recipes for this family: rank 32, alpha 32, learning rate 1e-4.
"""

from ml_collections import ConfigDict

from configs import models
from nemotron_jax.config.convert import to_config_dict
from nemotron_jax.config.execution import Execution
from nemotron_jax.config.lora import LoRAConfig
from nemotron_jax.config.run import (
    DataConfig,
    LoggingConfig,
    MeshConfig,
    RunConfig,
    ScheduleConfig,
    TrainingConfig,
)
from nemotron_jax.config.sft import SFTConfig

STEPS, ROWS, TOKENS_PER_ROW = 1000, 16, 8192
STEP_TOKENS = ROWS * TOKENS_PER_ROW


def get_config() -> ConfigDict:
    """The run, open to `--config.` overrides."""
    schedule = ScheduleConfig(
        peak_learning_rate=1e-4,
        final_learning_rate=1e-5,
        warmup_tokens=50 * STEP_TOKENS,
        decay_tokens=500 * STEP_TOKENS,
        total_tokens=STEPS * STEP_TOKENS,
    )
    return to_config_dict(
        RunConfig(
            model=models.nano_30b(),
            training=TrainingConfig(steps=STEPS, schedule=schedule, mtp_depths=0, trains="lora"),
            data=DataConfig(
                sources=("messages:/data/own.jsonl",),
                tokenizer="/models/nano",
                sequence_length=TOKENS_PER_ROW,
                batch_size=ROWS,
            ),
            sft=SFTConfig(bad_rows="drop"),
            lora=LoRAConfig(rank=32, alpha=32.0),
            mesh=MeshConfig(fsdp=16),
            execution=Execution(compute_dtype="bfloat16", remat="full"),
            logging=LoggingConfig(evaluate_every=100, checkpoint_every=100, sample_tokens=0),
            stage="sft",
            init_from="/models/nano",
        )
    )
