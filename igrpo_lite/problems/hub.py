"""Rows of a Hugging Face hub data set, read with ``datasets``; its failures in one or two sentences."""

from __future__ import annotations

import os
from collections.abc import Sequence

from igrpo_lite.errors import DataError
from igrpo_lite.problems.files import Table
from igrpo_lite.problems.registry import find_id


def read_hub(
    repo: str, config: str | None, split: str | None, most: int | None = None, skipped: Sequence[str] = ()
) -> tuple[Table, str]:
    """The rows of one split, and the split's name. Without ``split``: ``test``, else ``validation``, else the only one.

    Images and other binary columns are not decoded. ``HF_HUB_OFFLINE``, ``HF_TOKEN`` and ``HF_HOME`` are respected.

    Args:
        repo: hub id, or a local folder in the hub's layout.
        config: configuration, where there are several.
        split: split, or one with a range (``train[:1000]``) where rows are not streamed.
        most: stream only so many rows from the start, without a download of the others; ``None``: all.
        skipped: columns that are not read.

    Raises:
        DataError: the set, its configuration or its split does not exist, needs access, or cannot be reached.
    """
    import datasets

    table = Table(repo)
    try:
        loaded = datasets.load_dataset(repo, config, split=split, streaming=most is not None)
        if split is None:
            names = list(loaded)
            split = next((name for name in ("test", "validation") if name in names), names[0])
            if split not in ("test", "validation") and len(names) > 1:
                raise DataError(f"{repo}: choose the held-out split with --eval-split; there are {', '.join(names)}")
            loaded = loaded[split]
        rows = loaded if most is None else loaded.take(most)
        for batch in rows.with_format("arrow").iter(1000):
            for values in batch.drop_columns([name for name in batch.column_names if name in skipped]).to_pylist():
                table.add(f"{repo} {split}, row {table.total + 1}", values)
    except DataError:
        raise
    except Exception as error:  # datasets raises a dozen unrelated types here, ValueError and OSError among them
        raise DataError(explain(repo, config, split, error)) from error
    if not table.total:
        raise DataError(f"{repo}: split {split} has no rows")
    return table, split


def explain(repo: str, config: str | None, split: str | None, error: Exception) -> str:
    """What an exception of ``datasets.load_dataset`` means, and what to do."""
    text = " ".join(str(error).partition("\nExample of usage")[0].split())
    kind = type(error).__name__
    if "gated" in text.lower():
        return (
            f"{repo}: access is gated; accept its terms on https://huggingface.co/datasets/{repo}, "
            "then log in with `hf auth login` or set HF_TOKEN"
        )
    if "Unknown split" in text or "Bad split" in text:
        return f"{repo}: there is no split {split} ({text}); choose with --data-split or --eval-split"
    if "onfig" in text and isinstance(error, ValueError):
        named = f"no configuration {config}" if config else "a configuration is needed"
        return f"{repo}: {named} ({text}); choose with --data-config"
    if kind == "DatasetNotFoundError":
        return (
            f"{repo}: no such data set on the Hugging Face hub, or it is private (then log in with `hf auth login`); "
            "a local file is named with its suffix, such as problems.jsonl"
        )
    if isinstance(error, ConnectionError | TimeoutError) or "Connect" in kind or "Timeout" in kind:
        entry = find_id(repo)
        local = "give a local file (JSONL, JSON, CSV, parquet)" + (f" as {entry.name}=path" if entry else "")
        if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
            return f"{repo}: not in the local cache, and HF_HUB_OFFLINE forbids the download; unset it, or {local}"
        return (
            f"{repo}: the Hugging Face hub cannot be reached and the set is not in the local cache ({kind}); "
            f"check the network, or {local}"
        )
    return f"{repo}: cannot be loaded from the Hugging Face hub: {kind}: {text[:300]}"
