"""The webhook's certificates over years of made-up time: at no moment is one expired or signed by a stranger."""

from __future__ import annotations

import base64
import contextlib
import datetime
import random
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest
from cryptography import x509
from cryptography.x509.verification import PolicyBuilder, Store
from hypothesis import given, settings
from hypothesis import strategies as st
from support.operator_world import Crash, FakeKube, FakeServer

from baton_common.clock import ManualClock
from baton_common.kube.errors import Conflict, KubeError
from baton_operator.certificates import KeyRing, Lifetimes, advance, read_ring
from baton_operator.kinds import SECRET, WEBHOOK_CONFIGURATION
from baton_operator.rotation import Rotation

NAMES = ("hook.ns.svc", "localhost")
START = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
DAY = datetime.timedelta(days=1)
TIMES = Lifetimes()


def first(now: datetime.datetime = START) -> KeyRing:
    return advance(None, now=now, names=NAMES, trusted=False, times=TIMES)


def step(ring: KeyRing, days: float, *, trusted: bool = True) -> KeyRing:
    return advance(ring, now=START + days * DAY, names=NAMES, trusted=trusted, times=TIMES)


def verify(serving: x509.Certificate, bundle: str, now: datetime.datetime) -> None:
    """As an API server would: the name, the chain, the times. Raises VerificationError."""
    store = Store(x509.load_pem_x509_certificates(bundle.encode()))
    PolicyBuilder().store(store).time(now).build_server_verifier(x509.DNSName(NAMES[0])).verify(serving, [])


# ---- one ring ------------------------------------------------------------------------------------------------------
def test_a_fresh_ring_is_trusted_by_its_own_bundle_and_lives_sixty_days() -> None:
    ring = first()
    for name in NAMES:
        store = Store(x509.load_pem_x509_certificates(ring.bundle.encode()))
        PolicyBuilder().store(store).time(START).build_server_verifier(x509.DNSName(name)).verify(ring.serving, [])
    assert ring.serving.not_valid_after_utc - START == 60 * DAY
    assert ring.authorities[0].not_valid_after_utc - START == 365 * DAY
    assert step(ring, 39) is ring


def test_a_serving_certificate_is_renewed_at_two_thirds_of_its_life() -> None:
    ring = first()
    later = step(ring, 40)
    assert later.serving != ring.serving
    assert later.authorities == ring.authorities
    assert later.serving.not_valid_after_utc == START + 100 * DAY


def test_a_new_authority_signs_only_when_it_is_trusted_and_the_old_one_stays_until_it_ends() -> None:
    ring = step(first(), 230)
    two = step(ring, 244)
    assert [item.not_valid_after_utc for item in two.authorities] == [START + 609 * DAY, START + 365 * DAY]
    assert two.serving == ring.serving
    assert step(two, 271, trusted=False).serving == ring.serving  # due, but nobody would believe it
    signed = step(two, 271)
    assert signed.serving.issuer == two.authorities[0].subject
    assert len(step(signed, 364.9).authorities) == 2
    assert len(step(signed, 365).authorities) == 1


def test_no_serving_certificate_outlives_its_authority() -> None:
    ring = first()
    for days in (330, 350):  # nobody led for most of a year, and then nobody trusts the new authority
        late = step(ring, days, trusted=True)
        assert late.serving.not_valid_after_utc <= late.authorities[0].not_valid_after_utc


def test_after_years_asleep_it_starts_afresh() -> None:
    late = step(first(), 4000)
    verify(late.serving, late.bundle, START + 4000 * DAY)
    assert len(late.authorities) == 1


@pytest.mark.parametrize("lost", ["ca.crt", "ca.key", "tls.crt", "tls.key"])
def test_a_damaged_secret_is_no_ring(lost: str) -> None:
    data = dict(first().as_data())
    assert read_ring(data) is not None
    assert read_ring({}) is None
    for damage in ("", "%%%", base64.b64encode(b"no PEM").decode(), first().as_data()[lost]):
        # the last one: of another ring, so that key and certificate do not belong together
        assert read_ring({**data, lost: damage}) is None


def test_what_is_written_is_what_is_read() -> None:
    ring = step(first(), 244)
    again = read_ring(ring.as_data())
    assert again is not None
    assert (again.bundle, again.chain, again.newest) == (ring.bundle, ring.chain, ring.newest)


def test_lifetimes_that_cannot_work_are_refused() -> None:
    with pytest.raises(ValueError, match="at most 90 days"):
        Lifetimes(serving=91 * DAY)
    with pytest.raises(ValueError, match="a third"):
        replace(TIMES, authority=100 * DAY)


# ---- two replicas, a Secret, a configuration, an API server that learns late ----------------------------------------
@dataclass
class Installed:
    """A release as Helm leaves it."""

    server: FakeServer = field(default_factory=FakeServer)
    clock: ManualClock = field(default_factory=ManualClock)

    def __post_init__(self) -> None:
        self.install()

    def install(self) -> None:
        self.server.put(SECRET, {"metadata": {"name": "hook", "namespace": "ns", "labels": {"a": "b"}}})
        hooks = [{"name": "isvc", "clientConfig": {"service": {"name": "hook"}}, "failurePolicy": "Ignore"}]
        self.server.put(WEBHOOK_CONFIGURATION, {"metadata": {"name": "ns-hook"}, "webhooks": hooks})

    def now(self) -> datetime.datetime:
        return START + datetime.timedelta(seconds=self.clock.now())

    def replica(self, *, leads: bool, times: Lifetimes = TIMES) -> Rotation:
        return Rotation(
            FakeKube(self.server, may_write=lambda: leads), namespace="ns", name="hook", leads=lambda: leads,
            clock=self.clock, wall=self.now, expires_s=lambda _: None, times=times,
        )  # fmt: skip

    @property
    def published(self) -> str:
        item = self.server.get(WEBHOOK_CONFIGURATION, "ns-hook", "")
        assert item is not None
        [hook] = item["webhooks"]
        assert hook["failurePolicy"] == "Ignore"  # nothing else of it is touched
        return base64.b64decode(hook["clientConfig"].get("caBundle", "")).decode()

    @property
    def secret(self) -> KeyRing | None:
        item = self.server.get(SECRET, "hook")
        return None if item is None else read_ring(item.get("data", {}))


def in_use(replica: Rotation) -> x509.Certificate:
    """What a new connection to it would be shown."""
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname, client.verify_mode = False, ssl.CERT_NONE
    ends = [ssl.MemoryBIO() for _ in range(2)]
    there = replica.tls.wrap_bio(ends[0], ends[1], server_side=True)
    here = client.wrap_bio(ends[1], ends[0])
    for side in (here, there, here):
        with contextlib.suppress(ssl.SSLWantReadError):
            side.do_handshake()
    shown = here.getpeercert(binary_form=True)
    assert shown is not None
    return x509.load_der_x509_certificate(shown)


async def test_the_leader_fills_the_empty_secret_and_the_configuration_and_all_serve() -> None:
    world = Installed()
    leader, other = world.replica(leads=True), world.replica(leads=False)
    await other.step()
    assert not other.serves.is_set()
    await leader.step()
    await other.step()
    assert leader.serves.is_set()
    assert other.serves.is_set()
    for replica in (leader, other):
        verify(in_use(replica), world.published, world.now())
    stored = world.server.get(SECRET, "hook")
    assert stored is not None
    assert stored["metadata"]["labels"] == {"a": "b"}


async def test_at_rest_nothing_is_written_by_anyone() -> None:
    world = Installed()
    leader, other = world.replica(leads=True), world.replica(leads=False)
    await leader.step()
    before = list(world.server.writes)
    for _ in range(100):
        world.clock.advance(3600)
        await leader.step()
        await other.step()
        await world.replica(leads=True).step()  # nor by one that has just started
    assert world.server.writes == before
    assert ("list", "/api/v1/namespaces/ns/secrets") not in world.server.calls


@pytest.mark.parametrize("place", range(8))
async def test_a_leader_that_dies_at_any_call_is_finished_by_the_next(place: int) -> None:
    world, count = Installed(), iter(range(1000))

    def die(verb: str, path: str) -> None:
        if next(count) == place:
            raise Crash

    world.server.before = world.server.after = die
    with contextlib.suppress(Crash):
        await world.replica(leads=True).step()
    world.server.before = world.server.after = lambda verb, path: None
    heir = world.replica(leads=True)
    await heir.step()
    verify(in_use(heir), world.published, world.now())


async def test_a_lost_or_spoilt_secret_is_told_and_made_good() -> None:
    world = Installed()
    leader = world.replica(leads=True)
    await leader.step()
    world.server.delete(SECRET.path("ns", "hook"))
    await leader.step()  # nothing to write into; it goes on serving
    assert leader.serves.is_set()
    world.install()  # helm upgrade
    await leader.step()
    verify(in_use(leader), world.published, world.now())


async def test_of_two_that_believe_to_lead_one_wins() -> None:
    world = Installed()
    one, two = world.replica(leads=True), world.replica(leads=True)
    raced = False

    async def race() -> None:
        nonlocal raced
        raced = True
        world.server.before = lambda verb, path: None
        await two.step()

    calls: list[str] = []

    def note(verb: str, path: str) -> None:
        calls.append(verb)
        if verb == "update" and not raced:
            raise Conflict("somebody was faster", status=409)

    world.server.before = note
    await one.step()
    assert not one.serves.is_set()
    await race()
    await one.step()
    assert in_use(one) == in_use(two)
    verify(in_use(one), world.published, world.now())


@settings(max_examples=3, deadline=None)
@given(serving_days=st.integers(6, 60), factor=st.floats(3.0, 5.0), seed=st.integers(0, 1 << 32))
async def test_over_years_with_restarts_and_outages_no_certificate_is_ever_expired_or_untrusted(
    serving_days: int, factor: float, seed: int
) -> None:
    """Looks of an hour to days apart; of any three, one may meet a new leader or an API that fails half-way."""
    dice, day_s = random.Random(seed), 86400
    times = Lifetimes(serving=serving_days * DAY, authority=serving_days * factor * DAY, settle_s=3600, check_s=3600)
    world = Installed()
    replicas = [world.replica(leads=index == 0, times=times) for index in range(2)]
    for replica in replicas:
        await replica.step()
    believed = world.published  # an API server learns of a bundle one look later
    served, authorities, calm = set(), set(), 0
    while world.clock.now() < 9 * serving_days * day_s:
        world.clock.advance(dice.uniform(3600, serving_days * day_s / 24))
        calm = 0 if calm >= 2 and dice.random() < 0.5 else calm + 1
        if calm == 0 and dice.random() < 0.5:
            replicas[0] = world.replica(leads=True, times=times)
        elif calm == 0:
            world.server.before = failing_after(dice.randrange(5))
        for replica in replicas:
            await replica.step()
        world.server.before = lambda verb, path: None
        for replica in replicas:
            if replica.serves.is_set():
                certificate = in_use(replica)
                verify(certificate, believed, world.now())
                served.add(certificate.serial_number)
        believed = world.published
        known = x509.load_pem_x509_certificates(believed.encode())
        authorities |= {item.serial_number for item in known}
        assert len(known) <= 2
    assert len(served) >= 9
    assert len(authorities) >= 2


def failing_after(calls: int) -> Callable[[str, str], None]:
    left = iter(range(calls))

    def fail(verb: str, path: str) -> None:
        if next(left, None) is None:
            raise KubeError("the API server does not answer")

    return fail
