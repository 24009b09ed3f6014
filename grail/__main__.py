"""`python -m grail`, what torchrun starts, and the console script."""

from __future__ import annotations

import sys


def main() -> None:
    """The command line, of which an interruption is told in one sentence also while it is only being imported."""
    try:
        from .cli import main as run

        run()
    except KeyboardInterrupt:
        sys.stderr.write("grail: interrupted; nothing new was kept\n")
        sys.exit(130)


if __name__ == "__main__":
    main()
