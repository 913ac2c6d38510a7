"""Nemotron 3 Super, pre-training phase 2: 5 T tokens of high quality, while the rate decays.

Command:  python train.py --config=configs/pretrain_super_phase2.py --workdir=runs/super_phase2 \
              --config.data.sources='shards:/data/phase2'
Hardware: v5p:8x8x4, as phase 1: 49 s a step as estimated.
Data:     token shards, made once: docs/data.md.
Expected: not run here. It continues the last state of phase 1 and counts steps from phase 1's
          start: step 794,728 has the peak learning rate, step 993,411 the final one, 4.5e-6.
Source:   Nemotron 3 Super report, arXiv:2604.12374.
"""

from ml_collections import ConfigDict

from configs import pretrain_super_phase1
from nemotron_jax.config.convert import to_config_dict


def get_config() -> ConfigDict:
    """Phase 1's run with other sources and the end of the schedule as its last step."""
    config = pretrain_super_phase1.get_config()
    config.data.sources = ("shards:/data/phase2",)
    config.training.steps = 993_411
    # The schedule is that of both phases and does not stretch with these steps.
    config.training.schedule = to_config_dict(pretrain_super_phase1.SCHEDULE)
    config.logging.merge_window = (
        10  # 500 B tokens at 50 B a checkpoint, the released base's window
    )
    return config
