"""`python -m grail`, what torchrun starts, and the console script."""

from __future__ import annotations

import sys

from .errors import INTERRUPTED


def main() -> None:
    """The command line, of which an interruption is told in one sentence also while it is only being imported."""
    try:
        from .cli import main as run

        run()
    except KeyboardInterrupt:
        sentence, code = INTERRUPTED
        sys.stderr.write(f"grail: {sentence}\n")
        sys.exit(code)


if __name__ == "__main__":
    main()
