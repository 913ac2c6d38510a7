"""The tiny run of pretrain_tiny.py in emulated NVFP4, by the recipe of Nemotron 3 Super.

Command:  python train.py --config=configs/pretrain_tiny_nvfp4.py --workdir=runs/tiny_nvfp4
Hardware: a CPU; see docs/precision.md for the time beside float32.
Expected: not compared with pretrain_tiny.py yet; 30 steps of it ran.
"""

from ml_collections import ConfigDict

from configs import pretrain_tiny
from nemotron_jax.config.convert import to_config_dict
from nemotron_jax.config.precision import nemotron3_nvfp4

LAST_LAYERS_HIGH = 1  # 15 % of the 7 layers


def get_config() -> ConfigDict:
    """The float32 run with quantised matmuls."""
    config = pretrain_tiny.get_config()
    config.execution.precision = to_config_dict(nemotron3_nvfp4(LAST_LAYERS_HIGH))
    return config
