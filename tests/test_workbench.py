"""The workbench under every verb: one text for one mistake, each prompt tokenised once, closed at the end."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import pytest
from tiny_parts import small_config

from igrpo_lite.errors import DataError
from igrpo_lite.evaluation.compare import compare
from igrpo_lite.evaluation.preflight import preflight
from igrpo_lite.evaluation.scan import scan
from igrpo_lite.export.verification import held_out_questions
from igrpo_lite.policy.prompting import prompt_builder
from igrpo_lite.prompts import PromptBuilder
from igrpo_lite.training.prepare import prepare


def test_every_verb_gives_the_same_text_where_no_prompt_fits(tmp_path):
    config = small_config(max_prompt_length=3)
    source = SimpleNamespace(config=config, questions=())
    verbs = {
        "train": lambda: prepare(config),
        "scan": lambda: scan(config, tmp_path / "kept.jsonl"),
        "eval": lambda: compare(config, None),
        "export": lambda: held_out_questions(source, prompt_builder(config), 2),
    }
    told = {}
    for name, verb in verbs.items():
        with pytest.raises(DataError) as error:
            verb()
        told[name] = str(error.value)
    text = "every {} prompt is longer than max_prompt_length = 3 tokens; raise --max-prompt-length"
    training, held_out = text.format("training"), text.format("held-out")
    assert told == {"train": training, "scan": training, "eval": held_out, "export": held_out}
    (finding,) = preflight(config, with_model=False).parts[-1].findings
    assert finding.text == training


def test_check_tokenises_each_prompt_once(monkeypatch):
    counts, encode = Counter(), PromptBuilder._encode

    def counted(self, text):
        counts[text] += 1
        return encode(self, text)

    monkeypatch.setattr(PromptBuilder, "_encode", counted)
    assert not preflight(small_config(max_problems=40), with_model=False).failed
    assert len(counts) > 40
    assert sum(count > 1 for count in counts.values()) <= 3  # what is shown, and the longest of each split
