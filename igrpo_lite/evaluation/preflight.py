"""Before a run: can its rewards be earned at all, do its prompts fit, and would its groups teach anything?

Half of all failed runs have a reward that nothing can earn. Each part looks at one link of the chain, in the order of
cost; the model comes last.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean, median, pvariance
from typing import Any, Literal

from igrpo_lite.algorithms.judging import PolicyJudge
from igrpo_lite.answers.checker import AnswerChecker
from igrpo_lite.config import RunConfig
from igrpo_lite.errors import RewardError, UserError
from igrpo_lite.evaluation.passrate import JudgeGroup, PassRate, pass_rates
from igrpo_lite.problems.loading import ProblemSets
from igrpo_lite.prompts import PromptBuilder
from igrpo_lite.rewards.calls import Calls
from igrpo_lite.rewards.judge import Judgement
from igrpo_lite.rewards.judge_prompt import judge_prompt, judge_template
from igrpo_lite.rewards.scorer import Scorer, right_text
from igrpo_lite.sampling.base import Sampler
from igrpo_lite.types import Completion, Problem, Prompt, Score
from igrpo_lite.workbench import Workbench
from igrpo_lite.worker.functions import in_short

MAX_UNVERIFIED = 0.05
"""Share of gold answers that may fail to verify against themselves before that is an error."""

CLIPPED_WARNING, CLIPPED_ERROR = 0.2, 0.5
FEW_INFORMATIVE = 0.3
LOPSIDED = 0.5
"""Share of a right answer's reward that a wrong one may earn by its form; the paper's own rewards give half."""
_SHOWN = 3
_WRONG = "987654321"


@dataclass(frozen=True, slots=True)
class Finding:
    """What is wrong and what to do; an ``error`` makes the check fail."""

    level: Literal["error", "warning"]
    text: str


@dataclass(slots=True)
class Part:
    """One part of the check: what was seen, in lines and in numbers, and what is wrong with it."""

    title: str
    lines: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)

    def error(self, text: str) -> None:
        self.findings.append(Finding("error", text))

    def errors(self, error: UserError) -> None:
        for text in error.problems:
            self.error(text)

    def warning(self, text: str) -> None:
        self.findings.append(Finding("warning", text))


@dataclass(slots=True)
class Preflight:
    """All parts that could be looked at; a broken one ends the check."""

    parts: list[Part] = field(default_factory=list)

    @property
    def failed(self) -> bool:
        return any(finding.level == "error" for part in self.parts for finding in part.findings)

    def to_json(self) -> dict[str, Any]:
        return {"failed": self.failed, "parts": [asdict(part) for part in self.parts]}


def preflight(
    config: RunConfig,
    problems: int = 16,
    samples: int = 4,
    with_model: bool = True,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Preflight:
    """Check what a run of ``config`` would work with.

    Args:
        problems: training problems that the model is tried on, drawn evenly.
        samples: completions sampled of each.
        with_model: load the model and sample.
        on_progress: called with (finished, expected) completions.

    Raises:
        UserError: data, prompts or model cannot be used at all.
    """
    found = Preflight()
    with Workbench(config) as bench:
        scorer = bench.open_scorer()
        found.parts.append(check_data(bench.sets, scorer.checker, config))
        found.parts.append(check_rewards(bench.sets.train, scorer, config))
        bench.fit("training", "held-out")
        found.parts.append(check_prompts(bench))
        if with_model and not found.failed:
            every = max(1, len(bench.train) // problems)
            found.parts.append(try_model(bench, bench.train[::every][:problems], samples, on_progress))
    return found


def check_data(sets: ProblemSets, checker: AnswerChecker, config: RunConfig) -> Part:
    """What was loaded, and whether each gold answer is recognised when somebody gives just that."""
    part = Part("problems", sets.report.lines())
    for name, problems in (("training", sets.train), ("held-out", sets.held_out)):
        items = [(right_text(p.answer, config.answer_style), p.answer, False) for p in problems]
        verdicts = checker.judge(items)
        bad = [(p, v) for p, v in zip(problems, verdicts, strict=True) if v.reason != "correct"]
        share = len(bad) / len(problems)
        part.numbers[f"{name}_unverified"] = len(bad)
        part.lines.append(
            f"{len(problems) - len(bad):,} of {len(problems):,} {name} gold answers verify against themselves"
        )
        if bad:
            shown = "; ".join(f"{p.id}: {p.answer[:60]!r} ({v.reason})" for p, v in bad[:_SHOWN])
            text = f"{len(bad):,} {name} gold answers ({share:.1%}) do not verify against themselves: {shown}"
            if share > MAX_UNVERIFIED:
                part.error(f"{text}. Choose the column with the final answer (--answer-column)")
            else:
                part.warning(f"{text}. No completion can earn accuracy there")
    return part


def check_rewards(problems: Sequence[Problem], scorer: Scorer, config: RunConfig) -> Part:
    """What the rewards give to the right answer in the right form, to a wrong one in that form, and to no answer."""
    part = Part("rewards")
    texts = {
        "right answer": lambda p: right_text(p.answer, config.answer_style),
        "wrong answer": lambda p: right_text(_WRONG, config.answer_style),
        "no answer": lambda p: "I do not know.",
        "empty": lambda p: "",
    }
    rewards: dict[str, float | None] = {}
    try:
        scorer.check(problems[0])
        for name, text in texts.items():
            rewards[name], shown = _earned([(p, text(p)) for p in problems[:_SHOWN]], scorer)
            part.lines.append(f"{name}: {shown}")
    except RewardError as error:
        part.errors(error)
        return part
    _tell_failures(part, scorer)
    part.numbers["rewards"] = rewards
    if scorer.asks_policy:
        part.lines.append("judge is the policy, which is asked once it is loaded (below); until then it abstains")
        return part
    right = rewards["right answer"]
    others = [reward for name, reward in rewards.items() if name != "right answer" and reward is not None]
    if right is None:
        part.error("every reward abstains on a right answer: nothing draws the model to it; mend the rewards")
    elif config.reward_funcs == ["random"]:
        part.warning("the only reward is random, a control: what a run gains with it, it has not learned from answers")
    elif others and right <= max(others):
        part.error(
            f"a right answer earns {right:.2f}, no more than something else ({max(others):.2f}): nothing draws the "
            "model to right answers; mend the rewards or their weights"
        )
    elif (wrong := rewards["wrong answer"]) is not None and wrong > LOPSIDED * right > 0:
        part.warning(
            f"a wrong answer in the right form earns {wrong:.2f} of the {right:.2f} that a right one does: form may "
            "rise while accuracy does not; give accuracy more of --reward-weights"
        )
    return part


def _earned(texts: Sequence[tuple[Problem, str]], scorer: Scorer) -> tuple[float | None, str]:
    """Mean reward of completions with these texts, ``None`` where all rewards abstain; and in words, part by part."""
    scores = []
    for problem, text in texts:
        completion = Completion(tuple(range(1, 9)), text, (0.0,) * 8, "stop")
        unasked = [Judgement(None, asked=False)] if scorer.asks_policy else None
        scores += scorer.score(problem, Prompt(problem.question, ()), [completion], unasked)
    values = [score.reward for score in scores if score.reward is not None]
    parts = {n: [value for s in scores if (value := s.parts[n]) is not None] for n in scorer.names}
    shown = ", ".join(f"{n} {fmean(v):.2f}" if v else f"{n} abstains" for n, v in parts.items())
    return (fmean(values), f"{fmean(values):.2f} ({shown})") if values else (None, f"none ({shown})")


def _tell_failures(part: Part, scorer: Scorer) -> None:
    """Warn of calls of rewards that failed since the last time."""
    for name, calls in scorer.failures.items():
        if calls.failed:
            part.warning(
                f"reward {name} failed in {calls.failed} of {calls.made} calls; those completions were scored "
                f"without it: {in_short(calls.first)}"
            )
        scorer.failures[name] = Calls(tokens=calls.tokens)  # what a judge has cost stays spent


def check_prompts(bench: Workbench) -> Part:
    """Both prompts of the first problem with all special tokens, the lengths of all, and the budget of tokens."""
    part, config, prompts = Part("prompts"), bench.config, bench.prompts
    problem = bench.sets.train[0]
    first = prompts.first(problem.question)
    draft = prompts.tokenizer.encode("(the chosen draft)", add_special_tokens=False)
    second = prompts.second(problem.question, first, draft)
    shown = {"stage 1": first, "stage 2": second}
    if prompts.judge is not None:
        shown["judge"] = prompts.judge.first(judge_prompt(judge_template(config), problem, "(the completion)"))
    for name, prompt in shown.items():
        part.lines += [f"{name}, {len(prompt.ids)} tokens:", *(f"  | {line}" for line in prompt.text.splitlines())]
    train, held_out = bench.fits["training"], bench.fits["held-out"]
    lengths = sorted(train.lengths)
    part.numbers |= {"median": median(lengths), "longest": lengths[-1], "dropped": train.dropped + held_out.dropped}
    part.lines.append(
        f"prompt tokens: median {median(lengths):g}, 95 % below {lengths[int(0.95 * (len(lengths) - 1))] + 1}, longest "
        f"{lengths[-1]}; left out above {config.max_prompt_length}: {train.dropped} training, {held_out.dropped} "
        "held-out problems"
    )
    if train.kept and held_out.kept and train.dropped > 0.1 * len(lengths):
        part.warning(
            f"{train.dropped / len(lengths):.0%} of the training problems are too long; raise --max-prompt-length"
        )
    try:
        needed = bench.check_lengths()
    except UserError as error:
        part.errors(error)
        return part
    part.numbers["needed"] = needed
    what = "prompt, draft and completion" + (", or what the judge reads and writes," if prompts.judge else "")
    part.lines.append(f"longest {what} together: at most {needed} tokens; they fit the model")
    return part


def try_model(
    bench: Workbench, problems: Sequence[Problem], samples: int, on_progress: Callable[[int, int], None]
) -> Part:
    """Sample from the model as it is, and say what its rewards promise for training."""
    bench.load()
    config, scorer, sampler, prompts = bench.config, bench.scorer, bench.sampler, bench.prompts
    try:
        score = _scored_by_policy(scorer, sampler, prompts, config) if scorer.asks_policy else scorer.score
        rates = pass_rates(problems, sampler, prompts, config, samples, score, on_progress)
        part = judge_rates(rates, config)
        _tell_failures(part, scorer)
    except RewardError as error:
        part = Part("model")
        part.errors(error)
    part.lines = bench.notes + part.lines
    return part


def _scored_by_policy(scorer: Scorer, sampler: Sampler, prompts: PromptBuilder, config: RunConfig) -> JudgeGroup:
    judge = PolicyJudge(config, prompts)

    def score(problem: Problem, prompt: Prompt, completions: Sequence[Completion]) -> list[Score]:
        judgements = judge.judge(sampler, problem, completions, config.seed, "pass-rate", problem.id)
        return scorer.score(problem, prompt, completions, judgements)

    return score


def judge_rates(rates: Sequence[PassRate], config: RunConfig) -> Part:
    """What samples from the plain prompt say about a run: pass rate, cut completions, groups that can teach."""
    part = Part("model")
    samples = len(rates[0].completions)
    total = samples * len(rates)
    right = [round(rate.rate * samples) for rate in rates]
    share, cut = sum(right) / total, fmean(rate.truncated for rate in rates)
    reasons = Counter(score.reason for rate in rates for score in rate.scores)
    group = config.n_drafts if "stage1" in config.learning_stages else config.n_refinements
    expected = informative_share(right, samples, group)
    part.numbers |= {
        "samples": total,
        "pass_rate": share,
        "truncated": cut,
        "length": fmean(rate.length for rate in rates),
        "solved": fmean(count > 0 for count in right),
        "reasons": dict(reasons),
        "group": group,
        "informative_expected": expected,
        "informative_seen": fmean(rate.informative for rate in rates),
    }
    part.lines += [
        f"{len(rates)} problems x {samples} samples at temperature {config.temperature:g}: {share:.0%} right, "
        f"{part.numbers['solved']:.0%} of the problems solved at least once",
        f"verdicts: {', '.join(f'{reason} {count}' for reason, count in reasons.most_common())}",
        f"{part.numbers['length']:.0f} tokens a completion; {cut:.0%} cut at max_completion_length = "
        f"{config.max_completion_length}",
        f"groups of {group} in which right and wrong answers are mixed, as far as so few samples tell: {expected:.0%}"
        + (" (from the plain prompt; a good draft makes them fewer)" if "stage1" not in config.learning_stages else ""),
        *_examples(rates),
    ]
    _look_at_judge(part, rates)
    _advise(part, config, share, cut, expected, reasons["no_answer"] / total)
    return part


def _look_at_judge(part: Part, rates: Sequence[PassRate]) -> None:
    """Whether the reward ``judge`` knows right completions from wrong ones, where there are both."""
    graded = [
        (score.reason == "correct", grade)
        for r in rates
        for score in r.scores
        if (grade := score.parts.get("judge")) is not None
    ]
    right, wrong = ([grade for correct, grade in graded if correct is wanted] for wanted in (True, False))
    if not right or not wrong:
        return
    part.numbers["judge"] = {"right": fmean(right), "wrong": fmean(wrong)}
    part.lines.append(f"the judge gives right completions {fmean(right):.2f}, wrong ones {fmean(wrong):.2f} on average")
    if fmean(right) <= fmean(wrong):
        part.warning(
            "the judge grades wrong completions no lower than right ones, so what is learned from it leads astray; "
            "take a stronger judge, another --judge-prompt, or leave it out"
        )


def informative_share(right: Sequence[int], samples: int, group: int) -> float:
    """Expected share of groups with both right and wrong answers, from ``right`` of ``samples`` for each problem.

    The pass rates of all problems are taken as one Beta distribution, with mean and variance matched to the counts
    (the binomial part of the variance taken out). With it, 1 - E[p^G] - E[(1-p)^G] is a quotient of Beta functions.
    """
    mean = sum(right) / (samples * len(right))
    if not 0 < mean < 1:
        return 0.0
    spread = pvariance([count / samples for count in right])
    between = (spread - mean * (1 - mean) / samples) / (1 - 1 / samples) if samples > 1 else 0.0
    if between <= 0:
        return 1 - mean**group - (1 - mean) ** group
    size = max(1e-3, mean * (1 - mean) / between - 1)
    a, b = mean * size, (1 - mean) * size

    def moment(x: float) -> float:  # E[p^G] of Beta(x, size - x)
        terms = math.lgamma(x + group) - math.lgamma(x), math.lgamma(a + b) - math.lgamma(a + b + group)
        return math.exp(sum(terms))

    return max(0.0, 1 - moment(a) - moment(b))


def _advise(part: Part, config: RunConfig, share: float, cut: float, expected: float, unanswered: float) -> None:
    longer = f"raise --max-completion-length (now {config.max_completion_length})"
    if cut >= CLIPPED_ERROR:
        part.error(f"{cut:.0%} of the completions are cut before they end, and mostly earn nothing; {longer}")
    elif cut >= CLIPPED_WARNING:
        part.warning(f"{cut:.0%} of the completions are cut before they end; {longer}")
    if share == 0:
        why = "too hard for this model, another answer form than asked for, or the wrong answer column"
        why = f"mostly because they are cut off: {longer} first" if cut >= CLIPPED_ERROR else why
        part.error(f"not one of {part.numbers['samples']} completions is right: {why}; look at the sample above")
    elif share == 1:
        part.error("every completion is right: there is nothing left to learn from these problems; take harder ones")
    elif expected < FEW_INFORMATIVE:
        what = "hard" if share < 0.5 else "easy"
        part.warning(
            f"only {expected:.0%} of the groups would teach anything, most problems are too {what}: keep those that "
            "the model solves sometimes (igrpo-lite scan), raise --num-generations, or set --dynamic-sampling 2"
        )
    if unanswered >= 0.3 and share > 0:
        part.warning(
            f"{unanswered:.0%} of the completions give no answer that can be found; see how the model writes it, and "
            "set --answer-style or --system-prompt to suit"
        )


def _examples(rates: Sequence[PassRate]) -> list[str]:
    """One right and one wrong completion, if there are such."""
    lines = []
    for wanted, name in ((True, "a right one"), (False, "a wrong one")):
        found = next(
            (
                (rate.problem, completion, score)
                for rate in rates
                for completion, score in zip(rate.completions, rate.scores, strict=True)
                if (score.reason == "correct") is wanted
            ),
            None,
        )
        if found is not None:
            problem, completion, score = found
            text = " ".join(completion.text.split())
            shown = text if len(text) <= 300 else f"{text[:140]} ... {text[-150:]}"
            lines.append(f"{name} ({score.reason}; gold {problem.answer}): {shown}")
    return lines
