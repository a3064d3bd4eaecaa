"""One process of benchmarks/gpu.sh: stages that share a setup, one after the other. Started by ``gpu.py``.

What happens goes as lines of JSON into a file that the parent reads, so whatever ends this process costs only the
stage that was running.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpu_common import MARK, NotHere, Outcome, Setup


@dataclass(slots=True)
class Context:
    """What a stage is given.

    Attributes:
        tiny: sizes at which only the code is tried.
        scratch: folder for models and whatever else is written; later processes find it again.
        suffix: of the stage's name, where it has no setup: mostly a model.
        outcome: of the stage that runs.
    """

    device: str
    tiny: bool
    scratch: Path
    setup: Setup | None
    events: Path
    suffix: str = ""
    outcome: Outcome = field(default_factory=Outcome)
    _engine: Any = None

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"

    def model(self, name: str) -> str:
        """Folder of a random model that has been made before."""
        from gpu_models import folder_of

        return str(folder_of(self.scratch, name))

    def engine(self) -> Any:
        """The setup's policy and sampler, loaded by the first stage that asks for them.

        Raises:
            RuntimeError: they could not be loaded, now or before.
        """
        if isinstance(self._engine, BaseException):
            raise RuntimeError(f"not loaded, as said before: {self._engine}") from self._engine
        if self._engine is None:
            from gpu_engine import load

            self.tell(event="loading")
            started = time.perf_counter()
            try:
                self._engine = load(self)
            except Exception as error:
                self._engine = error
                raise
            self.tell(event="loaded", seconds=time.perf_counter() - started)
        return self._engine

    def tell(self, **message: Any) -> None:
        with self.events.open("a", encoding="utf-8") as file:
            file.write(json.dumps(message, default=str) + "\n")


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    setup = Setup(**job["setup"]) if job["setup"] else None
    context = Context(job["device"], job["tiny"], Path(job["scratch"]), setup, Path(job["events"]))
    for stage in job["stages"]:
        print(f"{MARK}{stage['name']}", flush=True)
        context.tell(event="start", stage=stage["name"])
        context.suffix, context.outcome = stage["suffix"], Outcome()
        started = time.perf_counter()
        status, reason = _run(stage["run"], context)
        context.tell(
            event="end",
            stage=stage["name"],
            status=status,
            reason=reason,
            seconds=time.perf_counter() - started,
            found=[found.record(judged=not job["tiny"]) for found in context.outcome.found],
            details=context.outcome.details,
        )


def _run(spec: str, context: Context) -> tuple[str, str]:
    """``done``, ``skipped`` or ``failed``, and why. What was found before an error is kept."""
    module, _, function = spec.partition(":")
    try:
        if context.setup is not None:
            _enter(context)
        getattr(importlib.import_module(module), function)(context)
    except NotHere as reason:
        return "skipped", str(reason)
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        sys.stderr.flush()
        text = " ".join(str(error).split())
        return "failed", f"{type(error).__name__}: {text[:600]}"
    return "done", ""


def _enter(context: Context) -> None:
    """The back end's own imports, before anything else brings transformers in."""
    from igrpo_lite.config import ModelOptions
    from igrpo_lite.policy.backends import enter

    assert context.setup is not None
    backend: Any = context.setup.backend
    enter(ModelOptions(backend=backend, device=context.device))


if __name__ == "__main__":
    main()
