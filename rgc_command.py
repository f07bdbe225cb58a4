"""What does the command ``rgc`` start? The command line, in a way that Ctrl-C is one line even while PyTorch is loaded.

It stands outside of the package, because importing anything of that takes the seconds in question.
"""

from __future__ import annotations

import os
import signal
from types import FrameType


def main() -> None:
    """The console script; exit status as in `rgc.cli`."""
    signal.signal(signal.SIGINT, _leave)
    from rgc import cli

    cli.main()  # which has a handler of its own


def _leave(signal_number: int, frame: FrameType | None) -> None:
    """There is nothing to clean up yet, and an exception amid imports would come out as another one, or as many."""
    os.write(2, b"rgc: interrupted\n")
    os._exit(130)


if __name__ == "__main__":
    main()
