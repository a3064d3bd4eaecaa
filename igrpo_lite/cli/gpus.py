"""``igrpo-lite gpus``: the GPUs that plans can be made for by name."""

from __future__ import annotations

import json as json_module

from igrpo_lite.cli.models import Json
from igrpo_lite.planning.gpus import GPUS, Gpu


def gpus(*, json: Json = False) -> None:
    """List the GPUs that plan --gpu knows: memory as torch sees it, speed, and which are too old."""
    if json:
        print(json_module.dumps([_all(gpu) for gpu in GPUS], indent=2))
        return
    print(f"{'name':12}{'GPU':15}{'GiB':>7}{'capability':>12}{'16 bit':>10}{'GB/s':>7}{'TFLOPS':>8}  note")
    for gpu in GPUS:
        capability = "{}.{}".format(*gpu.capability)
        kind = "refused" if gpu.refusal else "bfloat16" if gpu.bfloat16 else "float16"
        line = f"{gpu.aliases[0]:12}{gpu.name:15}{gpu.memory_gib:>7.1f}{capability:>12}{kind:>10}"
        print(f"{line}{gpu.bandwidth or 0:>7,.0f}{gpu.tflops or 0:>8g}  {gpu.note}".rstrip())


def _all(gpu: Gpu) -> dict[str, object]:
    return {
        "name": gpu.name,
        "aliases": list(gpu.aliases),
        "memory_gib": gpu.memory_gib,
        "capability": list(gpu.capability),
        "bfloat16": gpu.bfloat16,
        "bandwidth_gb_s": gpu.bandwidth,
        "tflops": gpu.tflops,
        "refusal": gpu.refusal or None,
        "note": gpu.note,
        "source": gpu.source,
    }
