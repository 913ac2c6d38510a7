"""Nemotron 3 Super, the first stage of supervised fine-tuning.

Command:  python train.py --config=configs/sft_super.py --workdir=runs/sft_super \
              --config.init_from=/models/super-base --config.data.tokenizer=/models/super-base \
              --config.data.sources='messages:/data/sft.jsonl'
          Stage two: --config.sft.loss=conversations --config.sft.truncated_budget=0.12 from stage
              one's run, at half the rows.
Hardware: v5p:8x8x4, 256 chips, mesh data=2 and fsdp=128, one row a chip in each micro-batch: 59.0
          of 95 GB a chip as compiled (docs/sharding.md), 32 s a step as estimated. Several
          processes drive it (docs/scale.md): tried with CPUs of one machine. The
          released run has the same tokens a step in 64 rows of 262,144 (stage two: 32 of 524,288).
          Such a row's states do not fit one chip, and rows are not shared among chips yet, so rows
          are 16,384 here and longer conversations are left out.
Expected: not run here. The tests build the model's shapes and pin the batch and the schedule.
Source:   NVIDIA-NeMo/Nemotron's guide to Super's fine-tuning; the numbers of samples are the notes'
          on the report, arXiv:2604.12374: 7 million samples, 80 billion tokens, learning rate 1e-5
          after a warm-up of 30,000 samples, of which a row of 256K tokens holds about 23.
"""

from ml_collections import ConfigDict

from configs import models
from nemotron_jax.config.convert import to_config_dict
from nemotron_jax.config.execution import Execution
from nemotron_jax.config.run import (
    DataConfig,
    LoggingConfig,
    MeshConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
    TrainingConfig,
)
from nemotron_jax.config.sft import SFTConfig

TOKENS_PER_ROW, ROWS = 16_384, 1024
TOTAL_TOKENS, SAMPLES, WARMUP_SAMPLES = 80_000_000_000, 7_000_000, 30_000
SCHEDULE = ScheduleConfig(
    peak_learning_rate=1e-5,
    final_learning_rate=1e-5,
    warmup_tokens=WARMUP_SAMPLES * TOTAL_TOKENS // SAMPLES,
    decay_tokens=0,
    total_tokens=TOTAL_TOKENS,
)


def get_config() -> ConfigDict:
    """The run, open to `--config.` overrides."""
    return to_config_dict(
        RunConfig(
            model=models.super_120b(),
            training=TrainingConfig(
                steps=TOTAL_TOKENS // (ROWS * TOKENS_PER_ROW),
                schedule=SCHEDULE,
                optimizer=OptimizerConfig(beta1=0.9, beta2=0.95, weight_decay=0.1),
                mtp_depths=2,
                mtp_loss_scale=0.3,
                micro_batches=4,
            ),
            mesh=MeshConfig(data=2, fsdp=128),
            data=DataConfig(
                sources=("messages:/data/sft.jsonl",),
                tokenizer="/models/super-base",
                sequence_length=TOKENS_PER_ROW,
                batch_size=ROWS,
                held_out_fraction=0.0005,
            ),
            sft=SFTConfig(loss="tokens", bad_rows="drop", reasoning_off=0.03),
            execution=Execution(compute_dtype="bfloat16", remat="full"),
            logging=LoggingConfig(evaluate_every=200, checkpoint_every=200, sample_tokens=0),
            stage="sft",
            init_from="/models/super-base",
        )
    )
