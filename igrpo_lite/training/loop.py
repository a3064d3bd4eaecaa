"""The training loop: the paper's algorithm 1, one named step a line, and around it what keeps a long run safe."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from typing import Any

from igrpo_lite.algorithms.dynamic import Batch, with_signal
from igrpo_lite.algorithms.rollout import Rollout, RolloutCollector, stage_temperature
from igrpo_lite.config import RunConfig
from igrpo_lite.errors import RewardError, RunFolderError, SamplerError, UpdateError
from igrpo_lite.evaluation.evaluate import evaluate
from igrpo_lite.policy.fingerprint import base_fingerprint
from igrpo_lite.report.screen import EvaluationName, Screen
from igrpo_lite.report.trackers import Trackers
from igrpo_lite.rewards.custom import in_short
from igrpo_lite.rewards.scorer import Calls
from igrpo_lite.sampling.parity import MAX_TOKENS, probe
from igrpo_lite.training.checkpoint import Checkpoints, restore, save_adapter, take_back
from igrpo_lite.training.health import Health
from igrpo_lite.training.interrupt import Interrupt
from igrpo_lite.training.memory import memory
from igrpo_lite.training.metrics import step_metrics
from igrpo_lite.training.prepare import Prepared
from igrpo_lite.training.records import rollout_record, shown_samples
from igrpo_lite.training.run_folder import Records, RunFolder
from igrpo_lite.training.schedule import batch_indices, learning_rate, other_indices
from igrpo_lite.training.state import Progress, Stop
from igrpo_lite.training.update import MAX_OVERFLOWS, PolicyUpdate, UpdateStats
from igrpo_lite.types import Problem


class Trainer:
    """Runs the steps of one run in its folder, from wherever its last checkpoint is."""

    def __init__(
        self, config: RunConfig, parts: Prepared, folder: RunFolder, screen: Screen, trackers: Trackers
    ) -> None:
        self.config = config
        self.parts = parts
        self.folder = folder
        self.screen = screen
        self.trackers = trackers
        self.update = PolicyUpdate(parts.policy, config)
        self.health = Health(config)
        self.checkpoints = Checkpoints(folder.checkpoints, config.save_total_limit)
        dtype = str(parts.policy.model.get_base_model().dtype).removeprefix("torch.")
        self.progress = Progress(fingerprint=parts.fingerprint(), base=base_fingerprint(parts.policy), dtype=dtype)
        self.collector = RolloutCollector(
            parts.sampler, parts.scorer, parts.prompts, config, config.seed, self._heartbeat
        )
        self.metrics: Records
        self.samples: Records
        self._fatal: str | None = None
        self._failing: set[str] = set()
        self._update_tokens, self._checkpointing = self.update.update_tokens, self.update.checkpointing
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
            self.metrics.close()
            self.samples.close()

    def _steps(self, interrupt: Interrupt) -> Stop | None:
        self._check_parity()
        while True:
            # Before the stop is looked at, and again on resume: a run stopped here must not miss its evaluation.
            if self._evaluation_due() and not interrupt.requested and self._fatal is None:
                self._evaluate()
            stop = self._stop(interrupt)
            if self._save_due(stop):
                self._save()
            if stop is not None or self.progress.step >= self.config.max_steps:
                return stop
            self._step()
            self._maintain_sampler()

    @contextmanager
    def _saved_on(self, *errors: type[BaseException]) -> Iterator[None]:
        """Keep what the last complete step left; the policy must not have been changed since."""
        try:
            yield
        except errors as error:
            self.collector.close()
            if isinstance(error, RewardError):
                # Once it is mended, failures must not count against it; what a judge has cost stays spent.
                spent = {name: calls.tokens for name, calls in self.parts.scorer.failures.items() if calls.tokens}
                self.progress.reward_failures = {name: asdict(Calls(tokens=count)) for name, count in spent.items()}
            with suppress(RunFolderError):
                self._save()
            raise

    def _step(self) -> None:
        """One iteration of algorithm 1 (arXiv 2602.09000): rollouts, rewards and draft choice, update, new sampler."""
        config, started = self.config, time.perf_counter()
        step = self.progress.step
        self.collector.reward_seconds, self.collector.judge_tokens, before = 0.0, 0, self._engine()
        problems, upcoming = self._problems(step), self._problems(step + 1)  # S problems each
        with self._saved_on(KeyboardInterrupt):  # later in a step, the adapter may be half changed
            # Drafts, scores, best draft, refinements, scores:
            rollouts = self.collector.collect(problems, step, upcoming=upcoming)
            batch = self._with_signal(rollouts)  # dynamic sampling, where asked for
        sampled = time.perf_counter()
        rate = learning_rate(step, config.max_steps, config)
        self.parts.sampler.sleep()
        stats = self.update.step(batch.kept, step, rate)  # advantages, tokens, log-probabilities, loss, optimizer step
        ended = time.perf_counter()

        self.progress.step += 1
        self.progress.rollouts += sum(rollout.sampled for rollout in batch.sampled)
        self.progress.drafted = self.collector.drafted()
        failures = self.parts.scorer.failures
        self.progress.reward_failures = {name: asdict(calls) for name, calls in failures.items()}
        metrics: dict[str, Any] = {"kind": "step", "step": self.progress.step} | step_metrics(
            batch, stats, self.parts.prompts
        )
        metrics["learning_rate"] = rate
        if self.collector.judge is not None:
            metrics["tokens/judge"] = self.collector.judge_tokens
        metrics |= {f"engine/{name}": count - before[name] for name, count in self._engine().items()}
        metrics["memory"] = memory(self.parts.policy.device)
        metrics |= self.parts.scorer.take_logged()
        metrics["reward_failures"] = sum(calls.failed for calls in failures.values())
        metrics["time"] = self.progress.clock(
            rollout=sampled - started - self.collector.reward_seconds,
            reward=self.collector.reward_seconds,
            update=ended - sampled,
        )
        metrics["time"]["step"] = ended - started
        metrics["time"]["tokens_per_second"] = metrics["tokens/sampled"] / (ended - started)
        self._tell_of_relief(stats)
        self._report(batch.sampled, metrics)
        self._synchronise()  # the next step samples from the new policy

    def _synchronise(self) -> None:
        # Last in a step: should the engine fail, the step is complete and can be saved.
        started = time.perf_counter()
        self.parts.sampler.wake()
        self.parts.sampler.load_adapter()
        self.progress.clock(synchronisation=time.perf_counter() - started)

    def _maintain_sampler(self) -> None:
        """What long runs need of their sampler every so many steps: a new engine, a new proof of parity."""
        step, config = self.progress.step, self.config
        if step >= config.max_steps:
            return
        if config.rebuild_steps and step % config.rebuild_steps == 0:
            self.parts.sampler.rebuild()
        if config.parity_steps and step % config.parity_steps == 0:
            self._check_parity()

    def _check_parity(self) -> None:
        """Stop the run if the sampler does not sample from the policy."""
        if not self.config.parity_steps or self.progress.step >= self.config.max_steps:
            return
        started = time.perf_counter()
        config, prompts = self.config, [self.parts.prompts.first(problem.question) for problem in self.parts.train[:4]]
        temperatures = sorted({stage_temperature(config, stage) for stage in ("stage1", "stage2")})
        limit = min(MAX_TOKENS, config.max_completion_length)
        parity = probe(self.parts.policy, self.parts.sampler, prompts, temperatures, limit)
        times = self.progress.clock(parity=time.perf_counter() - started)
        self.metrics.append({"kind": "parity", "step": self.progress.step} | parity.record() | {"time": times})
        self._fatal = self._fatal or parity.failure()

    def _changed_base(self) -> Stop | None:
        """The frozen weights must be what they were when the run began."""
        if base_fingerprint(self.parts.policy) == self.progress.base:
            return None
        return Stop(
            "diagnosis",
            "the frozen weights of the model have changed during the run, so the adapter does not fit the model that "
            "it was started with; please report this",
        )

    def _problems(self, step: int) -> list[Problem]:
        """Those of a step; none after the last."""
        if step >= self.config.max_steps:
            return []
        indices = batch_indices(len(self.parts.train), self.config.prompts_per_step, step, self.config.seed)
        return [self.parts.train[index] for index in indices]

    def _engine(self) -> dict[str, int]:
        names = ("decode_steps", "prefill_tokens", "cached_tokens")
        return {name: getattr(self.parts.sampler, name) for name in names}

    def _with_signal(self, rollouts: Sequence[Rollout]) -> Batch:
        """The step's rollouts, those that teach nothing replaced by other problems' (DAPO)."""
        step, train = self.progress.step, self.parts.train
        chosen = batch_indices(len(train), self.config.prompts_per_step, step, self.config.seed)
        others = (train[index] for index in other_indices(len(train), chosen, step, self.config.seed))
        return with_signal(rollouts, others, self.config, lambda more, slot: self.collector.collect(more, step, slot))

    def _report(self, rollouts: Sequence[Rollout], metrics: dict[str, Any]) -> None:
        self.metrics.append(metrics)
        self.samples.append(*(rollout_record(self.progress.step, rollout) for rollout in rollouts))
        self.trackers.log(metrics, self.progress.step)
        self.screen.step(metrics)
        self._tell_of_failing_rewards()
        for finding in self.health.update(metrics):
            self.screen.message(finding.text, "warning")
            if finding.level == "stop":
                self._fatal = finding.text
        if self.progress.step % self.config.sample_steps == 0 or self.progress.step == 1:
            good, bad = shown_samples(rollouts)
            self.screen.sample(good, bad)

    def _tell_of_relief(self, stats: UpdateStats) -> None:
        tokens = self.update.update_tokens
        if tokens < self._update_tokens:
            self.screen.message(
                f"out of memory in the update: update_tokens is {tokens} from now on, not {self._update_tokens}; the "
                f"same rollouts were used again; start with --update-tokens {tokens} to save the lost time",
                "warning",
            )
        self._update_tokens = tokens
        if self.update.checkpointing and not self._checkpointing:
            self._checkpointing = True
            self.screen.message(
                "out of memory in the update, with a single completion at a time: activations are recomputed from now "
                "on, a third more work; the same rollouts were used again; start with --gradient-checkpointing to save "
                "the lost time",
                "warning",
            )
        if stats.skipped:
            self.screen.message(
                f"float16 overflowed: step {self.progress.step} changed nothing, and the loss scale is halved "
                f"({self.update.overflows} in a row; {MAX_OVERFLOWS} stop the run)",
                "warning",
            )

    def _tell_of_failing_rewards(self) -> None:
        # At once: a reward that hangs takes its whole timeout in each call until there are enough to stop the run.
        for name, calls in self.parts.scorer.failures.items():
            if calls.failed and name not in self._failing:
                self._failing.add(name)
                self.screen.message(
                    f"reward {name} failed in {calls.failed} of {calls.made} calls, whose completions go without it: "
                    f"{in_short(calls.first)}",
                    "warning",
                )

    def _evaluate(self) -> None:
        """Held-out accuracy; the adapter with the best single pass so far is kept in ``best``."""
        self.screen.heartbeat(f"evaluating on {len(self.parts.held_out)} held-out problems")
        limit = self.config.max_completion_length
        evaluation = evaluate(
            self.parts.held_out, self.parts.sampler, self.parts.prompts, limit, self.parts.scorer.checker
        )
        result = {"step": self.progress.step} | evaluation.result()
        self.folder.write_lines(
            f"evaluations/step-{self.progress.step:06d}.jsonl", [answer.record() for answer in evaluation.answered]
        )
        times = self.progress.clock(evaluation=evaluation.seconds)
        self.metrics.append({"kind": "evaluation"} | result | {"time": times})
        self.trackers.log({f"eval/{key}": value for key, value in result.items() if key != "step"}, self.progress.step)
        self._saved_step = None
        if self.progress.add_evaluation(result):
            save_adapter(self.parts.policy, self.folder.best)
            self._save()  # so that ``best`` and what a resumed run knows of it never part for long
        self.screen.evaluation(self._name(self.progress.step), result | {"seconds": evaluation.seconds})

    def _name(self, step: int) -> EvaluationName:
        return "before" if step == 0 else "after" if step >= self.config.max_steps else "during"

    def _save(self) -> None:
        started = time.perf_counter()
        self.progress.positions = {"metrics": self.metrics.position, "samples": self.samples.position}
        self.progress.health, self.progress.update = self.health.state(), self.update.state()
        self.checkpoints.save(self.progress.step, self.parts.policy, self.update.optimizer, self.progress.to_json())
        self._saved, self._saved_step = time.monotonic(), self.progress.step
        self.progress.clock(saving=time.perf_counter() - started)

    def _resume(self) -> None:
        for folder in (self.folder.best, self.folder.adapter):
            take_back(folder)
        found = self.checkpoints.latest()
        if found is not None:
            fingerprint, base, dtype = self.progress.fingerprint, self.progress.base, self.progress.dtype
            self.progress = Progress.from_json(restore(found.path, self.parts.policy, self.update.optimizer))
            if self.progress.fingerprint != fingerprint:
                raise RunFolderError(
                    f"the problems are not those that {self.folder.path} was started with (a changed data file?); "
                    "restore them, or use --fresh to start over"
                )
            self.progress.base = self.progress.base or base  # a checkpoint of an earlier version has none
            if self.progress.dtype not in ("", dtype):
                raise RunFolderError(
                    f"{self.folder.path} was started with weights in {self.progress.dtype}, and here they are {dtype} "
                    f"(another kind of GPU?); go on with --dtype {self.progress.dtype}, or use --fresh to start over"
                )
            if self.progress.base != base:
                raise RunFolderError(
                    f"the weights of {self.config.model} are not those that {self.folder.path} was started with (a new "
                    "revision?); restore them, or use --fresh to start over"
                )
            self.update.load_state(self.progress.update)
            self._update_tokens, self._checkpointing = self.update.update_tokens, self.update.checkpointing
            self.health.load_state(self.progress.health)
            if self.health.dead() is not None:
                self.health.forgive()
            failures = {name: Calls(**calls) for name, calls in self.progress.reward_failures.items()}
            self.parts.scorer.failures.update(failures)
            self.parts.sampler.load_adapter()
            self.collector.load_drafted(self.progress.drafted, self._problems(found.step), found.step)
            self._saved_step = self._resumed_step = found.step
            for damage in found.damaged:
                self.screen.message(f"{damage}; going on from step {found.step}", "warning")
        elif self.folder.has_work():
            raise RunFolderError(
                f"{self.folder.path} holds the records of earlier steps but no checkpoint to go on from; use --fresh "
                "to start over (the old run is kept beside it)"
            )
        positions = self.progress.positions
        self.metrics = Records(self.folder.path / "metrics.jsonl", positions.get("metrics", 0))
        self.samples = Records(self.folder.path / "samples.jsonl", positions.get("samples", 0))
        self.screen.start(self.config, self.parts.notes, self.progress.step)
        for records in (self.metrics, self.samples):
            if records.missing:
                self.screen.message(
                    f"{records.path} has lost lines of earlier steps (deleted or cut?); the run itself is complete and "
                    "goes on",
                    "warning",
                )
        for result in self.progress.evaluations:
            self.screen.evaluation(self._name(result["step"]), result)

    def _stop(self, interrupt: Interrupt) -> Stop | None:
        if interrupt.name is not None:
            return Stop(interrupt.name, f"{interrupt.name} received")
        if self.progress.step >= self.config.max_steps:
            return None
        diagnosis = self._fatal or self.health.dead()
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
        late = time.monotonic() - self._saved > 60 * self.config.save_minutes
        return step % self.config.save_steps == 0 or late or stop is not None or step >= self.config.max_steps

    def _heartbeat(self, done: int, total: int) -> None:
        self.screen.heartbeat(f"step {self.progress.step + 1}: {done} of {total} completions")
