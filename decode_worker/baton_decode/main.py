"""`baton-decode`: the decode role, or the colocated one (`--role colocated`), which is the same without peers."""

from __future__ import annotations

import os
import sys

from baton_decode.role import DecodeRole
from baton_kvtransfer import leave
from baton_proto import worker_pb2
from baton_worker.process import Program, RoleKind, RoleSetting, run


def _decode(setting: RoleSetting) -> DecodeRole:
    return DecodeRole(outbox=setting.outbox, incarnation=setting.incarnation)


PROGRAM = Program(
    name="baton-decode",
    roles={
        "decode": RoleKind(wire=worker_pb2.ROLE_DECODE, peers=True, make=_decode),
        "colocated": RoleKind(wire=worker_pb2.ROLE_COLOCATED, peers=False, make=_decode),
    },
)


def main() -> None:
    """Entry point of the command."""
    leave(run(PROGRAM, sys.argv[1:], os.environ))


if __name__ == "__main__":
    main()
