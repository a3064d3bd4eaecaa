"""What is seen and kept of a run: records, trackers, the screen and the diagnosis. No step depends on it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from igrpo_lite.algorithms.dynamic import Batch
from igrpo_lite.algorithms.rollout import Rollout, RolloutCollector
from igrpo_lite.config import RunConfig
from igrpo_lite.evaluation.evaluate import Evaluation
from igrpo_lite.report.screen import EvaluationName, Screen
from igrpo_lite.report.trackers import Trackers
from igrpo_lite.sampling.base import Sampler
from igrpo_lite.training.health import Health
from igrpo_lite.training.memory import memory
from igrpo_lite.training.metrics import step_metrics
from igrpo_lite.training.records import rollout_record, shown_samples
from igrpo_lite.training.run_folder import Records, RunFolder
from igrpo_lite.training.state import Progress
from igrpo_lite.training.update import MAX_OVERFLOWS, PolicyUpdate, UpdateStats
from igrpo_lite.workbench import Workbench
from igrpo_lite.worker.functions import in_short

SAMPLE_STEPS = 20
"""Steps between samples shown on the screen."""


class StepMeter:
    """What one step takes.

    Attributes:
        seconds: by phase: ``rollout``, without what it waited for rewards; ``reward``; ``update``.
    """

    def __init__(self, sampler: Sampler, collector: RolloutCollector) -> None:
        self.sampler, self.collector = sampler, collector
        self.seconds = {"rollout": 0.0, "reward": 0.0, "update": 0.0}
        self._before, self._waited = self._read(), collector.driver.waited

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure a phase that runs once."""
        started = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - started
        if name == "rollout":
            self.seconds["reward"] = self.collector.driver.waited - self._waited
            self.seconds["rollout"] -= self.seconds["reward"]

    def counts(self) -> dict[str, int]:
        """The engine's work, and the tokens of the policy as judge where it is one."""
        return {name: count - self._before[name] for name, count in self._read().items()}

    def _read(self) -> dict[str, int]:
        names = ("decode_steps", "prefill_tokens", "cached_tokens")
        judge = {"tokens/judge": self.collector.judge_tokens} if self.collector.groups.judge else {}
        return judge | {f"engine/{name}": getattr(self.sampler, name) for name in names}


class Journal:
    """Writes down what happens and tells the user what matters.

    Attributes:
        fatal: why going on cannot help.
    """

    def __init__(
        self, config: RunConfig, parts: Workbench, folder: RunFolder, screen: Screen, trackers: Trackers
    ) -> None:
        self.config, self.parts, self.folder, self.screen, self.trackers = config, parts, folder, screen, trackers
        self.health = Health(config)
        self.fatal: str | None = None
        self.metrics: Records
        self.samples: Records
        self._failing: set[str] = set()
        self._tokens, self._checkpointing = 0, False

    def open(self, progress: Progress, update: PolicyUpdate) -> None:
        """Go on behind what ``progress`` knows of."""
        self._tokens, self._checkpointing = update.update_tokens, update.checkpointing
        positions = progress.positions
        self.metrics = Records(self.folder.path / "metrics.jsonl", positions.get("metrics", 0))
        self.samples = Records(self.folder.path / "samples.jsonl", positions.get("samples", 0))
        self.screen.start(self.config, self.parts.notes, progress.step)
        for records in (self.metrics, self.samples):
            if records.missing:
                self.warn(
                    f"{records.path} has lost lines of earlier steps (deleted or cut?); the run itself is complete and "
                    "goes on"
                )
        for result in progress.evaluations:
            self.screen.evaluation(self._name(result["step"]), result)

    def close(self) -> None:
        self.metrics.close()
        self.samples.close()

    def positions(self) -> dict[str, int]:
        return {"metrics": self.metrics.position, "samples": self.samples.position}

    def warn(self, text: str) -> None:
        self.screen.message(text, "warning")

    def step(
        self,
        progress: Progress,
        batch: Batch,
        update: PolicyUpdate,
        stats: UpdateStats,
        meter: StepMeter,
        learning_rate: float,
    ) -> None:
        """After a step: metrics, samples, findings."""
        metrics: dict[str, Any] = {"kind": "step", "step": progress.step}
        metrics |= step_metrics(batch, stats, self.parts.prompts)
        metrics |= {"learning_rate": learning_rate} | meter.counts()
        metrics["memory"] = memory(self.parts.policy.device)
        metrics |= self.parts.scorer.take_logged()
        metrics["reward_failures"] = sum(calls.failed for calls in self.parts.scorer.failures.values())
        seconds = sum(meter.seconds.values())
        metrics["time"] = progress.clock(**meter.seconds) | {
            "step": seconds,
            "tokens_per_second": metrics["tokens/sampled"] / seconds,
        }
        self._tell_of_update(progress.step, update, stats)
        self.metrics.append(metrics)
        self.samples.append(*(rollout_record(progress.step, rollout) for rollout in batch.sampled))
        self.trackers.log(metrics, progress.step)
        self.screen.step(metrics)
        self._tell_of_rewards()
        for finding in self.health.update(metrics):
            self.warn(finding.text)
            if finding.level == "stop":
                self.fatal = finding.text
        self._show_samples(progress.step, batch.sampled)

    def evaluation(self, step: int, evaluation: Evaluation, result: dict[str, Any]) -> None:
        """After an evaluation, whose ``result`` has its step in it."""
        answers = [answer.record() for answer in evaluation.answered]
        self.folder.write_lines(f"evaluations/step-{step:06d}.jsonl", answers)
        times = {"evaluation": evaluation.seconds}
        self.metrics.append({"kind": "evaluation"} | result | {"time": times})
        self.trackers.log({f"eval/{key}": value for key, value in result.items() if key != "step"}, step)

    def show_evaluation(self, step: int, result: dict[str, Any], seconds: float) -> None:
        self.screen.evaluation(self._name(step), result | {"seconds": seconds})

    def dead(self) -> str | None:
        """Why going on cannot help, if it cannot."""
        return self.fatal or self.health.dead()

    def _name(self, step: int) -> EvaluationName:
        return "before" if step == 0 else "after" if step >= self.config.max_steps else "during"

    def _show_samples(self, step: int, rollouts: Sequence[Rollout]) -> None:
        if step % SAMPLE_STEPS == 0 or step == 1:
            good, bad = shown_samples(rollouts)
            self.screen.sample(good, bad)

    def _tell_of_update(self, step: int, update: PolicyUpdate, stats: UpdateStats) -> None:
        tokens = update.update_tokens
        if tokens < self._tokens:
            self.warn(
                f"out of memory in the update: update_tokens is {tokens} from now on, not {self._tokens}; the "
                f"same rollouts were used again; start with --update-tokens {tokens} to save the lost time"
            )
        self._tokens = tokens
        if update.checkpointing and not self._checkpointing:
            self._checkpointing = True
            self.warn(
                "out of memory in the update, with a single completion at a time: activations are recomputed from now "
                "on, a third more work; the same rollouts were used again; start with --gradient-checkpointing to save "
                "the lost time"
            )
        if stats.skipped:
            self.warn(
                f"float16 overflowed: step {step} changed nothing, and the loss scale is halved "
                f"({update.overflows} in a row; {MAX_OVERFLOWS} stop the run)"
            )

    def _tell_of_rewards(self) -> None:
        # At once: a reward that hangs takes its whole timeout in each call until there are enough to stop the run.
        for name, calls in self.parts.scorer.failures.items():
            if calls.failed and name not in self._failing:
                self._failing.add(name)
                self.warn(
                    f"reward {name} failed in {calls.failed} of {calls.made} calls; those completions were scored "
                    f"without it: {in_short(calls.first)}"
                )
