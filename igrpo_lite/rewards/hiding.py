"""A draft without its final answer, so that a refinement cannot simply copy it (a variant of ours)."""

from __future__ import annotations

import re

from igrpo_lite.rewards.answers import find_answer

MASK = "?"


def hide_answer(text: str) -> str:
    """``text`` with :data:`MASK` for its final answer, wherever that stands alone: also in the step that found it.

    ``27+30=57; \\boxed{57}`` becomes ``27+30=?; \\boxed{?}``, while ``157``, ``5.57`` and ``1,057`` stay. So does a
    text without an answer.
    """
    found = find_answer(text)
    if found is None:
        return text
    return re.sub(rf"(?<!\w)(?<!\d[.,]){re.escape(found.text)}(?!\w|[.,]\d)", MASK, text)
