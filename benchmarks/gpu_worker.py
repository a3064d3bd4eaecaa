"""One process of benchmarks/gpu.sh: the stages that share what is loaded there, one by one. Started by ``gpu.py``.

What happens goes as lines of JSON into a file that the parent reads, so whatever ends this process costs only the
stage that was running.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpu_common import MARK, NotHere, Outcome
from gpu_stages import MACHINE


@dataclass(slots=True)
class Context:
    """What a stage is given.

    Attributes:
        tiny: sizes at which only the code is tried.
        eager: whether engines shall do without graphs.
        backend: that loads the model in this process.
        scratch: folder for models and whatever else is written; later processes find it again.
        outcome: of the stage that runs.
        imports: seconds that imports have taken in this process; those of Unsloth's vLLM are part of its loading.
    """

    device: str
    tiny: bool
    eager: bool
    backend: str
    scratch: Path
    events: Path
    outcome: Outcome = field(default_factory=Outcome)
    imports: float = 0.0
    _engine: Any = None

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"

    def model(self) -> str:
        """Folder of the random model that the first stage makes."""
        from gpu_models import NAME

        return str(self.scratch / NAME)

    @contextmanager
    def importing(self) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.imports += time.perf_counter() - started

    def enter(self) -> None:
        """The back end's own imports, before anything else brings transformers in."""
        from igrpo_lite.config import ModelOptions
        from igrpo_lite.policy.backends import enter

        backend: Any = self.backend
        enter(ModelOptions(backend=backend, device=self.device))
        import transformers  # noqa: F401

    def engine(self, settings: Callable[[Context], Mapping[str, Any]] | None = None) -> Any:
        """Policy and sampler of a run with ``settings``, loaded by the first stage of this process that asks for them.

        Raises:
            RuntimeError: they could not be loaded, now or before.
        """
        if isinstance(self._engine, BaseException):
            raise RuntimeError(f"not loaded, as said before: {self._engine}") from self._engine
        if self._engine is None:
            self.tell(event="loading")
            started = time.perf_counter()
            try:
                with self.importing():
                    import gpu_engine
                    import torch

                    from igrpo_lite.sampling.vllm_engine import load_vllm

                    if self.backend == "transformers":  # Unsloth brings its own in later
                        load_vllm(torch.device(self.device))
                if self.eager and (self.backend == "transformers" or self.on_gpu):
                    without_graphs()
                self._engine = gpu_engine.load((settings or gpu_engine.settings)(self))
            except Exception as error:
                self._engine = error
                raise
            self.tell(event="loaded", seconds=time.perf_counter() - started)
        return self._engine

    def close(self) -> None:
        """Free what :meth:`engine` gave."""
        if self._engine is not None and not isinstance(self._engine, BaseException):
            self._engine.prepared.close()
        self._engine = None

    def tell(self, **message: Any) -> None:
        with self.events.open("a", encoding="utf-8") as file:
            file.write(json.dumps(message, default=str) + "\n")


def without_graphs() -> None:
    """Let every engine of this process run eagerly, whoever starts it: vLLM compiles nothing and captures no graphs."""
    from vllm.engine.arg_utils import EngineArgs

    create = EngineArgs.create_engine_config

    def eagerly(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.enforce_eager = True
        return create(self, *args, **kwargs)

    EngineArgs.create_engine_config = eagerly


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    places = {name: Path(job[name]) for name in ("scratch", "events")}
    context = Context(job["device"], job["tiny"], job["eager"], job["backend"], **places)
    for stage in job["stages"]:
        print(f"{MARK}{stage['name']}", flush=True)
        context.tell(event="start", stage=stage["name"])
        context.outcome = Outcome()
        started = time.perf_counter()
        status, reason = _run(stage["run"], context)
        context.tell(
            event="end",
            stage=stage["name"],
            status=status,
            reason=reason,
            seconds=time.perf_counter() - started,
            imports=context.imports,
            found=[found.record(judged=not job["tiny"]) for found in context.outcome.found],
            details=context.outcome.details,
        )
        if status == "failed" and (stage["name"] == MACHINE.name or (context.on_gpu and _broken())):
            sys.exit(1)  # the parent knows what becomes of the others


def _run(spec: str, context: Context) -> tuple[str, str]:
    """``done``, ``skipped`` or ``failed``, and why. What was found before an error is kept."""
    module, _, function = spec.partition(":")
    try:
        with context.importing():
            context.enter()
            stage = getattr(importlib.import_module(module), function)
        stage(context)
    except NotHere as reason:
        return "skipped", str(reason)
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        sys.stderr.flush()
        text = " ".join(str(error).split())
        return "failed", f"{type(error).__name__}: {text[:600]}"
    return "done", ""


def _broken() -> bool:
    """Whether CUDA gives nothing but errors in this process from now on, as after an illegal access."""
    import torch

    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


if __name__ == "__main__":
    main()
