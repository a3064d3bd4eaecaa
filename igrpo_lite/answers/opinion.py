r"""Fallback for two expressions that are spelled differently: math-verify, confirmed by numbers.

math-verify (https://github.com/huggingface/Math-Verify) rounds to six digits or chops small differences away, takes
two unsolvable equations for the same one and ``C`` for ``c``. So its "equal" counts only if both expressions, read by
its parser with case kept, also agree to 25 digits at several points.

:func:`opinion` runs in a worker process (:mod:`igrpo_lite.worker.process`): sympy may take forever or all memory.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import Any

from igrpo_lite.answers.equality import same_answer

MEMORY = 1 << 30
"""Bytes of address space that a worker may take."""

POINTS = 5
"""Points at which two expressions with variables must agree."""

_DIGITS, _TOLERANCE = 40, "1e-25"
# Odd ones, at which no expression of an answer is 0: there is no ratio to 0, and next to it no digit is left.
_PLACES = [
    "0.3391208467",
    "-1.4273950619",
    "1.8602517391",
    "-0.4579316283",
    "2.6718340957",
    "2.1138072649",
    "-0.2840619753",
    "2.7493815067",
    "0.3826104759",
    "2.8361907423",
    "-2.2470159683",
    "2.3094817561",
]
_SPACE = re.compile(r"(?<![A-Za-z]) | (?![A-Za-z])")  # but not after a command: ``\\cos t``
_ready = False


def opinion(completions: Sequence[str], golds: Sequence[str]) -> list[float | None]:
    """Whether answers are the gold answers, as rewards: 1, 0, or ``None`` where it cannot be told."""
    _prepare()
    said = [same_answer(found, gold, equivalent) for found, gold in zip(completions, golds, strict=True)]
    return [None if same is None else float(same) for same in said]


def equivalent(found: str, gold: str) -> bool | None:
    """Whether two canonical spellings are equal; ``None`` where one of them cannot be read.

    Takes as long and as much memory as sympy wants.
    """
    from math_verify import verify  # type: ignore[import-untyped]

    real = not re.search(r"(?<![A-Za-z\\\\])i(?![A-Za-z])", f"{found} {gold}")
    left, right = _read(found, real), _read(gold, real)
    if left is None or right is None:
        return None
    agreed = _agree(left, right)
    if agreed is None:
        return True if left == right else None
    return agreed and bool(verify(right, left, timeout_seconds=None))


def _prepare() -> None:
    """Limits the process's memory and has everything loaded that the first question needs."""
    global _ready
    if _ready:
        return
    logging.disable(logging.CRITICAL)  # math-verify warns of a missing time limit: the limit is the process's end
    try:
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY if most < 0 else min(MEMORY, most), most))
    except (ImportError, ValueError, OSError):
        pass  # not on Windows, and not everywhere enforced elsewhere
    equivalent("x + 1", "1 + x")
    _ready = True


def _read(spelling: str, real: bool) -> Any:
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy  # type: ignore[import-untyped]
    from sympy import Basic  # type: ignore[import-untyped]

    try:
        found = latex2sympy(
            _SPACE.sub("", spelling),
            is_real=real,
            convert_degrees=True,
            normalization_config=None,
            conversion_config=ConversionConfig(lowercase_symbols=False),
        )
    except Exception:
        return None
    return found if isinstance(found, Basic) else None


def _agree(left: Any, right: Any) -> bool | None:
    """Whether two expressions have the same value, or both sides of two relations the same ratio, at every point.

    ``None`` where they have no values that could be compared.
    """
    from sympy import Expr, Float
    from sympy.core.relational import Relational  # type: ignore[import-untyped]

    relations = isinstance(left, Relational), isinstance(right, Relational)
    if relations == (True, True):
        left, right = (side.reversed if side.rel_op in (">", ">=") else side for side in (left, right))
        if left.rel_op != right.rel_op:
            return False
        ratios, ordered = _ratios(left.lhs - left.rhs, right.lhs - right.rhs), left.rel_op in ("<", "<=")
        if ratios is None:
            return None
        return all(_close(ratio, ratios[0]) for ratio in ratios) and bool(
            ratios[0].is_positive if ordered else ratios[0] != 0
        )
    if any(relations) or not isinstance(left, Expr) or not isinstance(right, Expr):
        return None
    ratios = _ratios(left, right)
    return None if ratios is None else all(_close(ratio, Float(1, _DIGITS)) for ratio in ratios)


def _ratios(left: Any, right: Any) -> list[Any] | None:
    """``left / right`` at the points where both have a value; ``None`` where there are too few."""
    from sympy import Float, Integer, Integral, Limit, Product, Rational, Sum, Symbol
    from sympy.core.function import AppliedUndef, Derivative  # type: ignore[import-untyped]

    sides = []
    for side in (left, right):
        if side.has(Integral, Limit, Product, Sum, Derivative):
            return None
        side = side.replace(lambda part: isinstance(part, AppliedUndef), lambda part: Symbol(str(part)))
        sides.append(side.replace(lambda part: isinstance(part, Float), lambda part: Rational(str(part))))
    names = sorted({symbol.name for side in sides for symbol in side.free_symbols})
    ratios: list[Any] = []
    for turn in range(len(_PLACES) if names else 1):
        places = {name: Rational(_PLACES[(turn + 5 * at) % len(_PLACES)]) + at for at, name in enumerate(names)}
        # Not subs() before evalf(): exact powers of fractions take forever where rounded ones do not.
        values = [
            side.evalf(_DIGITS, subs={symbol: places[symbol.name] for symbol in side.free_symbols}) for side in sides
        ]
        if not all(value.is_number and value.is_finite for value in values):
            continue
        if values[1] != 0:
            ratios.append((values[0] / values[1]).evalf(_DIGITS))
        elif values[0] != 0 or not names:
            ratios.append(Integer(int(values[0] == 0)))
        if len(ratios) == POINTS:
            return ratios
    return ratios if ratios and (not names or len(ratios) >= 3) else None


def _close(ratio: Any, wanted: Any) -> bool:
    from sympy import Abs, Float

    return bool(Abs(ratio - wanted) <= Float(_TOLERANCE) * max(1, Abs(wanted)))
