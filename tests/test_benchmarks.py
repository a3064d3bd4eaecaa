"""The benchmark scripts: their arithmetic on known numbers, and small runs of the sampler's and the update's. Never
times."""

from __future__ import annotations

import importlib
import json
import random
import statistics
from itertools import combinations
from pathlib import Path
from types import ModuleType

import pytest
import torch

from igrpo_lite.sampling.base import Request
from igrpo_lite.types import Completion, Prompt

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch):
    """Imports a script of ``benchmarks/`` by name, as it is when it runs from there."""
    monkeypatch.syspath_prepend(str(FOLDER))

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    return load


def test_results_do_not_name_folders(script):
    arguments = ["--repeats", "3", "--json", "/somewhere/out.json", "--output-dir=/elsewhere"]
    assert script("measuring").command("sampler.py", arguments) == "python benchmarks/sampler.py --repeats 3"


@pytest.mark.parametrize("model", [[], ["--hidden", "64", "--layers", "2"]])
def test_the_sampler_benchmark_counts_useful_tokens(script, tmp_path, model):
    sizes = ["--prompts", "2", "--group", "2", "--max-tokens", "6", "--longest", "8", "--warmup", "0", "--repeats", "2"]
    sampler = script("sampler")
    threads = torch.get_num_threads()
    sampler.main([*sizes, *model, "--json", str(tmp_path / "out.json")])
    torch.set_num_threads(threads)
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["model"]["name"] == ("random" if model else "tiny")
    assert result["same_greedy_outputs"] == dict.fromkeys(("ours", "ours-unmerged", "generate"), "2 of 2")
    assert result["workloads"].keys() == {"own lengths", "uneven lengths"}
    for found in result["workloads"].values():
        assert found["rollouts"] == 4
        assert found["contenders"].keys() == {"ours", "ours-unmerged", "generate", "generate-merged"}
        for numbers in found["contenders"].values():
            assert len(numbers["useful_tokens"]) == len(numbers["seconds"]["wall"]) == 2
        assert found["ratios"].keys() == {f"{a} / {b}" for a, b in sampler.RATIOS}
    wanted = sum(sampler.heavy_tail(4, 8))  # no end tokens: everyone samples exactly as much as was asked for
    uneven = result["workloads"]["uneven lengths"]["contenders"]
    assert {n for numbers in uneven.values() for n in numbers["useful_tokens"]} == {wanted}


def test_uneven_lengths_have_a_heavy_tail(script):
    lengths = sorted(script("sampler").heavy_tail(128, 256))
    assert lengths[0] >= 4
    assert lengths[-1] == 256
    assert sum(lengths) / 128 > 1.5 * lengths[64]


def test_contenders_take_turns_in_an_order_that_rotates(script):
    calls = []
    contenders = {name: lambda name=name: calls.append(name) for name in "abc"}
    seconds = script("measuring").take_turns(contenders, 3, finish=lambda: calls.append("."))
    assert "".join(calls) == "a.b.c." + "b.c.a." + "c.a.b."
    assert {(name, clock): len(values) for name, clocks in seconds.items() for clock, values in clocks.items()} == {
        (name, clock): 3 for name in "abc" for clock in ("wall", "cpu")
    }


def test_ratios_are_taken_within_turns(script):
    assert script("measuring").paired([1.0, 6.0, 2.0], [2.0, 3.0, 8.0]) == {"median": 0.5, "min": 0.25, "max": 2.0}


def test_memory_is_that_of_live_storages(script):
    weight = torch.zeros(1000, requires_grad=True)

    def run() -> None:
        dropped = weight * 3  # 4,000 bytes that are gone before anything else is made
        del dropped
        view = weight.exp().view(10, 100)  # 4,000 bytes, kept
        loss = view.sum()  # 4 bytes
        loss.backward()  # 4 bytes of ones, a view of them, 4,000 bytes of gradient

    memory = script("memory")
    assert memory.activation_memory(run, torch.device("cpu")) == {"peak": 8008, "kept": 4004}
    assert memory.activation_memory(run, torch.device("cpu"))["kept"] == 4004  # and nothing is left over


def test_branching_completions_part_as_samples_do(script):
    branching = script("update_cases").branching

    def last_branch(group: int, root: int) -> int:
        completions = [branching(random.Random(f"{root} {index}"), 120, 1000, root) for index in range(group)]
        pairs = [(a, b) for a, b in combinations(completions, 2) if a != b]
        return max(next(t for t in range(120) if a[t] != b[t]) for a, b in pairs)

    for group, depth in ((8, 24), (16, 34)):
        assert statistics.median(last_branch(group, root) for root in range(40)) == pytest.approx(depth, abs=5)


def test_the_update_benchmark_compares_equal_work(script, tmp_path):
    pytest.importorskip("trl", minversion="1.16")  # 1.15 does not run without a GPU
    cases = "stage2-a-rows stage2-a-cpu stage2-a-small-batches s-grpo-b t-spmo-a entropy-a grpo-long-prompt-v152k heads"
    threads = torch.get_num_threads()
    script("update").main(["--quick", "--cases", *cases.split(), "--json", str(tmp_path / "out.json")])
    torch.set_num_threads(threads)
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["versions"]["trl"].startswith("1.")
    found = result["cases"]
    assert found.keys() == {*cases.split()[:-1], "heads vocabulary 257", "heads vocabulary 389"}
    for case in found.values():
        assert len(case["ratios"]) >= 1
        for side in case["sides"].values():
            assert side["difference"]["gradients"] < 1e-4
            assert side["difference"]["loss"] < 1e-4
            assert side["memory"]["peak"] >= side["memory"]["kept"] >= 0

    def counts(case: str) -> dict[str, tuple[int, int]]:
        return {name: (s["backbone_tokens"], s["head_rows"]) for name, s in found[case]["sides"].items()}

    # Prompt 32 with the draft, 8 completions of 24. A completion's last token predicts nothing, and is not run.
    assert counts("stage2-a-rows") == {
        "ours": (32 + 8 * 23, 8 * 24),
        "ours-rows": (8 * (32 + 23), 8 * 24),
        "trl": (8 * (32 + 24), 8 * 24),
    }
    assert counts("stage2-a-cpu")["trl-cpu"] == (8 * 56, 8 * 55)
    budget = 2 * 56  # three completions fit with their prompt, so there are three trees
    assert counts("stage2-a-small-batches") == {"ours": (3 * 32 + 8 * 23, 8 * 24), "trl": (8 * 56, 8 * 24)}
    assert 32 + 3 * 23 <= budget < 32 + 4 * 23
    tokens, rows = counts("s-grpo-b")["s-grpo"]
    assert rows == 8 * round(200 / 32)
    assert 32 + 8 * 5 <= tokens < counts("s-grpo-b")["full"][0] / 2
    tokens, rows = counts("t-spmo-a")["t-spmo"]
    assert rows <= 2 * (8 - 1)
    assert tokens < counts("t-spmo-a")["full"][0]
    tokens, rows = counts("entropy-a")["full"]
    assert tokens < counts("entropy-a")["entropy"][0] <= 2 * tokens
    assert rows * 1.1 < counts("entropy-a")["entropy"][1] < rows * 1.5


def test_the_rollout_benchmark_counts_steps_and_drift(script, tmp_path):
    pytest.importorskip("vllm")
    threads = torch.get_num_threads()
    arguments = ["--quick", "--parts", "schedules", "drift", "--engines", "transformers"]
    script("rollout").main([*arguments, "--json", str(tmp_path / "out.json")])
    torch.set_num_threads(threads)
    parts = json.loads((tmp_path / "out.json").read_text())["parts"]
    few, equal = parts["schedules"]["runs"]
    assert (few["live"], equal["live"], equal["lengths"]) == (4, 12, "all of 6 tokens")
    steps = {name: side["decode_steps"] for name, side in equal["sides"].items()}
    assert steps == {"grpo": [5], "ahead": [5]}  # the first tokens come with the prompts
    assert {name: side["sampled_tokens"] for name, side in equal["sides"].items()} == {"grpo": [72], "ahead": [72]}
    assert few["overlap_samples_as_barrier"] == "24 of 24"  # two steps of 12
    steps = {name: side["decode_steps"][0] for name, side in few["sides"].items()}
    assert steps["overlap"] < steps["barrier"]
    assert few["sides"]["overlap"]["sampled_tokens"] == few["sides"]["barrier"]["sampled_tokens"]
    drift = parts["drift"]["sides"]
    for dtype in ("float32", "bfloat16"):
        ours, theirs = drift[f"ours, {dtype}"], drift[f"trl, {dtype}"]
        assert (ours["relative"], ours["same_fingerprint"], ours["one_copy"]) == (0.0, True, True)
        assert ours["adapter"] == pytest.approx(theirs["adapter"], rel=1e-6)
    assert 0 < drift["trl, float32"]["relative"] < 1e-6 < 1e-5 < drift["trl, bfloat16"]["relative"]


def test_given_lengths_belong_to_requests(script):
    common = script("rollout_common")
    law, seeds = common.heavy_tail(160), [random.Random(seed) for seed in range(2000)]
    lengths = sorted(law(rng) for rng in seeds)
    assert (lengths[0], lengths[-1]) == (8, 160)
    assert statistics.mean(lengths) == pytest.approx(37.3, abs=2)  # 8 + 30 (1 - e^-5) - 1/2
    sampler = common.make_sampler("transformers", *common.make_policy("tiny"), 4)
    prompts = [Prompt("", tuple(range(5, 15 + n))) for n in range(3)]
    requests = [Request(prompt, seed, max_tokens=1) for seed, prompt in enumerate(prompts)]
    given = common.GivenLengths(sampler, common.heavy_tail(20))
    follow_up = Request(prompts[0], 7, max_tokens=1)
    seen: dict[int, int] = {}

    def on_finished(request: Request, completion: Completion) -> list[Request]:
        seen[request.seed] = len(completion.ids)
        return [follow_up] if request.seed == 1 else []

    found = [len(completion.ids) for completion in given.run(requests, on_finished)]
    wanted = {seed: common.heavy_tail(20)(random.Random(seed)) for seed in (0, 1, 2, 7)}
    assert seen == wanted
    assert found == [wanted[0], wanted[1], wanted[2]]
    assert [request.seed for request in given.asked] == [0, 1, 2, 7]
