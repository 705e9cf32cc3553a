"""Endless random cases of all families: new values and page tables each time, new shapes where a family is known here.

Everything follows from one seed, so that a failure can be had again.
"""

from __future__ import annotations

from functools import partial
from itertools import cycle

import torch

from baton_kernels import pages
from baton_kernels.attention import cases as attention
from baton_kernels.families import FAMILIES
from baton_kernels.registry import Case

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def invented_attention(chance, largest):
    """Any heads, pages, storage, window and mix of decode, verification and prefill, up to `largest` tokens of KV."""
    kv_heads = chance.choice((1, 2, 4))
    dtype = chance.choice(DTYPES)
    tree = chance.random() < 0.2
    shape = attention.shape_of(
        kv_heads * chance.choice((1, 2, 4, 7, 16)),
        kv_heads,
        chance.choice((64, 80, 96, 128, 256)),
        chance.choice((16, 32, 64, 128)),
        dtype=dtype,
        kv_dtype=chance.choice((dtype, dtype, torch.float8_e4m3fn, torch.int8)),
        softcap=chance.choice((None, None, 30.0)),
        sinks=chance.random() < 0.3,
        tree=tree,
    )
    rows = []
    for _ in range(chance.randrange(1, 9)):
        tokens = min(largest, chance.choice((1, 15, 16, 17, 64, chance.randrange(1, largest + 1))))
        queries = min(tokens, chance.choice((0, 1, 1, 1, 4, 16, 17, chance.randrange(1, tokens + 1))))
        rows.append((queries, tokens))
    window = chance.choice((None, None, chance.randrange(64 if tree else 1, largest + 64)))
    batch = attention.Batch(rows=tuple(rows), window=window)
    make = partial(attention.make, shape, batch)
    return Case(name=f"{shape} {batch}", shape=shape, make=make, traffic=attention.model(shape, batch))


def invented_pages(chance, largest):
    """Any pool, any part of it, both directions, copied or converted."""
    size = chance.choice((16, 32, 64, 128))
    count, dim = largest // size + 3, chance.choice((6, 32, 64))
    pool = (count, chance.randrange(1, 5), chance.choice((1, 2)), chance.randrange(1, 5), size, dim)
    ends = [sorted(chance.randrange(most + 1) for _ in range(2)) for most in (pool[1], pool[3], largest)]
    layers, heads, tokens = (tuple(pair) for pair in ends)
    part = pages.Part(layers=layers, heads=heads, tokens=tokens)
    dtype, payload = chance.choice(((torch.int32, None), tuple(chance.sample(DTYPES, 2))))
    scatter, layer_first = chance.random() < 0.5, chance.random() < 0.3
    shape = pages.shape_of(pool, dtype, payload=payload, scatter=scatter, layer_first=layer_first)
    make = partial(pages.call, shape, pool, part)
    return Case(name=f"{shape} {pool} {part}", shape=shape, make=make, traffic=pages.model(shape, part))


INVENTED = {"attention": invented_attention, "pages": invented_pages}


def endless(chance, largest, families=FAMILIES):
    """(family, case, seed), the families in turn; `largest`: tokens of a row or of a part."""
    small = {family.op: [case for case in family.cases() if not case.bench] for family in families}
    for family in cycle(families):
        invent = INVENTED.get(family.op)
        case = chance.choice(small[family.op]) if invent is None else invent(chance, largest)
        yield family, case, chance.randrange(1 << 32)
