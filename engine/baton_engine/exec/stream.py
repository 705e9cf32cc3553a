"""What a device promises: an ordered stream of launches, and memory that is filled and read in stream order.

The planning thread submits, the stream executes in order of submission, and a launch is observed by polling or by a
bounded wait. A CPU runs the work on a thread of its own; an accelerator runs it on the submitting thread, which only
queues kernels. Nothing that uses these protocols knows which. They do not know steps, models or requests.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from numpy.typing import NDArray
from torch import Tensor

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

CLOSE_TIMEOUT_S = 30.0


class Fence(Protocol):
    """Polled; once true it stays true. Cheap enough to ask for every page of every step."""

    def done(self) -> bool: ...


class Launch(Protocol[T_co]):
    """One submitted piece of work, its fence and its outcome."""

    @property
    def fence(self) -> Fence: ...

    @property
    def elapsed_s(self) -> float:
        """Time on the device, without the wait for earlier launches; means something once the work has ended."""

    def done(self) -> bool:
        """True once the work and the callbacks that it asked for have ended, well or badly."""

    def wait(self, timeout_s: float) -> bool:
        """Block until it has ended, at most `timeout_s`; false = it has not."""

    def result(self) -> T_co:
        """What the work returned, or its exception again, or that of a callback or of the device.

        BatonError when it has not ended: `wait` first.
        """


class Stream(Protocol):
    """Ordered queue of launches: one starts only when all earlier ones have ended. A failed one does not stop it."""

    def submit(self, work: Callable[[], T]) -> Launch[T]:
        """Queue `work`; returns as soon as the device has it. It runs under torch.inference_mode.

        BatonError after `close`.
        """

    def after(self, callback: Callable[[], None]) -> None:
        """Call `callback` when all that the running work has queued so far is done. For the work itself to call.

        Callbacks run one at a time and in order, on a thread named baton-device. One that raises fails the launch, and
        those of the same launch behind it are not called.
        """

    def close(self) -> None:
        """Let everything queued end, then release the thread or the handle. Safe to call twice."""


class Memory(Protocol):
    """Traffic between the host and the device, ordered with the launches of its stream."""

    def upload(self, array: NDArray[Any]) -> Tensor:
        """A device tensor with the array's shape, dtype and contents. Does not wait for the device.

        The tensor may be the array: do not write to it afterwards.
        """

    def download(self, tensor: Tensor) -> Tensor:
        """A host tensor that has the contents of `tensor` once the launch that asks has ended. Does not wait."""

    def copy_in(self, target: Tensor, source: Tensor) -> None:
        """Fill a contiguous device tensor from a host tensor of the same shape, converting its dtype.

        `source` may be changed as soon as it returns. Blocks while the device is behind. For loading: large tensors,
        one thread at a time.
        """

    def available_bytes(self) -> int:
        """Memory that a new pool could take now."""
