r"""exp, log and log1p for kernels in float64: arithmetic and bits, no branch and no call, so that loops vectorize.

exp: x = n ln 2 + r with |r| <= ln(2)/2, the Taylor polynomial of exp(r), times 2^n in two halves, so that what is
subnormal comes out and what overflows is inf. log: x = 2^n m with m in [sqrt(1/2), sqrt(2)), and log m = 2 atanh(s),
s = (m - 1) / (m + 1), by its series. log1p(x) = log(u) + (x - (u - 1)) / u with u = 1 + x in floating point.

Error: below 4e-16 relative (log near 1: absolute). NaN stays NaN; log 0 is -inf and log of what is below 0 is NaN.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import types
from numba.extending import intrinsic

from flowvi.kernels.compiled.jit import EXACT, helper
from flowvi.kernels.compiled.tanh import _from_bits, _split

I64 = np.int64
_HIGH, _LOW = _split(40)
_PER_LN2 = 1 / math.log(2)
_EXP = tuple(1 / math.factorial(n) for n in range(13, -1, -1))
_ATANH = tuple(1 / (2 * n + 1) for n in range(10, 0, -1))
_MANTISSA, _ONE = 0x000FFFFFFFFFFFFF, 0x3FF0000000000000
_TINY, _TWO54 = 2.2250738585072014e-308, 2.0**54


@intrinsic
def _to_bits(_: Any, value: Any) -> Any:
    """The integer with the representation of this float64."""

    def generate(context: Any, builder: Any, _: Any, args: Any) -> Any:
        return builder.bitcast(args[0], context.get_value_type(types.int64))

    return types.int64(value), generate


@helper(EXACT)
def exp(x: Any) -> Any:
    """e^x in float64."""
    y = 710.0 if x > 710.0 else x
    y = -746.0 if y < -746.0 else y
    n = np.floor(y * _PER_LN2 + 0.5)
    r = (y - n * _HIGH) - n * _LOW
    p = 0.0
    for coefficient in _EXP:
        p = p * r + coefficient
    n = 0.0 if n != n else n
    whole = I64(n)
    half = whole >> I64(1)
    p *= _from_bits(I64((half + I64(1023)) << I64(52)))
    return p * _from_bits(I64((whole - half + I64(1023)) << I64(52)))


@helper(EXACT)
def log(x: Any) -> Any:
    """The natural logarithm in float64."""
    small = x < _TINY
    y = x * _TWO54 if small else x
    bits = _to_bits(y)
    n = np.float64((bits >> I64(52)) - I64(1023)) - (54.0 if small else 0.0)
    m = _from_bits(I64((bits & I64(_MANTISSA)) | I64(_ONE)))
    high = m > 1.4142135623730951
    m = 0.5 * m if high else m
    n = n + 1.0 if high else n
    f = m - 1.0
    s = f / (2.0 + f)
    z = s * s
    p = 0.0
    for coefficient in _ATANH:
        p = p * z + coefficient
    # log(1 + f) = f - s (f - 2 z p): f is exact, what is added to it is small
    value = n * _HIGH + (f - s * (f - 2.0 * z * p) + n * _LOW)
    value = x if x == math.inf else value
    value = -math.inf if x == 0.0 else value
    return math.nan if (x < 0.0 or x != x) else value


@helper(EXACT)
def log1p(x: Any) -> Any:
    """log(1 + x) in float64."""
    u = 1.0 + x
    value = log(u)
    rest = (x - (u - 1.0)) / u
    return value + (rest if rest == rest and abs(rest) < 1.0 else 0.0)
