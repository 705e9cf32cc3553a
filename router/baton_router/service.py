"""The router as one object: requests in (validated bytes), calls out. Knows no HTTP; `api` does.

Owner of the fleet, in a cluster of its membership, the tokeniser threads and the admission count.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from baton_common.clock import Clock, SystemClock
from baton_common.errors import Draining, InvalidRequest, Overloaded
from baton_common.kube.credentials import Credentials
from baton_common.telemetry import UNRECORDED, Span, open_tracing
from baton_proto import worker_pb2 as wire
from baton_router.call import Call, CallInfo
from baton_router.checkpoint import Checkpoint
from baton_router.config import RouterConfig
from baton_router.departure import RETRY_AFTER_MS, Departure
from baton_router.detokenise import Vocabulary
from baton_router.fleet import Fleet
from baton_router.keys import ApiKeys
from baton_router.membership import Membership
from baton_router.metrics import UNKNOWN_ROLE, RouterMetrics
from baton_router.order import Order
from baton_router.output import ChoiceOutput
from baton_router.sampling import ModelLimits, chat_sampling, completion_sampling, for_choice
from baton_router.schema import ChatRequest, CompletionRequest, Generation, parse_chat, parse_completion
from baton_router.sessions import keep_of
from baton_router.tokens import Prompt, PromptMaker

LAST_SPANS_S = 2.0
"""How long the end waits for a collector to take them."""


class ModelNotFound(InvalidRequest):
    """The client asked for a model this endpoint does not serve."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asker:
    """Who asks: the tenant of the key ("" = the endpoint is open), and the span of the question."""

    tenant: str = ""
    span: Span = UNRECORDED


class Router:
    """Everything between HTTP and the workers. Use on one event loop: `start`, calls, `stop`.

    Making one raises ConfigError when the API keys cannot be read or `otlp_endpoint` is no address.
    """

    def __init__(
        self,
        config: RouterConfig,
        checkpoint: Checkpoint,
        *,
        credentials: Credentials | None = None,
        clock: Clock | None = None,
        seed: Callable[[], int] = partial(secrets.randbits, 64),
    ) -> None:
        """`credentials`: of the cluster in which `config.worker_services` are looked up."""
        self.config = config
        self.checkpoint = checkpoint
        self.model = config.served_name or checkpoint.name
        self.created_s = int(time.time())
        self.metrics = RouterMetrics()
        clock = clock or SystemClock()
        self.keys = ApiKeys(config.api_keys, Path(config.api_keys_folder) if config.api_keys_folder else None, clock)
        self.fleet = Fleet(config.workers, clock)
        self.vocabulary = Vocabulary(checkpoint.tokenizer)
        self.departure = Departure(config.drain_s, clock)
        self.tracing = open_tracing(
            config.otlp_endpoint, service="baton-router", instance=self.fleet.router_id, clock=clock
        )
        self._prompts = PromptMaker(checkpoint)
        self._seed = seed
        self._inflight: set[Call] = set()
        self.metrics.watch_workers(self._worker_rows)
        self._membership = None if credentials is None else Membership(
            credentials, config.worker_services, self.fleet, self.metrics, vocab_size=checkpoint.vocab_size, clock=clock
        )  # fmt: skip
        self._following: asyncio.Task[None] | None = None

    def start(self) -> None:
        self.fleet.start()
        if self._membership is not None:
            self._following = asyncio.create_task(self._membership.run(), name="membership")

    async def stop(self) -> None:
        """Abandons what is still in flight; the HTTP server has waited before."""
        for call in list(self._inflight):
            call.close()
        await asyncio.sleep(0)
        if self._following is not None:
            self._following.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._following
        await self.fleet.stop()
        self._prompts.close()
        await asyncio.to_thread(self.tracing.close, LAST_SPANS_S)

    @property
    def open_answers(self) -> int:
        return len(self._inflight)

    # ---- requests

    async def chat(self, body: bytes, asker: Asker) -> Call:
        """Raises BatonError; otherwise a call that is ready to start."""
        arrival_s = asyncio.get_running_loop().time()
        request = parse_chat(body)
        self._admit(request)
        prompt = await self._prompts.in_thread(partial(self._chat_prompt, request))
        keep = await self._keep(request, prompt, asker)
        sampling = chat_sampling(request, prompt_tokens=len(prompt.ids), limits=self._limits(), seed=self._seed())
        return self._call(request, [prompt], [sampling], arrival_s, asker, keep)

    async def completion(self, body: bytes, asker: Asker) -> Call:
        """Raises BatonError; otherwise a call that is ready to start."""
        arrival_s = asyncio.get_running_loop().time()
        request = parse_completion(body)
        self._admit(request)
        prompts = await self._prompts.in_thread(partial(self._completion_prompts, request))
        keep = await self._keep(request, prompts[0], asker)
        limits, seed = self._limits(), self._seed()
        samplings = [
            completion_sampling(request, prompt_tokens=len(prompt.ids), limits=limits, seed=seed) for prompt in prompts
        ]
        return self._call(request, prompts, samplings, arrival_s, asker, keep)

    async def _keep(self, request: Generation, prompt: Prompt, asker: Asker) -> wire.KvKeep | None:
        if request.cache_control is None:
            return None
        return await self._prompts.in_thread(partial(keep_of, request, request.cache_control, prompt, asker.tenant))

    def _admit(self, request: Generation) -> None:
        if request.model != self.model:
            raise ModelNotFound(f"the model {request.model!r} does not exist; this is {self.model!r}", param="model")
        if self.departure.refuses:
            raise Draining(
                "this router is shutting down; send the request again, over a new connection",
                retry_after_ms=RETRY_AFTER_MS,
            )
        if len(self._inflight) >= self.config.max_inflight:
            raise Overloaded(
                f"{self.config.max_inflight} requests are in flight already; try again later", retry_after_ms=1000
            )

    def end_session(self, session: str, tenant: str) -> int:
        """Nothing of it is kept any more where a worker is connected; returns how many were told. Idempotent."""
        self.fleet.homes.forget(session, tenant)
        links = self.fleet.registered()
        for link in links:
            link.end_session(session, tenant)
        return len(links)

    def _limits(self) -> ModelLimits:
        return ModelLimits(
            context_tokens=self.fleet.context_tokens(self.checkpoint.context_tokens),
            vocab_size=self.checkpoint.vocab_size,
        )

    # ---- on tokeniser threads

    def _chat_prompt(self, request: ChatRequest) -> Prompt:
        tools = request.tools if request.tool_choice != "none" else None
        template = self.checkpoint.tool_template if tools else self.checkpoint.template
        if template is None:
            raise InvalidRequest("this model has no chat template; use /v1/completions", param="messages")
        text = template.render(
            request.template_messages(),
            tools=tools,
            add_generation_prompt=request.add_generation_prompt,
            extra=request.chat_template_kwargs,
        )
        return self._hashed(self._prompts.from_template(text, request.cache_salt or ""), "messages")

    def _completion_prompts(self, request: CompletionRequest) -> list[Prompt]:
        salt = request.cache_salt or ""
        made = [
            self._prompts.from_text(prompt, salt) if isinstance(prompt, str) else self._prompts.from_ids(prompt, salt)
            for prompt in request.prompts()
        ]
        return [self._hashed(prompt, "prompt") for prompt in made]

    def _hashed(self, prompt: Prompt, param: str) -> Prompt:
        if not prompt.ids:
            raise InvalidRequest(f"{param}: nothing is left of it after tokenising", param=param)
        for root, page_tokens in self.fleet.hash_roots():
            prompt.hashes(root, page_tokens)
        return prompt

    # ---- assembling

    def _call(
        self,
        request: ChatRequest | CompletionRequest,
        prompts: list[Prompt],
        samplings: list[wire.Sampling],
        arrival_s: float,
        asker: Asker,
        keep: wire.KvKeep | None,
    ) -> Call:
        info = self._info(request, prompts, samplings[0], keep)
        deadline_s = arrival_s + self.config.request_timeout_s
        call = Call(info, self.fleet, self.metrics, deadline_s, self._closed)
        for group, (prompt, sampling) in enumerate(zip(prompts, samplings, strict=True)):
            orders, outputs = [], []
            for choice in range(request.choices):
                index = group * request.choices + choice
                orders.append(
                    Order(
                        request_id=f"{info.call_id}-{index}" if index else info.call_id,
                        prompt=prompt,
                        sampling=for_choice(sampling, choice),
                        deadline_s=deadline_s,
                        worker_wait_s=self.config.worker_wait_s,
                        resume_wait_s=self.config.resume_wait_s,
                        local_below_tokens=self.config.local_below_tokens,
                        priority=request.priority or 0,
                        span=asker.span,
                        keep=keep if index == 0 else None,  # the choices share the prompt; one answer is gone on from
                    )
                )
                outputs.append(self._output(request, index, prompt, call, arrival_s))
            call.add_prompt(orders, outputs)
        self._inflight.add(call)
        self.metrics.inflight.set(len(self._inflight))
        self.metrics.prompt_tokens.inc(info.prompt_tokens)
        return call

    def _info(
        self,
        request: ChatRequest | CompletionRequest,
        prompts: list[Prompt],
        sampling: wire.Sampling,
        keep: wire.KvKeep | None,
    ) -> CallInfo:
        chat = isinstance(request, ChatRequest)
        return CallInfo(
            call_id=f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
            chat=chat,
            model=self.model,
            created_s=int(time.time()),
            prompt_tokens=sum(len(prompt.ids) for prompt in prompts),
            stream=bool(request.stream),
            include_usage=request.include_usage,
            logprobs=sampling.logprobs,
            top_logprobs=sampling.top_logprobs,
            session=keep.session if keep is not None else "",
        )

    def _output(
        self, request: ChatRequest | CompletionRequest, index: int, prompt: Prompt, call: Call, arrival_s: float
    ) -> ChoiceOutput:
        plain = isinstance(request, CompletionRequest)
        return ChoiceOutput(
            index,
            vocabulary=self.vocabulary,
            stops=request.stops(),
            skip_special=request.skip_special_tokens is not False,
            continues=plain,  # a completion goes on where its prompt ended: a leading space stays
            lead=prompt.text if isinstance(request, CompletionRequest) and request.echo else "",
            started_s=arrival_s,
            now=asyncio.get_running_loop().time,
            metrics=self.metrics,
            wake=call.wake,
        )

    def _closed(self, call: Call) -> None:
        if call not in self._inflight:
            return
        self._inflight.discard(call)
        self.metrics.inflight.set(len(self._inflight))
        self.metrics.output_tokens.inc(call.output_tokens)
        self.metrics.cached_tokens.inc(call.cached_tokens)

    def _worker_rows(self) -> Iterable[tuple[str, str, bool]]:
        for row in self.fleet.report():
            yield row["address"], row["role"] or UNKNOWN_ROLE, row["state"] == "up"


def model_card(router: Router) -> dict[str, object]:
    """Entry of /v1/models."""
    return {
        "id": router.model,
        "object": "model",
        "created": router.created_s,
        "owned_by": "baton",
        "max_model_len": router.fleet.context_tokens(router.checkpoint.context_tokens),
    }
