"""Sampling with vLLM: an engine in this process, one copy of the weights, the adapter written straight into it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from igrpo_lite.config import ModelOptions, RunConfig
from igrpo_lite.errors import SamplerError
from igrpo_lite.policy.loading import Policy, model_path
from igrpo_lite.policy.relief import forget
from igrpo_lite.prompts import PromptBuilder
from igrpo_lite.sampling import vllm_internals
from igrpo_lite.sampling.base import OnFinished, Poll, Request
from igrpo_lite.sampling.vllm_engine import Engine, EngineOptions, first_line, preserved_rng, start
from igrpo_lite.sampling.vllm_policy import (
    AdapterLayer,
    adapter_disabled,
    adapter_layers,
    base_parameters,
    set_aside,
    write_adapter,
)
from igrpo_lite.types import Completion, Prompt

_ADAPTER_ID = 1
_TEMPERATURES = 0.01, 2.0  # vLLM raises lower ones to the first, and 0.31 refuses higher ones than the second


class VllmSampler:
    """Implements :class:`igrpo_lite.sampling.base.Sampler` on a vLLM engine in this process.

    A completion depends on its request's seed and prompt and on the policy, not on the batch (up to floating-point ties
    between batch shapes). Log-probabilities are those of the sampling distribution, after temperature; with temperature
    0 those at temperature 1. The sampled tokens are other ones than the transformers sampler's, and differ between vLLM
    versions.

    Attributes:
        notes: sentences for the user about what could not be had, and what that costs.
        decode_steps: engine steps; a prompt's first token comes with its prefill.

    Args:
        options: the model that ``policy`` was loaded from.
        max_model_len: tokens of prompt and completion together.
        max_num_seqs: sequences decoded at the same time.
        kv_cache_bytes: of the KV cache; unset: enough for all sequences at full length, within limits.
        share_base: let the policy's frozen weights be the engine's.

    Raises:
        SamplerError: no usable vLLM, a model or adapter that it cannot run, or too little memory.
    """

    def __init__(
        self,
        policy: Policy,
        prompts: PromptBuilder,
        options: ModelOptions,
        max_model_len: int,
        *,
        max_num_seqs: int = 128,
        kv_cache_bytes: int | None = None,
        share_base: bool = True,
    ) -> None:
        self.policy = policy
        self.tokenizer = prompts.tokenizer
        self.stop_ids = sorted({*policy.stop_ids, *prompts.end_of_turn()})
        self.max_model_len = max_model_len
        self.vocabulary: int = policy.model.get_base_model().get_input_embeddings().num_embeddings
        self.layers = adapter_layers(policy.model)
        base = list(base_parameters(policy.model.get_base_model()).values())
        context = getattr(policy.model.config.get_text_config(), "max_position_embeddings", None) or max_model_len
        self._options = EngineOptions(
            model=model_path(options.model),
            revision=options.revision,
            dtype=base[0].dtype,
            device=policy.device,
            lora_rank=max(layer.rank for layer in self.layers),
            # vLLM scores nothing without sampling one token more.
            max_model_len=max(max_model_len, min(max_model_len + 1, context)),
            max_num_seqs=max_num_seqs,
            weight_bytes=sum(p.numel() * p.element_size() for p in base),
            kv_cache_bytes=kv_cache_bytes,
            share_base=share_base,
        )
        self.notes: list[str] = []
        self.decode_steps = self.sampled_tokens = self.prefill_tokens = self.cached_tokens = 0
        self.requests_made = 0
        self.version = 0
        self._running = False
        self.died: BaseException | None = None
        self._start()

    def run(
        self, requests: Sequence[Request], on_finished: OnFinished | None = None, poll: Poll | None = None
    ) -> list[Completion]:
        """Completions of ``requests``, in their order.

        Whatever ends it, nothing is left running in the engine. Ctrl-C waits for the end of an engine step.

        Raises:
            SamplerError: a request that does not fit, or an engine that died.
        """
        with self._exclusively():
            call = _Run(self, on_finished)
            try:
                return call.drain(requests, poll)
            finally:
                call.abort()

    def score(self, rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[tuple[float, ...]]:
        """The engine's log-probability of each completion token after its prompt, at temperature 1.

        vLLM gives those of prompt tokens before temperature only, and computes them without the KV cache. So
        this finds a missing or stale adapter, but neither a wrong temperature nor a stale prefix cache: these show in
        the log-probabilities of sampled completions.

        Args:
            rows: prompt ids and completion ids, together at most ``max_model_len``.
        """
        with self._exclusively():
            call = _Run(self, None)
            try:
                return call.score(rows)
            finally:
                call.abort()

    def load_adapter(self) -> None:
        """Take over the policy's adapter, and drop the KV cache of the one before.

        With the policy's adapter disabled, the base model is sampled from until the next call.

        Raises:
            SamplerError: an engine that died.
        """
        with self._exclusively() as engine, self._fatal("died while it took the adapter"):
            self.adapted = not adapter_disabled(self.policy.model)
            if self.adapted:
                self._push()
            self.version += 1
            # The version is part of every block's key, so the old ones are not found again. This frees them at once;
            # where vLLM refuses (it answers False), they give way as room is needed.
            engine.reset_prefix_cache()

    def sleep(self) -> None:
        """Give memory back around an update: on CUDA only, and never the weights that the policy uses.

        Raises:
            SamplerError: an engine that died, here or in :meth:`wake`.
        """
        self._check_living()
        with self._fatal("died while it released its memory"):
            self.engine.sleep()

    def wake(self) -> None:
        """Undo :meth:`sleep`; the other methods do it themselves."""
        self._check_living()
        with self._fatal("died while it woke up"):
            self.engine.wake()

    def rebuild(self) -> None:
        """Start the engine anew, for instance after it died; the policy's adapter is loaded.

        Raises:
            SamplerError: none could be started; the old one is gone all the same.
        """
        with self._fatal("could not be started anew"), self._without_its_weights():
            self.engine.close()
            self._start()

    def close(self) -> None:
        """Free the engine. The policy keeps its weights, and :meth:`rebuild` brings the sampler back.

        Raises:
            SamplerError: the engine is gone, but not in good order.
        """
        before = "" if self.died is None else f", after it died ({first_line(self.died)})"
        with self._fatal(f"could not be closed{before}"):
            self.engine.close()

    def _without_its_weights(self) -> AbstractContextManager[None]:
        """Where vLLM's pool must be empty before the engine is freed: the policy with weights of its own meanwhile.

        They wait in main memory, since copies on the GPU would not fit beside the engine.
        """
        model = self.policy.model.get_base_model()
        return set_aside(model, self.policy.device) if self.engine.sleeps == "kv" else nullcontext()

    @contextmanager
    def _letting_go(self) -> Iterator[None]:
        if self.died is not None:
            forget(self.died)  # its frames hold the engine
        self._slots.clear()
        self._folder.cleanup()
        with self._without_its_weights():
            yield

    def _start(self) -> None:
        model = self.policy.model.get_base_model()
        self._folder = TemporaryDirectory(prefix="igrpo-lite-adapter-")
        self._slots: list[tuple[AdapterLayer, Tensor, Tensor]] = []
        beside = self._options.share_base and self.policy.device.type == "cuda"
        with set_aside(model, self.policy.device) if beside else nullcontext():
            self.engine: Engine = start(self._options, model.config)
            self.engine.around_close = self._letting_go
            self.notes = self.engine.notes
            if self._options.share_base:
                self._share(model)
        try:
            self.died = None
            self._attach()
            self.load_adapter()
            self._warm_up()
        except BaseException:
            self.engine.close()
            raise

    def _warm_up(self) -> None:
        """One token, and one sleep: some of what vLLM cannot do shows only then."""
        counts = self.decode_steps, self.sampled_tokens, self.prefill_tokens, self.cached_tokens
        try:
            self.run([Request(Prompt("", (self.stop_ids[0],)), 0, 1, 0.0)])
        except SamplerError as error:
            cause = error.__cause__ or error
            raise SamplerError(
                f"vLLM cannot run model {self._options.model!r}: {first_line(cause)}; the transformers sampler may"
            ) from cause
        self.sleep()
        self.wake()
        self.decode_steps, self.sampled_tokens, self.prefill_tokens, self.cached_tokens = counts

    def _share(self, model: Any) -> None:
        done = vllm_internals.share_base(self.engine.llm, model)
        if done.own_bytes:
            whole = "a part of the" if done.shared_bytes else "the"
            self.notes.append(
                f"{whole} base weights are in memory twice, {done.own_bytes / 2**30:.2f} GiB more, because policy and "
                f"vLLM do not keep them alike ({done.reason})"
            )

    def _attach(self) -> None:
        """Register an adapter by vLLM's public way, and find the buffers it went to.

        It is a made-up one, so that A and B can be told from each other and from nothing. If all buffers then hold
        exactly what they should, they are what later pushes write to.
        """
        generator = torch.Generator().manual_seed(0)
        probe = [layer.made_up(generator) for layer in self.layers]
        self._register(probe)
        try:
            slots = vllm_internals.adapter_slots(self.engine.llm, _ADAPTER_ID, [layer.name for layer in probe])
            for layer, made_up in zip(self.layers, probe, strict=True):
                views = layer.views(*slots[layer.name])
                if views is None or not made_up.is_in(*slots[layer.name]):
                    raise vllm_internals.Unexpected(f"the slot of {layer.name} holds something else")
                self._slots.append((layer, *views))
        except vllm_internals.Unexpected as error:
            self._slots.clear()
            self.notes.append(f"the adapter goes to vLLM through a file once a step, which is slower ({error})")
        else:
            self._folder.cleanup()  # were vLLM ever to load it again, it had better fail

    def _push(self) -> None:
        for layer, a, b in self._slots:
            layer.write(a, b)
        if not self._slots:
            self._register(self.layers)

    def _register(self, layers: Sequence[AdapterLayer]) -> None:
        from vllm.lora.request import LoRARequest

        folder = Path(self._folder.name)
        write_adapter(folder, layers)
        named = {"lora_name": "policy", "lora_int_id": _ADAPTER_ID, "lora_path": str(folder)}
        self.lora_request = LoRARequest(**named)
        try:
            # In place, once: asked for with a request, vLLM would load it again in every engine step.
            self.engine.llm.llm_engine.add_lora(LoRARequest(**named, load_inplace=True))
        except Exception as error:
            raise SamplerError(
                f"vLLM cannot hold the adapter: {first_line(error)}; change --lora-target-modules, or use the "
                "transformers sampler"
            ) from error

    @contextmanager
    def _exclusively(self) -> Iterator[Any]:
        """vLLM's engine, awake, for one call at a time."""
        self._check_living()
        if self.engine.llm is None:
            raise SamplerError("this sampler's vLLM engine was closed; only one lives in a process at a time")
        if self._running:
            raise RuntimeError("the sampler is running; call this between runs")
        self._running = True
        try:
            self.wake()
            yield self.engine.llm.llm_engine
        finally:
            self._running = False

    def _check_living(self) -> None:
        if self.died is not None:
            raise SamplerError(f"the vLLM engine died before ({first_line(self.died)})") from self.died

    @contextmanager
    def _fatal(self, what: str) -> Iterator[None]:
        """An error in here is the engine's end: vLLM's state is unknown then."""
        try:
            yield
        except BaseException as error:
            self.died = error
            if isinstance(error, SamplerError) or not isinstance(error, Exception):
                raise
            raise SamplerError(f"the vLLM engine {what}: {first_line(error)}") from error


def make_vllm_sampler(policy: Policy, prompts: PromptBuilder, config: RunConfig, max_model_len: int) -> VllmSampler:
    """The sampler that ``config`` describes.

    Raises:
        SamplerError: as :class:`VllmSampler`; or a temperature that vLLM does not sample at.
    """
    _check_temperature(config.temperature, "--temperature ")
    return VllmSampler(
        policy,
        prompts,
        config,
        max_model_len,
        max_num_seqs=config.max_num_seqs,
        kv_cache_bytes=None if config.kv_cache_gib is None else int(config.kv_cache_gib * 2**30),
    )


def _check_temperature(temperature: float, setting: str = "") -> None:
    """Raise :class:`SamplerError` for a temperature that vLLM does not sample at; ``setting`` is where it is from."""
    lowest, highest = _TEMPERATURES
    if temperature and not lowest <= temperature <= highest:
        raise SamplerError(
            f"vLLM samples at temperatures from {lowest} to {highest} or at 0, not at {setting}{temperature}; change "
            "it, or use the transformers sampler"
        )


class _Run:
    """One call of :meth:`VllmSampler.run`: the requests that the engine works on."""

    def __init__(self, sampler: VllmSampler, on_finished: OnFinished | None) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        self.sampler = sampler
        self.engine = sampler.engine.llm.llm_engine
        self.on_finished = on_finished
        self.live: dict[str, Any] = {}
        self.params: Any = SamplingParams
        self.final_only = RequestOutputKind.FINAL_ONLY
        self.steps_left = 1000

    def drain(self, requests: Sequence[Request], poll: Poll | None) -> list[Completion]:
        completions: dict[int, Completion] = {}
        for place, request in enumerate(requests):
            self.submit(request, place)
        while True:
            if poll is not None:
                for request in poll(not self.live):
                    self.submit(request)
            if not self.live:
                break
            for output in self.step():
                request, place = self.live.pop(output.request_id)
                completion = self.completion(request, output)
                if place is not None:
                    completions[place] = completion
                if self.on_finished is not None:
                    for follow_up in self.on_finished(request, completion):
                        self.submit(follow_up)
        return [completions[place] for place in range(len(requests))]

    def submit(self, request: Request, place: int | None = None) -> None:
        self.check(request)
        try:
            params = self.params(
                temperature=request.temperature,
                top_p=request.top_p,
                top_k=0,
                seed=request.seed,
                max_tokens=request.max_tokens,
                # Ours and no others: vLLM would add those of the generation config.
                ignore_eos=True,
                stop_token_ids=self.sampler.stop_ids,
                logprobs=0,
                detokenize=False,
                output_kind=self.final_only,
            )
        except Exception as error:  # VLLMValidationError, which is not a ValueError
            raise SamplerError(f"vLLM refused a request: {first_line(error)}") from error
        self.add(request.prompt.ids, params, (request, place))
        self.steps_left += len(request.prompt.ids) + request.max_tokens

    def check(self, request: Request) -> None:
        length = len(request.prompt.ids)
        if not length or length + request.max_tokens > self.sampler.max_model_len:
            raise SamplerError(
                f"a prompt of {length} tokens and up to {request.max_tokens} more do not fit into the vLLM engine, "
                f"which was started for {self.sampler.max_model_len} together"
            )
        _check_temperature(request.temperature)

    def add(self, ids: Sequence[int], params: Any, mine: Any) -> None:
        sampler = self.sampler
        if max(ids) >= sampler.vocabulary:  # would kill the engine
            raise SamplerError(f"token id {max(ids)} of a prompt is outside the model's vocabulary")
        sampler.requests_made += 1
        name = str(sampler.requests_made)
        self.live[name] = mine
        try:
            with _CtrlCLater():
                self.engine.add_request(
                    request_id=name,
                    prompt={"prompt_token_ids": list(ids), "cache_salt": str(sampler.version)},
                    params=params,
                    lora_request=sampler.lora_request if sampler.adapted else None,
                )
        except Exception as error:
            del self.live[name]
            raise SamplerError(f"vLLM refused a request: {first_line(error)}") from error

    def step(self) -> list[Any]:
        """One engine step; the requests that it finished."""
        sampler = self.sampler
        if not self.steps_left:
            sampler.died = RuntimeError(f"it makes no progress on {len(self.live)} requests")
            raise SamplerError(f"the vLLM engine hangs: {sampler.died}")
        self.steps_left -= 1
        with _CtrlCLater():
            try:
                with preserved_rng(sampler.policy.device):
                    outputs = self.engine.step()
            except BaseException as error:
                sampler.died = error
                if not isinstance(error, Exception):
                    raise
                raise SamplerError(
                    f"the vLLM engine died while {len(self.live)} requests were decoding: {first_line(error)}"
                ) from error
        sampler.decode_steps += 1
        return [output for output in outputs if output.finished]

    def completion(self, request: Request, output: Any) -> Completion:
        sampler, result = self.sampler, output.outputs[0]
        if result.finish_reason not in ("stop", "length"):
            raise SamplerError(f"vLLM gave up a request (finish reason {result.finish_reason!r})")
        ids = tuple(result.token_ids)
        cached = output.num_cached_tokens or 0
        sampler.sampled_tokens += len(ids)
        sampler.cached_tokens += cached
        sampler.prefill_tokens += len(request.prompt.ids) - cached
        logprobs = tuple(place[token].logprob for token, place in zip(ids, result.logprobs, strict=True))
        text = sampler.tokenizer.decode(list(ids), skip_special_tokens=True)
        return Completion(ids, text, logprobs, "stop" if ids[-1] in sampler.stop_ids else "length")

    def score(self, rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[tuple[float, ...]]:
        params = self.params(
            temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False, output_kind=self.final_only
        )
        for place, (prompt, completion) in enumerate(rows):
            ids = (*prompt, *completion)
            self.add(ids, params, (place, len(prompt), ids))
            self.steps_left += len(ids)
        scores: list[tuple[float, ...]] = [()] * len(rows)
        while self.live:
            for output in self.step():
                place, start, ids = self.live.pop(output.request_id)
                found = output.prompt_logprobs
                scores[place] = tuple(found[at][ids[at]].logprob for at in range(start, len(ids)))
        return scores

    def abort(self) -> None:
        """Take what is unfinished out of the engine; where that fails, the next call says so."""
        sampler = self.sampler
        if self.live and sampler.died is None:
            try:
                self.engine.abort_request(list(self.live))
                if self.engine.has_unfinished_requests():
                    sampler.died = RuntimeError("its requests could not be aborted")
            except Exception as error:
                sampler.died = error
        self.live.clear()
        self.engine = None  # an error's traceback may keep this call, but not the engine's memory


class _CtrlCLater:
    """Holds a first Ctrl-C back until the engine is between two steps; a second one takes effect at once."""

    def __enter__(self) -> None:
        self.handler: Any = None
        self.held = 0
        if threading.current_thread() is threading.main_thread():
            handler = signal.getsignal(signal.SIGINT)
            if callable(handler):
                self.handler = handler
                signal.signal(signal.SIGINT, self.press)

    def press(self, number: int, frame: FrameType | None) -> None:
        self.held += 1
        if self.held > 1:
            self.deliver(number, frame)

    def deliver(self, number: int, frame: FrameType | None) -> None:
        """Every press to the handler, which may count them."""
        while self.held:
            self.held -= 1
            self.handler(number, frame)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self.handler is not None:
            signal.signal(signal.SIGINT, self.handler)
            if kind is None:
                self.deliver(signal.SIGINT, None)
