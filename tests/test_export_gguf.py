"""GGUF files: the command lines, with programs that check what they are given; and llama.cpp itself, where it is.

Set ``LLAMA_CPP`` to a checkout of llama.cpp (its Python packages ``gguf`` and ``sentencepiece`` installed, and
``llama-quantize`` and ``llama-completion`` built or on PATH) for the real conversion.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from export_parts import move_adapter, options, short_run, source
from tiny_parts import small_config

from igrpo_lite.cli import main
from igrpo_lite.errors import UserError
from igrpo_lite.export.exporting import export
from igrpo_lite.export.gguf import file_bytes, find_tools
from igrpo_lite.export.source import bits, read_source
from igrpo_lite.training import train

CONVERTER = """
import argparse, json, pathlib
from safetensors import safe_open
parser = argparse.ArgumentParser()
parser.add_argument("model", type=pathlib.Path)
parser.add_argument("--outfile", type=pathlib.Path, required=True)
parser.add_argument("--outtype", choices=["f32", "f16", "bf16", "q8_0", "tq1_0", "tq2_0", "auto"], default="auto")
args = parser.parse_args()
assert json.loads((args.model / "config.json").read_text())["architectures"] == ["Qwen2ForCausalLM"]
assert (args.model / "tokenizer.json").is_file() and (args.model / "chat_template.jinja").is_file()
with safe_open(args.model / "model.safetensors", "pt") as file:
    assert {str(file.get_tensor(name).dtype) for name in file.keys()} == {"torch.bfloat16"}
    assert not any("lora" in name for name in file.keys())
args.outfile.write_bytes(b"GGUF" + args.outtype.encode())
"""
QUANTIZER = """
import pathlib, sys
source, target, kind = sys.argv[1:]
found = pathlib.Path(source).read_bytes()
assert found == b"GGUFbf16" and kind == kind.upper(), (found, kind)
pathlib.Path(target).write_bytes(b"GGUF" + kind.encode())
"""


def program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!{sys.executable}\n{text}", encoding="utf-8")
    path.chmod(0o755)


@pytest.fixture
def tools(tmp_path, monkeypatch) -> Path:
    """A folder laid out like a built checkout of llama.cpp, with programs that check what they are given."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path / "llama"))
    program(tmp_path / "llama" / "convert_hf_to_gguf.py", CONVERTER)
    program(tmp_path / "llama" / "build" / "bin" / "llama-quantize", QUANTIZER)
    return tmp_path / "llama"


def words(output: Path, quantization: str) -> list[str]:
    more = ["--quantization", quantization, "--output", str(output), "--adapter", "last", "--no-verify"]
    return ["export", str(short_run()), "--to", "gguf", *more]


@pytest.mark.parametrize(("quantization", "content"), [("q8_0", b"GGUFq8_0"), ("q4_k_m", b"GGUFQ4_K_M")])
def test_the_tools_get_what_they_need(tools, tmp_path, quantization, content):
    assert main(words(tmp_path / "out", quantization)) == 0
    written = tmp_path / "out" / f"my-run-{quantization}.gguf"
    assert written.read_bytes() == content
    assert {path.name for path in written.parent.iterdir()} == {written.name, "Modelfile", "README.md", "igrpo.json"}
    assert (written.parent / "Modelfile").read_text(encoding="utf-8").startswith(f"FROM ./{written.name}\n")
    found = json.loads((written.parent / "igrpo.json").read_text(encoding="utf-8"))
    assert found["quantization"] == quantization
    assert found["commands"]["llama.cpp"] == f"llama-server -m ./{written.name} --jinja -c 1072"


def test_a_converter_on_the_path_is_run_as_a_program(tools, tmp_path, monkeypatch):
    program(tmp_path / "bin" / "convert_hf_to_gguf.py", CONVERTER)
    program(tmp_path / "bin" / "llama-quantize", QUANTIZER)
    monkeypatch.delenv("LLAMA_CPP")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    assert main(words(tmp_path / "out", "Q6_K")) == 0
    assert (tmp_path / "out" / "my-run-q6_k.gguf").read_bytes() == b"GGUFQ6_K"


def test_a_failing_converter_is_quoted_and_leaves_nothing(tools, tmp_path, capsys):
    failing = "import sys; sys.exit('BPE pre-tokenizer was not recognized - update get_vocab_base_pre()')"
    program(tools / "convert_hf_to_gguf.py", failing)
    assert main(words(tmp_path / "there" / "out", "q8_0")) == 2
    told = capsys.readouterr().err
    assert "convert_hf_to_gguf.py" in told
    assert "BPE pre-tokenizer was not recognized" in told
    assert "llama.cpp does not know this model's tokenizer" in told
    assert list((tmp_path / "there").iterdir()) == []


def test_missing_tools_are_named_with_how_to_install_them(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(words(tmp_path / "out", "q5_k_m")) == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2
    assert "git clone --depth 1 https://github.com/ggml-org/llama.cpp" in told[0]
    assert "--quantization q5_k_m needs llama.cpp's llama-quantize" in told[1]
    assert main(words(tmp_path / "out", "q9")) == 2
    assert "'q9' is no type of llama.cpp's" in capsys.readouterr().err


def test_sizes_are_upper_bounds():
    measured = {
        "q8_0": 8.5,
        "q6_k": 6.5625,
        "q5_k_m": 5.7,
        "q4_k_m": 4.85,
        "q3_k_m": 3.9,
        "q2_k": 2.96,
        "f16": 16,
        "f32": 32,
    }
    for name, width in measured.items():
        assert file_bytes(10**9, name) >= 10**9 * width / 8
    assert [bits(name) for name in ("bf16", "iq3_xxs", "tq1_0", "q9_0", "8bit", "")] == [16, 3, 1, None, None, None]


@pytest.fixture(scope="module")
def checkout() -> Path:
    folder = Path(os.environ.get("LLAMA_CPP", ""))
    if not (folder / "models" / "ggml-vocab-qwen2.gguf").is_file():
        pytest.skip("LLAMA_CPP names no checkout of llama.cpp")
    pytest.importorskip("gguf")
    return folder


@pytest.fixture(scope="module")
def real_run(checkout, tmp_path_factory) -> Path:
    """A run on a random model with Qwen2's tokenizer, as llama.cpp brings it: of the bundled one it knows nothing."""
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    folder = tmp_path_factory.mktemp("real")
    tokenizer = AutoTokenizer.from_pretrained(checkout / "models", gguf_file="ggml-vocab-qwen2.gguf")
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.save_pretrained(folder / "model")
    shape = {"hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    tokens = {"vocab_size": 151936, "bos_token_id": 151643, "eos_token_id": 151645}
    more = {"intermediate_size": 512, "max_position_embeddings": 1024, "initializer_range": 0.06}
    model = Qwen2ForCausalLM(Qwen2Config(**shape, **tokens, **more, tie_word_embeddings=True))
    model.to(torch.bfloat16).save_pretrained(folder / "model")
    settings = {"model": str(folder / "model"), "output_dir": str(folder / "run"), "max_steps": 1, "num_generations": 4}
    train(small_config(**settings, prompts_per_step=1, max_completion_length=24, max_prompt_length=400))
    move_adapter(folder / "run" / "adapter", 0.03)
    return folder / "run"


@pytest.mark.parametrize("quantization", ["bf16", "q8_0", "q4_k_m"])
def test_llama_cpp_converts_and_the_file_is_what_was_trained(real_run, tmp_path, quantization):
    try:
        find_tools(quantization)
    except UserError as error:
        pytest.skip(error.problems[0])  # no llama-quantize
    facts = export(source(real_run), options("gguf", tmp_path / "out", quantization=quantization))
    assert facts.passed
    found = json.loads((facts.folder / "igrpo.json").read_text(encoding="utf-8"))["verification"]
    assert found["precision"] == {"bf16": "bfloat16", "q8_0": "8-bit", "q4_k_m": "4-bit"}[quantization]
    assert abs(found["kept"] - 1) < 0.3
    if quantization != "q4_k_m":
        assert found["mean"] < 0.2 * found["effect"]


def test_llama_cpp_makes_the_runs_prompt_and_answer(real_run, checkout, tmp_path):
    builds = os.pathsep.join([str(checkout / "build" / "bin"), os.environ["PATH"]])
    completion = shutil.which("llama-completion", path=builds)
    if completion is None:
        pytest.skip("no llama-completion")
    from igrpo_lite.export.verification import answer, load_reference
    from igrpo_lite.policy.prompting import prompt_builder

    facts = export(source(real_run), options("gguf", tmp_path / "out", quantization="f16", dtype="float16"))
    file = next(facts.folder.glob("*.gguf"))
    prompts = prompt_builder(facts.source.config)
    policy = load_reference(facts.source, None, facts.source.adapter)
    question = facts.source.questions[0]
    (expected,) = answer(policy, prompts, facts.served.stop_ids, [question], 6)
    said = ["-sys", prompts.system_prompt, "-p", question, "-n", "6", "--temp", "0", "-st", "--special", "-t", "1"]
    command = [completion, "-m", str(file), "--jinja", *said, "--verbose-prompt"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL)
    read = [line.split("->")[0].split()[-1] for line in (done.stdout + done.stderr).splitlines() if " -> '" in line]
    assert tuple(map(int, read)) == expected.prompt
    assert prompts.tokenizer.decode(expected.completion) in done.stdout
    assert read_source(real_run, None).which == "best"
