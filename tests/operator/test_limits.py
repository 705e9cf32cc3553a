"""What the API takes and this release cannot run; and podTemplates that make two roles compute different KV."""

from __future__ import annotations

from typing import Any, get_args

import pytest
from support.operator_world import PLATFORM, Tree, profile_object, service_object

from baton_kvtransfer.config import WireChoice
from baton_operator.api import AcceleratorProfile, InferenceService
from baton_operator.api.policy import Wire
from baton_operator.plan.intake import blueprint
from baton_operator.plan.limits import kv_mismatch, unsupported


def mismatch(**spec: Any) -> str:
    service = InferenceService.parse(service_object(**spec))
    return kv_mismatch(blueprint(service, AcceleratorProfile.parse(profile_object()), PLATFORM))


def main(**container: Any) -> Tree:
    return {"podTemplate": {"spec": {"containers": [{"name": "main", **container}]}}}


def env(name: str, value: str) -> Tree:
    return main(env=[{"name": f"BATON_ENGINE_{name}", "value": value}])


def test_every_wire_of_the_api_is_one_that_the_workers_have() -> None:
    assert set(get_args(Wire)) == set(get_args(WireChoice))
    for wire in get_args(Wire):
        service = InferenceService.model_validate(service_object(transport={"wire": wire}))
        assert unsupported(service.spec) == ""


def test_parallelism_counts_only_for_roles_that_may_have_workers() -> None:
    spec = {"profile": "h200", "colocated": {"replicas": 1}, "prefill": {"replicas": 0, "parallelism": {"tensor": 2}}}
    assert unsupported(InferenceService.parse(service_object(**{**spec, "decode": {"replicas": 0}})).spec) == ""


@pytest.mark.parametrize(
    ("prefill", "decode"),
    [
        (env("DTYPE", "float32"), env("DTYPE", "bfloat16")),
        (main(args=["--dtype=float32"]), env("DTYPE", "bfloat16")),
        (main(args=["--dtype", "float32"]), main(args=["--dtype", "bfloat16"])),
    ],
)
def test_roles_that_compute_in_different_formats_cannot_pair(prefill: Tree, decode: Tree) -> None:
    words = mismatch(prefill=prefill, decode=decode)
    assert "KV cannot be handed over" in words
    assert "spec.model" in words


@pytest.mark.parametrize(
    ("prefill", "decode"),
    [
        ({}, {}),
        (env("DTYPE", "float32"), env("DTYPE", "float32")),
        (env("KV_DTYPE", "float32"), env("KV_DTYPE", "bfloat16")),  # converted on the way, as are pages
        (main(args=["--page-tokens", "32"]), main(args=["--page-tokens", "64"])),
        (env("DTYPE", "float32"), {}),  # the other side follows the checkpoint: only the workers know
        (env("MAX_ROWS", "8"), env("MAX_ROWS", "16")),
    ],
)
def test_what_agrees_or_is_decided_by_the_checkpoint_is_let_through(prefill: Tree, decode: Tree) -> None:
    assert mismatch(prefill=prefill, decode=decode) == ""


def test_a_flag_wins_over_a_variable_as_in_the_worker() -> None:
    both = main(env=[{"name": "BATON_ENGINE_DTYPE", "value": "float32"}], args=["--dtype", "bfloat16"])
    assert mismatch(prefill=both, decode=env("DTYPE", "bfloat16")) == ""
