"""Why a run does not learn, in words: each finding says what was seen, why it matters and which flag changes it.

Only the numbers of past steps go in, never clocks or random draws, so that a resumed run diagnoses exactly as one that
never stopped; but for the memory in use, which never stops a run. Thresholds: reward that is stuck, cut completions
and collapse are the loudest complaints about GRPO.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from statistics import fmean, pvariance
from typing import Any, Literal, TypeGuard

from igrpo_lite.config import RunConfig
from igrpo_lite.training.memory import MemoryTrend

SILENT_STEPS = 20
"""A finding that lasts is repeated at most every so many steps."""

_HISTORY, _HALF = 20, 10
_CUT_WARNING, _CUT_STRONG, _CUT_COMPLETIONS = 0.2, 0.5, 32
_CONSTANT_COMPLETIONS, _CONSTANT_STEPS = 64, 5
_ONE_SIDED, _GROUPS = 0.9, 16
_FALL = 0.2
_ENTROPY_LOW, _ENTROPY_HIGH = 0.02, 2.0
_GAP_WARNING, _GAP_STOP, _GAP_STEPS = 0.05, 0.5, 3

_REASON_HINTS = {
    "no_answer": "look at samples.jsonl for the form that was written, and at --answer-style and --system-prompt",
    "unparsed": "the answers cannot be read as values; look at samples.jsonl and at --answer-style",
    "truncated": "raise --max-completion-length",
    "wrong": "use easier problems (--data) or a stronger --model, and check --answer-column",
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One diagnosis. ``stop`` means that going on cannot help; ``text`` is for a person."""

    code: str
    level: Literal["warning", "stop"]
    text: str


class Health:
    """Diagnoses a run from the metrics of its steps."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        sizes = {"stage1": config.n_drafts, "stage2": config.n_refinements}
        self._groups = {stage: size for stage, size in sizes.items() if size}
        self._learning = config.learning_stages
        self._history: list[dict[str, Any]] = []
        self._constant: dict[str, dict[str, Any]] = {}
        self._best: dict[str, Any] | None = None
        self._scatter: dict[str, dict[str, float]] = {}
        self._no_gradient = 0
        self._no_distance = 0
        self._dead = 0
        self._memory = MemoryTrend()
        self._told: dict[str, int] = {}

    def update(self, metrics: Mapping[str, Any]) -> list[Finding]:
        """Take in one step; return what is new to say, most important first."""
        self._history = [*self._history, _kept(metrics)][-_HISTORY:]
        self._count_constant_parts()
        self._count_stillness()
        self._remember_best()
        self._memory.add(metrics["step"], metrics.get("memory") or {})
        new = [finding for finding in self._findings() if finding.level == "stop" or self._due(finding.code)]
        self._told.update({finding.code: metrics["step"] for finding in new})
        return new

    def forgive(self) -> None:
        """Count dead steps anew: a run that was stopped for them and started again gets another chance."""
        self._dead = 0

    def dead(self) -> str | None:
        """Why the run should stop, once `patience_dead` steps in a row gave no learning signal."""
        patience = self._config.patience_dead
        if not patience or self._dead < patience:
            return None
        reason = f"All rewards within a group were equal ({self._odds(self._learning[0], _CONSTANT_STEPS)})."
        if any(self._mean(f"{stage}/informative", _HALF) for stage in self._learning):
            reason = "Rewards differed, but no token learned: see --tokens and --mask-truncated-completions."
        cause = next((finding.text for finding in self._causes()), reason)
        return f"No learning signal in {self._dead} steps in a row (--patience-dead). {cause}"

    def state(self) -> dict[str, Any]:
        """Everything that later diagnoses depend on, as JSON types."""
        return {
            "history": [dict(entry) for entry in self._history],
            "constant": {name: dict(entry) for name, entry in self._constant.items()},
            "best": dict(self._best) if self._best else None,
            "scatter": {name: dict(entry) for name, entry in self._scatter.items()},
            "no_gradient": self._no_gradient,
            "no_distance": self._no_distance,
            "dead": self._dead,
            "memory": self._memory.state(),
            "told": dict(self._told),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue from a :meth:`state`."""
        self._history = [dict(entry) for entry in state["history"]]
        self._constant = {name: dict(entry) for name, entry in state["constant"].items()}
        self._best = dict(state["best"]) if state["best"] else None
        self._scatter = {name: dict(entry) for name, entry in state["scatter"].items()}
        self._no_gradient, self._no_distance = state["no_gradient"], state["no_distance"]
        self._dead = state["dead"]
        self._memory.load_state(state.get("memory", {}))
        self._told = dict(state["told"])

    def _due(self, code: str) -> bool:
        return code not in self._told or self._now["step"] - self._told[code] >= SILENT_STEPS

    # What is counted from step to step.

    @property
    def _now(self) -> dict[str, Any]:
        return self._history[-1]

    def _values(self, key: str, steps: int, skip: int = 0) -> list[float]:
        """The numbers under `key` in the last `steps` steps before the last `skip`; absent ones are left out."""
        entries = self._history[: len(self._history) - skip][-steps:]
        return [value for value in (entry.get(key) for entry in entries) if _is_number(value)]

    def _mean(self, key: str, steps: int) -> float | None:
        values = self._values(key, steps)
        return fmean(values) if values else None

    def _count_constant_parts(self) -> None:
        by_part: dict[str, list[tuple[str, float | None]]] = {}
        for key, value in self._now.items():
            stage, _, name = key.partition("/rewards/")
            if name:
                by_part.setdefault(name, []).append((stage, value))
        for name, seen in by_part.items():
            values, past = [value for _, value in seen], self._constant.get(name)
            completions = sum(self._config.prompts_per_step * self._groups[stage] for stage, _ in seen)
            if not all(_same(value, values[0]) for value in values):
                self._constant.pop(name, None)
            elif past and _same(past["value"], values[0]):
                past["steps"] += 1
                past["completions"] += completions
            else:
                self._constant[name] = {"value": values[0], "steps": 1, "completions": completions}

    def _count_stillness(self) -> None:
        now = self._now
        # With dynamic sampling the shares are over replaced problems too; what is kept is what the update gets.
        keys = ["dynamic/kept"] if "dynamic/kept" in now else [f"{stage}/informative" for stage in self._learning]
        seen = any((now.get(key) or 0) > 0 for key in (*keys, "replay/informative"))
        learns = (seen or self._config.single_stage_share) and now.get("learning_sequences") != 0
        self._dead = 0 if learns else self._dead + 1
        if not learns:
            return
        self._no_gradient = self._no_gradient + 1 if now.get("grad_norm") == 0 else 0
        # Before the first update, and while the warm-up's rate is 0, the distance is rightly 0.
        self._no_distance = self._no_distance + 1 if now.get("kl") == 0 and (now.get("learning_rate") or 0) > 0 else 0

    def _remember_best(self) -> None:
        """Keep the best moving mean of the drafts' reward, and how much rewards scatter from step to step.

        The scatter comes from successive differences, which a trend hardly touches: the best of many noisy means is
        high by chance, and only a fall beyond that chance is one.
        """
        for name, values in (("first", self._values("stage1/reward", 2)), ("gap", self._gaps(2))):
            if len(values) == 2:
                seen = self._scatter.setdefault(name, {"sum": 0.0, "n": 0})
                seen["sum"] += (values[1] - values[0]) ** 2 / 2
                seen["n"] += 1
        first, second = self._values("stage1/reward", _HALF), self._values("stage2/reward", _HALF)
        if len(first) == _HALF and (self._best is None or fmean(first) > self._best["first"]):
            second_mean = fmean(second) if second else None
            self._best = {"first": fmean(first), "second": second_mean, "step": self._now["step"]}

    def _gaps(self, steps: int) -> list[float]:
        """Refinements' minus drafts' reward: both meet the same problems, so their common luck cancels."""
        first, second = self._values("stage1/reward", steps), self._values("stage2/reward", steps)
        return [two - one for one, two in zip(first, second, strict=True)] if len(first) == len(second) else []

    def _error(self, name: str) -> float:
        """Standard error of the difference of two means over `_HALF` steps."""
        seen = self._scatter.get(name)
        return math.sqrt(2 * seen["sum"] / seen["n"] / _HALF) if seen else math.inf

    # What is found, in the order of importance.

    def _findings(self) -> Iterator[Finding]:
        yield from self._broken()
        yield from self._parted()
        yield from self._causes()
        yield from self._frozen()
        yield from self._hacked()
        yield from self._fallen()
        yield from self._entropy()
        yield from self._growing()

    def _causes(self) -> Iterator[Finding]:
        """Why there may be nothing to learn from."""
        cut = list(self._cut())
        yield from cut
        yield from self._dead_parts()
        for stage in self._learning:
            found = self._one_sided(stage)
            # What follows from being cut is not a second cause.
            if found and not (cut and cut[0].code == "mostly-truncated" and found.code == "all-wrong"):
                yield found
                return

    def _broken(self) -> Iterator[Finding]:
        for name in ("grad_norm", "loss"):
            value = self._now.get(name)
            if isinstance(value, float) and not math.isfinite(value):
                text = f"{name} became {value} at step {self._now['step']}; such an update ruins the adapter. Lower "
                text += f"--learning-rate (now {self._config.learning_rate:g}), or use --dtype float32 or bfloat16."
                yield Finding("not-finite", "stop", text)
                return

    def _parted(self) -> Iterator[Finding]:
        """Sampler and policy give the same tokens other probabilities."""
        values = self._values("sampler_gap", _GAP_STEPS)
        if len(values) < _GAP_STEPS or min(values) <= _GAP_WARNING:
            return
        text = (
            f"Sampler and policy differ by {fmean(values):.2g} nats per token in the last {_GAP_STEPS} steps: what is "
            "sampled is not what learns. Likely causes: the sampler holds an older adapter or other base weights, or "
            "does not apply --temperature."
        )
        if min(values) > _GAP_STOP:
            yield Finding("sampler-gap", "stop", f"{text} Use --sampler transformers, and please report it.")
        else:
            yield Finding("sampler-gap", "warning", f"{text} Low precision can do it too: compare --dtype float32.")

    def _cut(self) -> Iterator[Finding]:
        shares = {stage: share for stage in self._groups if (share := self._mean(f"{stage}/truncated", 5)) is not None}
        if not shares:
            return
        stage = max(shares, key=shares.__getitem__)
        share, limit = shares[stage], self._config.max_completion_length
        seen = len(self._history) * self._config.prompts_per_step * self._groups[stage]
        if share < _CUT_WARNING or seen < _CUT_COMPLETIONS:
            return
        what = f"{share:.0%} of the {self._called(stage)} were cut at {limit} tokens"
        if share >= _CUT_STRONG:
            text = f"Most never end: {what}, before they could answer, so the reward says little about the reasoning. "
            yield Finding("mostly-truncated", "warning", f"{text}Raise --max-completion-length (try {2 * limit}).")
        else:
            text = f"{what}; a cut completion rarely has an answer and counts as wrong."
            yield Finding("truncated", "warning", f"{text} Raise --max-completion-length (try {limit + limit // 2}).")

    def _dead_parts(self) -> Iterator[Finding]:
        for name, seen in self._constant.items():
            value = seen["value"]
            enough = seen["steps"] >= _CONSTANT_STEPS and seen["completions"] >= _CONSTANT_COMPLETIONS
            # `accuracy` at its bounds is what all-wrong and all-right explain better; `format` at 1 is the aim.
            if not enough or name == "accuracy" or (name == "format" and value == 1):
                continue
            always = "abstained" if value is None else f"was always {round(float(value), 4)}"
            yield Finding(
                f"dead-reward:{name}",
                "warning",
                f"Dead reward: `{name}` {always} on {seen['completions']} completions in {seen['steps']} steps, so it "
                "teaches nothing. Compare it with samples.jsonl, or leave it out of --reward-funcs.",
            )

    def _one_sided(self, stage: str) -> Finding | None:
        steps = min(max(5, -(-_GROUPS // self._config.prompts_per_step)), _HISTORY)
        if len(self._history) < 3 or len(self._history) * self._config.prompts_per_step < _GROUPS:
            return None
        wrong, right = self._mean(f"{stage}/all_wrong", steps), self._mean(f"{stage}/all_right", steps)
        chance = self._odds(stage, steps)
        if wrong is not None and wrong >= _ONE_SIDED:
            reason = self._main_reason(stage, steps)
            hint = _REASON_HINTS.get(reason, _REASON_HINTS["wrong"])
            text = f"{wrong:.0%} of the groups of {self._called(stage)} have no right answer ({chance}). "
            return Finding("all-wrong", "warning", f"{text}Mostly `{reason}`: {hint}.")
        if right is not None and right >= _ONE_SIDED:
            text = (
                f"{right:.0%} of the groups of {self._called(stage)} are all right, too easy to learn from ({chance})."
            )
            return Finding("all-right", "warning", f"{text} Use harder problems (--data) or a higher --temperature.")
        return None

    def _odds(self, stage: str, steps: int) -> str:
        rate, size = self._mean(f"{stage}/accuracy", steps) or 0.0, self._groups[stage]
        seen = self._mean(f"{stage}/informative", steps) or 0.0
        mixed = 1 - rate**size - (1 - rate) ** size
        return f"pass rate {rate:.1%}; {seen:.0%} of the groups informative, {mixed:.0%} expected at {size} per group"

    def _main_reason(self, stage: str, steps: int) -> str:
        totals: dict[str, float] = {}
        for entry in self._history[-steps:]:
            for reason, times in (entry.get(f"{stage}/reasons") or {}).items():
                totals[reason] = totals.get(reason, 0) + times
        totals.pop("correct", None)
        return max(totals, key=totals.__getitem__, default="wrong")

    def _frozen(self) -> Iterator[Finding]:
        if self._no_gradient >= 2:
            seen = f"the gradient was exactly 0 for {self._no_gradient} steps although groups were informative"
        elif self._no_distance >= 5:
            seen = f"the KL to the model without adapter was exactly 0 for {self._no_distance} steps of updates"
        else:
            return
        text = f"The adapter does not learn: {seen}. Check that --lora-target-modules names modules that the model uses"
        yield Finding("frozen", "warning", f"{text}.")

    def _hacked(self) -> Iterator[Finding]:
        for stage in self._learning:
            gain, error = self._change(f"{stage}/reward")
            skill, _ = self._change(f"{stage}/accuracy")
            if gain is None or skill is None or gain < max(0.05, 3 * error) or skill > 0.01:
                continue
            if (self._mean(f"{stage}/accuracy", _HALF) or 0) >= 0.95:
                continue
            part = self._main_gain(stage)
            own = ", the policy's grade of itself" if (part, self._config.judge_by) == ("judge", "policy") else ""
            where = f": the gain is in `{part}`{own}" if part else ""
            text = f"The reward of the {self._called(stage)} rose by {gain:.2f} within {_HISTORY} steps, their "
            text += f"accuracy by {100 * skill:+.1f} points{where}. It may be earned without skill: lower that part's "
            yield Finding("reward-hacking", "warning", f"{text}weight in --reward-weights, and read samples.jsonl.")
            return

    def _change(self, key: str) -> tuple[float | None, float]:
        """Newer minus older half of the history, and the standard error of that difference."""
        new, old = self._values(key, _HALF), self._values(key, _HALF, skip=_HALF)
        if len(new) < _HALF or len(old) < _HALF:
            return None, 0.0
        return fmean(new) - fmean(old), math.sqrt((pvariance(new) + pvariance(old)) / (_HALF - 1))

    def _main_gain(self, stage: str) -> str | None:
        prefix = f"{stage}/rewards/"
        gains = {key.removeprefix(prefix): self._change(key)[0] or 0.0 for key in self._now if key.startswith(prefix)}
        gains.pop("accuracy", None)
        return max(gains, key=gains.__getitem__, default=None)

    def _fallen(self) -> Iterator[Finding]:
        """The answer-leak, and collapse in general: drafts get worse than they were."""
        values, best = self._values("stage1/reward", _HALF), self._best
        if best is None or len(values) < _HALF or best["first"] <= 0:
            return
        now, loss = fmean(values), best["first"] - fmean(values)
        if loss < _FALL * best["first"] or loss < 2.5 * self._error("first"):
            return
        seen = f"from {best['first']:.2f} (best, step {best['step']}) to {now:.2f}"
        slower = f"ower --learning-rate (now {self._config.learning_rate:g})"
        kept = "the adapter of the best held-out evaluation is kept"
        if self._leaks(loss):
            copied = self._mean("stage2/copied", _HALF)
            share = "" if copied is None else f" ({copied:.0%} repeat it)"
            other = "" if "stage1" in self._config.learning_stages else "Use --algorithm igrpo-joint, or l"
            cure = f"{other or 'L'}{slower}"
            text = f"Answer leak: the drafts' reward fell {seen}, that of the refinements did not. They copy the "
            text += f"draft's answer{share}, and single-pass skill is being lost. {cure}; {kept}."
            yield Finding("answer-leak", "warning", text)
        elif loss > 4.5 * self._error("first"):
            text = f"The reward of the {self._called('stage1')} fell {seen}: the policy gets worse. L{slower}; {kept}."
            yield Finding("reward-fall", "warning", text)

    def _leaks(self, loss: float) -> bool:
        """Whether the refinements' reward stayed up while the drafts' fell by `loss`."""
        best, second = self._best, self._mean("stage2/reward", _HALF)
        if best is None or second is None or not best["second"]:
            return False
        second_loss = best["second"] - second
        comparable = second_loss / abs(best["second"]) >= loss / best["first"] / 2
        return not comparable and loss - second_loss > 3 * self._error("gap")

    def _entropy(self) -> Iterator[Finding]:
        from igrpo_lite.algorithms.tokens import tokens_of  # imports torch

        values = self._values("entropy", 5)
        if len(values) < 3 or tokens_of(self._config).uncertain:
            return
        mean, rate = fmean(values), f"--learning-rate (now {self._config.learning_rate:g})"
        if mean < _ENTROPY_LOW:
            text = f"Entropy fell to {mean:.3f} nats per token: rollouts are alike, so groups stop being informative."
            yield Finding("entropy-low", "warning", f"{text} Lower {rate} or raise --temperature.")
        elif mean > _ENTROPY_HIGH:
            text = f"Entropy rose to {mean:.1f} nats per token: samples are close to random; this rarely recovers."
            yield Finding("entropy-high", "warning", f"{text} Lower {rate} or --temperature.")

    def _growing(self) -> Iterator[Finding]:
        for kind, found in self._memory.growing():
            name = {"rss": "Memory", "device": "GPU memory"}[kind]
            text = (
                f"{name} has grown from {found.first:,.0f} MiB at step {found.since} to {found.last:,.0f} MiB. Stopped "
                "with Ctrl-C and started again, the run goes on from here with fresh memory"
            )
            yield Finding(f"memory:{kind}", "warning", f"{text}.")

    def _called(self, stage: str) -> str:
        return "completions" if len(self._groups) == 1 else {"stage1": "drafts", "stage2": "refinements"}[stage]


def _kept(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """What a diagnosis may read: no times, which would make states of equal runs differ."""
    names = ("step", "loss", "grad_norm", "learning_rate", "entropy", "kl", "learning_sequences", "sampler_gap")
    prefixes = ("stage1/", "stage2/", "replay/", "dynamic/")
    return {key: value for key, value in metrics.items() if key in names or key.startswith(prefixes)}


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and math.isfinite(value)


def _same(one: float | None, other: float | None) -> bool:
    # Means of equal values differ in their last bits.
    return one == other if one is None or other is None else math.isclose(one, other, rel_tol=1e-9, abs_tol=1e-12)
