"""Keeps three in step: the webhook's Secret, the bundle in its configuration, and what this process serves with.

Story. Every replica reads the Secret every `check_s` and serves with what it finds there, renewing its TLS context in
place: the listener and open connections stay. The leader also does what is due (`certificates.advance`), Secret first,
bundle second; a pass that ends between the two is finished by the next. A new authority signs after the leader has seen
it in the bundle for `settle_s`. At rest: two reads, no write. The Secret is made by the chart, so that it goes with it.
"""

from __future__ import annotations

import asyncio
import base64
import logging
import ssl
import tempfile
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from baton_common.clock import Clock
from baton_common.kube.client import KubeClient
from baton_common.kube.errors import KubeError, NotLeader
from baton_common.kube.objects import Object, mapping, objects, text
from baton_operator.certificates import KeyRing, Lifetimes, advance, read_ring
from baton_operator.kinds import SECRET, WEBHOOK_CONFIGURATION

log = logging.getLogger("baton.operator.rotation")

_FIRST_LOOKS_S = 1.0


class Rotation:
    """`tls` serves as soon as `serves` is set. `expires_s`: told of the end of each certificate, seconds since 1970."""

    def __init__(
        self,
        client: KubeClient,
        *,
        namespace: str,
        name: str,
        leads: Callable[[], bool],
        clock: Clock,
        wall: Callable[[], datetime],
        expires_s: Callable[[float], None],
        times: Lifetimes,
    ) -> None:
        self._client = client
        self._namespace = namespace
        self._name = name  # of the Secret and the Service; the configuration has the namespace before it
        self._leads = leads
        self._clock = clock
        self._wall = wall
        self._expires_s = expires_s
        self._times = times
        # the API server calls a Service by the first, and a URL of the same machine by the second
        self._names = (f"{name}.{namespace}.svc", "localhost")
        self._served = ""
        self._published, self._published_s = "", 0.0
        self.tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self.serves = asyncio.Event()

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await self.step()
            check_s = self._times.check_s
            await asyncio.sleep(check_s if self.serves.is_set() else min(check_s, _FIRST_LOOKS_S))

    async def step(self) -> None:
        """One pass. Never raises for the API's sake: what fails is tried again by the next."""
        try:
            ring = await self._look()
        except (KubeError, NotLeader) as error:
            log.warning("certificate of the webhook: %s", error)
            return
        if ring is not None and ring.chain != self._served:
            self._serve(ring)

    async def _look(self) -> KeyRing | None:
        secret = await self._client.get(SECRET, self._namespace, self._name)
        if secret is None:
            log.warning("no Secret %s in %s: the webhook has no certificate; upgrade the release to have it made again",
                        self._name, self._namespace)  # fmt: skip
            return None
        ring = read_ring(mapping(secret, "data"))
        if not self._leads():
            return ring
        hooks = await self._client.get(WEBHOOK_CONFIGURATION, "", f"{self._namespace}-{self._name}")
        trusted = ring is not None and self._trusted(hooks, ring.newest)
        wanted = advance(ring, now=self._wall(), names=self._names, trusted=trusted, times=self._times)
        if wanted is not ring:
            # the resourceVersion we read comes back with it: of two writers one gets a conflict
            await self._client.replace(SECRET, self._namespace, self._name, {**secret, "data": wanted.as_data()})
            log.info("renewed", extra={"ends": str(wanted.serving.not_valid_after_utc), "cas": len(wanted.authorities)})
        await self._publish(hooks, wanted.bundle)
        return wanted

    def _trusted(self, hooks: Object | None, authority: str) -> bool:
        """Published for long enough, as far as this process has seen."""
        if not all(authority in _bundle(hook) for hook in objects(hooks, "webhooks")):
            self._published = ""
            return False
        if self._published != authority:
            self._published, self._published_s = authority, self._clock.now()
        return self._clock.now() - self._published_s >= self._times.settle_s

    async def _publish(self, hooks: Object | None, bundle: str) -> None:
        stale = [text(hook, "name") for hook in objects(hooks, "webhooks") if _bundle(hook) != bundle]
        if stale:
            encoded = base64.b64encode(bundle.encode()).decode()
            patch: Object = {"webhooks": [{"name": name, "clientConfig": {"caBundle": encoded}} for name in stale]}
            configuration = f"{self._namespace}-{self._name}"
            await self._client.strategic_merge(WEBHOOK_CONFIGURATION, "", configuration, patch)

    def _serve(self, ring: KeyRing) -> None:
        # ssl only loads from files; connections made from now on use it
        with tempfile.TemporaryDirectory(prefix="baton-") as folder:
            pair = Path(folder) / "serving.pem"
            pair.touch(mode=0o600)
            pair.write_text(ring.chain)
            self.tls.load_cert_chain(pair)
        self._served = ring.chain
        self._expires_s(ring.serving.not_valid_after_utc.timestamp())
        self.serves.set()


def _bundle(hook: Object) -> str:
    try:
        return base64.b64decode(text(hook, "clientConfig", "caBundle")).decode()
    except ValueError:
        return ""
