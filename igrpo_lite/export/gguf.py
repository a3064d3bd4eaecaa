"""GGUF files by llama.cpp's own tools: ``convert_hf_to_gguf.py``, and ``llama-quantize`` for types that it lacks."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from igrpo_lite.errors import UserError
from igrpo_lite.export.source import bits

CONVERTER, QUANTIZER = "convert_hf_to_gguf.py", "llama-quantize"
DIRECT = ("f32", "f16", "bf16", "q8_0", "tq1_0", "tq2_0")
"""Types that the converter writes itself."""

_INSTALL = (
    "git clone --depth 1 https://github.com/ggml-org/llama.cpp && pip install gguf sentencepiece, then run this again "
    "here, or with LLAMA_CPP set to that folder"
)
_BUILD = (
    "cmake -B build && cmake --build build --target llama-quantize in the folder of llama.cpp (or install its "
    "binaries), or take --quantization q8_0, which needs the converter only"
)


@dataclass(frozen=True, slots=True)
class Tools:
    """Where llama.cpp's tools are.

    Attributes:
        quantizer: only for types that need it.
    """

    converter: Path
    quantizer: Path | None


def find_tools(quantization: str) -> Tools:
    """The tools that a type needs: on PATH, in the folder that ``LLAMA_CPP`` names, or in ``./llama.cpp``.

    Raises:
        UserError: what is missing and how to install it.
    """
    folders = [Path(os.environ["LLAMA_CPP"])] if os.environ.get("LLAMA_CPP") else []
    folders.append(Path("llama.cpp"))
    converter = next((f / CONVERTER for f in folders if (f / CONVERTER).is_file()), None) or _which(CONVERTER, None)
    builds = [str(f / part) for f in folders for part in ("", "build/bin", "build/bin/Release")]
    quantizer = None
    found = []
    if converter is None:
        found.append(f"llama.cpp's {CONVERTER} is neither on PATH nor in $LLAMA_CPP or ./llama.cpp: {_INSTALL}")
    if quantization.lower() not in DIRECT:
        quantizer = _which(QUANTIZER, os.pathsep.join(builds)) or _which(QUANTIZER, None)
        if quantizer is None:
            found.append(f"--quantization {quantization} needs llama.cpp's {QUANTIZER}: {_BUILD}")
    if found or converter is None:
        raise UserError(found)
    return Tools(converter.absolute(), quantizer)


def _which(name: str, path: str | None) -> Path | None:
    found = shutil.which(name, path=path)
    return Path(found).absolute() if found else None


def commands(tools: Tools, merged: Path, output: Path, quantization: str, half: str) -> list[list[str]]:
    """The command lines that make ``output`` from a merged model.

    Args:
        half: ``f16`` or ``bf16``: what is quantised from, where the converter cannot write the type itself.
    """
    # The converter is run by this Python, which has torch and transformers, unless it was installed as a program.
    program = shutil.which(CONVERTER) == str(tools.converter)
    convert = [str(tools.converter)] if program else [sys.executable, str(tools.converter)]
    if tools.quantizer is None:
        return [[*convert, str(merged), "--outfile", str(output), "--outtype", quantization.lower()]]
    between = intermediate(output, half)
    return [
        [*convert, str(merged), "--outfile", str(between), "--outtype", half],
        [str(tools.quantizer), str(between), str(output), quantization.upper()],
    ]


def intermediate(output: Path, half: str) -> Path:
    """The 16-bit file that is quantised from."""
    return output.with_name(f".{output.stem}-{half}.gguf")


def convert(tools: Tools, merged: Path, output: Path, quantization: str, half: str) -> None:
    """Write a GGUF file of a merged model.

    Raises:
        UserError: a tool failed, with the last lines that it wrote.
    """
    for command in commands(tools, merged, output, quantization, half):
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
        target = Path(command[command.index("--outfile") + 1]) if "--outfile" in command else output
        if done.returncode or not target.is_file():
            lines = [line for line in done.stdout.splitlines() if line.strip()][-3:] or ["it wrote no file"]
            raise UserError([f"{' '.join(command)}: failed ({done.returncode})", *lines, *_advice(done.stdout)])
    intermediate(output, half).unlink(missing_ok=True)


def _advice(text: str) -> list[str]:
    if "No module named" in text:
        return ["the converter needs packages that are not here: pip install gguf sentencepiece"]
    if "pre-tokenizer was not recognized" in text:
        return ["llama.cpp does not know this model's tokenizer: update it, or export --to merged-16bit"]
    return []


def file_bytes(parameters: int, quantization: str) -> int:
    """Size of a GGUF file, at most: a block's scales take less than one more bit per weight."""
    width = bits(quantization) or 16
    return parameters * (width if width >= 16 else width + 1) // 8
