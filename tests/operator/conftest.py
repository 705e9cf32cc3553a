"""A real API server for the tests of this room, started once for all of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.cluster import Cluster, control_plane, why_no_control_plane

from baton_operator.crd import FOLDER


@pytest.fixture(scope="session")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """API server with our CRDs."""
    if reason := why_no_control_plane():
        pytest.skip(reason)
    with control_plane(tmp_path_factory.mktemp("control-plane")) as cluster:
        cluster.apply(*sorted(FOLDER.glob("*.yaml")))
        yield cluster
