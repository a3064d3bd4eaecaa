"""Run in a process of its own by :mod:`igrpo_lite.doctor.backends`: try one back end and report in JSON lines."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

MARK = "@igrpo-lite "
"""Begins each line that is a report; libraries print what they like in between."""


def report(**facts: Any) -> None:
    """Tell the parent process something."""
    print(f"\n{MARK}{json.dumps(facts)}", flush=True)


def try_transformers() -> None:
    """What training needs at least: the bundled model with an adapter, and one step of it."""
    import torch

    report(torch=_torch(torch))  # before what may break on it

    from igrpo_lite.config import RunConfig
    from igrpo_lite.policy.loading import load_policy

    policy = load_policy(RunConfig.model_validate({}), 0)
    policy.model(torch.tensor([[1, 2]], device=policy.device)).logits.sum().backward()


def try_4bit() -> None:
    """A layer in NF4 and one product with it."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    linear = import_module("bitsandbytes").nn.Linear4bit
    layer = linear(64, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4").to(device)
    layer(torch.ones(1, 64, device=device))


def try_vllm() -> None:
    """vLLM as our sampler loads it, with its own checks of version and device."""
    import torch

    from igrpo_lite.sampling.vllm_engine import load_vllm

    load_vllm(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def try_unsloth() -> None:
    """The import patches half of transformers and TRL, so most of what can break breaks here."""
    assert callable(import_module("unsloth").FastLanguageModel.from_pretrained)


def _torch(torch: Any) -> dict[str, Any]:
    found = {"version": torch.__version__, "cuda": torch.version.cuda or "", "hip": torch.version.hip or ""}
    found |= {"available": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "devices": []}
    if not found["available"]:
        return found | {"error": _why_no_gpu(torch) if found["cuda"] or found["hip"] else ""}
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found["devices"].append(
            {
                "index": index,
                "name": properties.name,
                "capability": [properties.major, properties.minor],
                "total_bytes": properties.total_memory,
                "uuid": str(getattr(properties, "uuid", "")),
            }
        )
    return found


def _why_no_gpu(torch: Any) -> str:
    try:
        torch.cuda.init()
    except Exception as error:
        return last_words(error)
    return ""


def last_words(error: BaseException) -> str:
    """What went wrong in one line, and what caused it where the error does not say so itself."""
    words = _line(error)
    root = error
    while root.__cause__ is not None:
        root = root.__cause__
    cause = str(root).strip().splitlines()
    if root is not error and cause and cause[-1].strip() not in words:
        words += f" (caused by {_line(root)})"
    return words


def _line(error: BaseException) -> str:
    said = (str(error).strip().splitlines() or [""])[0].strip()
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


TRIALS: dict[str, Callable[[], None]] = {
    "transformers-16bit": try_transformers,
    "transformers-4bit": try_4bit,
    "vllm": try_vllm,
    "unsloth": try_unsloth,
}


def main(name: str) -> int:
    """Try one back end; 0 if it works."""
    try:
        TRIALS[name]()
    except BaseException as error:  # whatever a broken package throws, SystemExit included
        report(error=last_words(error))
        return 1
    report(works=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
