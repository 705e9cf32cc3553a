"""The webhook's HTTPS listener, and admission as kopf calls it.

kopf takes reviews apart, asks our handler and writes the answers. The listener is ours, by kopf's protocol for servers:
kopf's own closes its port to load a renewed certificate, and objects applied in that moment would pass unseen.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import kopf
from aiohttp import web

from baton_operator.admission import Admission
from baton_operator.kinds import INFERENCE_SERVICE
from baton_operator.rotation import Rotation

_HANDLER = "admission"
_REVIEW_BYTES = 8 << 20  # the new and the old object, each at most 1.5 MiB, and room for their escapes
_LAST_ANSWERS_S = 2.0
_UNPROCESSABLE = 422     # what the CRD's own rules answer with


@dataclass(frozen=True, slots=True, kw_only=True)
class Webhook:
    """What `watching` needs to have services admitted."""

    port: int
    rotation: Rotation
    admission: Admission

    def register(self, registry: kopf.OperatorRegistry, settings: kopf.OperatorSettings) -> None:
        """Makes kopf serve it; kopf keeps its hands off the configuration in the cluster."""
        settings.admission.server = self._serve
        logging.getLogger("kopf.objects").addFilter(_is_no_denial)
        kind = INFERENCE_SERVICE

        async def admit(*, warnings: list[str], **about: Any) -> None:
            verdict = await self.admission.judge(about["new"], about["old"])
            warnings.extend(verdict.warnings)
            if verdict.denial:
                raise kopf.AdmissionError(verdict.denial, code=_UNPROCESSABLE)

        kopf.on.validate(
            kind.group, kind.version, kind.plural, id=_HANDLER, operations=["CREATE", "UPDATE"], registry=registry
        )(admit)

    async def _serve(self, review: kopf.WebhookFn) -> AsyncIterator[kopf.WebhookClientConfig]:
        """As `kopf.WebhookServerProtocol`: listens once there is a certificate, until it is closed."""

        async def answer(request: web.Request) -> web.Response:
            try:
                return web.json_response(await review(await request.json()))
            except (ValueError, KeyError) as error:
                raise web.HTTPBadRequest(text=f"no admission review of an InferenceService: {error}\n") from None

        await self.rotation.serves.wait()
        app = web.Application(client_max_size=_REVIEW_BYTES)
        app.add_routes([web.post("/validate", answer)])
        runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=_LAST_ANSWERS_S)
        await runner.setup()
        try:
            await web.TCPSite(runner, None, self.port, ssl_context=self.rotation.tls).start()
            yield {}  # how to reach us is for the chart to say
            await asyncio.Event().wait()
        finally:
            await runner.cleanup()


def _is_no_denial(record: logging.LogRecord) -> bool:
    """kopf writes every refusal as an error of the operator's."""
    return not record.getMessage().startswith(f"Webhook {_HANDLER!r} failed permanently")
