"""The whole job on a toy FLUX that comes with the package: install, train a LoRA, draw with it.

    python3 scripts/quickstart.py [--output DIR]

Makes the environment on the first start. Everything after the script's name goes to `flux-ft quickstart`.
"""

from __future__ import annotations

import os
import sys

from _environment import child_environment, ensure_environment, run_child


def main() -> int:
    """The exit code of `flux-ft quickstart`."""
    python = ensure_environment()
    return run_child([str(python), "-m", "flux_ft", "quickstart", *sys.argv[1:]], child_environment(os.environ, {}))


if __name__ == "__main__":
    sys.exit(main())
