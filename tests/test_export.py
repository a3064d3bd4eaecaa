"""Exports of a real run, loaded back by the plain libraries and compared with what was trained."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from export_parts import QUESTIONS, copied_run, options, short_run, source
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from igrpo_lite.cli import main
from igrpo_lite.errors import UserError
from igrpo_lite.export.exporting import export
from igrpo_lite.export.verification import Answer, Reading, Reference, Tolerance, compare
from igrpo_lite.tiny import MODEL_DIR

Logprobs = list[tuple[Tensor, Tensor]]


@pytest.fixture(scope="module")
def answers() -> list[Answer]:
    """The run's greedy answers by plain PEFT and ``generate``."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32), last())
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    found = []
    for question in source().questions[:QUESTIONS]:
        record = json.loads((short_run() / "evaluations" / "step-000002.jsonl").read_text().splitlines()[len(found)])
        assert record["question"] == question
        text = prompt_text(question)
        ids = torch.tensor([tokenizer.encode(text)])
        output = model.generate(input_ids=ids, max_new_tokens=48, do_sample=False)[0].tolist()
        found.append(Answer(tuple(ids[0].tolist()), tuple(output[ids.shape[1] :])))
    return found


def last() -> Path:
    return short_run() / "adapter"


def prompt_text(question: str) -> str:
    system = "Solve the problem step by step, then put the final answer in \\boxed{}. If the prompt contains a draft, "
    system += "take it as guidance and not as truth: correct its mistakes, fill its gaps, do not repeat it word for "
    system += "word, and give a strictly better solution."
    turns = f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n"
    return f"{turns}<|im_start|>assistant\n"


@torch.no_grad()
def said(model: Any, answers: list[Answer]) -> Logprobs:
    """Log-probability of each token of the answers and the model's own choice there, from all logits."""
    found = []
    for prompt, completion in answers:
        logits = model(input_ids=torch.tensor([prompt + completion])).logits[0].double()
        there = torch.log_softmax(logits, dim=-1)[len(prompt) - 1 : -1]
        found.append((there.gather(1, torch.tensor(completion)[:, None])[:, 0], there.argmax(dim=-1)))
    return found


def largest_gap(one: Logprobs, other: Logprobs) -> float:
    return max(float((a[0] - b[0]).abs().max()) for a, b in zip(one, other, strict=True))


@pytest.fixture(scope="module")
def trained(answers) -> Logprobs:
    base = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32)
    plain = said(base, answers)
    found = said(PeftModel.from_pretrained(base, last()), answers)
    assert largest_gap(plain, found) > 0.5  # so that a lost adapter would be seen
    return found


def exported(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "igrpo.json").read_text(encoding="utf-8"))


def test_an_adapter_is_what_was_trained(tmp_path, answers, trained):
    facts = export(source(), options("adapter", tmp_path / "made here" / "adapter"))
    folder = facts.folder
    assert (
        largest_gap(said(AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32), answers), trained) == 0
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tuple(tokenizer.encode(prompt_text(source().questions[0]))) == answers[0].prompt
    found = exported(folder)
    verified = found["verification"]
    assert (verified["passed"], verified["mean"], verified["agreeing"]) == (True, 0.0, verified["tokens"])
    assert verified["tokens"] == sum(len(answer.completion) for answer in answers)
    assert verified["kept"] == pytest.approx(1.0)
    assert found["adapter"]["rank"] == source().lora["r"]
    assert found["base"]["trained_in"] == "float32"
    assert found["evaluation"]["this"] == json.loads((short_run() / "summary.json").read_text())["after"]
    card = (folder / "README.md").read_text(encoding="utf-8")
    accuracy = found["evaluation"]["this"]["single"]
    numbers = f"{100 * accuracy['accuracy']:.1f} % ({100 * accuracy['low']:.1f}-{100 * accuracy['high']:.1f})"
    assert numbers in card
    assert str(tmp_path) not in card
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [2]
    assert [path.name for path in folder.parent.iterdir()] == ["adapter"]


def test_merged_weights_are_rounded_once_and_what_verification_says_is_true(tmp_path, answers, trained):
    facts = export(source(), options("merged-16bit", tmp_path / "merged"))
    written, base, adapter = (
        load_file(file)
        for file in (
            facts.folder / "model.safetensors",
            MODEL_DIR / "model.safetensors",
            last() / "adapter_model.safetensors",
        )
    )
    scale = source().lora["lora_alpha"] / source().lora["r"]
    assert written.keys() == base.keys()
    changed = 0
    for name, weight in base.items():
        stem = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        if f"{stem}A.weight" not in adapter:
            assert torch.equal(written[name], weight)
            continue
        delta = scale * adapter[f"{stem}B.weight"].double() @ adapter[f"{stem}A.weight"].double()
        expected = (weight.double() + delta).to(torch.bfloat16)
        assert (written[name] == expected).float().mean() > 0.999  # sums in another order meet a tie of rounding
        assert torch.allclose(written[name].float(), expected.float(), rtol=2**-7)
        changed += 1
    assert changed == len(adapter) / 2
    model = AutoModelForCausalLM.from_pretrained(facts.folder)
    assert model.dtype == torch.bfloat16
    there = said(model, answers)
    gaps = torch.cat([(a[0] - b[0]).abs() for a, b in zip(there, trained, strict=True)])
    verified = exported(facts.folder)["verification"]
    assert (verified["passed"], verified["precision"]) == (True, "bfloat16")
    assert verified["mean"] == pytest.approx(float(gaps.mean()), rel=1e-2)
    assert verified["max"] == pytest.approx(float(gaps.max()), rel=1e-2)
    assert 0.9 < verified["kept"] < 1.1
    for answer, place in zip(answers, verified["divergence"], strict=True):
        ids = torch.tensor([answer.prompt])
        own = model.generate(input_ids=ids, max_new_tokens=48, do_sample=False)[0, ids.shape[1] :].tolist()
        pairs = zip(own, answer.completion, strict=False)
        assert next((i for i, (mine, theirs) in enumerate(pairs) if mine != theirs), None) == place


def test_float32_on_request_leaves_nothing_to_rounding(tmp_path, answers, trained):
    facts = export(source(), options("merged-16bit", tmp_path / "merged", dtype="float32"))
    assert largest_gap(said(AutoModelForCausalLM.from_pretrained(facts.folder), answers), trained) < 1e-4
    assert exported(facts.folder)["verification"]["precision"] == "float32"


def test_an_export_that_is_something_else_is_kept_marked_and_ends_with_3(tmp_path, capsys):
    torch.manual_seed(9)
    other = Qwen2ForCausalLM(Qwen2Config.from_pretrained(MODEL_DIR))
    other.save_pretrained(tmp_path / "other")
    words = ["--to", "merged-16bit", "--output", str(tmp_path / "merged"), "--problems", "2", "--adapter", "last"]
    assert main(["export", str(short_run()), *words, "--base", str(tmp_path / "other")]) == 3
    out = capsys.readouterr().out
    assert "FAILED: log-probabilities differ by" in out
    assert exported(tmp_path / "merged")["verification"]["passed"] is False
    assert "failed its verification" in (tmp_path / "merged" / "README.md").read_text(encoding="utf-8")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").num_parameters() > 0


def reference(change: Tensor) -> Reference:
    count = len(change)
    base = Reading(-torch.rand(count), torch.arange(count))
    adapted = Reading(base.logprobs + change, base.chosen)
    answers = (Answer((1,), tuple(range(count // 2))), Answer((1,), tuple(range(count // 2, count))))
    return Reference(answers, adapted, base, "float32", "float32", "cpu")


def test_a_lost_adapter_is_found_where_every_tolerance_is_kept():
    change = 0.02 * torch.randn(400)
    found = reference(change)
    noise = 0.01 * torch.randn(400)
    for share in (1.0, 0.6, 0.0):
        logprobs = found.base.logprobs + share * change + noise
        verified = compare(found, Reading(logprobs, found.base.chosen), "bfloat16")
        slope = torch.linalg.lstsq(
            change[:, None].double(), (logprobs - found.base.logprobs).double()[:, None]
        ).solution
        assert verified.kept == pytest.approx(float(slope), rel=1e-4)
        assert verified.kept_error == pytest.approx(0.01 / 0.02 / 20, rel=0.2)
        assert verified.mean < 0.03  # so the tolerance says nothing
        assert verified.passed == (share > 0.5)
    assert "nearer to the base model" in verified.reasons[0]
    other_base = Reading(found.base.logprobs + 0.3, found.base.chosen)
    moved = Reading(found.adapted.logprobs + 0.3, found.base.chosen)
    assert compare(found, moved, "4-bit", other_base).kept == pytest.approx(1.0, abs=1e-4)


def test_divergence_ties_and_what_is_not_a_number():
    found = reference(torch.zeros(10))
    chosen = found.base.chosen.clone()
    chosen[7] = 99
    verified = compare(found, Reading(found.adapted.logprobs, chosen), "exact")
    assert (verified.agreeing, verified.divergence, verified.identical) == (9, (None, 2), 1)
    assert (verified.kept, verified.passed) == (None, True)
    logprobs = found.adapted.logprobs.clone()
    logprobs[3] = float("nan")
    verified = compare(found, Reading(logprobs, chosen), "1-bit")
    assert not verified.passed
    assert json.loads(json.dumps(verified.to_json(), allow_nan=False))["max"] is None
    assert verified.to_json()["tolerance"] == Tolerance(3.0, 20.0)._asdict()


def test_four_bit_runs_are_merged_onto_either_base_and_say_so(tmp_path):
    functional = pytest.importorskip("bitsandbytes").functional
    run = copied_run(tmp_path, load_in_4bit=True)
    onto = {
        kind: export(source(run), options("merged-16bit", tmp_path / kind, onto=kind, dtype="float32"))
        for kind in ("original", "dequantized")
    }
    base, adapter = load_file(MODEL_DIR / "model.safetensors"), load_file(run / "adapter" / "adapter_model.safetensors")
    scale = source().lora["lora_alpha"] / source().lora["r"]
    name = "model.layers.1.mlp.up_proj.weight"
    stem = f"base_model.model.{name.removesuffix('.weight')}.lora_"
    delta = scale * adapter[f"{stem}B.weight"] @ adapter[f"{stem}A.weight"]
    packed = functional.quantize_4bit(base[name].float(), quant_type="nf4", compress_statistics=True)
    weights = {"original": base[name].float(), "dequantized": functional.dequantize_4bit(*packed)}
    for kind, weight in weights.items():
        written = load_file(onto[kind].folder / "model.safetensors")
        assert torch.allclose(written[name], weight + delta, atol=1e-6)
        assert "quantization_config" not in json.loads((onto[kind].folder / "config.json").read_text())
    verified = {kind: exported(facts.folder)["verification"] for kind, facts in onto.items()}
    assert verified["dequantized"]["precision"] == "float32"
    assert verified["dequantized"]["passed"]
    assert verified["original"]["precision"] == "4-bit"
    assert verified["original"]["mean"] > 10 * verified["dequantized"]["mean"]
    assert "dequantised (NF4)" in onto["original"].notes[0]
    assert onto["dequantized"].onto == "tiny in 4 bits, dequantised"
    assert "4 bits" in (onto["original"].folder / "README.md").read_text(encoding="utf-8")


def test_the_original_of_packed_weights_must_be_known(tmp_path):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    packing = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    AutoModelForCausalLM.from_pretrained(MODEL_DIR, quantization_config=packing).save_pretrained(tmp_path / "packed")
    AutoTokenizer.from_pretrained(MODEL_DIR).save_pretrained(tmp_path / "packed")
    run = copied_run(tmp_path, model=str(tmp_path / "packed"))
    with pytest.raises(UserError, match="holds 4-bit weights only; name the 16-bit model"):
        export(source(run), options("merged-16bit", tmp_path / "merged"))
    facts = export(source(run), options("merged-16bit", tmp_path / "merged", base="tiny", problems=2))
    assert exported(facts.folder)["base"]["merged"]["onto"] == "tiny"
    assert isinstance(facts.passed, bool)


def test_mistakes_are_named_before_anything_is_loaded(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    code = (
        "import sys\nfrom igrpo_lite.cli import main\ncode = main(sys.argv[1:])\n"
        "print(code, 'torch' in sys.modules, 'transformers' in sys.modules)"
    )
    words = ["--to", "adapter", "--output", str(tmp_path / "full"), "--problems", "0", "--dtype", "float32"]
    command = [sys.executable, "-c", code, "export", str(tmp_path), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["2", "False", "False"]
    assert [line.split(":")[1].strip() for line in done.stderr.splitlines()] == [
        "--output",
        "--onto, --base and --dtype are for merged weights; an adapter is exported as it is",
        "--problems",
        f"{tmp_path} is not a run folder (no config.yaml); give the --output-dir of a training run",
    ]
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["file"]


def test_what_cannot_be_exported(tmp_path, capsys):
    run = copied_run(tmp_path)
    assert main(["export", str(run), "--to", "adapter", "--adapter", str(tmp_path)]) == 2
    assert f"{tmp_path} holds no adapter" in capsys.readouterr().err
    config = run / "adapter" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"use_dora": True}))
    assert main(["export", str(run), "--to", "adapter", "--adapter", "last"]) == 2
    assert "is not a plain LoRA adapter (use_dora)" in capsys.readouterr().err
    for name in ("best", "adapter"):
        (run / name).rename(run / f"no-{name}")
    assert main(["export", str(run), "--to", "adapter"]) == 2
    assert "the run has not saved one yet" in capsys.readouterr().err


def test_weights_that_were_never_packed_cannot_be_dequantized(tmp_path, capsys):
    words = ["--to", "merged-16bit", "--onto", "dequantized", "--output", str(tmp_path / "merged")]
    assert main(["export", str(short_run()), *words]) == 2
    assert "this run was not trained on 4-bit weights" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()


def test_an_unknown_base_and_a_full_disk_leave_nothing_behind(tmp_path, capsys):
    run = copied_run(tmp_path, model="nobody/has-this-model")
    output = ["--output", str(tmp_path / "out" / "merged")]
    assert main(["export", str(run), "--to", "merged-16bit", "--adapter", "last", *output]) == 2
    assert "nobody/has-this-model" in capsys.readouterr().err
    huge = tmp_path / "huge"
    huge.mkdir()
    for file in MODEL_DIR.iterdir():
        (huge / file.name).write_bytes(file.read_bytes())
    shape = json.loads((huge / "config.json").read_text()) | {"vocab_size": 10**10, "hidden_size": 2**14}
    (huge / "config.json").write_text(json.dumps(shape))
    words = ["--to", "merged-16bit", "--adapter", "last", "--base", str(huge), *output]
    assert main(["export", str(short_run()), *words]) == 2
    assert "GiB are free; free space, or choose another disk with --output" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_best_adapter_goes_without_being_named_and_unverified_exports_say_so(tmp_path, capsys):
    words = ["export", str(short_run()), "--to", "adapter", "--no-verify", "--output"]
    assert main([*words, str(tmp_path / "a")]) == 0
    assert "Not verified: it was not asked for (--no-verify)." in capsys.readouterr().out
    found = exported(tmp_path / "a")
    assert found["adapter"]["which"] == "best"
    assert found["verification"] == {"skipped": "it was not asked for (--no-verify)"}
    card = (tmp_path / "a" / "README.md").read_text(encoding="utf-8")
    assert "which flatters it a little" in card
    best = (short_run() / "best" / "adapter_model.safetensors").read_bytes()
    assert (tmp_path / "a" / "adapter_model.safetensors").read_bytes() == best
