"""One side of benchmarks/rollout_training.py, in a process of its own: ``python rollout_trainers.py SIDE SETTINGS``.

It makes a training step whenever it reads a line, and answers each with a line of JSON. So several trainers can take
turns, step by step. Heavy imports come late: they belong to the side whose memory is measured.

ours         the real training loop, vLLM with one copy of the weights
trl          TRL's GRPOTrainer with vLLM colocate; on a CPU with the engine in float32 like ours, and with our choice of
             matrix kernels
trl-default  the same as TRL starts it on a CPU: the engine in bfloat16 (TRL's and vLLM's default for a float32 model)
"""

from __future__ import annotations

import functools
import json
import os
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

MIB = 2**20


class Channel:
    """Lines to and from the parent. What libraries print goes to standard error meanwhile."""

    def __init__(self) -> None:
        self.out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self.imported: float | None = None
        self.ready = False

    def wait(self) -> None:
        """Say that the next step can be made, and wait until it should be."""
        if not self.ready:
            self.send({"imported": self.imported, "memory": memory()})
            self.ready = True
        if not sys.stdin.readline():
            raise SystemExit("the parent has gone")

    def loaded(self) -> None:
        """Note how much memory the libraries take, before there is any model."""
        self.imported = memory()["rss"]

    def send(self, message: dict[str, Any]) -> None:
        print(json.dumps(message), file=self.out, flush=True)


class Parts:
    """Seconds spent inside named calls."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()

    def watch(self, owner: Any, method: str, name: str) -> None:
        call = getattr(owner, method)

        @functools.wraps(call)
        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                self.seconds[name] += time.perf_counter() - started

        setattr(owner, method, timed)

    def take(self) -> dict[str, float]:
        taken, self.seconds = dict(self.seconds), Counter()
        return taken


def memory() -> dict[str, float]:
    """Of this process, MiB: in use now, and most so far; on a GPU also the most that torch had allocated there."""
    import psutil

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 if sys.platform == "darwin" else 1024)
    found = {"rss": psutil.Process().memory_info().rss / MIB, "peak": peak}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        found["device_peak"] = torch.cuda.max_memory_allocated() / MIB
    return found


def clocks() -> tuple[float, float]:
    """By the clock and of this process's processors, once a GPU has done what it was told."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter(), time.process_time()


def step(channel: Channel, parts: Parts, run: Callable[[], object], counts: Callable[[], dict[str, int]]) -> None:
    """Wait for the parent's word, make a step, and tell how it went."""
    channel.wait()
    parts.take()
    started = clocks()
    run()
    wall, cpu = (end - start for start, end in zip(started, clocks(), strict=True))
    channel.send({"wall": wall, "cpu": cpu, "parts": parts.take(), "memory": memory()} | counts())


def our_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Our names for what all sides are told."""
    steps = settings["steps"]
    return {
        "model": settings["model"],
        "backend": "transformers",
        "device": settings["device"],
        "dtype": settings["dtype"],
        "gradient_checkpointing": settings["gradient_checkpointing"],
        "update_tokens": settings["update_tokens"],
        "data": settings["data"],
        "eval_data": "two-step",
        "seed": settings["seed"],
        "lora_r": settings["lora_r"],
        "algorithm": "grpo",
        "sampler": "vllm",
        "prompts_per_step": settings["prompts_per_step"],
        "num_generations": settings["group"],
        "max_num_seqs": settings["rollouts"],
        "kv_cache_gib": settings["kv_cache_gib"],
        "max_completion_length": settings["tokens"],
        "reward_funcs": [f"{settings['reward']}:share_of_digits"],
        "learning_rate": settings["learning_rate"],
        "max_steps": steps,
        "eval_size": 1,
        "eval_steps": steps,
        "save_steps": steps,
        "parity_steps": 0,
        "output_dir": settings["folder"],
        "progress": "off",
    }


def ours(settings: dict[str, Any], channel: Channel) -> None:
    import torch

    from igrpo_lite.config.resolve import resolve
    from igrpo_lite.sampling.vllm_engine import load_vllm
    from igrpo_lite.training.prepare import prepare

    load_vllm(torch.device(settings["device"]))
    channel.loaded()
    config = resolve(our_settings(settings))
    prepared = prepare(config)
    try:
        train_ours(config, prepared, channel)
    finally:
        prepared.close()


def train_ours(config: Any, prepared: Any, channel: Any) -> None:
    """All steps of a run with parts that are loaded. Every completion is as long as it may be."""
    from igrpo_lite.report.choice import make_screen
    from igrpo_lite.report.trackers import Trackers
    from igrpo_lite.training.interrupt import Interrupt
    from igrpo_lite.training.loop import Trainer
    from igrpo_lite.training.run_folder import RunFolder

    parts, sampler = Parts(), prepared.sampler
    sampler.stop_ids = []

    class Stepping(Trainer):
        def _step(self) -> None:
            step(channel, parts, super()._step, self._counts)

        def _counts(self) -> dict[str, int]:
            return {"tokens": sampler.sampled_tokens, "engine_steps": sampler.decode_steps}

    with RunFolder(config) as folder, make_screen("off") as screen:
        trainer = Stepping(config, prepared, folder, screen, Trackers([], folder.path, "", {}, print))
        parts.watch(trainer.collector, "collect", "rollout")
        parts.watch(trainer.update, "step", "update")
        parts.watch(sampler, "load_adapter", "sync")
        with Interrupt() as interrupt:
            trainer.run(interrupt)


def trl(settings: dict[str, Any], channel: Channel, default: bool = False) -> None:
    import torch

    cpu = settings["device"] == "cpu"
    if cpu:
        torch.set_num_threads(1)
    import trl.generation.vllm_generation as generation
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from igrpo_lite.sampling.vllm_internals import multiply_plain_weights_fast

    channel.loaded()
    engine: dict[str, Any] = {"kv_cache_memory_bytes": int(settings["kv_cache_gib"] * 2**30)}
    if cpu:
        engine |= _on_a_cpu()
    if not default:
        engine["dtype"] = settings["dtype"]
    generation.LLM = functools.partial(generation.LLM, **engine)

    checkpointing = settings["gradient_checkpointing"]
    args = GRPOConfig(
        output_dir=settings["folder"],
        use_cpu=cpu,
        bf16=settings["dtype"] == "bfloat16",
        fp16=settings["dtype"] == "float16",
        gradient_checkpointing=checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if checkpointing else None,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        max_steps=settings["steps"],
        per_device_train_batch_size=settings["rows"],
        gradient_accumulation_steps=settings["rollouts"] // settings["rows"],
        num_generations=settings["group"],
        max_completion_length=settings["tokens"],
        temperature=1.0,
        beta=0.0,
        loss_type="grpo",
        learning_rate=settings["learning_rate"],
        shuffle_dataset=False,
        use_vllm=True,
        vllm_mode="colocate",
        vllm_gpu_memory_utilization=0.1,
        vllm_max_model_length=settings["max_model_len"],
        vllm_importance_sampling_mode="token_truncate",
        generation_kwargs={"ignore_eos": True},
        model_init_kwargs={"dtype": settings["dtype"]},
    )
    scope: dict[str, Any] = {}
    exec(Path(settings["reward"]).read_text(), scope)
    trainer = GRPOTrainer(
        settings["model"],
        reward_funcs=scope["share_of_digits"],
        args=args,
        train_dataset=Dataset.from_dict({"prompt": settings["prompts"]}),
        peft_config=LoraConfig(
            r=settings["lora_r"], lora_alpha=settings["lora_r"], target_modules="all-linear", task_type="CAUSAL_LM"
        ),
    )
    llm = trainer.vllm_generation.llm
    if cpu and not default:
        multiply_plain_weights_fast(llm)
    parts = Parts()
    parts.watch(trainer.vllm_generation, "generate", "rollout")
    parts.watch(trainer.vllm_generation, "sync_weights", "sync")
    parts.watch(trainer, "_compute_loss", "loss")
    parts.watch(trainer.accelerator, "backward", "backward")
    counted = {"tokens": 0, "engine_steps": 0}
    sample, engine_step = trainer.vllm_generation.generate, llm.llm_engine.step

    def counting(*args: Any, **kwargs: Any) -> Any:
        found = sample(*args, **kwargs)
        counted["tokens"] += sum(map(len, found[1]))
        return found

    def stepping() -> Any:
        counted["engine_steps"] += 1
        return engine_step()

    trainer.vllm_generation.generate, llm.llm_engine.step = counting, stepping

    class Stepping(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            channel.wait()
            parts.take()
            self.started = clocks()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            wall, cpu = (end - start for start, end in zip(self.started, clocks(), strict=True))
            channel.send({"wall": wall, "cpu": cpu, "parts": parts.take(), "memory": memory()} | counted)

    trainer.add_callback(Stepping())
    trainer.train()


def _on_a_cpu() -> dict[str, Any]:
    """What TRL's side needs to be compared with ours on a CPU; gives arguments of its engine."""
    import trl.trainer.utils as trl_utils
    import vllm._custom_ops as ops
    import vllm.model_executor.layers.utils as layers

    # Two lines without which vLLM's CPU build has no weights that TRL could load into.
    ops._supports_onednn = False
    layers.check_cpu_sgl_kernel = lambda *args, **kwargs: False
    # On a CPU its head would score prompts too; so it runs here as on CUDA (see benchmarks/update.py).
    trl_utils._use_triton = lambda device: True
    return {"enforce_eager": True}


def main() -> None:
    side, settings = sys.argv[1], json.loads(Path(sys.argv[2]).read_text())
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "TRL_EXPERIMENTAL_SILENCE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
    }
    if settings["device"] == "cpu":
        os.environ |= {"OMP_NUM_THREADS": "1", "VLLM_LOGGING_LEVEL": "ERROR", "TORCHDYNAMO_DISABLE": "1"}
    channel = Channel()
    if side == "ours":
        ours(settings, channel)
    else:
        trl(settings, channel, default=side == "trl-default")


if __name__ == "__main__":
    main()
