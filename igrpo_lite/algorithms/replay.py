"""T-SPMO's replay (arXiv 2504.20834): fresh continuations from inside a success and a failure.

The paper names the idea and leaves the rest open. Our reading: one restart in a completion above its group's mean
reward and one in a completion below it; where rewards do not differ, one in any completion, since it may still find a
branch. The place of the restart is uniform over the completion's inner tokens.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from igrpo_lite.algorithms.groups import Groups, Place
from igrpo_lite.algorithms.plans import All, Plan
from igrpo_lite.types import Completion, Group, Prompt


@dataclass(frozen=True, slots=True)
class Replay:
    """Fresh continuations from inside one completion.

    Attributes:
        group: the source first, then the continuations, all as whole completions of the same prompt, scored as such.
        start: tokens of the source that they share, at least 1 and fewer than the source has.
    """

    group: Group
    start: int

    @property
    def source(self) -> Completion:
        return self.group.completions[0]

    @property
    def continuations(self) -> tuple[Completion, ...]:
        """The sampled ones, as whole completions: all but the source."""
        return self.group.completions[1:]

    @property
    def sampled_tokens(self) -> int:
        return sum(len(completion.ids) - self.start for completion in self.continuations)


@dataclass(frozen=True, slots=True)
class Restart:
    """A replay before it is sampled: the source's place in its group, and the tokens of it that are kept."""

    source: int
    start: int


def choose_restarts(group: Group, rng: random.Random) -> list[Restart]:
    """Where to restart: in one random success and one random failure if there are both, else in any one completion.

    A success earned more than the group's mean, a failure less. Completions that no reward scored, and those of a
    single token, are never sources.
    """
    pairs = zip(group.completions, group.scores, strict=True)
    rewards = {index: score.reward for index, (_, score) in enumerate(pairs) if score.reward is not None}
    usable = [index for index in rewards if len(group.completions[index].ids) > 1]
    if not usable:
        return []
    mean = fmean(rewards.values())
    successes = [index for index in usable if rewards[index] > mean]
    failures = [index for index in usable if rewards[index] < mean]
    kinds = [successes, failures] if successes and failures else [usable]
    sources = [rng.choice(kind) for kind in kinds]
    return [Restart(source, rng.randint(1, len(group.completions[source].ids) - 1)) for source in sources]


def replay(groups: Groups, p: Place, group: Group, restarts: Sequence[Restart], count: int) -> Plan[tuple[Replay, ...]]:
    """Sample and score ``count`` fresh continuations at each restart in a group."""
    replays = yield All([_replay(groups, p, group, number, at, count) for number, at in enumerate(restarts, start=1)])
    return tuple(replays)


def _replay(groups: Groups, p: Place, group: Group, number: int, at: Restart, count: int) -> Plan[Replay]:
    source, config, tokenizer = group.completions[at.source], groups.config, groups.prompts.tokenizer
    kept, limit = source.ids[: at.start], config.max_completion_length - at.start
    prompt = Prompt(group.prompt.text + tokenizer.decode(list(kept)), group.prompt.ids + kept)
    continuations = yield groups.sample(p, group.stage, prompt, count, limit, number)
    completions = [source]
    for c in continuations:  # each as if it had been sampled in one piece
        ids, logprobs = kept + c.ids, source.logprobs[: at.start] + c.logprobs
        completions.append(Completion(ids, tokenizer.decode(list(ids), skip_special_tokens=True), logprobs, c.finish))
    scores = yield from groups.score(p, group.stage, group.prompt, tuple(completions[1:]), number)
    everything = tuple(completions), (group.scores[at.source], *scores)
    return Replay(Group(p.problem, group.stage, group.prompt, *everything), at.start)
