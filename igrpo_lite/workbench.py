"""What train, eval, check, scan and export work with, made step by step in the order of cost: problems, rewards,
prompts, and only then the model and its sampler."""

from __future__ import annotations

import hashlib
import json
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

from igrpo_lite.config import RunConfig
from igrpo_lite.errors import DataError
from igrpo_lite.policy.loading import Policy, load_policy
from igrpo_lite.policy.prompting import Fitting, check_context, fitting, prompt_builder
from igrpo_lite.problems.loading import ProblemSets, load_problems
from igrpo_lite.prompts import PromptBuilder
from igrpo_lite.rewards.scorer import Scorer
from igrpo_lite.sampling.base import Sampler
from igrpo_lite.sampling.choice import make_sampler
from igrpo_lite.types import Problem

Split = Literal["training", "held-out"]


class Workbench:
    """The parts of one run. Each step sets the attributes it is named for; close it at the end.

    Attributes:
        sets: the problems as they were loaded.
        scorer: after :meth:`open_scorer`.
        prompts, fits: after :meth:`fit`; ``fits`` has the problems whose prompt is short enough, by split.
        needed: after :meth:`check_lengths`: tokens of the longest prompt, draft and completion together.
        policy, sampler: after :meth:`load`.
        notes: lines for the user about what was loaded, counted and left out.

    Raises:
        UserError: each step, with all that it finds wrong.
    """

    scorer: Scorer
    prompts: PromptBuilder
    needed: int
    policy: Policy
    sampler: Sampler

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.sets: ProblemSets = load_problems(config, config.seed)
        self.fits: dict[Split, Fitting] = {}
        self.notes: list[str] = []
        self._stack = ExitStack()

    def __enter__(self) -> Workbench:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the processes and free the engine that belong to the run, whichever of them were made."""
        self._stack.close()

    @property
    def train(self) -> list[Problem]:
        """Training problems whose prompt is short enough."""
        return self.fits["training"].kept

    @property
    def held_out(self) -> list[Problem]:
        """Held-out problems whose prompt is short enough."""
        return self.fits["held-out"].kept

    def open_scorer(self) -> Scorer:
        """Make the scorer; nothing is scored yet."""
        self.scorer = self._stack.enter_context(Scorer(self.config, self.config.answer_style))
        return self.scorer

    def fit(self, *splits: Split, prompts: PromptBuilder | None = None) -> None:
        """Load the tokenizer, unless ``prompts`` has it, and tokenise each prompt of these splits, once."""
        self.prompts = prompts or prompt_builder(self.config)
        problems = {"training": self.sets.train, "held-out": self.sets.held_out}
        self.fits = {name: fitting(problems[name], self.prompts, self.config.max_prompt_length) for name in splits}

    def longest(self) -> list[Problem]:
        """The problem with the longest prompt of each split.

        Raises:
            DataError: a split has no prompt that is short enough.
        """
        for name, fit in self.fits.items():
            if fit.longest is None:
                raise DataError(
                    f"every {name} prompt is longer than max_prompt_length = {self.config.max_prompt_length} tokens; "
                    "raise --max-prompt-length"
                )
        return [fit.longest for fit in self.fits.values() if fit.longest is not None]

    def check_lengths(self) -> int:
        """See :func:`igrpo_lite.policy.prompting.check_context`; also refuses a split of which no prompt fits."""
        self.needed = check_context(self.config, self.prompts, *self.longest())
        return self.needed

    def load(self, adapter: Path | None = None) -> None:
        """Load the policy, with the adapter of a folder if there is one, and start its sampler."""
        self.load_policy(adapter)
        self.start_sampler()

    def load_policy(self, adapter: Path | None = None) -> Policy:
        """The first half of :meth:`load`."""
        self.policy = load_policy(self.config, self.config.seed, adapter, context=self.needed)
        return self.policy

    def start_sampler(self) -> None:
        """The second half of :meth:`load`."""
        self.sampler, notes = make_sampler(self.config, self.policy, self.prompts, self.needed)
        self._stack.callback(lambda: self.sampler.close())
        self.notes += notes

    def fingerprint(self) -> str:
        """Hash of the problems in use: a resumed run must see the same ones."""
        digest = hashlib.sha256()
        for problem in (*self.train, *self.held_out):
            columns = json.dumps(dict(problem.columns), sort_keys=True, default=str)  # users' rewards read them
            digest.update(f"{problem.id}\x1f{problem.question}\x1f{problem.answer}\x1f{columns}\x1e".encode())
        return digest.hexdigest()
