"""Evaluate a model; `python eval.py --help` says how. All of it is nemotron_jax.commands.eval."""

from nemotron_jax.commands.eval import run

if __name__ == "__main__":
    run()
