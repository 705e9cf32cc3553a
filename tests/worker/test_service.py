"""The shell over real gRPC on loopback, with a scripted engine behind it."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from support.router_client import GREEDY, RouterClient
from support.scripted_engine import PAGES, expected_token
from worker.conftest import COMPAT, Worker, _raise

from baton_common.clock import SystemClock
from baton_common.errors import BatonError, ConfigError, ErrorKind
from baton_common.ids import PageHash, TransferId
from baton_engine.request import FinishReason, Mode, SamplingParams
from baton_kvtransfer.records import Receipt
from baton_proto import worker_pb2, worker_pb2_grpc
from baton_worker.config import WorkerConfig
from baton_worker.service import READY_SERVICE, WorkerService

LONG = SamplingParams(temperature=0.0, max_tokens=100_000, ignore_eos=True)
RECEIPT = Receipt(
    transfer_id=TransferId("d-2"), peer="d", wire="tcp", bytes=1, chunks=1, resends=0, first_chunk_s=0.0,
    last_chunk_s=0.0, finish_s=0.0, commit_s=0.0,
)  # fmt: skip
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING

SMALL_WINDOW = (("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1 << 16))  # else megabytes fit in between


def outputs(prompt: list[int], count: int) -> list[int]:
    return [expected_token(prompt, position) for position in range(count)]


async def health(address: str, service: str) -> int:
    async with grpc.aio.insecure_channel(address) as channel:
        reply = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=service))
        return int(reply.status)


async def status(address: str) -> worker_pb2.StatusReply:
    async with grpc.aio.insecure_channel(address) as channel:
        return await worker_pb2_grpc.AdminStub(channel).Status(worker_pb2.StatusRequest())


# ---- requests -------------------------------------------------------------------------------------------------------
async def test_a_request_streams_its_tokens_and_ends_with_a_reason(worker: Worker) -> None:
    bench = await worker()
    async with bench.router() as router:
        answer = await router.submit(Mode.LOCAL, [5, 6, 7])
        assert await answer.end() == outputs([5, 6, 7], GREEDY.max_tokens)
        assert answer.tokens[-1].finish is FinishReason.LENGTH
        assert [token.position for token in answer.tokens] == list(range(GREEDY.max_tokens))
        assert [token.cached_tokens for token in answer.tokens] == [0] + [None] * (GREEDY.max_tokens - 1)
        await router.wait(lambda: bench.desk.open_requests == 0)  # the last token may be read before it is booked


async def test_all_tokens_of_a_step_come_in_one_message(worker: Worker) -> None:
    bench = await worker(step_s=0.01)
    async with bench.router() as router:
        bench.engine.may_step.clear()
        answers = [await router.submit(Mode.LOCAL, [index]) for index in range(10)]
        await router.wait(lambda: bench.engine.stats().running == 10)
        bench.engine.may_step.set()
        for index, answer in enumerate(answers):
            assert await answer.end() == outputs([index], GREEDY.max_tokens)
        assert len(router.batches) == GREEDY.max_tokens
        assert len({batch.step for batch in router.batches}) == GREEDY.max_tokens
        assert all(len(batch.handles) == 10 for batch in router.batches)


async def test_two_routers_may_use_the_same_handles(worker: Worker) -> None:
    bench = await worker()
    async with bench.router("one") as one, bench.router("two") as two:
        first, second = await one.submit(Mode.LOCAL, [1]), await two.submit(Mode.LOCAL, [2])
        assert first.handle == second.handle
        assert await first.end() == outputs([1], 8)
        assert await second.end() == outputs([2], 8)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tokens": b""}, "prompt"),
        ({"deadline_ms": 0}, "deadline_ms"),
    ],
)
async def test_a_bad_submit_fails_with_its_field_and_the_stream_goes_on(
    worker: Worker, fields: dict[str, object], param: str
) -> None:
    bench = await worker()
    async with bench.router() as router:
        answer = await router.submit(Mode.LOCAL, [1], raw=fields)
        with pytest.raises(BatonError) as refusal:
            await answer.end()
        assert (refusal.value.kind, refusal.value.param) == (ErrorKind.INVALID, param)
        assert await (await router.submit(Mode.LOCAL, [1])).end() == outputs([1], 8)


async def test_an_abort_ends_the_request_and_nothing_follows(worker: Worker) -> None:
    bench = await worker()
    async with bench.router() as router:
        answer = await router.submit(Mode.LOCAL, [1], sampling=LONG)
        await answer.first()
        await router.abort(answer, "client went away")
        with pytest.raises(BatonError, match="client went away") as end:
            await answer.end()
        assert end.value.kind is ErrorKind.ABORTED
        await router.abort(answer)  # crosses the end: ignored
        assert await (await router.submit(Mode.LOCAL, [2])).end() == outputs([2], 8)
        assert router.late == []


async def test_the_loss_of_a_stream_aborts_its_requests_and_no_others(worker: Worker) -> None:
    bench = await worker()
    async with bench.router() as survivor:
        kept = await survivor.submit(Mode.LOCAL, [9], sampling=LONG)
        async with bench.router() as router:
            for index in range(5):
                await (await router.submit(Mode.LOCAL, [index], sampling=LONG)).first()
            assert bench.desk.open_requests == 6
        await survivor.wait(lambda: bench.desk.open_requests == 1)
        assert (await status(bench.address)).pages.free == PAGES - 1
        seen = len(kept.tokens)
        await survivor.wait(lambda: len(kept.tokens) > seen)


# ---- rules of the stream --------------------------------------------------------------------------------------------
async def test_a_handle_in_use_ends_the_stream(worker: Worker) -> None:
    bench = await worker()
    async with bench.router() as router:
        answer = await router.submit(Mode.LOCAL, [1], sampling=LONG)
        await answer.first()
        await router.submit(Mode.LOCAL, [1], raw={"handle": answer.handle})
        assert await router.code() is grpc.StatusCode.INVALID_ARGUMENT
        async with bench.router() as again:
            await again.wait(lambda: bench.desk.open_requests == 0)


async def test_a_stream_of_another_protocol_version_is_refused_with_both(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = await worker()
    monkeypatch.setattr("support.router_client.PROTOCOL_VERSION", 99)
    with pytest.raises(ConnectionError, match=r"protocol_version differs: ours 1, theirs 99"):
        await bench.router().__aenter__()


async def test_a_stream_starts_with_hello(worker: Worker) -> None:
    bench = await worker()
    async with grpc.aio.insecure_channel(bench.address) as channel:
        call = worker_pb2_grpc.WorkerStub(channel).Connect()
        await call.write(worker_pb2.RouterMessage(abort=worker_pb2.Abort(handle=1)))
        assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_router_that_stops_reading_loses_its_stream_and_others_do_not_notice(worker: Worker) -> None:
    bench = await worker(step_s=0.001, stream_backlog=16)
    async with bench.router() as other:
        async with grpc.aio.insecure_channel(bench.address, options=SMALL_WINDOW) as channel:
            call = worker_pb2_grpc.WorkerStub(channel).Connect()
            await call.write(
                worker_pb2.RouterMessage(hello=worker_pb2.RouterHello(protocol_version=1, router_id="slow"))
            )
            await call.read()
            slow = RouterClient(bench.address)
            slow._call = call  # submits, but nobody reads
            top = SamplingParams(temperature=0.0, max_tokens=1_000_000, ignore_eos=True)
            for index in range(400):
                await slow.submit(Mode.LOCAL, [index], sampling=top)
            await other.wait(lambda: bench.desk.open_requests == 400)
            answer = await other.submit(Mode.LOCAL, [3])
            assert await answer.end() == outputs([3], 8)
            await other.wait(lambda: bench.desk.open_requests == 0, within_s=30)
            with pytest.raises(grpc.aio.AioRpcError, match="16 messages unread"):
                await _read_all(call)  # what was on the way, then the reason
            await slow._channel.close()
        assert len(bench.desk.streams) == 1


# ---- load and KV events ---------------------------------------------------------------------------------------------
async def test_load_comes_by_itself_and_counts_up(worker: Worker) -> None:
    bench = await worker()
    async with bench.router() as router:
        await (await router.submit(Mode.LOCAL, [1])).end()
        await router.wait(lambda: len(router.loads) >= 2)
        assert router.loads[1].sequence > router.loads[0].sequence
        assert router.loads[-1].total_pages == PAGES
        assert not router.loads[-1].draining


def _hash(index: int) -> PageHash:
    return PageHash(bytes([index]) * 16)


async def test_kv_events_follow_a_snapshot_without_gaps(worker: Worker) -> None:
    bench = await worker()
    bench.role.on_kv_events([_hash(1), _hash(2)], [])
    async with bench.router() as early:
        await early.wait(lambda: len(early.kv_events) == 1)
        bench.role.on_kv_events([_hash(3)], [_hash(1)])
        await early.wait(lambda: len(early.kv_events) == 2)
        snapshot, change = early.kv_events
        assert snapshot.snapshot
        assert {snapshot.stored[:16], snapshot.stored[16:]} == {_hash(1), _hash(2)}
        assert (change.stored, change.removed, change.snapshot) == (_hash(3), _hash(1), False)
        assert change.sequence == snapshot.sequence + 1
        await early.send(kv_snapshot=worker_pb2.KvSnapshotRequest())
        await early.wait(lambda: len(early.kv_events) == 3)
        assert {early.kv_events[2].stored[:16], early.kv_events[2].stored[16:]} == {_hash(2), _hash(3)}
        assert early.kv_events[2].snapshot


# ---- drain ----------------------------------------------------------------------------------------------------------
async def test_a_draining_worker_finishes_what_runs_and_refuses_the_rest(worker: Worker) -> None:
    bench = await worker(step_s=0.01)
    async with bench.router() as router:
        running = await router.submit(Mode.LOCAL, [4], sampling=SamplingParams(temperature=0, max_tokens=30))
        await running.first()
        drained = asyncio.create_task(bench.service.drain(10))
        await router.wait(lambda: bool(router.loads) and router.loads[-1].draining)
        refused = await router.submit(Mode.LOCAL, [5])
        with pytest.raises(BatonError) as refusal:
            await refused.end()
        assert refusal.value.kind is ErrorKind.DRAINING
        assert await health(bench.address, READY_SERVICE) == NOT_SERVING
        assert await health(bench.address, "") == SERVING
        assert await running.end() == outputs([4], 30)
        await drained
        assert (await status(bench.address)).state == "empty"


async def test_a_decode_worker_that_drains_hands_over_what_it_has(worker: Worker) -> None:
    """The router has room elsewhere: it aborts here, and asks for the KV with the other's ticket."""
    bench = await worker(step_s=0.01)
    ticket = worker_pb2.Ticket(transfer_id="d-2", peer_address="127.0.0.1:8", incarnation="d", compat=COMPAT)
    async with bench.router() as router:
        running = await router.submit(Mode.LOCAL, [4], sampling=LONG)
        await running.first()
        drained = asyncio.create_task(bench.service.drain(60))
        await router.wait(lambda: bool(router.loads) and router.loads[-1].draining)
        refused = await router.submit(Mode.RESERVE, [5])
        with pytest.raises(BatonError) as refusal:
            await refused.end()
        assert refusal.value.kind is ErrorKind.DRAINING
        made = running.token_ids
        await router.abort(running)
        leaving = await router.submit(Mode.PREFILL, [4, *made], prompt_tokens=1, sampling=LONG, ticket=ticket)
        assert (await leaving.first()).token_id == outputs([4], len(made) + 1)[-1]
        await router.wait(lambda: bench.endpoint.opened[0].finishes == 1)
        assert not drained.done()
        bench.endpoint.opened[0].outbound.done(RECEIPT)
        await drained
        late = await router.submit(Mode.PREFILL, [4], ticket=ticket)
        with pytest.raises(BatonError) as refusal:
            await late.end()
        assert refusal.value.kind is ErrorKind.DRAINING


async def test_a_prefill_worker_that_drains_takes_nothing_new(worker: Worker) -> None:
    bench = await worker(kind="prefill")
    ticket = worker_pb2.Ticket(transfer_id="d-2", peer_address="127.0.0.1:8", incarnation="d", compat=COMPAT)
    async with bench.router() as router:
        first = await router.submit(Mode.PREFILL, [4], sampling=LONG, ticket=ticket)
        await first.first()
        drained = asyncio.create_task(bench.service.drain(60))
        await router.wait(lambda: bool(router.loads) and router.loads[-1].draining)
        second = await router.submit(Mode.PREFILL, [5], sampling=LONG, ticket=ticket)
        with pytest.raises(BatonError) as refusal:
            await second.end()
        assert refusal.value.kind is ErrorKind.DRAINING
        bench.endpoint.opened[0].outbound.done(RECEIPT)
        await drained


async def test_what_does_not_finish_in_time_is_handed_back(worker: Worker) -> None:
    bench = await worker()
    async with bench.router() as router:
        running = await router.submit(Mode.LOCAL, [4], sampling=LONG)
        await running.first()
        await bench.service.drain(0.05)
        with pytest.raises(BatonError) as back:
            await running.end()
        assert back.value.kind is ErrorKind.DRAINING
        assert running.token_ids == outputs([4], len(running.tokens))


async def test_admin_drain_reports_until_empty(worker: Worker) -> None:
    bench = await worker()
    async with bench.router() as router, grpc.aio.insecure_channel(bench.address) as channel:
        await (await router.submit(Mode.LOCAL, [4], sampling=LONG)).first()
        call = worker_pb2_grpc.AdminStub(channel).Drain(worker_pb2.DrainRequest(deadline_ms=50))
        states = [reply.state async for reply in call]
        assert states[-1] == "empty"
        assert "draining" in states


# ---- start, health, crash -------------------------------------------------------------------------------------------
async def test_before_the_model_is_there_routers_are_told_to_come_back() -> None:
    service = WorkerService(config=WorkerConfig(listen="127.0.0.1:0"), clock=SystemClock(), on_failure=_raise)
    host, port = await service.listen()
    address = f"{host}:{port}"
    assert await health(address, READY_SERVICE) == NOT_SERVING
    assert (await status(address)).state == "starting"
    with pytest.raises(ConnectionError, match="UNAVAILABLE"):
        await RouterClient(address).__aenter__()
    await service.close()


async def test_a_port_in_use_is_said_with_its_number(worker: Worker) -> None:
    bench = await worker()
    service = WorkerService(config=WorkerConfig(listen=bench.address), clock=SystemClock(), on_failure=_raise)
    with pytest.raises(ConfigError, match=f"port {bench.address.rpartition(':')[2]} is in use"):
        await service.listen()


async def test_health_follows_the_step_counter(worker: Worker) -> None:
    bench = await worker(stall_s=0.2)
    async with bench.router() as router:
        await (await router.submit(Mode.LOCAL, [4], sampling=LONG)).first()
        assert await health(bench.address, "") == SERVING
        bench.engine.may_step.clear()
        await _until_health(bench.address, NOT_SERVING)
        assert await health(bench.address, READY_SERVICE) == NOT_SERVING
        bench.engine.may_step.set()
        await _until_health(bench.address, SERVING)


async def test_an_idle_worker_is_healthy_for_ever(worker: Worker) -> None:
    bench = await worker(stall_s=0.1)
    await asyncio.sleep(0.6)
    assert await health(bench.address, "") == SERVING


async def test_a_crashed_engine_answers_every_request(worker: Worker) -> None:
    bench = await worker()
    async with bench.router() as router:
        running = await router.submit(Mode.LOCAL, [4], sampling=LONG)
        await running.first()
        bench.engine.may_step.clear()
        await bench.service.crashed(BatonError("the worker crashed"))
        with pytest.raises(BatonError) as end:
            await running.end()
        assert end.value.kind is ErrorKind.INTERNAL
        bench.engine.may_step.set()
        await asyncio.sleep(0.05)
        assert router.late == []


async def _read_all(call: grpc.aio.StreamStreamCall) -> None:
    while await call.read() is not grpc.aio.EOF:
        pass


async def _until_health(address: str, wanted: int) -> None:
    async with asyncio.timeout(5):
        while await health(address, "") != wanted:
            await asyncio.sleep(0.05)
