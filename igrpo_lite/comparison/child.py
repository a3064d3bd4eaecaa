"""One run of a comparison, in a process of its own: ``python -m igrpo_lite.comparison.child``.

Its settings come as one line of JSON on standard input. The end of that input, be it closed or its writer dead, asks
the run to save and stop, as Ctrl-C does; so no run is left behind by a comparison that was killed.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading

import igrpo_lite
from igrpo_lite.errors import UserError

MISTAKE = 2
"""Exit code of a run that met something the user can mend; its output names it in lines that begin with ``error:``."""


def main() -> int:
    """Run it; returns the exit code."""
    settings = json.loads(sys.stdin.readline())
    threading.Thread(target=_watch, daemon=True).start()
    try:
        igrpo_lite.train(**settings)
    except UserError as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        return MISTAKE
    return 0


def _watch() -> None:
    # os.read, since a thread inside sys.stdin holds a lock that the interpreter wants when it ends.
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGINT)


if __name__ == "__main__":
    sys.exit(main())
