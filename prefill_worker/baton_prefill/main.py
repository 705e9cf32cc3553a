"""`baton-prefill`."""

from __future__ import annotations

import os
import sys

from baton_kvtransfer import leave
from baton_prefill.role import PrefillRole
from baton_proto import worker_pb2
from baton_worker.process import Program, RoleKind, RoleSetting, run


def _prefill(setting: RoleSetting) -> PrefillRole:
    return PrefillRole(outbox=setting.outbox, clock=setting.clock)


PROGRAM = Program(
    name="baton-prefill",
    roles={"prefill": RoleKind(wire=worker_pb2.ROLE_PREFILL, peers=True, make=_prefill)},
)


def main() -> None:
    """Entry point of the command."""
    leave(run(PROGRAM, sys.argv[1:], os.environ))


if __name__ == "__main__":
    main()
