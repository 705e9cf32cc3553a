"""Step preparation: from rows of the device-resident request table to the inputs of one step, all in static buffers.

The host says what each batch row computes (`work`), the device fills in what only it knows: the sampled token that the
row continues with, and its pages. Buffers have a fixed capacity so that a captured graph can read them: rows and tokens
behind the actual ones are padding, and padding writes to the dummy page. Every number is exact. It does not know why a
row computes what it computes, nor who owns a page; that pages, rows and offsets are in range is the caller's word.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from baton_kernels.capabilities import Capabilities
from baton_kernels.registry import Call, Case, Family, Implementation, Traffic, anywhere, needs_triton
from baton_kernels.rt.check import check
from baton_kernels.rt.language import jit, tl
from baton_kernels.rt.program import Config, Program

FIELDS = 4
"""Lines of `work`: row of the request table (-1: padding), first position, number of tokens, and where the prompt ids
of these tokens begin (-1: the one token is the last one that was sampled)."""
MAX_SPLITS = 8  # programs that share a row


@dataclass(frozen=True, slots=True, kw_only=True)
class StepShape:
    """Pages of `page_tokens` tokens."""

    page_tokens: int

    @property
    def label(self) -> str:
        return f"p{self.page_tokens}"


def step_buffers(rows: int, tokens: int, columns: int, device: torch.device) -> dict[str, Tensor]:
    """Outputs of the operation by name, for at most `rows` rows, `tokens` tokens and `columns` pages of a row."""
    of_tokens = partial(torch.zeros, tokens, dtype=torch.int64, device=device)
    return {
        "input_ids": of_tokens(),
        "positions": of_tokens(),
        "write_pages": of_tokens(),
        "write_offsets": of_tokens(),
        "cu_q": torch.zeros(rows + 1, dtype=torch.int32, device=device),
        "kv_lens": torch.zeros(rows, dtype=torch.int32, device=device),
        "page_table": torch.zeros(rows, columns, dtype=torch.int32, device=device),
    }


# ---- reference ------------------------------------------------------------------------------------------------------
class TorchStep:
    """The specification, and the operation on a CPU."""

    programs: Sequence[Program] = ()

    def __init__(self, shape: StepShape) -> None:
        self._page_tokens = shape.page_tokens

    def __call__(
        self,
        table: Tensor,
        last_token: Tensor,
        work: Tensor,
        prompt_ids: Tensor,
        dummy_page: int,
        *,
        input_ids: Tensor,
        positions: Tensor,
        write_pages: Tensor,
        write_offsets: Tensor,
        cu_q: Tensor,
        kv_lens: Tensor,
        page_table: Tensor,
    ) -> None:
        """Fill the buffers of a step of B rows, T tokens and P page columns of capacity.

        table int32[rows, columns], last_token int64[rows]: the request table. work int64[4, B]: see `FIELDS`; its
        counts add up to at most T. prompt_ids int64[N]: ids of all rows that bring some, in one piece.
        input_ids, positions, write_pages, write_offsets int64[T]: tokens of row 0, then of row 1, ...; the rest of
        them id 0 at position 0, written to slot 0 of `dummy_page`. cu_q int32[B + 1]: row b owns tokens
        [cu_q[b], cu_q[b + 1]). kv_lens int32[B]: tokens of the row after this step, 0 for padding. page_table
        int32[B, P]: pages that hold those tokens, then `dummy_page`.
        """
        rows, start, count, offset = work
        real = rows >= 0
        count = count * real
        lengths = (start + count) * real
        torch.cumsum(count, 0, dtype=torch.int32, out=cu_q[1:])
        cu_q[0] = 0
        kv_lens.copy_(lengths)
        columns = torch.arange(page_table.shape[1], device=table.device)
        width = min(table.shape[1], page_table.shape[1])
        page_table.fill_(dummy_page)
        page_table[:, :width] = table[rows.clamp(min=0), :width]
        page_table.masked_fill_(columns * self._page_tokens >= lengths.unsqueeze(1), dummy_page)

        owner = torch.repeat_interleave(count)  # of each token, int64[tokens in use]
        used = len(owner)
        within = torch.arange(used, device=table.device) - cu_q[owner]
        at = start[owner] + within
        for buffer, rest in ((input_ids, 0), (positions, 0), (write_pages, dummy_page), (write_offsets, 0)):
            buffer[used:] = rest
        positions[:used] = at
        write_pages[:used] = table[rows[owner], at // self._page_tokens]
        write_offsets[:used] = at % self._page_tokens
        given = offset[owner] >= 0
        input_ids[:used] = last_token[rows[owner]]
        input_ids[:used][given] = prompt_ids[(offset[owner] + within)[given]]


# ---- Triton ---------------------------------------------------------------------------------------------------------
@jit
def _tokens_before(WORK, s_work, row, BLOCK: tl.constexpr):
    """Tokens of the batch rows before `row`."""
    before = tl.zeros((BLOCK,), tl.int64)
    for base in tl.range(0, row, BLOCK):
        at = base + tl.arange(0, BLOCK)
        real = tl.load(WORK + at, mask=at < row, other=-1) >= 0
        before += tl.load(WORK + 2 * s_work + at, mask=real, other=0)
    return tl.sum(before, 0)


@jit
def _prepare_rows(
    TABLE, LAST, WORK, PROMPT, dummy, IDS, POSITIONS, PAGES, OFFSETS, CU_Q, KV_LENS, PAGE_TABLE,
    s_table, s_work, s_page_table, rows, tokens, columns,
    PAGE_TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Programs (b, i): blocks i, i + programs, ... of batch row b; behind the last row, of the padding tokens."""
    row = tl.program_id(0)
    first = tl.program_id(1)
    step = tl.num_programs(1) * BLOCK
    begin = _tokens_before(WORK, s_work, row, BLOCK)
    if first == 0:
        tl.store(CU_Q + row, begin.to(tl.int32))
    if row == rows:
        for base in tl.range(begin.to(tl.int32) + first * BLOCK, tokens, step):
            at = base + tl.arange(0, BLOCK)
            zero = tl.zeros((BLOCK,), tl.int64)
            tl.store(IDS + at, zero, mask=at < tokens)
            tl.store(POSITIONS + at, zero, mask=at < tokens)
            tl.store(PAGES + at, zero + dummy, mask=at < tokens)
            tl.store(OFFSETS + at, zero, mask=at < tokens)
    else:
        owner = tl.load(WORK + row)
        start = tl.load(WORK + s_work + row)
        count = tl.load(WORK + 2 * s_work + row)
        offset = tl.load(WORK + 3 * s_work + row)
        real = owner >= 0
        count = tl.where(real, count, 0)
        length = tl.where(real, start + count, 0)
        carried = tl.load(LAST + owner, mask=real & (offset < 0), other=0)
        if first == 0:
            tl.store(KV_LENS + row, length.to(tl.int32))
        pages = TABLE + owner * s_table
        for base in tl.range(first * BLOCK, count.to(tl.int32), step):
            within = base + tl.arange(0, BLOCK)
            position = start + within
            at = begin + within
            inside = (within < count) & (at < tokens)
            given = tl.load(PROMPT + offset + within, mask=inside & (offset >= 0), other=0)
            tl.store(IDS + at, given + carried, mask=inside)
            tl.store(POSITIONS + at, position, mask=inside)
            page = tl.load(pages + position // PAGE_TOKENS, mask=inside, other=0)
            tl.store(PAGES + at, page.to(tl.int64), mask=inside)
            tl.store(OFFSETS + at, position % PAGE_TOKENS, mask=inside)
        for base in tl.range(first * BLOCK, columns, step):
            column = base + tl.arange(0, BLOCK)
            page = tl.load(pages + column, mask=column.to(tl.int64) * PAGE_TOKENS < length, other=dummy)
            tl.store(PAGE_TABLE + row.to(tl.int64) * s_page_table + column, page, mask=column < columns)


class TritonStep:
    """See `TorchStep.__call__`."""

    def __init__(self, capabilities: Capabilities, shape: StepShape, config: Config) -> None:
        self._block = config["BLOCK"]
        anywhere_aligned = "*i64~"  # parts of one packed upload begin where they begin
        numbers = dict.fromkeys(("IDS", "POSITIONS", "PAGES", "OFFSETS"), anywhere_aligned)
        sizes = ("s_table", "s_work", "s_page_table", "rows", "tokens", "columns")
        self._program = Program(
            _prepare_rows,
            types={
                "TABLE": "*i32",
                "LAST": "*i64",
                "WORK": anywhere_aligned,
                "PROMPT": anywhere_aligned,
                "dummy": "i32",
                **numbers,
                "CU_Q": "*i32~",
                "KV_LENS": "*i32~",
                "PAGE_TABLE": "*i32",
                **dict.fromkeys(sizes, "i32"),
            },
            constants={"PAGE_TOKENS": shape.page_tokens, "BLOCK": self._block},
            config=config,
            capabilities=capabilities,
        )
        self.programs = (self._program,)

    def __call__(
        self,
        table: Tensor,
        last_token: Tensor,
        work: Tensor,
        prompt_ids: Tensor,
        dummy_page: int,
        *,
        input_ids: Tensor,
        positions: Tensor,
        write_pages: Tensor,
        write_offsets: Tensor,
        cu_q: Tensor,
        kv_lens: Tensor,
        page_table: Tensor,
    ) -> None:
        rows, tokens, columns = work.shape[-1], input_ids.shape[0], page_table.shape[-1]
        int32, int64 = torch.int32, torch.int64
        check(table, "table", (None, None), int32)
        check(last_token, "last_token", (table.shape[0],), int64)
        check(work, "work", (FIELDS, None), int64)
        check(prompt_ids, "prompt_ids", (None,), int64)
        check(input_ids, "input_ids", (None,), int64)
        check(positions, "positions", (tokens,), int64)
        check(write_pages, "write_pages", (tokens,), int64)
        check(write_offsets, "write_offsets", (tokens,), int64)
        check(cu_q, "cu_q", (rows + 1,), int32)
        check(kv_lens, "kv_lens", (rows,), int32)
        check(page_table, "page_table", (rows, None), int32)
        splits = min(MAX_SPLITS, max(1, -(-max(tokens, columns) // self._block)))
        self._program(
            (rows + 1, splits, 1), table, last_token, work, prompt_ids, dummy_page,
            input_ids, positions, write_pages, write_offsets, cu_q, kv_lens, page_table,
            table.stride(0), work.stride(0), page_table.stride(0), rows, tokens, columns,
        )  # fmt: skip


def _refuses(capabilities: Capabilities, shape: StepShape) -> str:
    if why := needs_triton(capabilities):
        return why
    return "" if shape.page_tokens > 0 else f"a page cannot hold {shape.page_tokens} tokens"


def _configs(_capabilities: Capabilities, _shape: StepShape) -> Sequence[Config]:
    return [
        {"BLOCK": block, "num_warps": warps, "num_stages": 1} for block in (128, 256, 512, 1024) for warps in (1, 2, 4)
    ]


# ---- floor and cases ------------------------------------------------------------------------------------------------
def model(shape: StepShape, rows: int, tokens: int, columns: int, pages: int) -> Traffic:
    """Writes every buffer once; reads the work, the ids and as many `pages` as the rows hold. Latency decides."""
    written = 8 * 4 * tokens + 4 * (2 * rows + 1) + 4 * rows * columns
    return Traffic(bytes=written + 8 * FIELDS * rows + 8 * tokens + 4 * (pages + tokens), flops=0)


Rows = Sequence[tuple[int, int, bool]]
"""(first position, tokens, whether the ids come with the work) of each batch row; a negative start is padding."""


def _call(
    shape: StepShape, batch: Rows, tokens: int, columns: int, random: torch.Generator, device: torch.device
) -> Call:
    """The request table has more rows and columns than the step reads; what it does not read is out of range."""
    held, wide = len(batch) + 3, columns + 5
    draw = partial(torch.randint, generator=random)
    table = draw(-(2**31), -(2**30), (held, wide), dtype=torch.int32)
    owners = torch.randperm(held, generator=random)
    work = torch.full((FIELDS, len(batch)), -1, dtype=torch.int64)
    flat = 0
    for index, (start, count, given) in enumerate(batch):
        if start < 0:
            continue
        used = -(-(start + count) // shape.page_tokens)
        table[owners[index], :used] = draw(0, 2**30, (used,), dtype=torch.int32)
        work[:, index] = torch.tensor([int(owners[index]), start, count, flat if given else -1])
        flat += count * given
    arguments = {
        "table": table,
        "last_token": draw(0, 1 << 40, (held,)),
        "work": work,
        "prompt_ids": draw(0, 1 << 40, (flat,)),
    }
    buffers = step_buffers(len(batch), tokens, columns, device)
    placed = {name: value.to(device) for name, value in arguments.items()}
    return Call(arguments=placed | {"dummy_page": 2**30} | buffers, outputs=tuple(buffers), exact=tuple(buffers))


def _case(
    name: str, page_tokens: int, batch: Rows, tokens: int, columns: int, *, bench: bool = False
) -> Case[StepShape]:
    shape = StepShape(page_tokens=page_tokens)
    pages = sum(-(-(start + count) // page_tokens) for start, count, _ in batch if start >= 0)
    return Case(
        name=f"{shape.label}-{name}",
        shape=shape,
        make=partial(_call, shape, batch, tokens, columns),
        traffic=model(shape, len(batch), tokens, columns, pages),
        bench=bench,
    )


def cases() -> Sequence[Case[StepShape]]:
    """Decode, prompts, both; with and without padding; page borders; more tokens and columns than one block."""
    last, prompt, padding = False, True, (-1, 0, False)
    decode = [(length, 1, last) for length in (0, 1, 15, 16, 17, 31, 63)]
    mixed = [(5, 1, last), (0, 16, prompt), (16, 1, prompt), (9, 0, prompt), (30, 7, prompt), (47, 1, last)]
    return [
        _case("decode", 16, decode, 7, 4),
        _case("decode-padded", 16, [*decode, padding, padding], 9, 6),
        _case("mixed", 16, mixed, 26, 3),
        _case("mixed-padded", 16, [*mixed, padding, (0, 2, prompt), padding], 40, 5),
        _case("padding", 64, [padding], 4, 2),
        _case("nobody", 64, [], 3, 2),
        _case("long", 16, [(0, 1, last), (100, 1500, prompt), (1700, 1, last)], 1600, 300),
        _case("b64-4k", 64, [(4095, 1, last)] * 64, 64, 2048, bench=True),
        _case("b256-mixed", 64, [(1023, 1, last)] * 255 + [(0, 7937, prompt)], 8192, 2048, bench=True),
    ]


def _shapes(_capabilities: Capabilities) -> Sequence[StepShape]:
    return [StepShape(page_tokens=page_tokens) for page_tokens in (16, 64, 128)]


FAMILY: Family[StepShape, TorchStep | TritonStep] = Family(
    op="step",
    implementations=(
        Implementation(name="triton", refuses=_refuses, bind=TritonStep, configs=_configs),
        Implementation(name="torch", refuses=anywhere, bind=lambda _capabilities, shape, _config: TorchStep(shape)),
    ),
    shapes=_shapes,
    cases=cases,
)
