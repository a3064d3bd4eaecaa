"""A method, or a choice of tokens, is one file and one line: each is written here and trained with."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from tiny_parts import SMALL

from igrpo_lite.algorithms import methods, tokens
from igrpo_lite.algorithms.drafts import DraftChoice
from igrpo_lite.algorithms.groups import Groups, Place
from igrpo_lite.algorithms.methods.base import LearningGroup, Method, Rollout
from igrpo_lite.algorithms.methods.igrpo import Igrpo
from igrpo_lite.algorithms.plans import All, Plan
from igrpo_lite.algorithms.replay import Replay, Restart, replay
from igrpo_lite.algorithms.tokens.base import Learning, LearningSequence, Measure, Tokens, equal
from igrpo_lite.config import ALGORITHMS, TOKENS, RunConfig
from igrpo_lite.config.resolve import resolve
from igrpo_lite.errors import ConfigError
from igrpo_lite.training import train
from igrpo_lite.types import Group

PAGE = Path(__file__).parents[1] / "docs" / "methods.md"


class WorstDraft(Igrpo):
    """Stage 2 sees the draft with the lowest reward."""

    def choose(self, drafts: Group, config: RunConfig, rng: random.Random) -> DraftChoice:
        rewards = [score.reward or 0.0 for score in drafts.scores]
        return DraftChoice(rewards.index(min(rewards)), tied=False)


class FirstTokens(Tokens):
    """The first token of each completion learns; the policy is asked, and its answer is the weight."""

    def learn(
        self,
        group: Group,
        advantages: Sequence[float],
        start: int,
        config: RunConfig,
        rng: Callable[[int], random.Random],
    ) -> list[Learning]:
        return [equal([start], advantage, 1.0) for advantage in advantages]

    def measured(
        self, sequences: Sequence[LearningSequence], measure: Measure, config: RunConfig
    ) -> list[LearningSequence]:
        rows = measure(sequences)
        assert all(len(row.logprobs) == len(row.entropies) == 1 for row in rows)
        return [
            s.with_learning(Learning(s.learning.indices, row.entropies, s.learning.advantages, 1.0))
            for s, row in zip(sequences, rows, strict=True)
        ]


class Undecided(Method):
    """The second half of the step's rollouts continues, from within, the first draft of each of those problems
    whose drafts disagree most: one method that divides rollouts among problems and whose given tokens do not learn."""

    def step(self, groups: Groups, places: Sequence[Place]) -> Plan[list[Rollout]]:
        drafts: list[Group] = yield All([groups.drafts(p) for p in places])
        spread = [len({score.reward for score in group.scores}) for group in drafts]
        chosen = sorted(range(len(places)), key=lambda i: -spread[i])[: len(places) // 2]
        more = yield All([self._continued(groups, places[i], drafts[i]) for i in chosen])
        replays = dict(zip(chosen, more, strict=True))
        return [Rollout(group, replays=replays.get(i, ())) for i, group in enumerate(drafts)]

    def _continued(self, groups: Groups, p: Place, drafts: Group) -> Plan[tuple[Replay, ...]]:
        within = len(drafts.completions[0].ids) // 4
        return (yield from replay(groups, p, drafts, [Restart(0, within)], 5))

    def learning_groups(self, rollout: Rollout, config: RunConfig) -> tuple[LearningGroup, ...]:
        return tuple(LearningGroup(r.group, r.start) for r in rollout.replays)


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    methods.register("worst-draft", WorstDraft(), ("stage2",))
    methods.register("undecided", Undecided(), ("stage1", "stage2"))
    tokens.register("first", FirstTokens())
    yield
    for name in ("worst-draft", "undecided"):
        del ALGORITHMS[name], methods._REGISTERED[name]
    del TOKENS["first"], tokens._REGISTERED["first"]


def trained(folder: Path, **settings: Any) -> list[dict[str, Any]]:
    """The steps' metrics of a run that has learned something."""
    train(resolve(SMALL | {"max_steps": 2, "progress": "off", "output_dir": str(folder)} | settings))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row["kind"] == "step"]
    assert len(steps) == 2
    adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert any(weights.any() for name, weights in adapter.items() if "lora_B" in name)
    return steps


def test_a_method_that_refines_the_worst_draft(tmp_path):
    trained(tmp_path / "run", algorithm="worst-draft")
    rows = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    rewards = [[draft["reward"] for draft in row["drafts"]] for row in rows]
    assert any(min(row) < max(row) for row in rewards)
    for row, among in zip(rows, rewards, strict=True):
        assert among[row["chosen"]] == min(among)
        assert len(row["refinements"]) == 3


def test_a_choice_of_tokens_that_asks_the_policy(tmp_path):
    for step in trained(tmp_path / "run", tokens="first"):
        assert step["tokens/learning"] == step["learning_sequences"] > 0
        assert step["place"] == 0


def test_a_method_that_divides_rollouts_and_masks_a_prefix(tmp_path):
    steps = trained(tmp_path / "run", algorithm="undecided", tokens="first", prompts_per_step=8)
    assert all(step["place"] >= 1 for step in steps if step["learning_sequences"])
    assert any(step["learning_sequences"] for step in steps)


def test_what_is_no_name_is_refused_with_those_that_are():
    with pytest.raises(ConfigError, match="did you mean worst-draft"):
        resolve({"algorithm": "worst-drafts"})
    del ALGORITHMS["worst-draft"]
    with pytest.raises(ConfigError, match="grpo, igrpo, igrpo-joint"):
        resolve({"algorithm": "worst-draft"})
    ALGORITHMS["worst-draft"] = ("stage2",)


def names(folder: Path) -> set[str]:
    return {path.stem for path in folder.glob("*.py")} - {"__init__", "base"}


def test_each_file_has_its_line_and_each_line_its_file():
    ours = [name for name in ALGORITHMS if name not in ("worst-draft", "undecided")]
    assert names(Path(methods.__file__).parent) == {name.replace("-", "_") for name in ours}
    assert all(isinstance(methods.method_of(RunConfig(algorithm=name)), Method) for name in ours)
    choices = [name for name in TOKENS if name != "first"]
    assert names(Path(tokens.__file__).parent) == {name.replace("-", "_") for name in choices}
    assert all(isinstance(tokens.tokens_of(RunConfig(tokens=name)), Tokens) for name in choices)


def test_each_name_has_its_section():
    sections = set(re.findall(r"^### `([\w-]+)`", PAGE.read_text(encoding="utf-8"), re.MULTILINE))
    losses = set(RunConfig.model_fields["loss_type"].annotation.__args__[0].__args__)
    ours = (ALGORITHMS.keys() | TOKENS.keys()) - {"worst-draft", "undecided", "first"}
    assert sections == ours | losses
