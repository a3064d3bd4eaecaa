"""The workbench of a training run, and what the user is told of it."""

from __future__ import annotations

from igrpo_lite.config import RunConfig
from igrpo_lite.policy.loading import recompute_activations
from igrpo_lite.policy.logprobs import RowLayout, best_layout
from igrpo_lite.prompts import PromptBuilder
from igrpo_lite.workbench import Workbench


def prepare(config: RunConfig) -> Workbench:
    """Load data, check rewards on one row, filter prompts, check lengths, then load the model.

    Raises:
        UserError: whatever of this cannot work, before the next, more expensive part is tried.
    """
    bench = Workbench(config)
    try:
        bench.open_scorer().check(bench.sets.train[0])
        bench.fit("training", "held-out")
        dropped = [fit.dropped for fit in bench.fits.values()]
        bench.notes = bench.sets.report.lines() + _prompt_notes(config, bench.prompts, *dropped)
        bench.check_lengths()
        policy = bench.load_policy()
        if config.gradient_checkpointing:
            recompute_activations(policy.model)
        if isinstance(best_layout(policy.model.get_base_model()), RowLayout):
            bench.notes.append(
                "the update repeats prompts in padded rows: this model's attention cannot take token trees"
            )
        bench.start_sampler()
    except BaseException:
        bench.close()
        raise
    return bench


def _prompt_notes(config: RunConfig, prompts: PromptBuilder, dropped: int, dropped_held_out: int) -> list[str]:
    notes = []
    if prompts.plain_template:
        notes.append(f"{config.model} has no chat template (a base model?): prompts use a plain one")
    if dropped or dropped_held_out:
        notes.append(
            f"left out as longer than {config.max_prompt_length} prompt tokens: {dropped} training and "
            f"{dropped_held_out} held-out problems"
        )
    if prompts.judge is not None:
        notes.append(
            "the policy is its own judge, as it is at each step: it may learn to please itself; watch the accuracy"
        )
    if config.n_refinements and config.draft_placement == "multi-turn":
        notes.append("stage 2 continues the draft as a conversation (draft_placement multi-turn)")
    return notes
