"""Rows of a Hugging Face hub data set, through ``datasets``; every way it can fail becomes one or two sentences."""

from __future__ import annotations

import os

from igrpo_lite.errors import DataError
from igrpo_lite.problems.files import Table

PUBLIC_SETS: dict[str, str | None] = {
    "openai/gsm8k": "main",
    "madrylab/gsm8k-platinum": "main",
    "open-r1/DAPO-Math-17k-Processed": "en",
    "ChilleD/SVAMP": None,
    "HuggingFaceH4/MATH-500": None,
    "HuggingFaceH4/aime_2024": None,
    "DigitalLearningGmbH/MATH-lighteval": None,
    "nvidia/AceReason-Math": None,
    "agentica-org/DeepScaleR-Preview-Dataset": None,
}
"""Sets that can be suggested when a name is mistyped, with the configuration taken where there are several and none
is given. Any other hub id works as well."""

_EVAL_SPLITS = ("test", "validation")


def read_hub(repo: str, config: str | None, split: str | None) -> tuple[Table, str]:
    """All rows of one split, and the split's name. Without ``split``: ``test``, else ``validation``, else the only one.

    Images and other binary columns are not decoded. Settings of the hub's own (``HF_HUB_OFFLINE``, ``HF_TOKEN``,
    ``HF_HOME``) are respected.

    Raises:
        DataError: the set, its configuration or its split does not exist, needs access, or cannot be reached.
    """
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"{repo}: hub data sets need the package datasets: pip install datasets") from error
    config = config or PUBLIC_SETS.get(repo)
    try:
        loaded = datasets.load_dataset(repo, config, split=split)
    except Exception as error:  # datasets raises a dozen unrelated types here, bare ValueError and OSError among them
        raise DataError(explain(repo, config, split, error)) from error
    if split is None:
        split = _only_split(repo, list(loaded))
        loaded = loaded[split]
    table = Table(repo)
    for batch in loaded.with_format("arrow").iter(1000):
        for values in batch.to_pylist():
            table.add(f"{repo} {split}, row {table.total + 1}", values)
    if not table.total:
        raise DataError(f"{repo}: split {split} has no rows")
    return table, split


def _only_split(repo: str, names: list[str]) -> str:
    for name in _EVAL_SPLITS:
        if name in names:
            return name
    if len(names) == 1:
        return names[0]
    raise DataError(f"{repo}: choose the held-out split with --eval-split; there are {', '.join(names)}")


def explain(repo: str, config: str | None, split: str | None, error: Exception) -> str:
    """What an exception of ``datasets.load_dataset`` means and what to do, in one or two sentences."""
    text = " ".join(str(error).partition("\nExample of usage")[0].split())
    kind = type(error).__name__
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}
    if "gated" in text.lower():
        return (
            f"{repo}: access is gated; accept its terms on https://huggingface.co/datasets/{repo}, "
            "then log in with `hf auth login` or set HF_TOKEN"
        )
    if "Unknown split" in text:
        return f"{repo}: there is no split {split} ({text}); choose with --data-split or --eval-split"
    if "onfig" in text and isinstance(error, ValueError):
        named = f"no configuration {config}" if config else "a configuration is needed"
        return f"{repo}: {named} ({text}); choose with --data-config"
    if kind == "DatasetNotFoundError":
        return (
            f"{repo}: no such data set on the Hugging Face hub, or it is private (then log in with `hf auth login`); "
            "a local file is named with its suffix, such as problems.jsonl"
        )
    unreachable = isinstance(error, ConnectionError | TimeoutError) or "Connect" in kind or "Timeout" in kind
    if unreachable and offline:
        return (
            f"{repo}: not in the local cache, and HF_HUB_OFFLINE forbids the download; "
            "unset it, or give a local file (JSONL, JSON, CSV, parquet)"
        )
    if unreachable:
        return (
            f"{repo}: the Hugging Face hub cannot be reached and the set is not in the local cache ({kind}); "
            "check the network, or give a local file (JSONL, JSON, CSV, parquet)"
        )
    return f"{repo}: cannot be loaded from the Hugging Face hub: {kind}: {text[:300]}"


def suggestions() -> dict[str, str]:
    """Short lower-case names of :data:`PUBLIC_SETS` with their ids, for hints after a mistyped name."""
    return {repo.partition("/")[2].lower(): repo for repo in PUBLIC_SETS}
