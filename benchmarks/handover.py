"""How long does it take to hand an adapter of a preset's full size to vLLM? Random weights in bfloat16; any machine.

The baseline is TRL's vLLM sync around its copy of all weights: PEFT's ``merge_adapter()`` and ``unmerge_adapter()``.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_models import write_model
from measuring import paired, provenance, shown, spread, write_json
from rollout_adapter import push_times, sync_as_trl, timed
from rollout_common import make_policy, make_sampler, parameters

from igrpo_lite.planning.models import find_model
from igrpo_lite.sampling.base import Request, request_seed
from igrpo_lite.types import Prompt


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="qwen2-1.5b", help="whose shape: a name from igrpo-lite models")
    parser.add_argument("--pushes", type=int, default=11)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the result here")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), find_model(options.model).shape, "cpu", torch.bfloat16)
        policy, config = make_policy(folder, "bfloat16")
        sampler = make_sampler("vllm", policy, config, 4)
        requests = [Request(Prompt("", tuple(range(5, 25))), request_seed(i), 2) for i in range(2)]
        pushes = list(push_times(policy, sampler, requests, options.pushes))[1:]
        sampler.close()
        merges = [timed(partial(sync_as_trl, policy.model)) for _ in pushes]
    adapter = sum(p.numel() for _, p in policy.adapter_parameters())
    ratio = paired(pushes, merges)
    result = provenance("handover.py", arguments, options.threads) | {
        "model": options.model,
        "weights": parameters(policy),
        "adapter": adapter,
        "rank": config.lora_r,
        "milliseconds": {"push": pushes, "merge_unmerge": merges},
        "push": spread(pushes),
        "ratio": ratio,
    }
    print(
        f"{options.model}, rank {config.lora_r} ({adapter / 1e6:.1f} M): {shown(spread(pushes), ' ms')}, "
        f"{shown(ratio, ' x', 3)} of TRL's merge and unmerge ({shown(spread(merges), ' ms')})"
    )
    write_json(options.json, result)
    return result


if __name__ == "__main__":
    main()
