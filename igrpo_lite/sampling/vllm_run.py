"""One call of the vLLM sampler: requests into the engine, completions out, nothing left behind."""

from __future__ import annotations

import signal
import threading
from collections.abc import Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any

from igrpo_lite.errors import SamplerError
from igrpo_lite.sampling.base import OnFinished, Poll, Request
from igrpo_lite.sampling.vllm_engine import first_line, preserved_rng
from igrpo_lite.types import Completion

if TYPE_CHECKING:
    from igrpo_lite.sampling.vllm import VllmSampler

_TEMPERATURES = 0.01, 2.0  # vLLM raises lower ones to the first, and 0.31 refuses higher ones than the second


def check_temperature(temperature: float, setting: str = "") -> None:
    """Raise :class:`SamplerError` for a temperature that vLLM does not sample at; ``setting`` is where it is from."""
    lowest, highest = _TEMPERATURES
    if temperature and not lowest <= temperature <= highest:
        raise SamplerError(
            f"vLLM samples at temperatures from {lowest} to {highest} or at 0, not at {setting}{temperature}; change "
            "it, or use the transformers sampler"
        )


class Run:
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
                min_p=request.min_p,
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
        check_temperature(request.temperature)

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
