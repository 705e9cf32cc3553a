"""kopf as the ears of the operator: it lists, watches, reconnects; every event becomes a call of the controller.

Only low-level `on.event` handlers, so kopf keeps no state in the cluster: no finaliser, no annotation, no patch, no
peering, no posted events. Children are watched with the service's label as selector on the *server's* side: other
objects of the cluster never come here.
"""

from __future__ import annotations

import asyncio
import datetime
import logging
import platform
from collections.abc import Callable
from typing import Any

import kopf

from baton_common.kube.credentials import Credentials
from baton_common.kube.kinds import POD, Kind
from baton_operator.config import OperatorConfig
from baton_operator.controller import Controller
from baton_operator.kinds import ACCELERATOR_PROFILE, CHILD_KINDS, INFERENCE_SERVICE, OPTIONAL_KINDS
from baton_operator.plan.labels import PREFIX, SERVICE_ANNOTATION, SERVICE_LABEL
from baton_operator.webhook import Webhook

_WATCHED_CHILDREN = (*(kind for kind in CHILD_KINDS if kind not in OPTIONAL_KINDS), POD)
_SERVER_TIMEOUT_S = 300    # an integer in the URL; a watch is renewed by the server after this
_CLIENT_TIMEOUT_S = 330.0  # and given up by us after this: a silently dead connection lasts no longer
_CONNECT_TIMEOUT_S = 10.0
_REQUEST_TIMEOUT_S = 30.0
_RECONNECT_S = 0.5
_PAGE = 500
_HANDLERS_AT_ONCE = 50
_IDLE_S = 1.0
_TOKEN_FRESH = datetime.timedelta(minutes=5)  # Kubernetes rotates a pod's token
_END_S = 20.0              # for kopf to end in order once a part of it has ended
_BACK_OFF_S = (0.5, 1, 2, 4, 8, 15, 30)


class NothingStored(kopf.DiffBaseStorage, kopf.ProgressStorage):
    """kopf's memory in the objects, switched off."""

    def fetch(self, **_: Any) -> Any:
        return None

    def store(self, **_: Any) -> None:
        """Nothing."""

    def purge(self, **_: Any) -> None:
        """Nothing."""

    def touch(self, **_: Any) -> None:
        """Nothing."""

    def clear(self, *, essence: Any) -> Any:
        return essence


async def watch(
    controller: Controller,
    credentials: Credentials,
    config: OperatorConfig,
    *,
    ready: asyncio.Event,
    webhook: Webhook | None,
) -> None:
    """Until SIGTERM or SIGINT, which kopf handles, or until cancelled. Sets `ready` once it watches.

    Raises what made a watch fail for good: an operator that has gone deaf had better start again.
    """
    logging.getLogger("kopf").setLevel(logging.WARNING)
    kopf_identity: Any = platform.node()
    registry, settings = _registry(controller, credentials), _settings(config)
    if webhook is not None:
        webhook.register(registry, settings)
    known = asyncio.all_tasks()  # kopf ends whatever begins from here on
    parts = await kopf.spawn_tasks(
        registry=registry,
        settings=settings,
        standalone=True,
        clusterwide=not config.namespaces,
        namespaces=config.namespaces,
        ready_flag=ready,
        # unused, but kopf would make one from the user's name, which a numeric user of a pod does not have
        identity=kopf_identity,
    )
    whole = asyncio.create_task(kopf.run_tasks(parts, ignored=known), name="kopf")
    try:
        await asyncio.wait(parts, return_when=asyncio.FIRST_COMPLETED)
        await asyncio.wait({whole}, timeout=_END_S)
    except asyncio.CancelledError:
        whole.cancel()
        await asyncio.wait({whole}, timeout=_END_S)
        raise
    if whole.done():
        return await whole
    # a watch that lost its session meanwhile waits for a new one and hears no cancellation
    for task in (whole, *parts):
        task.cancel()
    failures = [part.exception() for part in parts if part.done() and not part.cancelled()]
    raise next((failure for failure in failures if failure is not None), RuntimeError("watching did not end in order"))


def _settings(config: OperatorConfig) -> kopf.OperatorSettings:
    settings = kopf.OperatorSettings()
    settings.posting.enabled = False
    settings.peering.standalone = True
    # in namespaced mode there are no rights on CRDs and namespaces, and none are needed
    settings.scanning.disabled = bool(config.namespaces)
    settings.persistence.finalizer = f"{PREFIX}/never-set"
    settings.persistence.diffbase_storage = NothingStored()
    settings.persistence.progress_storage = NothingStored()
    settings.watching.server_timeout = _SERVER_TIMEOUT_S
    settings.watching.client_timeout = _CLIENT_TIMEOUT_S
    settings.watching.connect_timeout = _CONNECT_TIMEOUT_S
    settings.watching.reconnect_backoff = _RECONNECT_S
    settings.watching.chunk_size = _PAGE
    settings.networking.request_timeout = _REQUEST_TIMEOUT_S
    settings.networking.connect_timeout = _CONNECT_TIMEOUT_S
    settings.networking.error_backoffs = _BACK_OFF_S
    settings.queueing.worker_limit = _HANDLERS_AT_ONCE
    settings.queueing.idle_timeout = _IDLE_S
    settings.queueing.error_delays = _BACK_OFF_S
    for kind in _WATCHED_CHILDREN:
        settings.watching.label_selectors[kind.group, kind.version, kind.plural] = SERVICE_LABEL
    return settings


def _registry(controller: Controller, credentials: Credentials) -> kopf.OperatorRegistry:
    registry = kopf.OperatorRegistry()

    def on_event(kind: Kind, handle: Callable[[str, kopf.Body], None]) -> None:
        # a coroutine: kopf runs plain functions in threads
        async def heard(type: str | None, body: kopf.Body, **_: Any) -> None:
            handle(type or "", body)

        kopf.on.event(kind.group, kind.version, kind.plural, id=f"see-{kind.plural}", registry=registry)(heard)

    def service(change: str, body: kopf.Body) -> None:
        if change == "DELETED":
            controller.service_gone(body.meta.namespace or "", body.meta.name or "")
        else:
            profile = str(body.spec.get("profile", ""))
            controller.service_changed(body.meta.namespace or "", body.meta.name or "", profile)

    def child(_: str, body: kopf.Body) -> None:
        controller.child_changed(body.meta.namespace or "", body.meta.annotations.get(SERVICE_ANNOTATION, ""))

    on_event(INFERENCE_SERVICE, service)
    on_event(ACCELERATOR_PROFILE, lambda _, body: controller.profile_changed(body.meta.name or ""))
    for kind in _WATCHED_CHILDREN:
        on_event(kind, child)

    @kopf.on.login(registry=registry)
    async def login(**_: Any) -> kopf.ConnectionInfo:
        return kopf.ConnectionInfo(
            server=credentials.server,
            ca_data=credentials.ca_pem.encode() or None,
            insecure=credentials.insecure or None,
            token=credentials.read_token() or None,
            certificate_data=credentials.certificate_pem.encode() or None,
            private_key_data=credentials.key_pem.encode() or None,
            default_namespace=credentials.namespace,
            expiration=_soon() if credentials.token_file else None,
        )

    return registry


def _soon() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC) + _TOKEN_FRESH
