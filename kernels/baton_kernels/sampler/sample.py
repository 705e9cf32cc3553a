"""One token per position: penalties, bias, masks, temperature, truncation and noise of each position's own request.

A step's mix of requests is data, not control flow: the parameters of all requests lie in tables on the device, `work`
says per position what applies, and one sequence of launches serves any mix. The noise and the borders are those of
`reference`, so both implementations choose the same token unless two are a rounding apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum, IntFlag

import torch
from torch import Tensor

from baton_kernels.capabilities import Capabilities
from baton_kernels.registry import needs_triton
from baton_kernels.rt.check import check, check_contiguous
from baton_kernels.rt.program import Config, InputError, Program, pointer
from baton_kernels.sampler import reference
from baton_kernels.sampler.kernels import choose_tokens, scan_logits

MAX_VOCAB = 1 << 18
GROUP = 32  # neighbouring logits of which one maximum is kept: one cache line
CAPACITY = 4096  # candidates that the workspace has room for; rows that keep more are searched as a whole
SMALLEST_BLOCK, LARGEST_BLOCK = 256, 8192  # logits per program of the first pass
LIST = 128  # biases of a position that are applied at a time


class Work(IntEnum):
    """Columns of `work`."""

    ROW = 0  # of the tables of parameters
    POSITION = 1  # of the token in its request's output
    FLAGS = 2
    SLOT = 3  # of the tables of histories, -1 = no penalties
    LIST_BEGIN = 4
    LIST_END = 5
    MASK = 6  # row of `masks`, -1 = all tokens are allowed


class Flags(IntFlag):
    """Neither: the first best token. Both: noise among what truncation keeps."""

    NOISE = 1
    TRUNCATE = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleShape:
    """Size of the vocabulary."""

    vocab: int

    @property
    def label(self) -> str:
        return f"v{self.vocab}"

    @property
    def floats(self) -> int:
        """Of a position in the workspace."""
        return _whole(self.vocab, LARGEST_BLOCK) // GROUP + 2 * _whole(self._splits, 4) + CAPACITY

    @property
    def ints(self) -> int:
        """Of a position in the workspace."""
        return _whole(self.vocab, LARGEST_BLOCK) // GROUP + _whole(self._splits, 4) + CAPACITY

    @property
    def _splits(self) -> int:
        return -(-self.vocab // SMALLEST_BLOCK)

    def workspace(self, positions: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Scratch of calls for at most so many positions: never initialised, holds nothing from call to call. Calls
        that share it must be in one stream."""
        return (
            torch.empty((positions, self.floats), dtype=torch.float32, device=device),
            torch.empty((positions, self.ints), dtype=torch.int32, device=device),
        )


# ---- reference ------------------------------------------------------------------------------------------------------
class TorchSample:
    """The specification. On a GPU it waits for the device."""

    programs: Sequence[Program] = ()

    def __init__(self, shape: SampleShape) -> None:
        self._vocab = shape.vocab

    def __call__(
        self,
        logits: Tensor,
        work: Tensor,
        reals: Tensor,
        integers: Tensor,
        counts: Tensor,
        in_prompt: Tensor,
        *,
        list_ids: Tensor | None = None,
        list_values: Tensor | None = None,
        masks: Tensor | None = None,
        out: Tensor | None = None,
        workspace: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Tokens of logits float32[S, vocab], which are changed in place: int64[S], `out` or a new tensor.

        work: int64[S, 7], see `Work`. reals: float32[R, 6]: temperature, top_p, min_p, repetition, presence and
        frequency penalty; integers: int64[R, 2]: seed, top_k (0 = off). counts: int32[slots, vocab] of outputs, which
        get the chosen tokens, in_prompt: bool[slots, vocab]; no two positions share a slot. list_ids: int32[N],
        list_values: float32[N]: a position's biases, no token twice, -inf bans. masks: int32[M, ceil(vocab / 32)],
        bit 1 = allowed. workspace: scratch, see `SampleShape.workspace`.
        """
        rows, positions, flags, slots, begins, ends, mask_rows = work.unbind(1)
        penalised = (slots >= 0).nonzero().squeeze(-1)
        if len(penalised):
            repetition, presence, frequency = reals[rows[penalised], 3:].unbind(1)
            own = counts[slots[penalised]], in_prompt[slots[penalised]]
            logits[penalised] = reference.penalise_(logits[penalised], *own, repetition, presence, frequency)
        for at, (begin, end, mask) in enumerate(zip(begins.tolist(), ends.tolist(), mask_rows.tolist(), strict=True)):
            if end > begin:
                assert list_ids is not None, "a position has biases"
                assert list_values is not None, "a position has biases"
                logits[at, list_ids[begin:end].long()] += list_values[begin:end]
            if mask >= 0:
                assert masks is not None, "a position has a mask"
                bits = masks[mask, :, None] >> torch.arange(32, dtype=torch.int32, device=masks.device) & 1
                logits[at].masked_fill_(bits.flatten()[: self._vocab] == 0, float("-inf"))
        tokens = reference.argmax(logits)
        for kind in (Flags.NOISE, Flags.NOISE | Flags.TRUNCATE):
            drawn = (flags == kind).nonzero().squeeze(-1)
            if len(drawn):
                keys = reference.noise_keys(integers[rows[drawn], 0], positions[drawn])
                temperature, top_p, min_p = reals[rows[drawn], :3].unbind(1)
                if kind & Flags.TRUNCATE:
                    top_k = integers[rows[drawn], 1]
                    chosen = reference.draw_truncated(logits[drawn], temperature, top_k, top_p, min_p, *keys)
                else:
                    chosen = reference.draw(logits[drawn], temperature, *keys)
                tokens[drawn] = chosen
        counts[slots[penalised], tokens[penalised]] += 1
        return tokens if out is None else out.copy_(tokens)


# ---- Triton ---------------------------------------------------------------------------------------------------------
class TritonSample:
    """See `TorchSample.__call__`."""

    def __init__(self, capabilities: Capabilities, shape: SampleShape, config: Config) -> None:
        self._shape = shape
        block = config["SCAN_BLOCK"]
        assert SMALLEST_BLOCK <= block <= LARGEST_BLOCK, "the workspace is laid out for these"
        assert config["CAPACITY"] <= CAPACITY, "the workspace has no room for more"
        self._splits = -(-shape.vocab // block)
        logits, integers = pointer(torch.float32), pointer(torch.int64)
        tables = {"LOGITS": logits, "WORK": integers, "REALS": logits, "INTEGERS": integers}
        histories = {"COUNTS": pointer(torch.int32), "IN_PROMPT": pointer(torch.bool)}
        lists = {"LIST_IDS": pointer(torch.int32) + "~", "LIST_VALUES": logits + "~", "MASKS": pointer(torch.int32)}
        space = {"FLOATS": logits, "INTS": pointer(torch.int32)}
        common = {
            "VOCAB": shape.vocab,
            "GROUP": GROUP,
            "SPLITS": self._splits,
            "ROUNDED": _whole(self._splits, 4),
            "FLOATS_ROW": shape.floats,
            "INTS_ROW": shape.ints,
        }
        self._scan = Program(
            scan_logits,
            types={**tables, **histories, **lists, **space},
            constants={**common, "BLOCK": block, "LIST": LIST},
            config={"num_warps": config["SCAN_WARPS"], "num_stages": 1},
            capabilities=capabilities,
        )
        self._choose = Program(
            choose_tokens,
            types={**tables, "COUNTS": histories["COUNTS"], **space, "OUT": integers},
            constants={
                **common,
                "GROUPS": self._splits * (block // GROUP),
                "CAPACITY": config["CAPACITY"],
                "WIDTH": config["WIDTH"],
                "SPLIT_BLOCK": 1 << (self._splits - 1).bit_length(),
                "BLOCK": config["CHOOSE_BLOCK"],
                "PIVOTS": config["PIVOTS"],
            },
            config={"num_warps": config["CHOOSE_WARPS"], "num_stages": 1},
            capabilities=capabilities,
        )
        self.programs = (self._scan, self._choose)

    def __call__(
        self,
        logits: Tensor,
        work: Tensor,
        reals: Tensor,
        integers: Tensor,
        counts: Tensor,
        in_prompt: Tensor,
        *,
        list_ids: Tensor | None = None,
        list_values: Tensor | None = None,
        masks: Tensor | None = None,
        out: Tensor | None = None,
        workspace: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        positions, vocab = logits.shape[0], self._shape.vocab
        if out is None:
            out = torch.empty(positions, dtype=torch.int64, device=logits.device)
        floats, ints = self._shape.workspace(positions, logits.device) if workspace is None else workspace
        for tensor, name, shape in (
            (logits, "logits", (None, vocab)),
            (work, "work", (positions, len(Work))),
            (reals, "reals", (None, 6)),
            (integers, "integers", (reals.shape[0], 2)),
            (counts, "counts", (None, vocab)),
            (in_prompt, "in_prompt", (counts.shape[0], vocab)),
            (floats, "workspace", (None, self._shape.floats)),
            (ints, "workspace", (floats.shape[0], self._shape.ints)),
            (out, "out", (positions,)),
        ):
            check_dense(tensor, name, shape)
        if floats.shape[0] < positions:
            raise InputError(f"workspace is for {floats.shape[0]} positions, logits has {positions}")
        if masks is not None:
            check_dense(masks, "masks", (None, -(-vocab // 32)))
        # What no position refers to is not read.
        list_ids = counts if list_ids is None else list_ids
        list_values = reals if list_values is None else list_values
        self._scan(
            (positions, self._splits, 1), logits, work, reals, integers, counts, in_prompt, list_ids, list_values,
            counts if masks is None else masks, floats, ints,
        )  # fmt: skip
        self._choose((positions, 1, 1), logits, work, reals, integers, counts, floats, ints, out)
        return out


def check_dense(tensor: Tensor, name: str, shape: Sequence[int | None]) -> None:
    """See `check`; rows lie one behind the other, too."""
    check(tensor, name, shape)
    check_contiguous(tensor, name)


def _whole(size: int, of: int) -> int:
    return -(-size // of) * of


def refuses(capabilities: Capabilities, shape: SampleShape) -> str:
    if why := needs_triton(capabilities):
        return why
    if shape.vocab > MAX_VOCAB:
        return f"a vocabulary of {shape.vocab} is more than {MAX_VOCAB}"
    return ""


def configs(_capabilities: Capabilities, _shape: SampleShape) -> Sequence[Config]:
    return [
        {
            "SCAN_BLOCK": scan, "SCAN_WARPS": scan // elements // 32,
            "CHOOSE_BLOCK": choose, "CHOOSE_WARPS": warps, "PIVOTS": pivots, "CAPACITY": CAPACITY, "WIDTH": 512,
        }
        for scan in (2048, 4096, 8192)
        for elements in (8, 16)
        for choose, warps in ((512, 4), (1024, 8), (2048, 8), (2048, 16), (4096, 16))
        for pivots in (4, 8)
    ]  # fmt: skip
