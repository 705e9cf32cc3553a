"""What keeps a pod from working, told from the pod alone: reason and remedy. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from baton_common.kube.objects import Object, integer, mapping, objects, text
from baton_operator.plan.pods import FETCH_CONTAINER

_NO_IMAGE = frozenset({"ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull"})
_NO_CONFIG = frozenset({"CreateContainerConfigError", "CreateContainerError", "RunContainerError"})
_LONGEST = 400


@dataclass(frozen=True, slots=True, kw_only=True)
class Trouble:
    """`reason` as a condition takes it; `message`: what is wrong and what to do. `fetching`: the model's download."""

    reason: str
    message: str
    fetching: bool = False


def pod_trouble(pod: Object) -> Trouble | None:
    """None when the pod works, or only needs time."""
    name = text(pod, "metadata", "name")
    for condition in objects(pod, "status", "conditions"):
        if text(condition, "type") == "PodScheduled" and text(condition, "reason") == "Unschedulable":
            return Trouble(
                reason="Unschedulable",
                message=f"no node takes pod {name}: {_short(text(condition, 'message'))}; "
                "add nodes that fit the profile, free some, or lower the replicas or their resources",
            )
    for status in (*objects(pod, "status", "initContainerStatuses"), *objects(pod, "status", "containerStatuses")):
        if found := _container_trouble(name, status):
            return found
    return None


def first_trouble(pods: Iterable[Object], *, fetching: bool) -> Trouble | None:
    """The first one about the model's download, or the first one that is not."""
    found = (pod_trouble(pod) for pod in sorted(pods, key=lambda pod: text(pod, "metadata", "name")))
    return next((item for item in found if item is not None and item.fetching == fetching), None)


def _container_trouble(pod: str, status: Object) -> Trouble | None:
    waiting = mapping(status, "state", "waiting")
    reason, detail = text(waiting, "reason"), _short(text(waiting, "message"))
    fetching = text(status, "name") == FETCH_CONTAINER
    if reason in _NO_IMAGE:
        return Trouble(
            reason="ImageUnavailable",
            message=f"pod {pod} cannot get image {text(status, 'image')} ({reason}: {detail}); check the images in the "
            "operator's settings, the podTemplate and the pull secrets",
        )
    if reason in _NO_CONFIG:
        return Trouble(
            reason="ContainerNotCreated",
            message=f"pod {pod} cannot start ({reason}: {detail}); create what is missing, or correct the podTemplate",
        )
    ended = mapping(status, "state", "terminated") or mapping(status, "lastState", "terminated")
    code = integer(ended, "exitCode")
    failed = bool(ended) and (code != 0 or reason == "CrashLoopBackOff")
    running = bool(mapping(status, "state", "running"))
    if not failed or (running and integer(status, "restartCount") < 2):
        return None
    words = _short(text(ended, "message").strip()) or text(ended, "reason")
    last_line = words.splitlines()[-1] if words else "no message"
    if text(ended, "reason") == "OOMKilled":
        return Trouble(
            reason="OutOfMemory",
            message=f"container {text(status, 'name')} of pod {pod} was killed: it took more memory than its limit; "
            "raise resources.limits of the role, or serve a smaller model or context",
        )
    if fetching:
        return Trouble(
            reason="FetchFailed", fetching=True,
            message=f"the model cannot be fetched (pod {pod}): {last_line}; check spec.model.uri, revision, endpoint "
            "and credentialsSecret",
        )  # fmt: skip
    if code == 0:
        last_line = "it should run on; correct the command in the podTemplate"
    return Trouble(
        reason="Crashing", message=f"pod {pod} ended with status {code}: {last_line}; see `kubectl logs {pod} -p`"
    )


def _short(message: str) -> str:
    return message if len(message) <= _LONGEST else f"...{message[-_LONGEST:]}"
