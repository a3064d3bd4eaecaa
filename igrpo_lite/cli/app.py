"""The verbs under one name, and how their errors reach the user: one line each, no traceback, a stated exit code."""

from __future__ import annotations

import errno
import io
import select
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import cast

from cyclopts import App, CycloptsError

from igrpo_lite import __version__
from igrpo_lite.cli.flags import complaints, shortened
from igrpo_lite.errors import UserError

INTERRUPTED = 130
MISTAKE = 2


_SETTINGS = ("train", "eval", "compare", "check", "scan", "show-prompt", "plan")
"""Verbs whose flags are settings, more than fit a screen."""


def build(helped: str | None = None) -> App:
    """The command line as a cyclopts application. ``helped``: just this verb, for a help with the settings that matter
    most."""
    app = App(
        name="igrpo-lite",
        help="Train a language model with iGRPO or GRPO and LoRA, on one GPU or on a CPU.",
        help_epilogue="First try: igrpo-lite train (the bundled tiny model, on a CPU, in about a minute).",
        version=__version__,
        version_flags="--version",
        help_format="plaintext",
    )
    if helped is not None:
        more = f"All settings: igrpo-lite {helped} --help-all"
        app.command(shortened(_verb(helped)), name=helped, help_epilogue=more)
        return app
    from igrpo_lite.cli import data, doctor, export, gpus, models, recipes, verify

    for name in _SETTINGS:
        app.command(_verb(name), name=name, help_epilogue="")
    app.command(export.export, name="export", help_epilogue="")
    app.command(models.models, name="models", help_epilogue="")
    app.command(gpus.gpus, name="gpus", help_epilogue="")
    app.command(recipes.app())
    app.command(doctor.doctor, name="doctor", help_epilogue="")
    app.command(data.app())
    app.command(verify.verify, name="verify", help_epilogue="")
    return app


def _verb(name: str) -> Callable[..., int | None]:
    """A verb with its flags; the modules of the others are not imported, so that help comes at once."""
    module = import_module(f"igrpo_lite.cli.{'evaluate' if name == 'eval' else name.replace('-', '_')}")
    return cast("Callable[..., int | None]", module.verb())


def run(tokens: Sequence[str] | None = None) -> int:
    """Interpret the command line and do what it says; returns the exit code."""
    words = [_dashed(word) for word in (sys.argv[1:] if tokens is None else tokens)]
    asks = bool(words) and words[0] in _SETTINGS and not {"--help", "-h"}.isdisjoint(words)
    app = build(words[0] if asks else None)
    words = ["--help" if word == "--help-all" else word for word in words]
    try:
        command, bound, unused, _ = app.parse_known_args(words)
        if unused:
            _report(complaints(app, words, unused, bound.arguments))
            return MISTAKE
        code = command(*bound.args, **bound.kwargs)
        sys.stdout.flush()
        return code or 0
    except CycloptsError as error:
        error.verbose = False
        _report([" ".join(str(error).split())])
        return MISTAKE
    except UserError as error:
        _report(error.problems)
        return MISTAKE
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last checkpoint, if there is one", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        if not _reader_left():
            raise
        return 0
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        _report([f"{error.filename or 'output'}: {error.strerror}; make room and run the same command again"])
        _drop_output()
        return MISTAKE


def _dashed(word: str) -> str:
    """``--max_steps`` is as good as ``--max-steps``: other trainers write their flags with underscores."""
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if word.startswith("--") else word


def _reader_left() -> bool:
    """Whether the program that our output was piped to, like ``head``, has read enough."""
    if not hasattr(select, "poll"):
        return False
    output = select.poll()
    output.register(1)
    if not any(event & select.POLLERR for _, event in output.poll(0)):
        return False
    _drop_output()
    return True


def _drop_output() -> None:
    sys.stdout = io.StringIO()  # or Python complains when it flushes at exit


def _report(problems: Sequence[str]) -> None:
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
