"""What the doctor concludes, from made-up facts and the real requirements of the back ends' wheels."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from itertools import product

import pytest
from doctor_parts import A100, ABSENT, ALL_WORK, GIB, P100, SET_A, T4, V100, made_up
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging.requirements import Requirement
from packaging.specifiers import Specifier, SpecifierSet

from igrpo_lite.environment.diagnosis import choices, exit_code, problems
from igrpo_lite.environment.facts import BackEnd, Disk, Driver, Gpu, Hub, Memory, Torch, visible
from igrpo_lite.environment.hardware import dtype_for
from igrpo_lite.environment.packages import _tightest, demands, repair, violations
from igrpo_lite.environment.pins import INSTALL, SETS

BROKEN = BackEnd("broken", "ImportError: something is missing")


def levels(facts, needs=()):
    return {problem.level for problem in problems(facts, needs)}


def one(facts, words: str, needs=()):
    """The one problem that says this."""
    found = [problem for problem in problems(facts, needs) if words in problem.what]
    assert len(found) == 1, [problem.what for problem in problems(facts, needs)]
    return found[0]


def test_the_recommended_set_on_a_good_machine_has_no_problem():
    facts = made_up()
    assert problems(facts) == []
    assert exit_code(problems(facts, ["gpu", "vllm", "unsloth", "transformers-4bit"])) == 0


def test_the_newest_of_everything_violates_what_unsloth_declares():
    newest = {"torch": "2.15.0", "transformers": "5.23.0", "trl": "1.16.0", "datasets": "5.2.0"}
    found = violations(made_up(SET_A | newest))
    unsloth = {v.package for v in found if v.asker == "unsloth 2026.10.9"}
    assert unsloth == newest.keys()
    assert {v.package for v in found if v.asker == "vllm 0.31.0"} == {"torch", "transformers"}
    assert {v.package for v in found if v.asker == "igrpo-lite[unsloth]"} == newest.keys()
    assert {v.package for v in found if v.asker == "igrpo-lite"} == set()
    assert all(v.newer for v in found)
    # Too new is not known to fail, so it is a warning; older than what the code was written for is an error.
    assert levels(made_up(SET_A | newest)) == {"warning"}
    assert one(made_up(SET_A | {"transformers": "4.56.2"}), "transformers 4.56.2").level == "error"


def test_extras_count_only_where_they_are_in_use():
    without = {name: version for name, version in SET_A.items() if not name.startswith(("unsloth", "vllm"))}
    assert violations(made_up(without | {"trl": "1.16.0"})) == []  # neither [unsloth]'s trl nor [test]'s
    assert [v.wanted for v in violations(made_up(without | {"trl": "1.17.0"}))] == [">=1.14,<1.17"]
    assert [v.asker for v in violations(made_up(without | {"wandb": "0.1"}))] == ["igrpo-lite[trackers]"]
    no_bnb = {name: version for name, version in SET_A.items() if name not in ("bitsandbytes", "vllm-bnb-plugin")}
    askers = {v.asker for v in violations(made_up(no_bnb))}
    assert askers == {"unsloth 2026.10.9", "igrpo-lite[unsloth]"}


def test_what_training_needs_and_is_missing_comes_first_with_one_command():
    facts = made_up({name: version for name, version in SET_A.items() if name not in ("peft", "datasets")})
    first = problems(facts)[0]
    assert (first.level, first.what) == ("error", "missing: peft, datasets")
    assert first.repair == 'pip install "peft>=0.19,<0.22" "datasets>=4.7.0,<5.0.0,!=4.0.*,!=4.4.*"'
    without = {name: version for name, version in SET_A.items() if not name.startswith(("unsloth", "vllm", "datasets"))}
    assert problems(made_up(without))[0].repair == 'pip install "datasets>=4.7.0,<6"'


def test_a_repair_takes_exactly_the_versions_that_suit_all():
    facts = made_up(SET_A | {"transformers": "5.23.0", "datasets": "4.5.0"})
    for package, candidates in {
        "transformers": ("4.52.4", "5.0.0", "5.1.0", "5.15.9", "5.16.0", "5.16.1", "5.17.0", "5.17.1", "5.18.0"),
        "datasets": ("3.4.1", "4.0.1", "4.4.2", "4.5.0", "4.6.1", "4.7.0", "4.8.5", "5.0.0", "5.2.0"),
    }.items():
        command = repair(package, facts)
        wanted = Requirement(shlex.split(command)[-1]).specifier
        asked = [r.specifier for _, r in demands(facts) if r.name == package]
        assert len(asked) >= 3
        for version in candidates:
            assert wanted.contains(version) == all(specifier.contains(version) for specifier in asked), version
    assert repair("transformers", facts) == 'pip install "transformers>=5.16,<=5.17.0"'


def test_a_combination_speaks_for_the_versions_that_its_repair_changes_and_no_others():
    without_plugin = {name: version for name, version in SET_A.items() if name != "vllm-bnb-plugin"}
    newer = [problem.repair for problem in problems(made_up(without_plugin | {"vllm": "0.33.0"}))]
    assert set(newer) == {"pip install --no-deps vllm-bnb-plugin==0.0.3", INSTALL}
    old = [problem.repair for problem in problems(made_up(SET_A | {"torchao": "0.15.0"}))]
    assert old == ['pip install "torchao>=0.16"']


def test_what_decides_which_cuda_is_there_is_installed_as_a_set():
    colab = {name: SET_A[name] for name in ("igrpo-lite", "peft", "transformers", "datasets", "accelerate", "numpy")}
    facts = made_up(colab | {"torch": "2.10.0+cu128"}, T4, driver=Driver("550.54", "12.4", (T4,)), back_ends={})
    assert one(facts, "torch 2.10.0+cu128, but it must be >=2.11").repair == INSTALL
    assert one(made_up(colab), "missing: torch").repair == INSTALL
    for there, command in ((SET_A["vllm"], 'pip install "vllm==0.31.0"'), ("0.30.1", INSTALL)):
        packages = {name: version for name, version in SET_A.items() if name != "numba"} | {"vllm": there}
        facts = made_up(packages, back_ends=ALL_WORK | {"vllm": BROKEN})
        assert one(facts, f"vllm {there} asks for packages that are not installed: numba").repair == command
    unsupported = one(made_up(SET_A | {"vllm": "0.33.0"}), "vllm 0.33.0, but it must be >=0.26,<0.33")
    assert (unsupported.level, unsupported.repair) == ("warning", INSTALL)
    assert violations(made_up(SET_A | {"vllm": "0.26.0"})) == []  # set B's, though the extra takes a newer one


def test_a_clash_names_both_sides():
    facts = made_up(SET_A | {"trl": "1.16.0"})
    facts = replace(facts, requires=facts.requires | {"peft": ("trl>=1.16",)})
    assert repair("trl", facts).startswith("no version of trl suits all: ")
    assert "peft 0.21.2 asks for >=1.16" in repair("trl", facts)


GRID = [f"{major}.{minor}" for major, minor in product(range(4), range(4))] + ["1.1.1", "2.0.post1"]
specifiers = st.builds(
    lambda operator, version, star: operator + version + (".*" if star and operator in ("==", "!=") else ""),
    st.sampled_from(["<", "<=", ">", ">=", "==", "!=", "~="]),
    st.sampled_from(GRID[:16]),
    st.booleans(),
)


@settings(max_examples=400, deadline=None)
@given(st.lists(specifiers, max_size=6))
def test_shortened_specifiers_mean_the_same(texts):
    tightest = _tightest(map(Specifier, texts))
    everything = SpecifierSet(",".join(texts))
    fitting = [version for version in GRID if everything.contains(version)]
    if tightest is None:
        assert fitting == []
    else:
        shortened = SpecifierSet(",".join(map(str, tightest)))
        assert [version for version in GRID if shortened.contains(version)] == fitting
        assert len(tightest) <= len(set(texts))


def test_unreadable_versions_and_requirements_are_left_to_the_import():
    facts = made_up(SET_A | {"vllm": "main-build"})
    facts = replace(facts, requires=facts.requires | {"trl": ("this is no requirement >", "accelerate>=1.4.0")})
    assert violations(facts) == []


def test_packages_left_out_matter_only_if_the_back_end_fails():
    packages = {name: version for name, version in SET_A.items() if name not in ("numba", "setuptools")}
    words = "vllm 0.31.0 asks for packages that are not installed: setuptools, numba"
    assert one(made_up(packages), words).level == "note"
    found = one(made_up(packages, back_ends=ALL_WORK | {"vllm": BROKEN}), words)
    assert (found.level, found.repair) == ("warning", 'pip install "vllm==0.31.0"')


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [
        ((5, 2), None),
        ((6, 1), None),
        ((7, 0), "float16"),
        ((7, 5), "float16"),
        ((8, 0), "bfloat16"),
        ((12, 0), "bfloat16"),
    ],
)
def test_precision_by_capability(capability, dtype):
    precision = dtype_for(capability)
    assert precision.dtype == dtype
    assert "{}.{}".format(*capability) in precision.reason
    assert (dtype is None) == ("choose another GPU" in precision.reason)


def test_a_p100_is_refused_and_a_hidden_one_is_not():
    facts = made_up(gpu=P100)
    assert "choose another GPU" in one(facts, "P100").what
    assert exit_code(problems(facts)) == 3
    hidden = made_up(gpu=P100, torch=Torch("2.13.0+cu130", cuda="13.0"), variables={"CUDA_VISIBLE_DEVICES": ""})
    assert exit_code(problems(hidden)) == 0
    assert one(hidden, "hides every GPU").repair == "unset CUDA_VISIBLE_DEVICES"
    assert exit_code(problems(hidden, ["gpu"])) == 3


TWO = (replace(T4, free_bytes=2 * GIB), replace(T4, index=1, uuid="GPU-99999999-eeee"))


@pytest.mark.parametrize(
    ("setting", "indices"),
    [
        *((None, [0, 1]), ("", []), ("-1", []), ("1", [1]), ("1,0", [1, 0]), ("1, 5, 0", [1]), ("GPU-9999", [1])),
        *(("GPU-", []), ("GPU-1,GPU-9", [0, 1]), ("none", []), ("MIG-abc", [0, 1])),
    ],
)
def test_visible_gpus(setting, indices):
    assert [gpu.index for gpu in visible(TWO, setting)] == indices


def test_of_several_gpus_the_freest_is_proposed():
    facts = made_up(gpu=None, driver=Driver("580.1", "13.0", TWO), torch=Torch("2.13.0", "13.0", "", True, TWO))
    assert facts.gpu == TWO[0]
    assert one(facts, "2 GPUs").repair == "export CUDA_DEVICE_ORDER=PCI_BUS_ID CUDA_VISIBLE_DEVICES=1"
    assert "only 2.0 of 15.0 GiB are free" in one(facts, "something else uses the rest").what
    second = replace(
        facts, torch=Torch("2.13.0", "13.0", "", True, (Gpu(0, "Tesla T4", (7, 5), uuid="99999999-eeee"),))
    )
    assert second.gpu == TWO[1]  # torch counts what it sees, nvidia-smi what there is


@pytest.mark.parametrize(
    ("gpu", "driver_cuda", "torch"),
    [
        (T4, "12.4", Torch("2.13.0+cu130", cuda="13.0", error="driver too old")),
        (replace(A100, name="B200", capability=(10, 0)), "12.8", Torch("2.13.0+cu130", cuda="13.0")),
        (A100, "13.0", Torch("2.13.0+cpu")),
        (A100, "12.8", Torch("2.13.0+cpu")),
        (V100, "13.0", Torch("2.13.0+cu130", cuda="13.0", available=True, devices=(V100,))),
        (A100, "13.0", Torch("2.13.0+cu130", cuda="13.0", error="CUDA unknown error")),
        (A100, "12.4", Torch("2.11.0+cu126", cuda="12.6", error="CUDA unknown error")),
        (replace(A100, capability=None), "11.4", Torch("2.13.0+cu130", cuda="13.0", error="driver too old")),
    ],
)
def test_a_gpu_that_torch_cannot_use_is_an_error_with_one_command(gpu, driver_cuda, torch):
    without_vllm = {name: version for name, version in SET_A.items() if name not in ("vllm", "unsloth", "unsloth-zoo")}
    facts = made_up(
        without_vllm | {"torch": torch.version.partition("+")[0]},
        driver=Driver("1.0", driver_cuda, (gpu,)),
        torch=torch,
        back_ends={"transformers-16bit": BROKEN if torch.available else ALL_WORK["vllm"]},
    )
    errors = [problem for problem in problems(facts) if problem.level == "error"]
    assert len(errors) == 1
    assert errors[0].repair == INSTALL
    assert exit_code(errors) == 3


def test_a_broken_base_is_an_error_with_its_last_words():
    bare = made_up({}, gpu=None, torch=None, back_ends={"transformers-16bit": ABSENT})
    assert one(bare, "torch is not installed").level == "error"
    facts = made_up(back_ends=ALL_WORK | {"transformers-16bit": BROKEN})
    assert "something is missing" in problems(facts)[0].what
    again = f"pip install --force-reinstall --no-deps -r {SETS / 'a.txt'}"  # all is there, and does not work
    assert problems(facts)[0].repair == again
    assert exit_code(problems(facts)) == 3


@pytest.mark.parametrize("name", ["transformers-4bit", "vllm", "unsloth"])
def test_other_back_ends_count_where_they_are_wanted(name):
    on_gpu, on_cpu = (made_up(gpu=gpu, back_ends=ALL_WORK | {name: BROKEN}) for gpu in (A100, None))
    assert exit_code(problems(on_gpu)) == 3
    assert exit_code(problems(on_cpu)) == 0
    assert exit_code(problems(on_cpu, [name])) == 3
    absent = made_up(back_ends=ALL_WORK | {name: ABSENT})
    assert exit_code(problems(absent)) == 0
    found = one(absent, "was asked for", [name])
    assert (found.level, found.repair) == ("error", INSTALL)
    windows = one(made_up(system="Windows", back_ends=ALL_WORK | {name: ABSENT}), "was asked for", [name])
    assert (INSTALL in windows.repair) == (name == "transformers-4bit")
    assert ("A and B are for Linux" in windows.repair) == (name != "transformers-4bit")


def test_a_known_failure_of_a_back_end_is_explained_once():
    error = BackEnd("broken", "SamplerError: vLLM cannot be imported (libcudart.so.13: cannot open shared object file)")
    facts = made_up(driver=Driver("550.1", "12.4", (A100,)), back_ends=ALL_WORK | {"vllm": error})
    facts = replace(facts, torch=Torch("2.13.0+cu126", "12.6", "", True, (A100,)))
    found = [problem for problem in problems(facts) if "do not run on a driver for CUDA 12" in problem.what]
    assert [(problem.level, problem.repair) for problem in found] == [("error", INSTALL)]
    assert not any("does not work" in problem.what for problem in problems(facts))


@pytest.mark.parametrize(
    ("gpu", "vllm", "unsloth", "sampler", "backend"),
    [
        (A100, "works", "works", "vllm", "unsloth"),
        (A100, "works", "broken", "vllm", "transformers"),
        (A100, "broken", "works", "transformers", "unsloth"),
        (A100, "not installed", "not installed", "transformers", "transformers"),
        (None, "works", "works", "transformers", "transformers"),
    ],
)
def test_what_auto_comes_to(gpu, vllm, unsloth, sampler, backend):
    facts = made_up(gpu=gpu, back_ends=ALL_WORK | {"vllm": BackEnd(vllm), "unsloth": BackEnd(unsloth)})
    chosen = choices(facts)
    assert (chosen["sampler"].choice, chosen["backend"].choice) == (sampler, backend)
    if gpu is None:
        assert "no CUDA GPU" in chosen["sampler"].reason
        assert "--sampler vllm works too" in chosen["sampler"].reason
    elif "broken" in (vllm, unsloth):
        assert "broken" in chosen["sampler" if vllm == "broken" else "backend"].reason


def test_surroundings():
    hub = Hub("https://huggingface.co", "unreachable", "ConnectError: no route")
    disks = (Disk("downloaded models", "/mnt/c/hf", GIB, True), Disk("run folders", "/runs", 9 * GIB, False))
    facts = made_up(
        kinds=frozenset({"wsl", "colab"}), memory=Memory(4 * GIB, GIB), shm_bytes=64 * 2**20, disks=disks, hub=hub
    )
    said = "\n".join(problem.what for problem in problems(facts))
    for words in (
        "1.0 GiB of main",
        "64 MiB of shared",
        "1.0 GiB free for",
        "no permission to write run",
        "slow from WSL",
    ):
        assert words in said
    assert "12 hours" in one(facts, "Colab").what
    assert (one(facts, "no route").level, one(facts, "no route").repair) == ("warning", "export HF_HUB_OFFLINE=1")
    assert one(facts, "no route", ["hub"]).level == "error"
    kaggle = replace(facts, kinds=frozenset({"kaggle"}))
    assert "turn on Internet" in one(kaggle, "no network").repair
    offline = replace(facts, hub=replace(hub, state="offline"))
    assert one(offline, "HF_HUB_OFFLINE").level == "note"
    assert exit_code(problems(offline, ["hub"])) == 3
    good = made_up(kinds={"container"}, memory=Memory(4 * GIB, 3 * GIB), shm_bytes=GIB)
    for state in ("reachable", "not asked"):
        assert problems(replace(good, hub=replace(hub, state=state))) == []


@pytest.mark.parametrize(("system", "words"), [("Windows", "WSL2"), ("Darwin", "Mac")])
def test_systems(system, words):
    facts = made_up({"igrpo-lite": "0.1.0"}, gpu=None, system=system, requires={}, back_ends={})
    assert [words in problem.what for problem in problems(facts)] == [True]


def test_problems_come_in_the_order_of_their_level():
    facts = made_up(
        SET_A | {"torchao": "0.15.0", "setuptools": "84.2.1"}, gpu=P100, memory=Memory(GIB, GIB), kinds={"kaggle"}
    )
    order = [problem.level for problem in problems(facts)]
    assert order == sorted(order, key=["error", "warning", "note"].index)
    assert set(order) == {"error", "warning", "note"}
    assert all(re.fullmatch(r"\S.*\S", problem.what) for problem in problems(facts))
