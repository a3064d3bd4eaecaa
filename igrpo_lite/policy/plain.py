"""The back end that needs nothing but transformers and PEFT: weights in 32, 16 or, by bitsandbytes, 4 bits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from igrpo_lite.errors import ModelError
from igrpo_lite.policy.attention import register
from igrpo_lite.policy.backends import Loaded, LoadRequest, model_path
from igrpo_lite.policy.four_bit import compute_in, keep_trainable, loading_arguments
from igrpo_lite.policy.loading import check_model, first_line, fresh_adapter, saved_adapter, without_dropout


class TransformersBackend:
    """Implements :class:`igrpo_lite.policy.backends.Backend`."""

    def load(self, request: LoadRequest) -> Loaded:
        model = _load_model(request)
        check_model(model, request.options.model)
        without_dropout(model)
        if request.adapter is None:
            return Loaded(fresh_adapter(model, request.options, request.seed))
        return Loaded(saved_adapter(model, request.adapter))


backend = TransformersBackend()


def _load_model(request: LoadRequest) -> Any:
    options = request.options
    packing = loading_arguments(request.config, options.load_in_4bit, request.device, request.dtype)
    try:
        with quiet():
            model, report = AutoModelForCausalLM.from_pretrained(
                model_path(options.model),
                revision=options.revision,
                config=request.config,
                dtype=request.dtype,
                attn_implementation=register(request.config),
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # so that they are in the report; see below
                **packing,
            )
    except Exception as error:
        raise ModelError(f"model {options.model!r} could not be loaded: {first_line(error)}") from error
    _refuse_incomplete(report, options.model)
    if not packing:
        return model.to(request.device)
    compute_in(model, request.dtype)
    keep_trainable(model)
    return model


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers from writing across our own screen; what is wrong is raised, in our words."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)


def _refuse_incomplete(report: Mapping[str, Any], name: str) -> None:
    """transformers only warns of weights that it had to draw at random: a run would train on noise."""
    missing = sorted(report["missing_keys"])
    other = sorted(str(entry[0]) for entry in report["mismatched_keys"])
    for keys, what in ((missing, "lacks"), (other, "does not have the shapes that config.json says for")):
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise ModelError(
                f"model {name!r}: its weights file {what} {keys[0]}{more}; get the whole model again (an interrupted "
                "download, or a config.json of another model?)"
            )
