"""Says which tier this machine can give: `python -m nemotron_jax.environments.sandbox`."""

import sys

from nemotron_jax.environments.sandbox import Sandbox, SandboxUnavailable
from nemotron_jax.environments.sandbox.tiers import HELP


def main() -> int:
    """Print the tier and the way to a better one; the exit status is 1 where there is none."""
    try:
        with Sandbox() as sandbox:
            print(sandbox.describe())
            if sandbox.tier != "full":
                print(f"For the full tier: {HELP}.")
    except SandboxUnavailable as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
