"""Public sets of mathematics problems by short name: where they are, which columns they have, what to expect of them.

Compiled from the task files of lm-evaluation-harness and lighteval, the code of open-r1, open-rs and M2PO, and the
cards on https://huggingface.co/datasets; ``source`` says which. A count that no such place confirmed is ``None``.
Licences are what those places state; read the card before you pass data on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Form = Literal["hash", "boxed", "plain", "float-int", "list0"]
"""How a column holds the gold answer: after the last ``####``; in the last ``\\boxed{}``; as it stands; as a number
like ``142.0`` for 142; as the first item of a list, in dollar signs or not (:mod:`igrpo_lite.problems.gold`)."""

STREAMED_ROWS = 20_000
"""Rows read of a very large set unless ``stream_rows`` says otherwise."""

_MAA = "problems by the MAA; see the card"


@dataclass(frozen=True, slots=True)
class PublicSet:
    """One public set.

    Attributes:
        name: short name.
        hub_id: where it is on the Hugging Face hub.
        questions: columns of the question (``A+B``: joined), the first that a copy has is taken; none: found by name.
        answers: columns of the gold answer with their form, likewise.
        splits: rows by split, ``None`` where the number was not confirmed.
        config: configuration, where the hub has several.
        train: split to train on; ``None``: it is a set to evaluate on.
        evaluate: split to evaluate on; ``None``: it has none of its own.
        licence: what its card or its source states.
        max_completion_length: tokens that most solutions fit into, a suggestion.
        large: so large that only the first :data:`STREAMED_ROWS` rows are read, streamed.
        skipped: columns that are not read, for their size.
        aliases: further short names.
        also: hub ids of copies, which the same columns are looked for in.
        source: where the facts are from.
        note: what one should know before using it.
    """

    name: str
    hub_id: str
    questions: tuple[str, ...]
    answers: tuple[tuple[str, Form], ...]
    splits: Mapping[str, int | None] = field(hash=False)
    config: str | None = None
    train: str | None = "train"
    evaluate: str | None = None
    licence: str = "see the card"
    max_completion_length: int = 2048
    large: bool = False
    skipped: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    also: tuple[str, ...] = ()
    source: str = ""
    note: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """Every name that files of the set may bear, lower case with underscores, the short name first."""
        names = (self.name, *self.aliases, self.hub_id.partition("/")[2])
        return tuple(dict.fromkeys(name.lower().replace("-", "_") for name in names))


_SETS = (
    PublicSet(
        "gsm8k",
        "openai/gsm8k",
        ("question",),
        (("answer", "hash"),),
        {"train": 7473, "test": 1319},
        config="main",
        evaluate="test",
        licence="MIT",
        max_completion_length=768,
        source="lm-eval gsm8k.yaml, lighteval gsm8k.py, card",
    ),
    PublicSet(
        "gsm8k-platinum",
        "madrylab/gsm8k-platinum",
        ("question",),
        (("answer", "hash"),),
        {"test": None},
        config="main",
        train=None,
        evaluate="test",
        max_completion_length=768,
        source="lm-eval gsm8k-platinum.yaml",
        note="GSM8K's test problems with the wrong and unclear ones taken out (about 1,209 rows)",
    ),
    PublicSet(
        "svamp",
        "ChilleD/SVAMP",
        ("Body+Question", "question_concat"),
        (("Answer", "float-int"),),
        {"train": 700, "test": 300},
        evaluate="test",
        licence="MIT",
        max_completion_length=768,
        source="card; columns: kinit/svamp",
        note="SVAMP.json of arkilpatel/SVAMP holds all 1,000",
    ),
    PublicSet(
        "math",
        "DigitalLearningGmbH/MATH-lighteval",
        ("problem",),
        (("solution", "boxed"), ("answer", "plain")),
        {"train": 7500, "test": 5000},
        config="default",
        evaluate="test",
        licence="MIT",
        aliases=("math-lighteval",),
        source="lighteval math.py, card",
        note="its test split contains math500",
    ),
    PublicSet(
        "hendrycks-math",
        "EleutherAI/hendrycks_math",
        ("problem",),
        (("solution", "boxed"),),
        {"train": None, "test": None},
        config="algebra",
        evaluate="test",
        licence="MIT",
        source="lm-eval hendrycks_math_algebra.yaml",
        note="the same problems as math, one subject per configuration (algebra unless --data-config names another)",
    ),
    PublicSet(
        "math500",
        "HuggingFaceH4/MATH-500",
        ("problem",),
        (("answer", "plain"), ("solution", "boxed")),
        {"test": 500},
        train=None,
        evaluate="test",
        licence="MIT (of MATH)",
        aliases=("math-500",),
        also=("lmms-lab/MATH500",),
        source="lighteval math_500.py, card",
    ),
    PublicSet(
        "aime24",
        "HuggingFaceH4/aime_2024",
        ("problem",),
        (("answer", "float-int"),),
        {"train": 30},
        train=None,
        evaluate="train",
        licence=_MAA,
        max_completion_length=4096,
        aliases=("aime-2024", "aime2024"),
        also=("Maxwell-Jia/AIME_2024",),
        source="lighteval aime.py; lm-eval aime24.yaml",
    ),
    PublicSet(
        "aime25",
        "math-ai/aime25",
        ("problem",),
        (("answer", "float-int"),),
        {"test": 30},
        train=None,
        evaluate="test",
        licence=_MAA,
        max_completion_length=4096,
        aliases=("aime-2025", "aime2025"),
        also=("yentinglin/aime_2025", "MathArena/aime_2025"),
        source="lm-eval aime25.yaml; lighteval aime.py",
    ),
    PublicSet(
        "aime26",
        "MathArena/aime_2026",
        ("problem",),
        (("answer", "float-int"),),
        {"train": 30},
        train=None,
        evaluate="train",
        licence="CC BY-NC-SA",
        max_completion_length=4096,
        aliases=("aime-2026", "aime2026"),
        source="card",
    ),
    PublicSet(
        "aime22-24",
        "AI-MO/aimo-validation-aime",
        ("problem",),
        (("answer", "float-int"),),
        {"train": 90},
        train=None,
        evaluate="train",
        licence=_MAA,
        max_completion_length=4096,
        aliases=("aimo-aime",),
        source="card",
        note="contains aime24",
    ),
    PublicSet(
        "amc22-23",
        "AI-MO/aimo-validation-amc",
        ("problem",),
        (("answer", "float-int"),),
        {"train": 83},
        train=None,
        evaluate="train",
        licence=_MAA,
        aliases=("aimo-amc",),
        source="card; M2PO test_amc.py",
    ),
    PublicSet(
        "amc23",
        "math-ai/amc23",
        ("question", "problem"),
        (("answer", "float-int"),),
        {"test": 40},
        train=None,
        evaluate="test",
        licence=_MAA,
        also=("knoveleng/AMC-23",),
        source="M2PO test_amc23.py; open-rs evaluate.py",
    ),
    PublicSet(
        "minerva",
        "math-ai/minervamath",
        ("question", "problem"),
        (("answer", "plain"), ("solution", "boxed")),
        {"test": 272},
        train=None,
        evaluate="test",
        aliases=("minerva-math",),
        also=("knoveleng/Minerva-Math",),
        source="M2PO test_minervamath.py; open-rs evaluate.py",
    ),
    PublicSet(
        "olympiadbench",
        "math-ai/olympiadbench",
        ("question", "problem"),
        (("final_answer", "list0"), ("answer", "plain")),
        {"test": 674},
        train=None,
        evaluate="test",
        max_completion_length=4096,
        aliases=("olympiad-bench", "olympiad"),
        also=("Hothan/OlympiadBench", "knoveleng/OlympiadBench"),
        source="M2PO test_olympiad.py; lighteval olympiade_bench.py",
    ),
    PublicSet(
        "acereason-math",
        "nvidia/AceReason-Math",
        ("problem",),
        (("answer", "plain"),),
        {"train": 49_585},
        licence="CC BY 4.0",
        max_completion_length=4096,
        aliases=("acereason",),
        source="card; github.com/EnvCommons/AceReason-Math",
        note="the set that iGRPO's paper trains on",
    ),
    PublicSet(
        "openr1-math",
        "open-r1/OpenR1-Math-220k",
        ("problem",),
        (("answer", "plain"),),
        {"train": 93_733},
        config="default",
        licence="Apache-2.0",
        max_completion_length=4096,
        large=True,
        skipped=("generations", "messages", "correctness_math_verify", "finish_reasons", "reparations"),
        aliases=("openr1-math-220k", "openr1"),
        source="card",
        note="10 GB as a whole; configuration extended: 131,396 further rows",
    ),
    PublicSet(
        "dapo-math",
        "open-r1/DAPO-Math-17k-Processed",
        ("prompt",),
        (("solution", "plain"),),
        {"train": None},
        config="en",
        licence="Apache-2.0",
        max_completion_length=4096,
        skipped=("source_prompt",),
        aliases=("dapo-math-17k", "dapo"),
        source="open-r1 filter_dapo.yaml; Unsloth's Qwen3-4B notebook",
        note="about 14,100 rows in en; configurations all and cn",
    ),
    PublicSet(
        "deepscaler",
        "agentica-org/DeepScaleR-Preview-Dataset",
        ("problem",),
        (("answer", "plain"),),
        {"train": 40_315},
        licence="MIT",
        max_completion_length=4096,
        aliases=("deepscaler-preview",),
        source="M2PO deepscaler_preview.py, card",
    ),
    PublicSet(
        "sanity-r1d",
        "sail/Sanity-Test-R1D-1.5B",
        (),
        (),
        {"train": None},
        max_completion_length=4096,
        source="github.com/huggingface/blog/pull/3527",
        note="1,460 questions that R1-Distill-Qwen-1.5B answers in 20 to 80 % of its tries; columns are found by name",
    ),
    PublicSet(
        "numina-tir",
        "AI-MO/NuminaMath-TIR",
        ("problem",),
        (("solution", "boxed"),),
        {"train": None, "test": None},
        evaluate="test",
        licence="Apache-2.0",
        skipped=("messages",),
        aliases=("numinamath-tir",),
        source="open-r1 recipes",
    ),
    PublicSet(
        "numina",
        "AI-MO/NuminaMath-CoT",
        ("problem",),
        (("solution", "boxed"),),
        {"train": None, "test": None},
        evaluate="test",
        licence="Apache-2.0",
        large=True,
        skipped=("messages",),
        aliases=("numina-cot", "numinamath", "numinamath-cot"),
        source="card",
        note="about 860,000 rows; proofs among them have no answer and are left out",
    ),
)

PUBLIC_SETS: dict[str, PublicSet] = {entry.name: entry for entry in _SETS}
"""Every public set by short name."""

_BY_NAME = {name.lower(): entry for entry in _SETS for name in (entry.name, *entry.aliases)}
_BY_ID = {hub_id.lower(): entry for entry in _SETS for hub_id in (entry.hub_id, *entry.also)}


def find_set(name: str) -> PublicSet | None:
    """The public set of a short name; upper case and underscores are no matter."""
    return _BY_NAME.get(name.lower().replace("_", "-"))


def find_id(hub_id: str) -> PublicSet | None:
    """The public set that a hub id names, or a copy of it."""
    return _BY_ID.get(hub_id.lower())


def suggestions() -> dict[str, str]:
    """What a mistyped name may have meant, lower case, each with what to write instead."""
    last = {entry.hub_id.partition("/")[2].lower(): entry.name for entry in _SETS}
    return last | {name: entry.name for name, entry in _BY_NAME.items()}
