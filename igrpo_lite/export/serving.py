"""The lines that serve an export: vLLM, a first question, Ollama."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from igrpo_lite.export.merging import Base
from igrpo_lite.export.prompting import OllamaTemplate, Served
from igrpo_lite.export.source import Kind, Source

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What ``--max-lora-rank`` may be (vLLM 0.31, ``vllm/config/lora.py``)."""

OLLAMA_MODELS = frozenset({"llama", "mistral", "gemma", "gemma2", "gemma3_text", "phi3", "qwen2", "qwen3"})
OLLAMA_ADAPTERS = frozenset({"llama", "mistral", "gemma", "gemma2"})
"""Families whose safetensors Ollama reads (https://docs.ollama.com/import): whole models, and adapters."""

_QUESTION = "Ana has 89 eggs, loses 20 and sells 22. How many eggs are left?"


def vllm_rank(rank: int) -> int | None:
    """The least ``--max-lora-rank`` for an adapter; ``None`` for a rank that vLLM cannot serve."""
    return next((allowed for allowed in VLLM_RANKS if allowed >= rank), None)


def vllm_command(
    kind: Kind, folder: Path, source: Source, base: Base, dtype: str, served: Served, four_bit: bool
) -> str | None:
    """``vllm serve`` for an adapter on its base, or for a merged model; ``None`` where vLLM cannot.

    Args:
        dtype: type to compute in: that of the run, or of the merged weights.
        four_bit: the adapter was trained on 4-bit weights, and is served on such.
    """
    if kind == "adapter":
        rank = vllm_rank(source.rank)
        if rank is None:
            return None
        words = [base.path, *(["--revision", base.revision] if base.revision else [])]
        words += ["--enable-lora", "--max-lora-rank", str(rank), "--lora-modules", f"{source.name}={folder}"]
        if four_bit:
            words += ["--quantization", "bitsandbytes"]
            dtype = "bfloat16" if dtype == "float32" else dtype  # vLLM has no float32 for these
        words += ["--generation-config", str(folder)]  # else the base's is applied, penalties and all
        if served.prompts.plain_template:
            words += ["--chat-template", str(folder / "chat_template.jinja")]
    elif kind == "merged-16bit":
        words = [str(folder), "--served-model-name", source.name]
    else:
        return None
    return shlex.join(["vllm", "serve", *words, "--dtype", dtype])


def curl_command(source: Source, served: Served, port: int = 8000) -> str:
    """A first question, in the messages that make the run's own prompt, answered greedily like the evaluation's."""
    body = {
        "model": source.name,
        "messages": served.messages(_QUESTION),
        "temperature": 0,
        "max_tokens": source.config.max_completion_length,
    }
    url = f"http://localhost:{port}/v1/chat/completions"
    return shlex.join(["curl", url, "-H", "Content-Type: application/json", "-d", json.dumps(body)])


def modelfile(
    origin: str, served: Served, source: Source, template: OllamaTemplate | None, adapter: bool = False
) -> str:
    """Ollama's ``Modelfile``: origin, template where it is proven, system prompt, greedy decoding, end tokens, context.

    Args:
        origin: what stands after FROM.
        template: of :func:`ollama_template`.
        adapter: the folder holds an adapter of ``origin``.
    """
    lines = [f"FROM {origin}", *(["ADAPTER ."] if adapter else [])]
    if template is not None:
        lines.append(f'TEMPLATE """{template.text()}"""')
    else:
        lines += [
            "# No TEMPLATE: none of ours makes this model's prompts exactly. Ollama looks for one of its own that is",
            "# like the model's; look at it with: ollama show --template",
        ]
    system = served.prompts.system_prompt
    if '"""' in system:
        lines.append('# The system prompt contains """ and cannot be written here; send it with each request.')
    elif system:
        lines.append(f'SYSTEM """{system}"""')
    length = source.config.max_prompt_length + source.config.max_completion_length
    numbers = {"temperature": 0, "repeat_penalty": 1, "num_ctx": length}
    lines += [f"PARAMETER {name} {value}" for name, value in numbers.items()]
    lines += [f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in served.stops()]
    return "\n".join(lines) + "\n"


def modelfile_origin(kind: Kind, base: Base, gguf: str) -> tuple[str | None, str]:
    """What FROM names, or why there is no ``Modelfile``."""
    if kind == "gguf":
        return f"./{gguf}", ""
    if base.family not in (OLLAMA_MODELS if kind == "merged-16bit" else OLLAMA_ADAPTERS):
        what = "models" if kind == "merged-16bit" else "adapters"
        return None, f"Ollama reads no safetensors {what} of type {base.family}: export --to gguf"
    if kind == "merged-16bit":
        return ".", ""
    if Path(base.path).is_dir():
        return base.path, ""
    return None, f"Ollama needs {base.path} in a folder (hf download --local-dir) for this adapter; or export --to gguf"
