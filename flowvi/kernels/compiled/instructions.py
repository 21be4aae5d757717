r"""What the register machine understands; the machine itself is in `machine`.

An instruction is a row of WIDTH integers: the operation; where out, a, b and c begin; four loop lengths n0 to n3, n3
innermost; for each of the four operands its strides along them; and for each how far it moves from tile to tile.
Offsets and strides count numbers, LANES included. Truth values are 1 and 0. A row that begins with TILES says that the
next so many rows (its second number) are done again and again (its third), a tile of the data each time.
"""

from __future__ import annotations

__all__ = ["ELEMENTWISE", "LANES", "NUMBERS", "TILES", "WIDTH"]

LANES = 8
"""Particles in a block."""

WIDTH = 29
TILES = -1

_ALONG = ("sum", "amax", "amin", "cumsum", "matmul", "matmul_const", "gather", "scatter_add", "cholesky", "solve_lower")
_COMMON = (
    *("copy", "neg", "abs", "exp", "log", "log1p", "sqrt", "sigmoid", "tanh"),
    *("add", "sub", "mul", "div", "max", "min", "pow", "where"),
)
_RARE = ("sign", "expm1", "sin", "cos", "lgamma", "digamma", "erf", "erfc", "isnan", "not")
_TESTS = ("eq", "ne", "lt", "le", "gt", "ge", "and", "or")

NUMBERS = {name: number for number, name in enumerate((*_ALONG, *_COMMON, *_RARE, *_TESTS))}
"""The operations.

- ``sum``, ``amax``, ``amin``: out along n0, n1 from a along n2, n3, and from what is in out where c is not 0.
  ``cumsum`` along n3.
- ``matmul``: out[n0, n1, n2] = sum over n3 of a b, where a doesn't move along n2 and b not along n1, added to what is
  in out where c is not 0; ``matmul_const`` with b among constants that have no lanes.
- ``gather``: out along n3 is a at the integers from c on; ``scatter_add`` adds b to out at those.
- ``cholesky``: out, a matrix along n2, n3, becomes its lower factor, NaN where there is none.
- ``solve_lower``: out, rows along n3 and columns along n1, becomes a^-1 out; a is lower triangular, rows along n2 and
  columns along n3.
- All others loop over n0 to n3; ``where`` takes b where a is true, else c.
"""

ELEMENTWISE = frozenset((*_COMMON, *_RARE, *_TESTS))
