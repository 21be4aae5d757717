r"""A register machine for densities: a program of tensor operations on blocks of particles, each operation one loop.

A program (`flowvi.program`) is a list of instructions over one array of memory. A register holds a tensor of
every particle in the block, as (*shape, LANES): particles are innermost, so that each operation is a run of whole
vectors, whatever the tensor's shape; and a block is so small that what an operation leaves is still in the cache when
the next one asks for it. That is what a loop over operations of all particles can't have, and no compiler is needed:
the loops are compiled once for all programs.

What an instruction says is in `instructions`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from flowvi.kernels.compiled import elementary
from flowvi.kernels.compiled.instructions import LANES, TILES, Op
from flowvi.kernels.compiled.jit import helper, kernel, stamp
from flowvi.kernels.compiled.planar_small import at
from flowvi.kernels.compiled.tanh import tanh

__all__ = ["make_machine"]

_FOLD = 64
"""So many numbers are added up before their sum is added: rounding errors stay small in float32."""


def _unary(op: Callable[[Any], Any]) -> Any:
    @helper()
    def loops(mem: Any, code: Any, o: int, a: int, b: int, c: int) -> None:
        n3, so, sa = code[8], code[12], code[16]
        flat = so == LANES and sa == LANES
        for i0 in range(code[5]):
            for i1 in range(code[6]):
                for i2 in range(code[7]):
                    po = o + i0 * code[9] + i1 * code[10] + i2 * code[11]
                    pa = a + i0 * code[13] + i1 * code[14] + i2 * code[15]
                    if flat:
                        for k in range(n3 * LANES):
                            mem[at(po + k)] = op(mem[at(pa + k)])
                    else:
                        for _ in range(n3):
                            for j in range(LANES):
                                mem[at(po + j)] = op(mem[at(pa + j)])
                            po += so
                            pa += sa

    return loops


def _binary(op: Callable[[Any, Any], Any]) -> Any:
    @helper()
    def loops(mem: Any, code: Any, o: int, a: int, b: int, c: int) -> None:
        n3, so, sa, sb = code[8], code[12], code[16], code[20]
        flat = so == LANES and sa == LANES and sb == LANES
        for i0 in range(code[5]):
            for i1 in range(code[6]):
                for i2 in range(code[7]):
                    po = o + i0 * code[9] + i1 * code[10] + i2 * code[11]
                    pa = a + i0 * code[13] + i1 * code[14] + i2 * code[15]
                    pb = b + i0 * code[17] + i1 * code[18] + i2 * code[19]
                    if flat:
                        for k in range(n3 * LANES):
                            mem[at(po + k)] = op(mem[at(pa + k)], mem[at(pb + k)])
                    else:
                        for _ in range(n3):
                            # all are read before one is written: the compiler can't know that they don't overlap
                            r0 = op(mem[at(pa)], mem[at(pb)])
                            r1 = op(mem[at(pa + 1)], mem[at(pb + 1)])
                            r2 = op(mem[at(pa + 2)], mem[at(pb + 2)])
                            r3 = op(mem[at(pa + 3)], mem[at(pb + 3)])
                            r4 = op(mem[at(pa + 4)], mem[at(pb + 4)])
                            r5 = op(mem[at(pa + 5)], mem[at(pb + 5)])
                            r6 = op(mem[at(pa + 6)], mem[at(pb + 6)])
                            r7 = op(mem[at(pa + 7)], mem[at(pb + 7)])
                            mem[at(po)] = r0
                            mem[at(po + 1)] = r1
                            mem[at(po + 2)] = r2
                            mem[at(po + 3)] = r3
                            mem[at(po + 4)] = r4
                            mem[at(po + 5)] = r5
                            mem[at(po + 6)] = r6
                            mem[at(po + 7)] = r7
                            po += so
                            pa += sa
                            pb += sb

    return loops


def _reduction(op: Callable[[Any, Any], Any], start: float, fold: int) -> Any:
    @helper()
    def loops(mem: Any, code: Any, o: int, a: int, b: int, c: int) -> None:
        n3, sa = code[8], code[16]
        first = mem.dtype.type(start)
        for i0 in range(code[5]):
            for i1 in range(code[6]):
                po = o + i0 * code[9] + i1 * code[10]
                s0, s1, s2, s3, s4, s5, s6, s7 = first, first, first, first, first, first, first, first
                if c != 0:
                    s0, s1, s2, s3 = mem[at(po)], mem[at(po + 1)], mem[at(po + 2)], mem[at(po + 3)]
                    s4, s5, s6, s7 = mem[at(po + 4)], mem[at(po + 5)], mem[at(po + 6)], mem[at(po + 7)]
                for i2 in range(code[7]):
                    pa = a + i0 * code[13] + i1 * code[14] + i2 * code[15]
                    left = n3
                    while left > 0:
                        t0, t1, t2, t3, t4, t5, t6, t7 = first, first, first, first, first, first, first, first
                        for _ in range(min(left, fold)):
                            t0 = op(t0, mem[at(pa)])
                            t1 = op(t1, mem[at(pa + 1)])
                            t2 = op(t2, mem[at(pa + 2)])
                            t3 = op(t3, mem[at(pa + 3)])
                            t4 = op(t4, mem[at(pa + 4)])
                            t5 = op(t5, mem[at(pa + 5)])
                            t6 = op(t6, mem[at(pa + 6)])
                            t7 = op(t7, mem[at(pa + 7)])
                            pa += sa
                        left -= fold
                        s0 = op(s0, t0)
                        s1 = op(s1, t1)
                        s2 = op(s2, t2)
                        s3 = op(s3, t3)
                        s4 = op(s4, t4)
                        s5 = op(s5, t5)
                        s6 = op(s6, t6)
                        s7 = op(s7, t7)
                mem[at(po)] = s0
                mem[at(po + 1)] = s1
                mem[at(po + 2)] = s2
                mem[at(po + 3)] = s3
                mem[at(po + 4)] = s4
                mem[at(po + 5)] = s5
                mem[at(po + 6)] = s6
                mem[at(po + 7)] = s7

    return loops


@helper()
def _where(mem: Any, code: Any, o: int, a: int, b: int, c: int) -> None:
    n3, so, sa, sb, sc = code[8], code[12], code[16], code[20], code[24]
    for i0 in range(code[5]):
        for i1 in range(code[6]):
            for i2 in range(code[7]):
                po = o + i0 * code[9] + i1 * code[10] + i2 * code[11]
                pa = a + i0 * code[13] + i1 * code[14] + i2 * code[15]
                pb = b + i0 * code[17] + i1 * code[18] + i2 * code[19]
                pc = c + i0 * code[21] + i1 * code[22] + i2 * code[23]
                for _ in range(n3):
                    for j in range(LANES):
                        mem[at(po + j)] = mem[at(pb + j)] if mem[at(pa + j)] != 0 else mem[at(pc + j)]
                    po += so
                    pa += sa
                    pb += sb
                    pc += sc


def _cumulative(op: Callable[[Any, Any], Any]) -> Any:
    @helper()
    def loops(mem: Any, code: Any, o: int, a: int, b: int, c: int) -> None:
        for i0 in range(code[5]):
            for i1 in range(code[6]):
                for i2 in range(code[7]):
                    po = o + i0 * code[9] + i1 * code[10] + i2 * code[11]
                    pa = a + i0 * code[13] + i1 * code[14] + i2 * code[15]
                    for j in range(LANES):
                        total = mem[at(pa + j)]
                        mem[at(po + j)] = total
                        for i3 in range(1, code[8]):
                            total = op(total, mem[at(pa + i3 * code[16] + j)])
                            mem[at(po + i3 * code[12] + j)] = total

    return loops


@helper()
def _matmul(mem: Any, constants: Any, constant: bool, code: Any, o: int, a: int, b: int, c: int) -> None:
    zero = mem.dtype.type(0)
    n3, sa, sb = code[8], code[16], code[20]
    for i0 in range(code[5]):
        for i1 in range(code[6]):
            for i2 in range(code[7]):
                pa = a + i0 * code[13] + i1 * code[14]
                pb = b + i0 * code[17] + i2 * code[19]
                po = o + i0 * code[9] + i1 * code[10] + i2 * code[11]
                s0, s1, s2, s3, s4, s5, s6, s7 = zero, zero, zero, zero, zero, zero, zero, zero
                if c != 0:
                    s0, s1, s2, s3 = mem[at(po)], mem[at(po + 1)], mem[at(po + 2)], mem[at(po + 3)]
                    s4, s5, s6, s7 = mem[at(po + 4)], mem[at(po + 5)], mem[at(po + 6)], mem[at(po + 7)]
                left = n3
                while left > 0:
                    t0, t1, t2, t3, t4, t5, t6, t7 = zero, zero, zero, zero, zero, zero, zero, zero
                    if constant:
                        for _ in range(min(left, _FOLD)):
                            factor = constants[at(pb)]
                            t0 += factor * mem[at(pa)]
                            t1 += factor * mem[at(pa + 1)]
                            t2 += factor * mem[at(pa + 2)]
                            t3 += factor * mem[at(pa + 3)]
                            t4 += factor * mem[at(pa + 4)]
                            t5 += factor * mem[at(pa + 5)]
                            t6 += factor * mem[at(pa + 6)]
                            t7 += factor * mem[at(pa + 7)]
                            pa += sa
                            pb += sb
                    else:
                        for _ in range(min(left, _FOLD)):
                            t0 += mem[at(pb)] * mem[at(pa)]
                            t1 += mem[at(pb + 1)] * mem[at(pa + 1)]
                            t2 += mem[at(pb + 2)] * mem[at(pa + 2)]
                            t3 += mem[at(pb + 3)] * mem[at(pa + 3)]
                            t4 += mem[at(pb + 4)] * mem[at(pa + 4)]
                            t5 += mem[at(pb + 5)] * mem[at(pa + 5)]
                            t6 += mem[at(pb + 6)] * mem[at(pa + 6)]
                            t7 += mem[at(pb + 7)] * mem[at(pa + 7)]
                            pa += sa
                            pb += sb
                    left -= _FOLD
                    s0 += t0
                    s1 += t1
                    s2 += t2
                    s3 += t3
                    s4 += t4
                    s5 += t5
                    s6 += t6
                    s7 += t7
                mem[at(po)] = s0
                mem[at(po + 1)] = s1
                mem[at(po + 2)] = s2
                mem[at(po + 3)] = s3
                mem[at(po + 4)] = s4
                mem[at(po + 5)] = s5
                mem[at(po + 6)] = s6
                mem[at(po + 7)] = s7


@helper()
def _gather(mem: Any, indices: Any, code: Any, o: int, a: int, b: int, c: int) -> None:
    for i0 in range(code[5]):
        for i1 in range(code[6]):
            for i2 in range(code[7]):
                po = o + i0 * code[9] + i1 * code[10] + i2 * code[11]
                pa = a + i0 * code[13] + i1 * code[14] + i2 * code[15]
                for i3 in range(code[8]):
                    source = pa + indices[at(c + i3)] * code[16]
                    for j in range(LANES):
                        mem[at(po + j)] = mem[at(source + j)]
                    po += code[12]


@helper()
def _scatter_add(mem: Any, indices: Any, code: Any, o: int, a: int, b: int, c: int) -> None:
    for i0 in range(code[5]):
        for i1 in range(code[6]):
            for i2 in range(code[7]):
                po = o + i0 * code[9] + i1 * code[10] + i2 * code[11]
                pb = b + i0 * code[17] + i1 * code[18] + i2 * code[19]
                for i3 in range(code[8]):
                    to = po + indices[at(c + i3)] * code[12]
                    for j in range(LANES):
                        mem[at(to + j)] += mem[at(pb + j)]
                    pb += code[20]


@helper()
def _cholesky(mem: Any, code: Any, o: int, a: int, b: int, c: int) -> None:
    n, row, column = code[8], code[11], code[12]
    for i0 in range(code[5]):
        for i1 in range(code[6]):
            base = o + i0 * code[9] + i1 * code[10]
            for k in range(n):
                pivot = base + k * (row + column)
                for j in range(LANES):
                    d = mem[at(pivot + j)]
                    mem[at(pivot + j)] = np.sqrt(d) if d > 0 else np.nan
                for i in range(k + 1, n):
                    below = base + i * row + k * column
                    for j in range(LANES):
                        mem[at(below + j)] /= mem[at(pivot + j)]
                        mem[at(base + k * row + i * column + j)] = 0.0
                for i in range(k + 1, n):
                    for m in range(k + 1, i + 1):
                        to, left, right = base + i * row + m * column, i * row + k * column, m * row + k * column
                        for j in range(LANES):
                            mem[at(to + j)] -= mem[at(base + left + j)] * mem[at(base + right + j)]


@helper()
def _solve_lower(mem: Any, code: Any, o: int, a: int, b: int, c: int) -> None:
    n = code[8]
    for i0 in range(code[5]):
        base, matrix = o + i0 * code[9], a + i0 * code[13]
        for i in range(n):
            for k in range(i):
                factor = matrix + i * code[15] + k * code[16]
                for c in range(code[6]):
                    to, by = base + i * code[12] + c * code[10], base + k * code[12] + c * code[10]
                    for j in range(LANES):
                        mem[at(to + j)] -= mem[at(factor + j)] * mem[at(by + j)]
            pivot = matrix + i * (code[15] + code[16])
            for c in range(code[6]):
                to = base + i * code[12] + c * code[10]
                for j in range(LANES):
                    mem[at(to + j)] /= mem[at(pivot + j)]


def _in_double(op: Callable[[Any], Any]) -> Any:
    @helper()
    def both(x: Any) -> Any:
        return op(np.float64(x))

    return both


@helper()
def _digamma(x: Any) -> Any:
    """The derivative of log Gamma: recurrence up to 10, and the asymptotic series; NaN at poles, but -inf at 0."""
    y, total = np.float64(x), 0.0
    if y == 0.0:
        return -math.copysign(np.inf, y)
    if y < 0.0 and y == math.floor(y):
        return np.nan
    if y < 0.0:
        total = -math.pi / math.tan(math.pi * (y - math.floor(y)))
        y = 1.0 - y
    while y < 10.0:
        total -= 1.0 / y
        y += 1.0
    z = 1.0 / (y * y)
    series = z * (1 / 12 - z * (1 / 120 - z * (1 / 252 - z * (1 / 240 - z * (1 / 132 - z * (691 / 32760 - z / 12))))))
    return total + math.log(y) - 0.5 / y - series


@helper()
def _sigmoid(x: Any) -> Any:
    return 1.0 / (1.0 + elementary.exp(-np.float64(x)))


@helper()
def _power(x: Any, y: Any) -> Any:
    return math.pow(np.float64(x), np.float64(y))


@helper()
def _rare(op: int, x: Any) -> Any:
    """An operation on one number that isn't worth a loop of its own."""
    if op == Op.SIGN:
        return 1.0 if x > 0 else (-1.0 if x < 0 else 0.0)  # of NaN, 0: as torch
    if op == Op.EXPM1:
        return math.expm1(np.float64(x))
    if op == Op.SIN:
        return math.sin(x)
    if op == Op.COS:
        return math.cos(x)
    if op == Op.LGAMMA:
        return math.lgamma(np.float64(x))
    if op == Op.DIGAMMA:
        return _digamma(x)
    if op == Op.ERF:
        return math.erf(np.float64(x))
    if op == Op.ERFC:
        return math.erfc(np.float64(x))
    if op == Op.ISNAN:
        return 1.0 if x != x else 0.0
    return 1.0 if x == 0 else 0.0


@helper()
def _rares(mem: Any, code: Any, o: int, a: int, b: int, c: int) -> None:
    op = code[0]
    for i0 in range(code[5]):
        for i1 in range(code[6]):
            for i2 in range(code[7]):
                po = o + i0 * code[9] + i1 * code[10] + i2 * code[11]
                pa = a + i0 * code[13] + i1 * code[14] + i2 * code[15]
                for i3 in range(code[8]):
                    for j in range(LANES):
                        mem[at(po + i3 * code[12] + j)] = _rare(op, mem[at(pa + i3 * code[16] + j)])


def _test(op: Callable[[Any, Any], bool]) -> Any:
    @helper()
    def loops(mem: Any, code: Any, o: int, a: int, b: int, c: int) -> None:
        for i0 in range(code[5]):
            for i1 in range(code[6]):
                for i2 in range(code[7]):
                    po = o + i0 * code[9] + i1 * code[10] + i2 * code[11]
                    pa = a + i0 * code[13] + i1 * code[14] + i2 * code[15]
                    pb = b + i0 * code[17] + i1 * code[18] + i2 * code[19]
                    for _ in range(code[8]):
                        for j in range(LANES):
                            mem[at(po + j)] = 1.0 if op(mem[at(pa + j)], mem[at(pb + j)]) else 0.0
                        po += code[12]
                        pa += code[16]
                        pb += code[20]

    return loops


_larger, _smaller = (
    helper()(lambda x, y: x if x > y or x != x else y),
    helper()(lambda x, y: x if x < y or x != x else y),
)
_COPY, _NEG, _ABS = _unary(helper()(lambda x: x)), _unary(helper()(lambda x: -x)), _unary(helper()(lambda x: abs(x)))
_EXP, _LOG, _LOG1P = (_unary(_in_double(f)) for f in (elementary.exp, elementary.log, elementary.log1p))
_SQRT, _TANH, _SIGMOID = _unary(helper()(lambda x: np.sqrt(x))), _unary(helper()(lambda x: tanh(x))), _unary(_sigmoid)
_ADD, _SUB = _binary(helper()(lambda x, y: x + y)), _binary(helper()(lambda x, y: x - y))
_MUL, _DIV = _binary(helper()(lambda x, y: x * y)), _binary(helper()(lambda x, y: x / y))
_MAX, _MIN, _POW = _binary(_larger), _binary(_smaller), _binary(_power)
_EQ, _NE = _test(helper()(lambda x, y: x == y)), _test(helper()(lambda x, y: x != y))
_LT, _LE = _test(helper()(lambda x, y: x < y)), _test(helper()(lambda x, y: x <= y))
_GT, _GE = _test(helper()(lambda x, y: x > y)), _test(helper()(lambda x, y: x >= y))
_AND, _OR = _test(helper()(lambda x, y: x != 0 and y != 0)), _test(helper()(lambda x, y: x != 0 or y != 0))
_CUMSUM, _CUMPROD = _cumulative(helper()(lambda x, y: x + y)), _cumulative(helper()(lambda x, y: x * y))
_SUM = _reduction(helper()(lambda x, y: x + y), 0.0, _FOLD)
_AMAX, _AMIN = _reduction(_larger, -math.inf, 1 << 60), _reduction(_smaller, math.inf, 1 << 60)


@cache
def make_machine(dtype: type) -> Any:
    """The machine for registers of one dtype.

    It runs a program's code (number of instructions, WIDTH) for the particles z (S, D) from start to stop: mem is
    scratch memory whose constants are in place, constants what `matmul_const` reads, indices what `gather` and
    `scatter_add` do. A block's z is put at z_at, D rows of LANES; what is found at value_at and grad_at goes to value
    (S,) and grad (S, D); grad is left alone where grad_at < 0.
    """
    F, TAG = dtype, stamp()

    @kernel
    def machine(
        program: Any, z: Any, mem: Any, constants: Any, indices: Any, z_at: int, value_at: int, grad_at: int,
        value: Any, grad: Any, start: int, stop: int,
    ) -> int:  # fmt: skip
        dim = z.shape[1]
        for first in range(start, stop, LANES):
            size = min(LANES, stop - first)
            for d in range(dim):
                for j in range(LANES):
                    mem[at(z_at + d * LANES + j)] = z[first + min(j, size - 1), d]
            line = 0
            while line < len(program):
                count, tiles = 1, 1
                if program[line, 0] == TILES:
                    count, tiles = program[line, 1], program[line, 2]
                    line += 1
                for tile in range(tiles):
                    for i in range(line, line + count):
                        code = program[i]
                        op = code[0]
                        o, a = code[1] + tile * code[25], code[2] + tile * code[26]
                        b, c = code[3] + tile * code[27], code[4] + tile * code[28]
                        if op == Op.ADD:
                            _ADD(mem, code, o, a, b, c)
                        elif op == Op.COPY:
                            _COPY(mem, code, o, a, b, c)
                        elif op == Op.NEG:
                            _NEG(mem, code, o, a, b, c)
                        elif op == Op.ABS:
                            _ABS(mem, code, o, a, b, c)
                        elif op == Op.EXP:
                            _EXP(mem, code, o, a, b, c)
                        elif op == Op.LOG:
                            _LOG(mem, code, o, a, b, c)
                        elif op == Op.LOG1P:
                            _LOG1P(mem, code, o, a, b, c)
                        elif op == Op.SQRT:
                            _SQRT(mem, code, o, a, b, c)
                        elif op == Op.SIGMOID:
                            _SIGMOID(mem, code, o, a, b, c)
                        elif op == Op.TANH:
                            _TANH(mem, code, o, a, b, c)
                        elif op == Op.SUB:
                            _SUB(mem, code, o, a, b, c)
                        elif op == Op.MUL:
                            _MUL(mem, code, o, a, b, c)
                        elif op == Op.DIV:
                            _DIV(mem, code, o, a, b, c)
                        elif op == Op.MAX:
                            _MAX(mem, code, o, a, b, c)
                        elif op == Op.MIN:
                            _MIN(mem, code, o, a, b, c)
                        elif op == Op.POW:
                            _POW(mem, code, o, a, b, c)
                        elif op == Op.WHERE:
                            _where(mem, code, o, a, b, c)
                        elif op == Op.SUM:
                            _SUM(mem, code, o, a, b, c)
                        elif op == Op.AMAX:
                            _AMAX(mem, code, o, a, b, c)
                        elif op == Op.AMIN:
                            _AMIN(mem, code, o, a, b, c)
                        elif op == Op.CUMSUM:
                            _CUMSUM(mem, code, o, a, b, c)
                        elif op == Op.CUMPROD:
                            _CUMPROD(mem, code, o, a, b, c)
                        elif op == Op.MATMUL:
                            _matmul(mem, mem, False, code, o, a, b, c)
                        elif op == Op.MATMUL_CONST:
                            _matmul(mem, constants, True, code, o, a, b, c)
                        elif op == Op.GATHER:
                            _gather(mem, indices, code, o, a, b, c)
                        elif op == Op.SCATTER_ADD:
                            _scatter_add(mem, indices, code, o, a, b, c)
                        elif op == Op.CHOLESKY:
                            _cholesky(mem, code, o, a, b, c)
                        elif op == Op.SOLVE_LOWER:
                            _solve_lower(mem, code, o, a, b, c)
                        elif op == Op.EQ:
                            _EQ(mem, code, o, a, b, c)
                        elif op == Op.NE:
                            _NE(mem, code, o, a, b, c)
                        elif op == Op.LT:
                            _LT(mem, code, o, a, b, c)
                        elif op == Op.LE:
                            _LE(mem, code, o, a, b, c)
                        elif op == Op.GT:
                            _GT(mem, code, o, a, b, c)
                        elif op == Op.GE:
                            _GE(mem, code, o, a, b, c)
                        elif op == Op.AND:
                            _AND(mem, code, o, a, b, c)
                        elif op == Op.OR:
                            _OR(mem, code, o, a, b, c)
                        else:
                            _rares(mem, code, o, a, b, c)
                line += count
            for j in range(size):
                value[first + j] = mem[at(value_at + j)]
                if grad_at >= 0:
                    for d in range(dim):
                        grad[first + j, d] = mem[at(grad_at + d * LANES + j)]
        return TAG + int(F(0))

    return machine
