"""One export, from a run folder to a folder that others can load, compared with what was trained."""

from __future__ import annotations

import gc
import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from igrpo_lite.errors import ConfigError, RunFolderError, UserError
from igrpo_lite.export.card import Facts, card, record
from igrpo_lite.export.gguf import convert, file_bytes, find_tools
from igrpo_lite.export.merging import load_base, merge, merge_base, own_base
from igrpo_lite.export.serving import (
    Served,
    curl_command,
    end_tokens,
    modelfile,
    ollama_template,
    vllm_command,
)
from igrpo_lite.export.source import Options, Source, bits
from igrpo_lite.export.verification import (
    MAX_TOKENS,
    Reading,
    Reference,
    Verification,
    answer,
    coarser,
    compare,
    held_out_questions,
    load_reference,
    read,
    reference,
)
from igrpo_lite.policy.loading import pick_device
from igrpo_lite.policy.prompting import prompt_builder

_SMALL_FILES = 64 * 2**20
"""Bytes of disk for tokenizer and card."""

_NF4 = (
    "the adapter was trained against 4-bit weights, dequantised (NF4); merged onto the original 16-bit ones it meets "
    "slightly other weights (--onto dequantized merges onto what it was trained with)"
)


def export(source: Source, options: Options, on_progress: Callable[[str], None] = lambda text: None) -> Facts:
    """Write an export and compare it with the run's model.

    A failed comparison does not raise: the export is kept, and its card says so.

    Args:
        on_progress: called with a few words before each long step.

    Raises:
        UserError: an unknown base, missing tools or too little disk space, before a model is loaded; later a model that
            cannot be loaded, a full disk or a failing converter. Nothing is left behind then.
    """
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    job = _Job(source, options, on_progress)
    shutil.rmtree(job.folder, ignore_errors=True)
    try:
        job.folder.mkdir(parents=True)
        facts = job.run()
        if job.output.exists():
            job.output.rmdir()  # it is empty: others are refused
        job.folder.rename(job.output)
    except (OSError, SafetensorError) as error:
        raise RunFolderError(f"the export to {job.output} could not be written: {error}") from error
    except torch.OutOfMemoryError as error:
        raise UserError("the GPU's memory is too small for this export; use --device cpu") from error
    finally:
        shutil.rmtree(job.folder, ignore_errors=True)
    return facts


class _Job:
    """One export; making it checks, at little cost, whether it can work."""

    def __init__(self, source: Source, options: Options, on_progress: Callable[[str], None]) -> None:
        self.source = source
        self.options = options
        self.say = on_progress
        self.output = options.output.absolute()
        self.folder = self.output.with_name(f".tmp-{self.output.name}")
        self.tools = find_tools(options.quantization) if options.to == "gguf" else None
        own = own_base(source, options)
        self.four_bit = source.config.load_in_4bit or own.quantized
        if options.onto == "dequantized" and not self.four_bit:
            raise ConfigError("--onto dequantized: this run was not trained on 4-bit weights; leave it out")
        self.base = own if options.to == "adapter" else merge_base(own, options)
        self.prompts = prompt_builder(source.config)
        self.served = Served(self.prompts, end_tokens(own.path, own.revision, self.prompts))
        self.device = pick_device(options.device or source.config.device)
        self.gguf = f"{source.name}-{options.quantization.lower()}.gguf"
        self.half = "bf16" if self.base.target == torch.bfloat16 else "f16"
        self._check_space()

    def run(self) -> Facts:
        """Write everything into the temporary folder."""
        base_reading = None
        if self.options.to == "adapter":
            self._write_adapter()
        found, reading = self._reference() if self.options.problems else (None, None)
        if self.options.to != "adapter":
            base_reading = self._merge(found)
        verification = self._verify(found, reading, base_reading)
        if self.options.to == "gguf":
            shutil.rmtree(self._merged)
        facts = self._facts(found, verification)
        (self.folder / "igrpo.json").write_text(json.dumps(record(facts), indent=2, ensure_ascii=False) + "\n", "utf-8")
        (self.folder / "README.md").write_text(card(facts), encoding="utf-8")
        return facts

    @property
    def _merged(self) -> Path:
        return self.folder if self.options.to == "merged-16bit" else self.folder / ".merged"

    def _write_adapter(self) -> None:
        config = dict(self.source.lora) | {"base_model_name_or_path": self.base.path, "revision": self.base.revision}
        (self.folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        shutil.copyfile(self.source.adapter / "adapter_model.safetensors", self.folder / "adapter_model.safetensors")
        self._write_tokenizer(self.folder)

    def _write_tokenizer(self, folder: Path) -> None:
        self.served.tokenizer.save_pretrained(folder)
        self.served.generation_config().save_pretrained(folder)

    def _reference(self) -> tuple[Reference, Reading | None]:
        """The run's model on held-out questions, and an exported adapter on the same base."""
        self.say(f"loading {self.source.config.model} with {self.source.adapter}")
        policy = load_reference(self.source, str(self.device), self.source.adapter)
        questions = held_out_questions(self.source, self.prompts, self.options.problems)
        self.say(f"answering {len(questions)} held-out questions")
        limit = min(MAX_TOKENS, self.source.config.max_completion_length)
        answers = answer(policy, self.prompts, self.served.stop_ids, questions, limit)
        found, exported = reference(policy, answers), None
        if self.options.to == "adapter":
            policy.model.load_adapter(str(self.folder), "export")
            policy.model.set_adapter("export")
            exported = read(policy.model, answers)
        del policy
        _free()
        return found, exported

    def _merge(self, found: Reference | None) -> Reading | None:
        """Write the merged model, and the GGUF file made of it; returns what its base said without the adapter, where
        that is another than the reference's."""
        self.say(f"merging onto {self.base.name}")
        model = load_base(self.base, self.source, self.options, self._place())
        other_base = found is not None and found.precision == "4-bit" and self.options.onto == "original"
        reading = read(model, found.answers) if found is not None and other_base else None
        model = merge(model, self.source.adapter, self.base.target)
        self.say(f"writing {self.output}")
        model.generation_config = self.served.generation_config()
        model.save_pretrained(self._merged, max_shard_size="5GB")
        self._write_tokenizer(self._merged)
        del model
        _free()
        if self.tools is not None:
            self.say(f"converting to {self.options.quantization}")
            convert(self.tools, self._merged, self.folder / self.gguf, self.options.quantization, self.half)
        return reading

    def _verify(
        self, found: Reference | None, reading: Reading | None, base_reading: Reading | None
    ) -> Verification | str:
        if found is None:
            return "it was not asked for (--no-verify)"
        if reading is not None:
            return compare(found, reading, "exact")
        self.say("reading the export back")
        try:
            model = self._load_back()
        except (ImportError, ValueError) as error:
            if self.options.to != "gguf":
                raise
            return f"transformers cannot read this GGUF file here ({str(error).strip().splitlines()[0]})"
        return compare(found, read(model, found.answers), self._precision(found), base_reading)

    def _load_back(self) -> Any:
        """The written files, loaded by plain transformers."""
        arguments: dict[str, Any] = {"dtype": "auto"}
        if self.options.to == "gguf":
            arguments = {"dtype": self.base.target, "gguf_file": self.gguf}
        return AutoModelForCausalLM.from_pretrained(self.folder, **arguments).to(self._place()).eval()

    def _precision(self, found: Reference) -> str:
        """The coarsest precision on the way from the reference to a merged model or GGUF file."""
        # What was trained on 4-bit weights and merged onto these very weights meets nothing new.
        trained = found.precision if self.options.onto == "original" else found.dtype
        width = bits(self.options.quantization)
        gguf = {32: "float32", 16: "bfloat16" if self.options.quantization.lower() == "bf16" else "float16"}
        written = gguf.get(width, f"{width}-bit") if width and self.options.to == "gguf" else "float32"
        return coarser(trained, written, self.base.target_name)

    def _place(self) -> torch.device:
        """The device, where the merged weights fit; else the CPU."""
        if self.device.type == "cuda" and torch.cuda.mem_get_info(self.device)[0] < 1.2 * self.base.merged_bytes:
            self.say("on the CPU, for lack of GPU memory")
            return torch.device("cpu")
        return self.device

    def _check_space(self) -> None:
        needed = _SMALL_FILES
        if self.options.to == "adapter":
            needed += (self.source.adapter / "adapter_model.safetensors").stat().st_size
        else:
            needed += self.base.merged_bytes
        if self.tools is not None:
            needed += file_bytes(self.base.parameters, self.options.quantization)
            needed += 2 * self.base.parameters if self.tools.quantizer is not None else 0
        there = next(folder for folder in self.output.parents if folder.is_dir())
        free = shutil.disk_usage(there).free
        if free < needed:
            raise RunFolderError(
                f"the export needs {needed / 2**30:.1f} GiB in {there}, where {free / 2**30:.1f} GiB are free; free "
                "space, or choose another disk with --output"
            )

    def _facts(self, found: Reference | None, verification: Verification | str) -> Facts:
        source, kind = self.source, self.options.to
        dtype = found.dtype if found is not None else source.dtype
        notes = [_NF4] if self.four_bit and kind != "adapter" and self.options.onto == "original" else []
        commands = {}
        served_in = dtype if kind == "adapter" else self.base.target_name
        vllm = vllm_command(kind, self.output, source, self.base, served_in, self.served, self.four_bit)
        if kind == "gguf":
            context = source.config.max_prompt_length + source.config.max_completion_length
            file = self.output / self.gguf
            commands["llama.cpp"] = shlex.join(["llama-server", "-m", str(file), "--jinja", "-c", str(context)])
        elif vllm is not None:
            commands["vLLM"] = vllm
        else:
            notes.append(f"vLLM serves no adapters of rank {source.rank}: export --to merged-16bit")
        if commands:
            commands["A first question"] = curl_command(source, self.served, 8080 if kind == "gguf" else 8000)
        if kind != "adapter":
            text = modelfile(f"./{self.gguf}" if kind == "gguf" else ".", self.served, source)
            (self.folder / "Modelfile").write_text(text, encoding="utf-8")
            create = shlex.join(["ollama", "create", source.name, "-f", str(self.output / "Modelfile")])
            commands["Ollama"] = f"{create} && ollama run {shlex.quote(source.name)}"
            if ollama_template(self.served) is None:
                notes.append(
                    "the Modelfile has no TEMPLATE, since this model's chat format is not ChatML: Ollama chooses one, "
                    f"which may differ from the training's (ollama show --template {source.name})"
                )
        trained_on = f"4 bits (NF4), computed in {dtype}" if self.four_bit else dtype
        return Facts(
            source, self.options, self.base, self.served, trained_on, verification, self.output, commands, notes
        )


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
