r"""What the register machine understands; the machine itself is in `machine`.

An instruction is a row of WIDTH integers: the operation; where out, a, b and c begin; four loop lengths n0 to n3, n3
innermost; for each of the four operands its strides along them; and for each how far it moves from tile to tile.
Offsets and strides count numbers, LANES included. Truth values are 1 and 0. A row that begins with TILES says that the
next so many rows (its second number) are done again and again (its third), a tile of the data each time.
"""

from __future__ import annotations

from enum import IntEnum

__all__ = ["ELEMENTWISE", "LANES", "TILES", "WIDTH", "Op"]

LANES = 8
"""Particles in a block."""

WIDTH = 29
TILES = -1


class Op(IntEnum):
    """The operations.

    - SUM, AMAX, AMIN: out along n0, n1 from a along n2, n3, and from what is in out where c is not 0. CUMSUM and
      CUMPROD along n3.
    - MATMUL: out[n0, n1, n2] = sum over n3 of a b, where a doesn't move along n2 and b not along n1, added to what is
      in out where c is not 0; MATMUL_CONST with b among constants that have no lanes.
    - GATHER: out along n3 is a at the integers from c on; SCATTER_ADD adds b to out at those.
    - CHOLESKY: out, a matrix along n2, n3, becomes its lower factor, NaN where there is none.
    - SOLVE_LOWER: out, rows along n3 and columns along n1, becomes a^-1 out; a is lower triangular, rows along n2 and
      columns along n3.
    - From COPY on all loop over n0 to n3; WHERE takes b where a is true, else c. From SIGN on they are seldom met, and
      share one loop.
    """

    SUM = 0
    AMAX = 1
    AMIN = 2
    CUMSUM = 3
    CUMPROD = 4
    MATMUL = 5
    MATMUL_CONST = 6
    GATHER = 7
    SCATTER_ADD = 8
    CHOLESKY = 9
    SOLVE_LOWER = 10
    COPY = 11
    NEG = 12
    ABS = 13
    EXP = 14
    LOG = 15
    LOG1P = 16
    SQRT = 17
    SIGMOID = 18
    TANH = 19
    ADD = 20
    SUB = 21
    MUL = 22
    DIV = 23
    MAX = 24
    MIN = 25
    POW = 26
    WHERE = 27
    EQ = 28
    NE = 29
    LT = 30
    LE = 31
    GT = 32
    GE = 33
    AND = 34
    OR = 35
    SIGN = 36
    EXPM1 = 37
    SIN = 38
    COS = 39
    LGAMMA = 40
    DIGAMMA = 41
    ERF = 42
    ERFC = 43
    ISNAN = 44
    NOT = 45


ELEMENTWISE = frozenset(op for op in Op if op >= Op.COPY)
