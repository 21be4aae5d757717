r"""What a fit will take of memory at its peak, by a formula, before any work is done.

With D dimensions, S particles, K layers of P parameters and U units (outputs of networks) in all, N observed numbers,
R the rank of a low-rank base (D of a full one, 0 of a diagonal one), and b bytes of a number, a fit keeps 6 P b (value,
gradient, two moments, two copies), and 8 D^2 b of starts where the base is full. On top of that comes the largest of

    whiten    72 D R b + 512 (6 D + 16 N) b           8 Gaussians of 9 matrices, or 72 R vectors; 512 first points
    modes     8 (12288 D + 16 D^2) + 8 * 1024 N b     draws and Gaussians in float64; D^2 where the base is full
    steps     S (20 D + 16 N) b + 6 S (K D + U) b     the last term where the layers need autograd's tape
    check     4 C (D + U / K + N) b                   C draws: 4096, and 8192 between rounds
    verify    20000 D b + M (6 D + 6 U / K + 4 N) b + 400000 D
                                                      M = min(10000, 2^21 / D) draws at once; HMC, up to D = 2000

where N counts nothing if the target is a program (`flowvi.program`), which works on eight particles at a time, but

    program   5e7 + 1300 N b                          13 particles where it is written, 64 where it is compared

and a quarter more. The numbers are those that were measured; they are meant to be too large rather than too small, and
more than twice what is used only where few starts are needed. What a model makes beside its N observed numbers (a table
for each datum, say) is not seen, nor are the parameters of a factory without a registered name.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import torch
from torch.distributions.transforms import Transform as TorchTransform

from flowvi.errors import FlowVIError, MemoryWarning, TooLargeError
from flowvi.examine import MAX_HMC_DIM
from flowvi.flow_spec import FlowSpec
from flowvi.random_state import kept
from flowvi.transforms.affine import default_rank
from flowvi.transforms.registry import build

HEADROOM = 1.25
LARGEST_BUILT = 512
"""The dimension up to which layers are built to be counted; above, a parabola goes on: all layers here are one in D."""


def forecast(
    spec: FlowSpec,
    *,
    num_particles: int,
    itemsize: int,
    whiten: bool,
    verify: bool,
    rounds: bool = False,
    num_data: int = 0,
    program: bool = False,
    registered: bool = True,
) -> dict[str, int]:
    """The bytes at the peak of each phase of a fit, by the formula above.

    Args:
        spec: flow, D, K and base.
        num_particles: S.
        itemsize: b.
        whiten: whether it is whitened, and modes are looked for.
        verify: whether it is verified.
        rounds: whether it is checked between rounds.
        num_data: N.
        program: whether the target is a program.
        registered: whether the flow has a registered name, by which its layers can be built and counted.

    Returns:
        Bytes by phase, in order.
    """
    dim, particles, b = spec.dim, num_particles, itemsize
    full = spec.base == "full"
    rank = dim if full else default_rank(dim) if spec.base == "low_rank" else 0
    parameters, units, taped = _count(spec) if registered else (0, 0, True)
    parameters += spec.funnels * dim**2
    width = dim + units // max(1, spec.num_flows)
    kept = 6 * b * (parameters + dim * (2 + rank)) + (8 * b * dim**2 if full and whiten else 0)
    phases: dict[str, int] = {}
    if program:
        phases["program"], num_data = 50_000_000 + 1300 * num_data * b, 0
    if whiten:
        phases["whiten"] = b * (72 * dim * rank + 512 * (6 * dim + 16 * num_data))
        phases["modes"] = 8 * (12288 * dim + (16 * dim**2 if full else 0)) + 8 * 1024 * num_data * b
    tape = 6 * (spec.num_flows * dim + units) if taped else 0
    phases["steps"] = b * particles * (20 * dim + 16 * num_data + tape)
    phases["check"] = 4 * b * (8192 if rounds else 4096) * (width + num_data)
    if verify:
        rows = max(64, min(10_000, 2**21 // dim))
        phases["verify"] = b * (20_000 * dim + rows * (6 * width + 4 * num_data))
        phases["verify"] += 400_000 * dim if dim <= MAX_HMC_DIM else 0
    return {name: int(HEADROOM * (kept + size)) for name, size in phases.items()}


def check_memory(phases: dict[str, int], device: torch.device) -> dict[str, int | str]:
    """The forecast of the whole fit, for ``posterior.config``; compared with what the machine has, where that is known.

    Args:
        phases: bytes, by `forecast`.
        device: where the fit computes.

    Raises:
        TooLargeError: even half of the forecast is more than the device has.
    """
    phase = max(phases, key=lambda name: phases[name])
    size = phases[phase]
    total, free = memory_of(device)
    what = f"the fit is forecast to take {size / 2**30:.3g} GiB at its peak, in the phase {phase!r}"
    how = (
        'base="low_rank" or "diag" takes less than "full", num_particles= and num_flows= less where smaller, and '
        "whiten=False and verify=False leave their phases out"
    )
    if total is not None and size > 2 * total:
        raise TooLargeError(f"{what}, but {device} has {total / 2**30:.3g} GiB: {how}.")
    if free is not None and size > free:
        warnings.warn(MemoryWarning(f"{what}, and {device} has {free / 2**30:.3g} GiB free: {how}."), stacklevel=3)
    return {"forecast": size, "phase": phase}


def memory_of(device: torch.device) -> tuple[int | None, int | None]:
    """Bytes that a device has and that are free, at most those of a container; None where that can't be told."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return total, free
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (AttributeError, OSError, ValueError, StopIteration):
        return None, None
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii"))
    except (OSError, ValueError):  # no group, or "max"
        return total, free
    return min(total, limit), min(free, limit)


def _count(spec: FlowSpec) -> tuple[int, int, bool]:
    """Parameters and units of K layers, and whether they need a tape; nothing where they can't be built."""
    dims = (spec.dim,) if spec.dim <= LARGEST_BUILT else (LARGEST_BUILT // 2, 3 * LARGEST_BUILT // 4, LARGEST_BUILT)
    taped, counts = True, []
    try:
        with kept():
            for dim in dims:
                one, two = (build(spec.name, dim, num, **spec.options) for num in (1, 2))
                each = [_numbers(layers) for layers in (one, two)]
                counts.append([a + (spec.num_flows - 1) * (b - a) for a, b in zip(*each, strict=True)])
                taped = not all(getattr(layer, "tapeless", False) for layer in one)
    except FlowVIError:  # options that fit one dimension only
        return 0, 0, True
    t = (spec.dim - dims[0]) / (LARGEST_BUILT // 4)
    parameters, units = (
        f[0] if len(f) == 1 else f[0] + t * (f[1] - f[0]) + t * (t - 1) / 2 * (f[2] - 2 * f[1] + f[0])
        for f in zip(*counts, strict=True)
    )
    return int(parameters), int(units), taped


def _numbers(layers: list[TorchTransform]) -> tuple[int, int]:
    """Parameters, and those of them that are biases: one for each output of a network."""
    found = [p for layer in layers for p in (layer.parameters() if isinstance(layer, torch.nn.Module) else ())]
    return sum(p.numel() for p in found), sum(p.numel() for p in found if p.dim() == 1)
