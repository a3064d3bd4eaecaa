"""The training loop: the paper's algorithm 1, one named step a line, and around it what keeps a long run safe."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from igrpo_lite.algorithms.dynamic import Batch, with_signal
from igrpo_lite.algorithms.rollout import Rollout, RolloutCollector
from igrpo_lite.config import RunConfig
from igrpo_lite.errors import RewardError, RunFolderError, SamplerError, UpdateError
from igrpo_lite.evaluation.evaluate import evaluate
from igrpo_lite.policy.fingerprint import base_fingerprint
from igrpo_lite.report.screen import Screen
from igrpo_lite.report.trackers import Trackers
from igrpo_lite.rewards.scorer import Calls
from igrpo_lite.sampling.parity import MAX_TOKENS, probe
from igrpo_lite.training.checkpoint import Checkpoints, restore, save_adapter, take_back
from igrpo_lite.training.interrupt import Interrupt
from igrpo_lite.training.journal import Journal, StepMeter
from igrpo_lite.training.run_folder import RunFolder
from igrpo_lite.training.schedule import batch_indices, learning_rate, other_indices
from igrpo_lite.training.state import Progress, Stop
from igrpo_lite.training.update import PolicyUpdate
from igrpo_lite.types import Problem
from igrpo_lite.workbench import Workbench

SAVE_SECONDS = 600.0
"""After which a checkpoint is due, whatever ``save_steps`` says."""


class Trainer:
    """Runs the steps of one run in its folder, from wherever its last checkpoint is."""

    def __init__(
        self, config: RunConfig, parts: Workbench, folder: RunFolder, screen: Screen, trackers: Trackers
    ) -> None:
        self.config = config
        self.parts = parts
        self.folder = folder
        self.screen = screen
        self.journal = Journal(config, parts, folder, screen, trackers)
        self.update = PolicyUpdate(parts.policy, config)
        self.checkpoints = Checkpoints(folder.checkpoints)
        dtype = str(parts.policy.model.get_base_model().dtype).removeprefix("torch.")
        self.progress = Progress(fingerprint=parts.fingerprint(), base=base_fingerprint(parts.policy), dtype=dtype)
        self.collector = RolloutCollector(
            parts.sampler, parts.scorer, parts.prompts, config, config.seed, self._heartbeat
        )
        self._started = self._saved = time.monotonic()
        self._saved_step: int | None = None
        self._resumed_step = 0

    def run(self, interrupt: Interrupt) -> Stop | None:
        """Train until ``max_steps`` or until something asks to stop; everything is saved either way."""
        self._resume()
        try:
            with self._saved_on(RewardError, SamplerError, UpdateError):
                stop = self._steps(interrupt)
            save_adapter(self.parts.policy, self.folder.adapter)
            return self._changed_base() or stop
        finally:
            self.collector.close()
            self.journal.close()

    def _steps(self, interrupt: Interrupt) -> Stop | None:
        self._check_parity()
        while True:
            # Before the stop is looked at, and again on resume: a run stopped here must not miss its evaluation.
            if self._evaluation_due() and not interrupt.requested and self.journal.fatal is None:
                self._evaluate()
            stop = self._stop(interrupt)
            if self._save_due(stop):
                self._save()
            if stop is not None or self.progress.step >= self.config.max_steps:
                return stop
            self._step()
            self._maintain_sampler()

    def _step(self) -> None:
        """One iteration of algorithm 1 (arXiv 2602.09000)."""
        step, sampler = self.progress.step, self.parts.sampler
        problems, upcoming = self._problems(step), self._problems(step + 1)  # S problems each
        rate = learning_rate(step, self.config.max_steps, self.config)
        meter = StepMeter(sampler, self.collector)

        with meter.phase("rollout"), self._saved_on(KeyboardInterrupt):  # later, the adapter may be half changed
            rollouts = self.collector.collect(problems, step, upcoming=upcoming)  # drafts, best draft, refinements
            batch = self._with_signal(rollouts)  # dynamic sampling, where asked for
        with meter.phase("update"):
            sampler.sleep()
            stats = self.update.step(batch.kept, step, rate)  # advantages, tokens, log-probabilities, loss, AdamW

        self.progress.finish_step(batch, self.collector.drafted(), self.parts.scorer.failures)
        self.journal.step(self.progress, batch, self.update, stats, meter, rate)

        with self.progress.timed("synchronisation"):  # last: should the engine fail, the step is complete
            sampler.wake()
            sampler.load_adapter()  # the next step samples from the new policy

    def _problems(self, step: int) -> list[Problem]:
        """Those of a step; none after the last."""
        if step >= self.config.max_steps:
            return []
        indices = batch_indices(len(self.parts.train), self.config.prompts_per_step, step, self.config.seed)
        return [self.parts.train[index] for index in indices]

    def _with_signal(self, rollouts: Sequence[Rollout]) -> Batch:
        """The step's rollouts, those that teach nothing replaced by other problems' (DAPO)."""
        step, train = self.progress.step, self.parts.train
        chosen = batch_indices(len(train), self.config.prompts_per_step, step, self.config.seed)
        others = (train[index] for index in other_indices(len(train), chosen, step, self.config.seed))
        return with_signal(rollouts, others, self.config, lambda more, slot: self.collector.collect(more, step, slot))

    def _maintain_sampler(self) -> None:
        """What long runs need of their sampler every so many steps: a new proof of parity."""
        step, config = self.progress.step, self.config
        if step >= config.max_steps:
            return
        if config.parity_steps and step % config.parity_steps == 0:
            self._check_parity()

    def _check_parity(self) -> None:
        """Stop the run if the sampler does not sample from the policy."""
        if not self.config.parity_steps or self.progress.step >= self.config.max_steps:
            return
        started = time.perf_counter()
        config, prompts = self.config, [self.parts.prompts.first(problem.question) for problem in self.parts.train[:4]]
        limit = min(MAX_TOKENS, config.max_completion_length)
        parity = probe(self.parts.policy, self.parts.sampler, prompts, [config.temperature], limit)
        times = self.progress.clock(parity=time.perf_counter() - started)
        self.journal.metrics.append({"kind": "parity", "step": self.progress.step} | parity.record() | {"time": times})
        self.journal.fatal = self.journal.fatal or parity.failure()

    def _changed_base(self) -> Stop | None:
        """The frozen weights must be what they were when the run began."""
        if base_fingerprint(self.parts.policy) == self.progress.base:
            return None
        return Stop(
            "diagnosis",
            "the frozen weights of the model have changed during the run, so the adapter does not fit the model that "
            "it was started with; please report this",
        )

    def _evaluate(self) -> None:
        """Held-out accuracy; the adapter with the best single pass so far is kept in ``best``."""
        self.screen.heartbeat(f"evaluating on {len(self.parts.held_out)} held-out problems")
        limit, step = self.config.max_completion_length, self.progress.step
        evaluation = evaluate(
            self.parts.held_out, self.parts.sampler, self.parts.prompts, limit, self.parts.scorer.checker
        )
        result = {"step": step} | evaluation.result()
        self.progress.clock(evaluation=evaluation.seconds)
        self.journal.evaluation(step, evaluation, result)
        self._saved_step = None
        if self.progress.add_evaluation(result):
            save_adapter(self.parts.policy, self.folder.best)
            self._save()  # so that ``best`` and what a resumed run knows of it never part for long
        self.journal.show_evaluation(step, result, evaluation.seconds)

    @contextmanager
    def _saved_on(self, *errors: type[BaseException]) -> Iterator[None]:
        """Keep what the last complete step left; the policy must not have been changed since."""
        try:
            yield
        except errors as error:
            self.collector.close()
            if isinstance(error, RewardError):
                self.progress.forgive_rewards(self.parts.scorer.failures)
            with suppress(RunFolderError):
                self._save()
            raise

    def _save(self) -> None:
        with self.progress.timed("saving"):
            self.progress.positions = self.journal.positions()
            self.progress.health, self.progress.update = self.journal.health.state(), self.update.state()
            self.checkpoints.save(self.progress.step, self.parts.policy, self.update.optimizer, self.progress.to_json())
            self._saved, self._saved_step = time.monotonic(), self.progress.step

    def _resume(self) -> None:
        for folder in (self.folder.best, self.folder.adapter):
            take_back(folder)
        found = self.checkpoints.latest()
        if found is None and self.folder.has_work():
            raise RunFolderError(
                f"{self.folder.path} holds the records of earlier steps but no checkpoint to go on from; use --fresh "
                "to start over (the old run is kept beside it)"
            )
        if found is not None:
            saved = Progress.from_json(restore(found.path, self.parts.policy, self.update.optimizer))
            saved.check_continues(self.progress, self.folder.path, self.config.model)
            self.progress, self._saved_step, self._resumed_step = saved, found.step, found.step
            self.update.load_state(saved.update)
            self.journal.health.load_state(saved.health)
            if self.journal.health.dead() is not None:
                self.journal.health.forgive()
            failures = {name: Calls(**calls) for name, calls in saved.reward_failures.items()}
            self.parts.scorer.failures.update(failures)
            self.parts.sampler.load_adapter()
            self.collector.load_drafted(saved.drafted, self._problems(found.step), found.step)
            for damage in found.damaged:
                self.journal.warn(f"{damage}; going on from step {found.step}")
        self.journal.open(self.progress, self.update)

    def _stop(self, interrupt: Interrupt) -> Stop | None:
        if interrupt.name is not None:
            return Stop(interrupt.name, f"{interrupt.name} received")
        if self.progress.step >= self.config.max_steps:
            return None
        diagnosis = self.journal.dead()
        if diagnosis is not None:
            return Stop("diagnosis", diagnosis)
        over = time.monotonic() - self._started > 60 * (self.config.max_minutes or math.inf)
        if over and self.progress.step > self._resumed_step:
            return Stop("time", f"{self.config.max_minutes:g} minutes are over (--max-minutes)")
        return None

    def _evaluation_due(self) -> bool:
        step, done = self.progress.step, self.progress.evaluations
        due = step % self.config.eval_steps == 0 or step >= self.config.max_steps
        return due and (not done or done[-1]["step"] != step)

    def _save_due(self, stop: Stop | None) -> bool:
        step = self.progress.step
        if step == self._saved_step:
            return False
        late = time.monotonic() - self._saved > SAVE_SECONDS
        return step % self.config.save_steps == 0 or late or stop is not None or step >= self.config.max_steps

    def _heartbeat(self, done: int, total: int) -> None:
        self.screen.heartbeat(f"step {self.progress.step + 1}: {done} of {total} completions")
