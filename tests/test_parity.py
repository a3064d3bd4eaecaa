"""The parity probe passes good samplers, names what is wrong with broken ones, and leaves everything as it was."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from typing import ClassVar

import numpy as np
import pytest
import torch
from bad_parts import records, steps
from peft.tuners.lora import LoraLayer
from tiny_parts import SMALL, small_config, tiny_parts

from igrpo_lite.config.resolve import resolve
from igrpo_lite.errors import SamplerError
from igrpo_lite.sampling import transformers as transformers_sampler
from igrpo_lite.sampling.parity import Parity, probe
from igrpo_lite.sampling.replica import Replica
from igrpo_lite.sampling.transformers import TransformersSampler
from igrpo_lite.training import train
from igrpo_lite.training.prepare import prepare

OTHER_MODEL = "samples from another model"
NOT_FOLLOWED = "did not follow a change of the adapter"


@pytest.fixture(scope="module")
def trained():
    """With an adapter that is not zero, as after some steps."""
    made = tiny_parts(small_config())
    yield made
    made.scorer.close()


@pytest.fixture(scope="module")
def fresh():
    """With an adapter that does nothing yet, as at the start of a run."""
    made = prepare(small_config())
    yield made
    made.scorer.close()


def sampler_of(parts, replica=None, kind=TransformersSampler):
    replica = replica or Replica(parts.policy.model)
    return kind(replica, parts.prompts.tokenizer, parts.sampler.stop_ids.tolist())


def probed(parts, sampler, temperatures=(1.0,)) -> Parity:
    prompts = [parts.prompts.first(problem.question) for problem in parts.train[:4]]
    return probe(parts.policy, sampler, prompts, temperatures)


class Stale(TransformersSampler):
    """Its adapter is the one it was made with."""

    def load_adapter(self) -> None:
        pass


class Missing(Replica):
    """Samples from the base alone."""

    def refresh(self) -> None:
        for source, target in self._merges:
            target.weight.data.copy_(source.get_base_layer().weight)


class Doubled(Replica):
    """The adapter's scale is applied twice."""

    @torch.no_grad()
    def refresh(self) -> None:
        super().refresh()
        for source, target in self._merges:
            target.weight.add_(source.get_delta_weight("default"))


class OtherBase(Replica):
    """Another revision of the base: one layer's weights are a little different."""

    @torch.no_grad()
    def refresh(self) -> None:
        super().refresh()
        target = self._merges[0][1].weight
        target.mul_(1.2)


class Lukewarm(TransformersSampler):
    """Takes no notice of the temperature."""

    def run(self, requests, on_finished=None, poll=None):
        return super().run([dataclasses.replace(r, temperature=1.0) for r in requests], on_finished, poll)


class OldCache(TransformersSampler):
    """Keeps the keys and values of prompts over changes of the adapter."""

    kept: ClassVar[dict] = {}

    def run(self, requests, on_finished=None, poll=None):
        cache = self.kept

        class Run(transformers_sampler._Run):
            def prefill(self, requests):
                self.prefixes.update({r.prompt.ids: cache[r.prompt.ids] for r in requests if r.prompt.ids in cache})
                super().prefill(requests)
                cache.update(self.prefixes)

        with self.replica as model, torch.no_grad():
            return Run(self, model, on_finished).drain(requests, poll)


class NotANumber(TransformersSampler):
    def run(self, requests, on_finished=None, poll=None):
        found = super().run(requests, on_finished, poll)
        return [dataclasses.replace(c, logprobs=(math.nan, *c.logprobs[1:])) for c in found]


@pytest.mark.parametrize("temperatures", [[1.0], [0.7], [0.6, 1.3]])
@pytest.mark.parametrize("kind", ["merged", "shared"])
@pytest.mark.parametrize("which", ["fresh", "trained"])
def test_good_samplers_pass(which, kind, temperatures, request):
    parts = request.getfixturevalue(which)
    found = probed(parts, sampler_of(parts, Replica(parts.policy.model, kind)), temperatures)
    assert found.failure() is None
    assert found.mean <= found.largest < 1e-4
    assert found.mean_moved < 1e-3 < 0.5 <= found.moved
    assert (found.tolerance, found.tolerance_moved) == (1e-4, 0.02 * found.moved)


def test_a_bfloat16_model_passes_within_its_tolerance_and_faults_are_found():
    parts = tiny_parts(small_config(dtype="bfloat16"))
    found = probed(parts, parts.sampler, [0.7, 1.0])
    assert found.failure() is None
    assert 1e-6 < found.mean < 0.01
    assert found.mean_moved < 0.05
    assert (found.tolerance, found.tolerance_moved) == (0.1, 0.05 * found.moved)
    doubled = sampler_of(parts, Doubled(parts.policy.model, "merged"))
    for sampler in (doubled, sampler_of(parts, kind=Lukewarm)):
        assert NOT_FOLLOWED in (probed(parts, sampler, [0.7]).failure() or "")
    parts.scorer.close()


BROKEN = {
    "stale": lambda parts: sampler_of(parts, kind=Stale),
    "missing": lambda parts: sampler_of(parts, Missing(parts.policy.model, "merged")),
    "doubled": lambda parts: sampler_of(parts, Doubled(parts.policy.model, "merged")),
    "other base": lambda parts: sampler_of(parts, OtherBase(parts.policy.model, "merged")),
    "temperature": lambda parts: sampler_of(parts, kind=Lukewarm),
    "old cache": lambda parts: sampler_of(parts, kind=type("FreshCache", (OldCache,), {"kept": {}})),
    "not a number": lambda parts: sampler_of(parts, kind=NotANumber),
}


@pytest.mark.parametrize(
    ("which", "fault", "told"),
    [
        ("fresh", "stale", (NOT_FOLLOWED, "not pushed")),
        ("trained", "stale", (NOT_FOLLOWED, "not pushed")),
        ("fresh", "missing", (NOT_FOLLOWED, "not pushed")),
        ("trained", "missing", (OTHER_MODEL, "missing")),
        ("fresh", "doubled", (NOT_FOLLOWED, "scaled wrongly")),
        ("trained", "doubled", (OTHER_MODEL, "scaled wrongly")),
        ("fresh", "other base", (OTHER_MODEL, "other base weights")),
        ("trained", "other base", (OTHER_MODEL, "other base weights")),
        ("fresh", "temperature", (OTHER_MODEL, "temperature that is not applied")),
        ("trained", "temperature", (OTHER_MODEL, "temperature that is not applied")),
        ("fresh", "old cache", (NOT_FOLLOWED, "a KV cache of older weights")),
        ("trained", "old cache", (NOT_FOLLOWED, "a KV cache of older weights")),
        ("trained", "not a number", (OTHER_MODEL, "nan nats")),
    ],
)
def test_broken_samplers_are_named(which, fault, told, request):
    parts = request.getfixturevalue(which)
    failure = probed(parts, BROKEN[fault](parts), [0.7, 1.0]).failure()
    assert failure is not None
    assert all(words in failure for words in told), failure


def test_a_temperature_of_the_drafts_alone_is_probed_too(trained):
    """The first of two temperatures is 1, which the broken sampler gets right."""
    assert probed(trained, BROKEN["temperature"](trained), [1.0]).failure() is None
    assert OTHER_MODEL in (probed(trained, BROKEN["temperature"](trained), [1.0, 0.5]).failure() or "")


def test_an_adapter_without_effect_is_named(trained):
    modules = [module for module in trained.policy.model.modules() if isinstance(module, LoraLayer)]
    scales = [dict(module.scaling) for module in modules]
    for module in modules:
        module.scaling["default"] = 0.0
    failure = probed(trained, sampler_of(trained)).failure()
    for module, scale in zip(modules, scales, strict=True):
        module.scaling.update(scale)
    assert "it cannot learn" in (failure or "")
    assert "--lora-target-modules" in (failure or "")


def everything(parts, sampler):
    """Adapter, the sampler's copy, the mode, and all global random states."""
    tensors = {name: p.detach().clone() for name, p in parts.policy.model.named_parameters()}
    if sampler.replica._copy is not None:
        tensors |= {f"copy {name}": t.clone() for name, t in sampler.replica._copy.state_dict().items()}
    states = (torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state()))
    return tensors, (parts.policy.model.training, *states)


def assert_untouched(before, after):
    assert before[1] == after[1]
    assert before[0].keys() == after[0].keys()
    assert all(torch.equal(tensor, after[0][name]) for name, tensor in before[0].items())


@pytest.mark.parametrize("kind", ["merged", "shared"])
def test_afterwards_all_is_bit_for_bit_what_it_was(kind, trained):
    trained.policy.model.train()
    sampler = sampler_of(trained, Replica(trained.policy.model, kind))
    before = everything(trained, sampler)
    assert probed(trained, sampler).failure() is None
    assert_untouched(before, everything(trained, sampler))
    trained.policy.model.eval()


@pytest.mark.parametrize("error", [SamplerError("the engine died"), KeyboardInterrupt()])
@pytest.mark.parametrize(("method", "call"), [("run", 1), ("run", 2), ("load_adapter", 1)])
def test_also_when_it_breaks_off(method, call, error, trained, monkeypatch):
    sampler, calls = sampler_of(trained), []
    before = everything(trained, sampler)
    original = getattr(sampler, method)

    def failing(*arguments):
        calls.append(arguments)
        result = original(*arguments)
        if len(calls) == call:
            raise error
        return result

    monkeypatch.setattr(sampler, method, failing)
    with pytest.raises(type(error)) as raised:
        probed(trained, sampler)
    assert raised.value is error
    assert_untouched(before, everything(trained, sampler))


def test_of_two_errors_the_first_is_told(trained, monkeypatch):
    sampler, runs = sampler_of(trained), []

    def dying(requests, *_):
        runs.append(requests)
        if len(runs) == 1:
            return TransformersSampler.run(sampler, requests)
        monkeypatch.setattr(sampler, "load_adapter", lambda: (_ for _ in ()).throw(SamplerError("it died before")))
        raise SamplerError("it dies")

    monkeypatch.setattr(sampler, "run", dying)
    with pytest.raises(SamplerError, match="it dies"):
        probed(trained, sampler)


# In a run


def parities(folder):
    return [record for record in records(folder, "metrics.jsonl") if record["kind"] == "parity"]


def test_a_run_probes_at_start_every_so_often_and_on_resume(tmp_path):
    settings = SMALL | {"max_steps": 5, "parity_steps": 2, "eval_steps": 5, "output_dir": str(tmp_path / "run")}
    train(resolve(settings | {"max_minutes": 1e-6}))
    assert [record["step"] for record in parities(tmp_path / "run")] == [0]
    train(resolve(settings))
    found = parities(tmp_path / "run")
    assert [record["step"] for record in found] == [0, 1, 2, 4]
    assert all(record["mean"] <= record["largest"] < 1e-4 < record["moved"] for record in found)
    assert all(record["time"].keys() == {"parity"} for record in found)
    fields = {field.name for field in dataclasses.fields(Parity)}
    assert all(record.keys() == {"kind", "step", "time", *fields} for record in found)
    train(resolve(settings))  # finished: nothing to probe
    assert len(parities(tmp_path / "run")) == 4
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["time"]["parity"] > 0


def test_the_probe_changes_nothing_in_a_run(tmp_path):
    samples = []
    for steps_between in (0, 1):
        folder = tmp_path / str(steps_between)
        train(small_config(max_steps=3, eval_steps=3, parity_steps=steps_between, output_dir=str(folder)))
        samples.append((folder / "samples.jsonl").read_bytes())
        assert len(parities(folder)) == 3 * steps_between
    assert samples[0] == samples[1]


def test_short_completions_are_probed_with_short_ones(tmp_path, monkeypatch):
    """Nothing longer than what the run itself samples: that is what an engine has room for."""
    limits, run = set(), TransformersSampler.run
    monkeypatch.setattr(
        TransformersSampler,
        "run",
        lambda self, requests, *rest: limits.update(r.max_tokens for r in requests) or run(self, requests, *rest),
    )
    train(small_config(max_steps=1, max_completion_length=5, output_dir=str(tmp_path / "run")))
    assert limits == {5}
    assert parities(tmp_path / "run")[0]["mean"] < 1e-4


def test_a_broken_sampler_stops_a_run_before_its_first_step(say, tmp_path, monkeypatch):
    monkeypatch.setattr(Replica, "refresh", lambda self: None)
    code, _, shown = say(max_steps=2)
    assert code == 3
    assert NOT_FOLLOWED in " ".join(shown.split())
    folder = tmp_path / "run"
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["steps"], summary["stopped_by"], summary["rollouts"]) == (0, "diagnosis", 0)
    assert NOT_FOLLOWED in summary["stopped"]
    assert (folder / "checkpoints" / "step-000000").is_dir()
    assert [record["mean_moved"] > 0.5 for record in parities(folder)] == [True]
    assert say(max_steps=2)[0] == 3, "and again"
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert say(max_steps=2)[0] == 0
    assert steps(folder) == [1, 2]


def test_a_sampler_that_breaks_later_stops_the_run_at_the_next_probe(tmp_path, monkeypatch):
    probes = []

    def counted(*arguments):
        probes.append(arguments)
        if len(probes) == 2:
            monkeypatch.setattr(TransformersSampler, "load_adapter", lambda self: None)
        return probe(*arguments)

    monkeypatch.setattr("igrpo_lite.training.loop.probe", counted)
    folder = tmp_path / "run"
    settings = {"max_steps": 6, "parity_steps": 2, "save_steps": 100, "eval_steps": 100, "output_dir": str(folder)}
    summary = train(small_config(**settings))
    assert (summary["steps"], summary["stopped_by"]) == (2, "diagnosis")
    assert (folder / "checkpoints" / "step-000002").is_dir()
