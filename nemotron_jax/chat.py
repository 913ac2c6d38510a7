"""The command `python -m nemotron_jax.chat`; see `terminal`. `nemotron_jax.chat` is a function of
the facade, so nothing imports this module."""

import sys

from nemotron_jax.terminal import main

if __name__ == "__main__":
    sys.exit(main())
