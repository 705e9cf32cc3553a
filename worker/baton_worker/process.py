"""A worker process from its command line to its exit status; both roles use it.

Exit status: 0 after a drain (SIGTERM, SIGINT), 1 after a crash of the engine (a dump file says more), 2 when it refuses
to start (one line says why). A second signal ends the process at once. SIGUSR1 prints all stacks.
Owner of: event loop (main thread), engine, transfer endpoint, metrics server.
"""

from __future__ import annotations

import asyncio
import faulthandler
import logging
import os
import signal
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from prometheus_client import CollectorRegistry, start_http_server

from baton_common import logs
from baton_common.checkpoint import resolve_checkpoint
from baton_common.clock import Clock, SystemClock
from baton_common.errors import BatonError, ConfigError
from baton_common.settings import parse_command_line
from baton_common.telemetry import OFF, open_tracing
from baton_engine.config import EngineConfig
from baton_engine.engine import Engine
from baton_engine.exec.cpu import available_bytes
from baton_engine.exec.device import Device, open_device
from baton_engine.models.kernels import parse_force
from baton_engine.models.loader import LoadedModel, load_model
from baton_kvtransfer import KvEndpoint, PeerInfo, TransferConfig, TransferMetrics
from baton_kvtransfer.blocks import Blocks, HostBlocks
from baton_proto import common_pb2, worker_pb2
from baton_worker import crash
from baton_worker.blocks import blocks_for
from baton_worker.config import WorkerConfig, split_address
from baton_worker.convert import PROTOCOL_VERSION
from baton_worker.desk import Desk
from baton_worker.outbox import Outbox
from baton_worker.ports import WorkerRole
from baton_worker.service import Parts, WorkerService
from baton_worker.spans import RequestSpans
from baton_worker.state import EngineMetrics
from baton_worker.storage import Storage, open_storage
from baton_worker.tiering import parse_tiers

log = logging.getLogger("baton.worker")

LAST_SPANS_S = 2.0
"""How long the end waits for a collector to take them."""
SECTIONS: Mapping[str, type] = {"worker": WorkerConfig, "engine": EngineConfig, "transfer": TransferConfig}
FLAG_NAMES = {("transfer", "listen"): "peer-listen", ("transfer", "advertise"): "peer-advertise"}


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleSetting:
    """What a role is made from."""

    outbox: Outbox
    incarnation: str
    clock: Clock


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleKind:
    """One role that a program can take: a row of its table."""

    wire: worker_pb2.Role
    peers: bool  # it hands over or receives KV
    make: Callable[[RoleSetting], WorkerRole]


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """A command: its name and the roles that it can take, its own first."""

    name: str
    roles: Mapping[str, RoleKind]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    worker: WorkerConfig
    engine: EngineConfig
    transfer: TransferConfig
    role: RoleKind


def run(program: Program, argv: Sequence[str], environment: Mapping[str, str]) -> int:
    """The whole life of a worker; returns its exit status."""
    try:
        settings = _settings(program, argv, environment)
        if settings is None:
            return 0
        logs.set_up(level=settings.worker.log_level, style=settings.worker.log_style)
        logging.getLogger("grpc").setLevel(logging.WARNING)
        logging.getLogger("asyncio").setLevel(logging.WARNING)
        faulthandler.register(signal.SIGUSR1, file=2, all_threads=True)
        return asyncio.run(_Process(program, settings).run())
    except ConfigError as error:
        sys.stderr.write(f"{program.name}: {error}\n")
        return 2


def _settings(program: Program, argv: Sequence[str], environment: Mapping[str, str]) -> Settings | None:
    """None = everything was explained, nothing is to be run."""
    line = parse_command_line(SECTIONS, program=program.name, argv=argv, environment=environment, flag_names=FLAG_NAMES)
    worker = line.resolve(WorkerConfig, section="worker")
    engine = line.resolve(EngineConfig, section="engine")
    transfer = line.resolve(TransferConfig, section="transfer")
    if line.explain:
        for section, rows in (
            ("worker", worker.explain()),
            ("engine", engine.explain()),
            ("transfer", transfer.explain()),
        ):
            for name, value, source, text in rows:
                sys.stdout.write(f"{section}.{name} = {value}    ({source})  {text}\n")
        return None
    name = worker.value.role or next(iter(program.roles))
    if name not in program.roles:
        raise ConfigError(f"{program.name} has no role {name!r}; it can be: {', '.join(program.roles)}", param="role")
    if not worker.value.model:
        raise ConfigError("--model is missing; give a checkpoint folder or a hub name", param="model")
    return Settings(worker=worker.value, engine=engine.value, transfer=transfer.value, role=program.roles[name])


@dataclass(frozen=True, slots=True, kw_only=True)
class _House:
    """The parts that hold threads, memory and sockets; closed in reverse order."""

    device: Device
    engine: Engine
    endpoint: KvEndpoint | None
    storage: Storage | None
    role: WorkerRole
    hello: worker_pb2.WorkerHello

    def close(self) -> None:
        """Blocks until threads are joined."""
        self.engine.stop()
        if self.endpoint is not None:
            self.endpoint.close()
        if self.storage is not None:
            self.storage.close()
        self.device.close()


class _Process:
    """One life. Created inside `run`; everything but `_build` and `_on_crash` is on the event loop."""

    def __init__(self, program: Program, settings: Settings) -> None:
        self._program = program
        self._settings = settings
        self._clock: Clock = SystemClock()
        self._incarnation = uuid.uuid4().hex[:12]
        self._registry = CollectorRegistry()
        self._tracing = OFF
        self._stop = asyncio.Event()
        self._serving = False
        self._crash: tuple[BaseException, Mapping[str, object]] | None = None

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)
        outbox = Outbox(loop)
        service = WorkerService(
            config=self._settings.worker, clock=self._clock, on_failure=lambda error: self._on_crash(error, {})
        )
        host, port = await service.listen()
        address = f"{host}:{port}"
        worker_id = self._settings.worker.worker_id or address
        try:
            self._tracing = open_tracing(
                self._settings.worker.otlp_endpoint,
                service=self._program.name,
                instance=worker_id,
                clock=self._clock,
            )
            self._open_metrics(host)
            house = await asyncio.to_thread(self._build, outbox, worker_id, loop)
        except BatonError as error:
            await service.close()
            raise ConfigError(str(error), param=error.param) from None
        desk = Desk(
            engine=house.engine,
            role=house.role,
            hello=house.hello,
            clock=self._clock,
            storage=house.storage,
            spans=RequestSpans(self._tracing),
        )
        outbox.open(desk.deliver)
        house.engine.start()
        await service.serve(
            Parts(
                engine=house.engine,
                role=house.role,
                desk=desk,
                hello=house.hello,
                peers=_peers(house.endpoint),
                tiers=_tiers(house.storage),
            )
        )
        library = house.device.library
        self._registry.register(EngineMetrics(house.engine.stats, house.role.handoffs, lambda: library.fallbacks))
        self._serving = True
        log.info("ready", extra={"address": address, "peer": house.hello.peer_address, "worker": worker_id})
        await self._stop.wait()
        if self._crash is None:
            await service.drain(self._settings.worker.drain_s)
        if self._crash is not None:  # also one that came while draining
            return await self._end_crashed(service, worker_id, *self._crash)
        await asyncio.to_thread(house.close)
        await service.close()
        outbox.close()
        await asyncio.to_thread(self._tracing.close, LAST_SPANS_S)
        log.info("stopped")
        return 0

    def _build(self, outbox: Outbox, worker_id: str, loop: asyncio.AbstractEventLoop) -> _House:
        """Everything that takes time. Runs beside the event loop, so that health and signals are answered meanwhile."""
        worker, config, kind = self._settings.worker, self._settings.engine, self._settings.role
        device = open_device(worker.device, threads=config.threads or None, kernels=parse_force(config.kernels))
        model = load_model(
            resolve_checkpoint(worker.model),
            device=device,
            dtype=config.dtype,
            kv_dtype=config.kv_dtype,
            page_tokens=config.page_tokens,
        )
        role = kind.make(RoleSetting(outbox=outbox, incarnation=self._incarnation, clock=self._clock))

        def on_crash(error: BaseException, dump: Mapping[str, object]) -> None:
            loop.call_soon_threadsafe(self._on_crash, error, dump)

        engine = Engine(model, config, device, role, self._clock, on_crash)
        compat = _compat(model, engine)
        blocks = blocks_for(device, engine.pool)
        storage = self._open_storage(engine, blocks, compat)
        endpoint, peer_address = None, ""
        if kind.peers:
            endpoint = KvEndpoint(
                worker_id=worker_id,
                incarnation=self._incarnation,
                compat=compat,
                pool=engine.pool.tensor,
                layout=engine.pool.layout,
                config=self._settings.transfer,
                clock=self._clock,
                events=role.inbound,
                metrics=TransferMetrics(self._registry),
                blocks=blocks,
            )
            peer_address = endpoint.start()
        role.bind(engine=engine, endpoint=endpoint, compat=compat, storage=storage)
        hello = worker_pb2.WorkerHello(
            protocol_version=PROTOCOL_VERSION,
            worker_id=worker_id,
            incarnation=self._incarnation,
            role=kind.wire,
            compat=compat,
            model_name=worker.model_name or Path(worker.model).name,
            context_tokens=engine.context_tokens,
            hash_root=engine.hash_root,
            peer_address=peer_address,
        )
        return _House(device=device, engine=engine, endpoint=endpoint, storage=storage, role=role, hello=hello)

    def _open_storage(self, engine: Engine, blocks: Blocks | None, compat: common_pb2.Compat) -> Storage | None:
        transfer, pool = self._settings.transfer, engine.pool
        taken = 0 if blocks else pool.tensor.untyped_storage().nbytes()  # host memory counts once it is written
        return open_storage(
            parse_tiers(self._settings.worker.tiers),
            compat=compat,
            layout=pool.layout,
            pool_pages=len(pool.tensor),
            blocks=blocks or HostBlocks(pool.tensor, pool.layout),
            host=transfer.advertise or split_address(transfer.listen, "peer-listen")[0],
            free_bytes=available_bytes() - taken,
            clock=self._clock,
            registry=self._registry,
        )

    def _open_metrics(self, host: str) -> None:
        port = self._settings.worker.metrics_port
        if port == 0:
            return
        try:
            start_http_server(port, addr=host, registry=self._registry)
        except OSError:
            raise ConfigError(
                f"cannot serve metrics: port {port} is in use; choose another --metrics-port", param="metrics_port"
            ) from None

    def _on_signal(self, number: int) -> None:
        if not self._serving or self._stop.is_set():
            log.warning("stopped at once", extra={"signal": signal.Signals(number).name})
            logging.shutdown()
            os._exit(0 if not self._serving else 128 + number)  # threads may be in the middle of anything
        self._stop.set()

    def _on_crash(self, error: BaseException, dump: Mapping[str, object]) -> None:
        self._crash = (error, dump)
        self._stop.set()

    async def _end_crashed(
        self, service: WorkerService, worker_id: str, error: BaseException, dump: Mapping[str, object]
    ) -> int:
        log.error("the engine crashed", exc_info=error)
        folder = Path(self._settings.worker.dump_dir or ".")
        try:
            path = crash.write_dump(
                folder, worker_id=worker_id, incarnation=self._incarnation, error=error, engine=dump
            )
            log.error("crash dump written", extra={"file": str(path)})
        except OSError as problem:
            log.error("no crash dump: the folder cannot be written", extra={"folder": str(folder), "why": str(problem)})
        await service.crashed(BatonError("the worker crashed; its log and crash dump say more"))
        await asyncio.to_thread(self._tracing.close, LAST_SPANS_S)
        logging.shutdown()
        os._exit(1)  # device and transfer threads may hang on whatever broke the engine
        return 1


def _compat(model: LoadedModel, engine: Engine) -> common_pb2.Compat:
    layout = engine.pool.layout
    return common_pb2.Compat(
        protocol_version=PROTOCOL_VERSION,
        model_digest=model.digest,
        weights_epoch=0,
        compute_dtype=model.dtype,
        kv_dtype=layout.dtype,
        page_tokens=layout.page_tokens,
        layers=layout.layers,
        kv_heads=layout.heads,
        head_dim=layout.dim,
        layout=layout.order.label,
        rope=model.spec.rope_text(),
        tp_size=1,
    )


def _peers(endpoint: KvEndpoint | None) -> Callable[[], Sequence[worker_pb2.PeerStatus]]:
    def status() -> Sequence[worker_pb2.PeerStatus]:
        return [] if endpoint is None else [_peer_status(peer) for peer in endpoint.peers()]

    return status


def _tiers(storage: Storage | None) -> Callable[[], Sequence[worker_pb2.TierStatus]]:
    return list if storage is None else storage.status


def _peer_status(peer: PeerInfo) -> worker_pb2.PeerStatus:
    return worker_pb2.PeerStatus(
        worker_id=peer.worker_id or peer.address, wire=peer.wire, state=peer.state, bytes=peer.bytes, reason=peer.reason
    )
