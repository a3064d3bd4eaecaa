"""An example of a reward of your own: short completions earn more.

A reward gets the completions of one call and, by name, the prompts and every column of the problems; it returns one
number per completion, or None where it does not apply.
"""

from __future__ import annotations

from typing import Any

ENOUGH = 200
"""Characters from which on there is nothing to earn."""


def brevity(completions: list[Any], **columns: Any) -> list[float]:
    """1 for an empty completion, falling to 0 at :data:`ENOUGH` characters."""
    texts = [completion if isinstance(completion, str) else completion[-1]["content"] for completion in completions]
    return [max(0.0, 1.0 - len(text) / ENOUGH) for text in texts]
