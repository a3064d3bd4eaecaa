"""iGRPO (arXiv 2602.09000) and GRPO with LoRA on one GPU, or on a CPU with a tiny bundled model.

In a notebook::

    import igrpo_lite

    summary = igrpo_lite.train(model="tiny", max_steps=5)

Importing the package imports neither torch nor transformers; these are loaded when work begins.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from igrpo_lite.answers.answers import Verdict
    from igrpo_lite.config import RunConfig
    from igrpo_lite.config.resolve import resolve

__version__ = "0.1.0"
__all__ = ["RunConfig", "__version__", "compare", "resolve", "train", "verify"]


def train(**settings: Any) -> dict[str, Any]:
    """Train with the given settings (see docs/config.md) and return the summary of the run.

    Raises :class:`igrpo_lite.errors.ConfigError` with every setting that is wrong.
    """
    from igrpo_lite.config.resolve import examine
    from igrpo_lite.errors import ConfigError
    from igrpo_lite.inputs import input_findings

    config, findings = examine(settings)
    findings += input_findings(config)
    if findings:
        raise ConfigError(findings)
    from igrpo_lite.training import train as start

    return start(config)


def verify(text: str | None, gold: str | float | None, truncated: bool = False) -> Verdict:
    """Judge a completion's text against a gold answer, or against a solution that holds one.

    See :mod:`igrpo_lite.answers.answers` for where the answer is looked for and :mod:`igrpo_lite.answers.equality` for
    what counts as equal. ``verify(...).reason == "correct"`` is the question mostly asked. No text holds no answer,
    and against no gold answer nothing can be judged (``unparsed``).
    """
    from igrpo_lite.answers.checker import verify as judge

    return judge("" if text is None else str(text), "" if gold is None else str(gold), truncated)


def compare(methods: Sequence[str], **options: Any) -> dict[str, Any]:
    """Train methods at equal rollouts over several seeds and set them side by side, as ``igrpo-lite compare`` does.

    See :func:`igrpo_lite.comparison.compare` for the options; other settings are common to all methods.
    """
    from igrpo_lite.comparison import compare as run

    return run(methods, **options)


def __getattr__(name: str) -> Any:
    if name == "RunConfig":
        from igrpo_lite.config import RunConfig

        return RunConfig
    if name == "resolve":
        from igrpo_lite.config.resolve import resolve

        return resolve
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
