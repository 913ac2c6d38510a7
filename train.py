"""Train a model; `python train.py --help` says how. All of it is nemotron_jax.commands.train."""

from nemotron_jax.commands.train import start, train

__all__ = ["train"]

if __name__ == "__main__":
    start()
