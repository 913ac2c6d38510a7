"""The command `nemotron-jax COMMAND …`: every front door under one name, each what its module is.

`nemotron-jax chat --checkpoint=DIR` does what `python -m nemotron_jax.chat --checkpoint=DIR` does.
"""

import runpy
import sys

COMMANDS = {
    "train": "nemotron_jax.commands.train",
    "eval": "nemotron_jax.commands.eval",
    "chat": "nemotron_jax.chat",
    "serve": "nemotron_jax.serve",
    "plan": "nemotron_jax.plan",
    "quantize": "nemotron_jax.quantize",
    "environments": "nemotron_jax.environments",
    "tokenize": "nemotron_jax.data.tokenize",
    "config": "nemotron_jax.config",
}
_WHAT = {
    "train": "train a model: --config=NAME --workdir=DIR",
    "eval": "evaluate one: --checkpoint=DIR --suites=perplexity --output=DIR",
    "chat": "talk to one: --checkpoint=DIR",
    "serve": "serve one to OpenAI clients: --checkpoint=DIR",
    "plan": "what a run takes on other devices: --config=NAME --target=all --estimate",
    "quantize": "store a model in 4 or 8 bits: --checkpoint=DIR --output=DIR",
    "environments": "tasks with verified rewards: --list",
    "tokenize": "make token shards of text: --sources=… --output=DIR",
    "config": "every field of a run's configuration",
}


def main() -> int:
    """Run the command that the first argument names, with the arguments that follow it."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help", "help"):
        print("usage: nemotron-jax COMMAND --flag=value …\n")
        print("\n".join(f"  {command:<13} {what}" for command, what in _WHAT.items()))
        print("\nnemotron-jax COMMAND --help lists a command's flags.")
        return 0
    if name not in COMMANDS:
        print(
            f"nemotron-jax: {name!r} is no command; choose one of {', '.join(COMMANDS)}",
            file=sys.stderr,
        )
        return 2
    del sys.argv[1]
    runpy.run_module(COMMANDS[name], run_name="__main__", alter_sys=True)
    return 0
