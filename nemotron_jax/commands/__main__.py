"""`python -m nemotron_jax.commands COMMAND …`, where nemotron-jax is not on the path."""

import sys

from nemotron_jax.commands import main

if __name__ == "__main__":
    sys.exit(main())
