"""What the sampler's kernels compute in each lane: the noise of `reference`, and floats as integers of the same order.

Hashes agree with the reference bit for bit, logarithms within a few units in the last place. An order key makes a
comparison exact and total: -inf is the lowest number, both zeros are one, NaN (of positive sign) is above all, as for
NumPy's argmax. Packed with an index, the largest key is the first maximum and a reduction needs no second operand.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from __future__ import annotations

from baton_kernels.rt.language import jit, tl

LOWEST = tl.constexpr(-(2**31))  # below every key
MINUS_INFINITY = tl.constexpr(-0x7F800001)  # its key
NOTHING = tl.constexpr(-(2**63))  # below every packed pair
SMALL = tl.constexpr(1.0 / 16)  # below this, 1 - u has lost too many digits of u for a logarithm


@jit
def mixed(x):
    """The bijection `mix_` of uint32 lanes."""
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    return x ^ (x >> 16)


@jit
def noise_keys(seed, position):
    """See the reference: two uint32 keys from int64 scalars."""
    low = (seed & 0xFFFFFFFF).to(tl.uint32)
    high = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    s0 = mixed(low ^ 0x9E3779B9)
    s1 = mixed(high ^ s0)
    k0 = mixed(position.to(tl.uint32) ^ s1)
    return k0, mixed(k0 + s0)


@jit
def uniform(bits):
    """float32 in [2**-32, 1 - 2**-24] from hash bits."""
    u = (bits & 0x7FFFFFFF).to(tl.int32).to(tl.float32) * 0.0000000004656612873077392578125  # 2**-31
    return tl.clamp(u, 2.0**-32, 1.0 - 2.0**-24)


@jit
def race(ids, k0, k1):
    """log(-log1p(-u)) of each vocabulary index: minus Gumbel noise."""
    u = uniform(mixed(ids.to(tl.uint32) * 0x9E3779B9 + k0) ^ k1)
    series = 1.0 + u * (1 / 2 + u * (1 / 3 + u * (1 / 4 + u * (1 / 5 + u * (1 / 6 + u * (1 / 7))))))
    return tl.log(tl.where(u < SMALL, u * series, -tl.log(1.0 - u)))


@jit
def order(x):
    """float32 as int32 keys of the same order."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@jit
def value(key):
    """The float32 of a key."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@jit
def pack(x, index):
    """int64 whose maximum is the largest x with the smallest index."""
    return (order(x).to(tl.int64) << 32) | (0x7FFFFFFF - index).to(tl.int64)


@jit
def index_of(packed):
    """int32 index of a packed pair."""
    return 0x7FFFFFFF - (packed & 0xFFFFFFFF).to(tl.int32)


@jit
def finite(x):
    """A maximum as something to subtract: that of nothing but -inf is 0."""
    return tl.where(x == float("-inf"), 0.0, x)
