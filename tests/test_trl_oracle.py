"""Same rollouts in, same loss and same gradients out as TRL 1.16's GRPOTrainer, whose real code runs here.

TRL's side: its rollout hook is handed fixed completions; `_generate_and_score_completions` pads them, computes old and
reference log-probabilities, the sampler's correction and advantages; the adapter moves; `_compute_loss` gives the loss.
Our side starts from the same lists of token ids and rewards: every sequence alone through a copy of the model that TRL
never saw, log-probabilities from full logits, then only `igrpo_lite.algorithms`.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import trl  # 1.15 does not run without a GPU
from datasets import Dataset
from models import VOCAB, make_model
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer

from igrpo_lite.algorithms.advantages import advantages
from igrpo_lite.algorithms.objectives import TokenLoss, Totals, reduce_loss, sampler_weights, token_loss
from igrpo_lite.config import RunConfig
from igrpo_lite.config.defaults import ENTROPY_SHARE
from igrpo_lite.tiny import MODEL_DIR

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # the rollout hook warns

GROUPS, SIZE, LONGEST = 3, 4, 12
TEMPERATURE = 0.9
LENGTHS = [12, 3, 7, 1, 9, 9, 2, 5, 12, 4, 6, 8]
REWARDS = [1.0, 0.0, 0.1, 0.0, 0.7, 1.1, 0.7, 0.0, 1.0, 1.0, 0.0, None]
KINDS = ("grpo", "dr_grpo", "dapo", "gspo", "cispo")
STALE = {"num_iterations": 2}  # the adapter has moved since the rollouts
VARIANTS: dict[str, dict[str, Any]] = {
    "on policy": {},
    "stale": STALE,
    "kl": STALE | {"beta": 0.1},
    "clip higher": STALE | {"epsilon": 0.1, "epsilon_high": 1.3},
    "batch advantages": STALE | {"scale_rewards": "batch"},
    "plain advantages": STALE | {"scale_rewards": "none"},
    "token advantages": STALE | {"token_advantages": True},
    "selected tokens": STALE | {"selected": True},
    "truncated masked": STALE | {"mask_truncated_completions": True},
    "entropy": STALE | {"tokens": "entropy"},
    "sampler, token_truncate": {"importance_sampling_mode": "token_truncate"},
    "sampler, token_mask": {"importance_sampling_mode": "token_mask"},
    "sampler, sequence_truncate": {"importance_sampling_mode": "sequence_truncate"},
    "sampler, sequence_mask": {"importance_sampling_mode": "sequence_mask"},
    "everything": STALE
    | {
        "beta": 0.05,
        "epsilon_high": 1.3,
        "token_advantages": True,
        "selected": True,
        "mask_truncated_completions": True,
        "importance_sampling_mode": "token_mask",
    },
}


@dataclass
class Case:
    """One step's rollouts, as plain lists, and the settings of both sides."""

    config: RunConfig
    prompts: list[list[int]]
    completions: list[list[int]]
    rewards: list[float | None] = field(default_factory=lambda: list(REWARDS))
    selected: list[list[int]] | None = None
    sampler: list[list[float | None]] | None = None
    token_advantages: list[Tensor] | None = None


class Oracle:
    """TRL's trainer, and a copy of its model from before it was TRL's."""

    def __init__(self, folder: str) -> None:
        model = make_model("qwen2", attention="sdpa")  # transformers' own attention: nothing of ours computes here
        torch.manual_seed(2)
        lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
        policy = get_peft_model(model, lora).eval()
        self.model = copy.deepcopy(policy)
        self.case: Case | None = None
        args = trl.GRPOConfig(
            output_dir=folder,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            temperature=TEMPERATURE,
            num_generations=SIZE,
            per_device_train_batch_size=GROUPS * SIZE,
            use_bias_correction_kl=False,  # the paper's k3, without ratio
            vllm_importance_sampling_clip_max=1.2,
        )
        self.trainer = trl.GRPOTrainer(
            policy,
            lambda prompts, **_: self.case.rewards,
            args=args,
            train_dataset=Dataset.from_dict({"prompt": ["unused"]}),
            processing_class=AutoTokenizer.from_pretrained(MODEL_DIR),
            rollout_func=lambda prompts, trainer: self.rollouts(),
        )
        self.trainer.current_gradient_accumulation_steps = 1  # one micro-batch is the whole step
        self.end = self.trainer.eos_token_ids[0]
        self.start = copy.deepcopy(self.adapter(self.model))

    @staticmethod
    def adapter(model: torch.nn.Module) -> dict[str, Tensor]:
        return {name: p for name, p in model.named_parameters() if p.requires_grad}

    def rollouts(self) -> dict[str, Any]:
        found = {
            "prompt_ids": self.case.prompts,
            "completion_ids": self.case.completions,
            "logprobs": self.case.sampler,
        }
        return found if self.case.selected is None else found | {"env_mask": self.case.selected}

    def move(self, model: torch.nn.Module, config: RunConfig) -> None:
        """An optimizer step of some size, the same for both models."""
        random = torch.Generator().manual_seed(5)
        for parameter in self.adapter(model).values() if config.num_iterations > 1 else ():
            parameter.data += 0.02 * torch.randn(parameter.shape, generator=random)

    def reset(self) -> None:
        for model in (self.model, self.trainer.model):
            model.zero_grad()
            for name, parameter in self.adapter(model).items():
                parameter.data.copy_(self.start[name])


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    return Oracle(str(tmp_path_factory.mktemp("trl")))


@pytest.fixture
def oracle(shared: Oracle, monkeypatch: pytest.MonkeyPatch) -> Iterator[Oracle]:
    monkeypatch.setattr("igrpo_lite.algorithms.objectives.SAMPLER_CAP", 1.2)  # so that it matters
    shared.reset()
    yield shared
    shared.reset()


def make_case(oracle: Oracle, selected: bool = False, token_advantages: bool = False, **settings: Any) -> Case:
    random = torch.Generator().manual_seed(3)
    settings = {"importance_sampling_mode": "none", "max_completion_length": LONGEST} | settings
    config = RunConfig(**settings)

    def ids(length: int) -> list[int]:
        return torch.randint(8, VOCAB, (length,), generator=random).tolist()

    prompts = [prompt for length in (5, 2, 8) for prompt in [ids(length)] * SIZE]
    completions = [ids(length) for length in LENGTHS]
    ended = [[*c[:-1], oracle.end] if len(c) < LONGEST else c for c in completions]  # the others are truncated
    case = Case(config, prompts, ended)
    if selected:
        case.selected = [(torch.rand(n, generator=random) < 0.6).int().tolist() for n in LENGTHS]
        case.selected[1] = [0, 0, 0]
    if token_advantages:
        case.token_advantages = [torch.randn(n, generator=random) for n in LENGTHS]
    if config.importance_sampling_mode != "none":
        with torch.no_grad():
            exact, _ = score(oracle.model, case)
        case.sampler = [(row + 0.15 * torch.randn(row.shape, generator=random)).tolist() for row in exact]
        case.sampler[4][2] = case.sampler[6][0] = None  # vLLM had none for these
    return case


# --- TRL's side --------------------------------------------------------------------------------------------------


def configure(patch: pytest.MonkeyPatch, trainer: Any, config: RunConfig) -> None:
    gspo, cispo = config.loss_type == "gspo", config.loss_type == "cispo"
    high = config.epsilon_high if config.epsilon_high is not None else 5.0 if cispo else config.epsilon
    sampler = config.importance_sampling_mode != "none"
    values = {
        "loss_type": "grpo" if gspo else config.loss_type,
        "importance_sampling_level": "sequence" if gspo else "token",
        "epsilon_low": config.epsilon,
        "epsilon_high": high,
        "beta": config.beta,
        "num_iterations": config.num_iterations,
        "scale_rewards": config.scale_rewards,
        "max_completion_length": config.max_completion_length,
        "mask_truncated_completions": config.mask_truncated_completions,
        "top_entropy_quantile": ENTROPY_SHARE if config.tokens == "entropy" else 1.0,
        "use_vllm": sampler,  # only its correction: the rollouts come from the hook
        "vllm_importance_sampling_mode": config.importance_sampling_mode,
        "_last_loaded_step": trainer.state.global_step,
    }
    for name, value in values.items():
        patch.setattr(trainer, name, value, raising=name != "_last_loaded_step")


def trl_step(oracle: Oracle, patch: pytest.MonkeyPatch, case: Case) -> tuple[dict[str, Tensor], Tensor]:
    """TRL's batch of tensors and its loss, whose gradients are left in the model."""
    trainer = oracle.trainer
    oracle.case = case
    configure(patch, trainer, case.config)
    trainer.model.train()
    batch = trainer._generate_and_score_completions([{"prompt": "unused"}] * len(case.prompts))
    if case.token_advantages is not None:
        batch["advantages"] = pad_sequence(case.token_advantages, batch_first=True)
    oracle.move(trainer.model, case.config)
    loss = trainer._compute_loss(trainer.model, batch)
    loss.backward()
    return batch, loss.detach()


# --- our side ----------------------------------------------------------------------------------------------------


def score(model: torch.nn.Module, case: Case) -> tuple[list[Tensor], list[Tensor]]:
    """Log-probabilities and entropies of the completions' tokens, sequence by sequence from full logits."""
    logprobs, entropies = [], []
    for prompt, completion in zip(case.prompts, case.completions, strict=True):
        logits = model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        table = (logits.float() / TEMPERATURE).log_softmax(dim=-1)
        logprobs.append(table.gather(1, torch.tensor(completion)[:, None])[:, 0])
        entropies.append(-(table.exp() * table).sum(dim=-1).detach())
    return logprobs, entropies


def our_advantages(case: Case) -> list[Tensor]:
    rewards = torch.tensor([math.nan if r is None else r for r in case.rewards])
    return advantages(rewards.split(SIZE), case.config.scale_rewards)


def our_step(oracle: Oracle, case: Case) -> tuple[TokenLoss, Tensor]:
    """The same with our functions on rows of the learning tokens alone, padded with zeros."""
    model, config = oracle.model.eval(), case.config
    with torch.no_grad():
        old, _ = score(model, case)
        with model.disable_adapter():
            reference, _ = score(model, case)
    oracle.move(model, config)
    logprobs, entropies = score(model, case)
    learn = [torch.tensor(row).bool() for row in case.selected or [[1] * n for n in LENGTHS]]
    if config.mask_truncated_completions:
        learn = [row & (ids[-1] == oracle.end) for row, ids in zip(learn, case.completions, strict=True)]
    counts = torch.stack([row.sum() for row in learn])  # TRL's, also with the entropy mask
    weights = [torch.ones(n) for n in LENGTHS]
    if config.tokens == "entropy":
        least = torch.quantile(torch.cat(entropies), 1 - ENTROPY_SHARE)
        uncertain = [row >= least for row in entropies]
        # TRL's ratio of a sequence runs over all its tokens, ours over those given; token ratios need the chosen alone.
        learn, weights = (learn, uncertain) if config.loss_type == "gspo" else (uncertain, weights)

    def rows(values: list[Tensor]) -> Tensor:
        return pad_sequence([v[chosen] for v, chosen in zip(values, learn, strict=True)], batch_first=True)

    mask = rows(learn)
    correction = None
    if case.sampler is not None:
        reported = [torch.tensor([math.nan if x is None else x for x in row]) for row in case.sampler]
        correction = sampler_weights(rows(old), rows(reported), mask, config)
    per_row = torch.cat(our_advantages(case))
    advantage = per_row if case.token_advantages is None else rows(case.token_advantages)
    on_policy = config.num_iterations == 1
    token = token_loss(
        rows(logprobs),
        rows(logprobs).detach() if on_policy else rows(old),
        advantage,
        mask,
        config,
        rows(reference) if config.beta else None,
        correction,
    )
    totals = Totals(len(LENGTHS), float(counts.sum()))
    loss = reduce_loss(token.loss, rows(weights) * mask, counts, totals, config)
    loss.backward()
    return token, loss.detach()


# --- the comparison ----------------------------------------------------------------------------------------------


def assert_same_gradients(oracle: Oracle) -> None:
    found, expected = oracle.adapter(oracle.model), oracle.adapter(oracle.trainer.model)
    assert found.keys() == expected.keys()
    largest = max(float(p.grad.abs().max()) for p in expected.values())
    assert largest > 1e-4
    for name, parameter in expected.items():
        torch.testing.assert_close(found[name].grad, parameter.grad, rtol=1e-4, atol=1e-5 * largest, msg=name)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_trls(oracle, monkeypatch, kind, variant):
    case = make_case(oracle, loss_type=kind, **VARIANTS[variant])
    _, expected = trl_step(oracle, monkeypatch, case)
    _, found = our_step(oracle, case)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert_same_gradients(oracle)


def test_tspmos_normaliser_is_dapos(oracle, monkeypatch):
    """Pairs of weight 1 with their own advantages: TRL's mean over selected tokens, whatever our ``loss_type``."""
    chosen = {"selected": True, "token_advantages": True}
    _, expected = trl_step(oracle, monkeypatch, make_case(oracle, loss_type="dapo", **chosen))
    _, found = our_step(oracle, make_case(oracle, tokens="t-spmo", **chosen))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert_same_gradients(oracle)


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v not in ("on policy", "stale")])
def test_every_variant_matters(oracle, variant):
    """Else the comparison above would prove nothing."""
    settings = VARIANTS[variant]
    _, with_it = our_step(oracle, make_case(oracle, loss_type="grpo", **settings))
    gradients = [p.grad.clone() for p in oracle.adapter(oracle.model).values()]
    oracle.reset()
    plain = {"num_iterations": settings.get("num_iterations", 1)}
    _, without = our_step(oracle, make_case(oracle, loss_type="grpo", **plain))
    assert abs(float(with_it - without)) > 1e-4
    others = [p.grad for p in oracle.adapter(oracle.model).values()]
    assert any(not torch.allclose(a, b, rtol=1e-2) for a, b in zip(gradients, others, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_clip_ratio_and_kl_are_trls(oracle, monkeypatch, kind):
    case = make_case(
        oracle, loss_type=kind, num_iterations=2, beta=0.1, epsilon=0.05, epsilon_high=1.02 if kind == "cispo" else 0.08
    )
    trl_step(oracle, monkeypatch, case)
    token, _ = our_step(oracle, case)
    metrics = oracle.trainer._metrics["train"]
    clipped = token.clipped
    if kind == "gspo":
        found = clipped.any(dim=1).float().mean()  # TRL counts sequences here
    elif kind == "cispo":
        found = (clipped & (torch.cat(our_advantages(case)) > 0)[:, None]).sum() / sum(
            LENGTHS
        )  # and positive ones here
    else:
        found = clipped.sum() / sum(LENGTHS)
    expected = metrics["cispo_clip_ratio" if kind == "cispo" else "clip_ratio/region_mean"][-1]
    assert 0.1 < expected < 0.9
    assert float(found) == pytest.approx(expected)
    assert float(token.kl.detach().sum() / sum(LENGTHS)) == pytest.approx(metrics["kl"][-1], rel=1e-4)
    assert metrics["kl"][-1] > 0.01


@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
@pytest.mark.parametrize("selected", [False, True])
def test_sampler_weights_are_trls(oracle, monkeypatch, mode, selected):
    case = make_case(oracle, loss_type="grpo", selected=selected, importance_sampling_mode=mode)
    batch, _ = trl_step(oracle, monkeypatch, case)
    learn = batch["completion_mask"].bool() & batch.get("tool_mask", torch.ones(())).bool()
    found = sampler_weights(batch["old_per_token_logps"], batch["sampling_per_token_logps"], learn, case.config)
    expected = batch["importance_sampling_ratio"].expand_as(learn)
    torch.testing.assert_close(found[learn], expected[learn])
    cut = (found == 0) if mode.endswith("mask") else (found == found.new_tensor(1.2))
    assert 0 < cut[learn].sum() < learn.sum()


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("seed", range(4))
def test_advantages_are_trls(oracle, monkeypatch, scale, seed):
    case = make_case(oracle, loss_type="grpo", scale_rewards=scale)
    random = torch.Generator().manual_seed(seed)
    rewards: list[float | None] = torch.rand(GROUPS * SIZE, generator=random).tolist()
    if seed == 1:
        rewards[:SIZE] = [0.5] * SIZE  # all equal
    if seed == 2:
        rewards[5] = rewards[6] = None
    if seed == 3:
        rewards[1:SIZE] = [None] * (SIZE - 1)  # one scored
        rewards[SIZE : 2 * SIZE] = [None] * SIZE
    case.rewards = rewards
    batch, _ = trl_step(oracle, monkeypatch, case)
    torch.testing.assert_close(torch.cat(our_advantages(case)), batch["advantages"], rtol=1e-5, atol=1e-6)
