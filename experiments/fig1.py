"""Figure 1: what planar and radial flows of length K = 1, 2, 10 do to a unit Gaussian and to a uniform.

Source: Rezende & Mohamed 2015 (arXiv:1505.05770), figure 1. The paper gives no parameters, so they are drawn
from a seeded generator, at a scale where one layer visibly bends the density, and K layers are the first K of
the same ten:

- planar: by turns a sharp push apart, |w| = 4 and w.û = 3 + N(0, .5^2), and a broad pull together, |w| = 1.2
  and w.û = -.6; û is along w, of a random direction, and the hyperplane w.z + b = 0 goes through a point
  c ~ .7 N(0, I), so b = -w.c;
- radial: z0 ~ .7 N(0, I); raw_alpha and raw_s (see `flowvi.kernels.radial`) are N(-1.5, .3^2) and
  N(1.2, .3^2), by turns so (pushes mass out of a hole around z0) and the other way round (pulls it in).

Densities are exact: log q(y) = log q_0(x) - log |det dy/dx| at x = f^-1(y), for each point y of a grid.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from experiments.report import Report, require_matplotlib, show_density
from flowvi.energies import Grid
from flowvi.flow import Flow
from flowvi.transforms import PlanarStack, RadialStack

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = "Figure 1: planar and radial flows of a unit Gaussian and of a uniform, K = 1, 2, 10"

SIDE = math.sqrt(3)
"""The uniform on [-SIDE, SIDE]^2 has unit variance, as the Gaussian."""


@dataclass(frozen=True)
class Config:
    """Everything figure 1 depends on."""

    seed: int = 0
    num_flows: tuple[int, ...] = (1, 2, 10)
    num: int = 1200
    """Cells of the grid along each dimension, for the integrals."""
    box: float = 12.0
    """Half the side of the square that is integrated."""
    shown: float = 4.0
    """Half the side of the square that is drawn."""
    pixels: int = 400

    @classmethod
    def quick(cls, seed: int = 0) -> Config:
        """The same picture, coarser."""
        return cls(seed=seed, num=300, pixels=150)


BASES: dict[str, torch.distributions.Distribution] = {
    "unit Gaussian": torch.distributions.Normal(torch.zeros(2).double(), torch.ones(2).double()),
    "uniform": torch.distributions.Uniform(
        torch.full((2,), -SIDE).double(), torch.full((2,), SIDE).double(), validate_args=False
    ),
}


def pushes(num_flows: int) -> Tensor:
    """Which layers push mass apart: every other one, from the first."""
    return torch.arange(num_flows) % 2 == 0


def planar(num_flows: int, normal: Callable[..., Tensor]) -> PlanarStack:
    """A planar stack with parameters at the scale of this file's docstring."""
    stack = PlanarStack(2, num_flows).double()
    push = pushes(num_flows)[:, None]
    w = torch.nn.functional.normalize(normal(num_flows, 2), dim=-1) * torch.where(push, 4, 1.2)
    through = 0.7 * normal(num_flows, 2)
    m = torch.where(push, 3 + 0.5 * normal(num_flows, 1), -0.6)
    # The stack's constraint takes w.u = s to 1 + m = (s + sqrt(s^2 + 4)) / 2; this is its inverse.
    u = ((1 + m) - 1 / (1 + m)) * w / w.square().sum(-1, keepdim=True)
    stack.load_state_dict({"w": w, "u": u, "bias": -(w * through).sum(-1)})
    return stack


def radial(num_flows: int, normal: Callable[..., Tensor]) -> RadialStack:
    """A radial stack with parameters at the scale of this file's docstring."""
    stack = RadialStack(2, num_flows).double()
    z0 = 0.7 * normal(num_flows, 2)
    small = -1.5 + 0.3 * normal(num_flows)
    large = 1.2 + 0.3 * normal(num_flows)
    push = pushes(num_flows)
    raw_alpha, raw_s = torch.where(push, small, large), torch.where(push, large, small)
    stack.load_state_dict({"z0": z0, "raw_alpha": raw_alpha, "raw_s": raw_s})
    return stack


FLOWS: dict[str, Callable[..., PlanarStack | RadialStack]] = {"planar": planar, "radial": radial}


def first(stack: PlanarStack | RadialStack, num_flows: int) -> PlanarStack | RadialStack:
    """The stack's first num_flows layers, as a stack of its own."""
    part = type(stack)(2, num_flows).double()
    part.load_state_dict({name: value[:num_flows] for name, value in stack.state_dict().items()})
    return part


@torch.no_grad()
def run(config: Config, progress: bool = True) -> Report:
    """Densities on the grid and their integrals."""
    require_matplotlib()
    start = time.perf_counter()
    stacks: dict[tuple[str, int], PlanarStack | RadialStack] = {}
    for flow, make in FLOWS.items():
        generator = torch.Generator().manual_seed(config.seed)
        normal = partial(torch.randn, generator=generator, dtype=torch.float64)
        longest = make(max(config.num_flows), normal)
        stacks |= {(flow, k): first(longest, k) for k in config.num_flows}
    square = ((-config.box, config.box),) * 2
    grid = Grid.midpoints(square, config.num)
    picture = Grid.midpoints(((-config.shown, config.shown),) * 2, config.pixels)

    rows: list[dict[str, Any]] = []
    images: dict[tuple[str, str, int], Tensor] = {}
    bar = tqdm(total=len(BASES) * len(stacks), desc="fig1", disable=not progress, unit="density")
    for base_name, base in BASES.items():
        images[base_name, "base", 0] = base.log_prob(picture.z).sum(-1)
        for (flow, k), stack in stacks.items():
            # Points outside the uniform have density 0: that's an answer here, not an error.
            q = Flow(base, [stack], validate_args=False)
            images[base_name, flow, k] = q.log_prob(picture.z)
            density = q.log_prob(grid.z).exp()
            rows.append(
                {
                    "base": base_name,
                    "flow": flow,
                    "K": k,
                    "integral": (density * grid.weights).sum().item(),
                    "highest": density.max().item(),
                }
            )
            bar.update()
    bar.close()
    table = [
        {
            "base": row["base"],
            "flow": row["flow"],
            "K": str(row["K"]),
            "integral of the density": f"{row['integral']:.4f}",
            "highest density": f"{row['highest']:.2f}",
        }
        for row in rows
    ]
    notes = [
        f"Integrals: midpoint rule, {config.num} x {config.num} cells on [-{config.box:g}, {config.box:g}]^2;"
        " the uniform's edges cost a part of a cell, hence not exactly 1.",
        "Parameters are random: the paper gives none. K layers are the first K of the same ten.",
        f"The uniform is on [-{SIDE:.3f}, {SIDE:.3f}]^2: unit variance, as the Gaussian.",
    ]
    figure = draw(config, images)
    return Report("fig1", TITLE, config, rows, table, notes, figure, time.perf_counter() - start)


def draw(config: Config, images: dict[tuple[str, str, int], Tensor]) -> Figure:
    """Rows: the base. Columns: the base itself, then each flow and K."""
    from matplotlib.figure import Figure

    columns = [("base", 0)] + [(flow, k) for flow in FLOWS for k in config.num_flows]
    figure = Figure(figsize=(1.75 * len(columns) + 0.9, 4.1), layout="constrained")
    grid = figure.subplots(len(BASES), len(columns))
    for i, base in enumerate(BASES):
        # One scale in a row: twice the base's own height, above which colours saturate.
        top = 2 * images[base, "base", 0].exp().max().item()
        for j, (flow, k) in enumerate(columns):
            image = show_density(grid[i, j], images[base, flow, k], config.shown, top)
            if i == 0:
                grid[i, j].set_title("base density" if flow == "base" else f"{flow}, K = {k}")
        grid[i, 0].set_ylabel(base)
        bar = figure.colorbar(image, ax=grid[i, :].tolist(), extend="max", shrink=0.85, pad=0.01)
        bar.set_label("density")
    figure.supxlabel(f"every panel: z in [-{config.shown:g}, {config.shown:g}]$^2$", fontsize="small")
    return figure
