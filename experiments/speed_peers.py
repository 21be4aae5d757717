"""The same work by others: one function for each makes a `Run`, which does a step n times.

Every step is whole: draws, flow, energy, gradient, Adam. normflows, zuko, flowjax and numpyro are compared
where they are installed (extra `peers`); Pyro always is. Each is set up as its own documentation does, and flowjax's
and numpyro's steps are one jitted function.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any

import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as pyro_transforms
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormalizingFlow

from experiments.zuko_flows import zuko_flow
from flowvi.energies import U2, Funnel
from flowvi.energies.base import Energy

Run = Callable[[int], None]
"""run(n) does n steps, and returns when all of their results are there."""

LR = 1e-3
HIDDEN, BINS = (32, 32), 8

NEEDS: Mapping[str, tuple[str, ...]] = {
    "pyro": ("pyro",),
    "normflows": ("normflows",),
    "zuko": ("zuko",),
    "flowjax": ("flowjax", "optax"),
    "numpyro": ("numpyro",),
}
"""What each peer imports."""


def installed(peer: str) -> bool:
    """Whether a peer can be imported."""
    try:
        for name in NEEDS[peer]:
            importlib.import_module(name)
    except ImportError:
        return False
    return True


def version(peer: str) -> str:
    """A peer's name and version."""
    return f"{peer} {importlib.metadata.version({'pyro': 'pyro-ppl'}.get(peer, peer))}"


def energy(dim: int) -> Energy:
    """The target of a step: U2 in two dimensions, Neal's funnel above; both cost O(D)."""
    return U2() if dim == 2 else Funnel(dim)


def repeat(one: Callable[[], Any]) -> Run:
    """The run that calls `one`."""

    def run(n: int) -> None:
        for _ in range(n):
            one()

    return run


# Stacks alone: forward, log-determinant, backward.


def pyro_stack(family: str, dim: int, num_particles: int, num_flows: int) -> Run:
    """A loop of Pyro's `Planar` or `Radial`: forward, log_abs_det_jacobian, backward."""
    make = {"planar": pyro_transforms.Planar, "radial": pyro_transforms.Radial}[family]
    layers = [make(dim) for _ in range(num_flows)]
    parameters = list(chain.from_iterable(layer.parameters() for layer in layers))
    x, g_z = torch.randn(num_particles, dim), torch.randn(num_particles, dim)
    g_log_det = torch.randn(num_particles)

    def one() -> None:
        z = x.clone()  # Pyro keeps the result of the last x, with its graph
        log_det = torch.zeros(())
        for layer in layers:
            y = layer(z)
            log_det = log_det + layer.log_abs_det_jacobian(z, y)
            z = y
        torch.autograd.grad([z, log_det], parameters, [g_z, g_log_det])

    return repeat(one)


# Whole steps.


def pyro_svi(model: Callable[..., Any], args: Sequence[Any], num_particles: int, num_flows: int, nesting: int) -> Run:
    """Pyro's `SVI.step` with `AutoNormalizingFlow` of planar layers and vectorized particles.

    Args:
        model: the model.
        args: its arguments.
        num_particles: S.
        num_flows: K.
        nesting: the model's plates inside one another.
    """
    guide = AutoNormalizingFlow(model, partial(pyro_transforms.iterated, num_flows, pyro_transforms.planar))
    loss = Trace_ELBO(num_particles=num_particles, vectorize_particles=True, max_plate_nesting=nesting)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": LR}), loss)
    store = pyro.get_param_store()
    with store.scope() as own:  # guides give their parameters the same names
        svi.step(*args)

    def run(n: int) -> None:
        with store.scope(own):
            for _ in range(n):
                svi.step(*args)

    return run


def normflows_step(dim: int, num_particles: int, num_flows: int) -> Run:
    """normflows: planar layers, `reverse_kld`, and torch's Adam."""
    import normflows

    class Target:
        log_prob = staticmethod(energy(dim).log_density)

    layers = [normflows.flows.Planar((dim,)) for _ in range(num_flows)]
    flow = normflows.NormalizingFlow(normflows.distributions.DiagGaussian(dim, trainable=False), layers, Target())
    return _reverse_kld(flow, num_particles)


def _reverse_kld(flow: Any, num_particles: int) -> Run:
    """A step of normflows: `reverse_kld`, and torch's Adam."""
    adam = torch.optim.Adam(flow.parameters(), lr=LR)

    def one() -> None:
        adam.zero_grad(set_to_none=True)
        flow.reverse_kld(num_particles).backward()
        adam.step()

    return repeat(one)


def zuko_step(name: str, dim: int, num_particles: int, num_flows: int) -> Run:
    """zuko: coupling layers of the given kind, "real_nvp" or "neural_spline", and torch's Adam."""
    flow = zuko_flow(name, dim, num_flows, hidden_dims=HIDDEN, num_bins=BINS)
    adam = torch.optim.Adam(flow.parameters(), lr=LR)
    log_density = energy(dim).log_density

    def one() -> None:
        adam.zero_grad(set_to_none=True)
        z, log_q = flow().rsample_and_log_prob((num_particles,))
        (log_q - log_density(z)).mean().backward()
        adam.step()

    return repeat(one)


def normflows_coupling_step(name: str, dim: int, num_particles: int, num_flows: int) -> Run:
    """normflows: coupling layers of the given kind, as for `zuko_step`, with a swap of the halves after each."""
    import normflows

    class Target:
        log_prob = staticmethod(energy(dim).log_density)

    half = dim // 2
    layers: list[Any] = []
    for _ in range(num_flows):
        if name == "real_nvp":
            widths = [dim - half, *HIDDEN, 2 * half]
            layers.append(normflows.flows.AffineCouplingBlock(normflows.nets.MLP(widths, init_zeros=True)))
        else:  # its networks are residual: one block of two layers
            spline = normflows.flows.CoupledRationalQuadraticSpline
            layers.append(spline(dim, 1, HIDDEN[0], num_bins=BINS, tail_bound=5.0))
        layers.append(normflows.flows.Permute(dim, mode="swap"))
    flow = normflows.NormalizingFlow(normflows.distributions.DiagGaussian(dim, trainable=False), layers, Target())
    return _reverse_kld(flow, num_particles)


def flowjax_step(dim: int, num_particles: int, num_flows: int, seed: int) -> Run:
    """flowjax: `planar_flow`, `ElboLoss` and optax's Adam in one jitted function, which nothing waits for."""
    import jax
    from flowjax.distributions import StandardNormal
    from flowjax.flows import planar_flow

    base = StandardNormal((dim,))
    flow = planar_flow(jax.random.key(seed), base_dist=base, flow_layers=num_flows, invert=False)
    return _elbo_loss(flow, dim, num_particles, seed)


def flowjax_network_step(name: str, dim: int, num_particles: int, num_flows: int, seed: int) -> Run:
    """flowjax: coupling or autoregressive layers of the given kind, with networks of as many units as flowvi's.

    Its `knots` are those between the bins, its autoregressive networks have hidden layers of one width, and a
    permutation comes between two layers.
    """
    import jax
    from flowjax.bijections import RationalQuadraticSpline
    from flowjax.distributions import StandardNormal
    from flowjax.flows import coupling_flow, masked_autoregressive_flow

    make = masked_autoregressive_flow if name == "iaf" else coupling_flow
    spline = {"transformer": RationalQuadraticSpline(knots=BINS - 1, interval=5)} if name == "neural_spline" else {}
    flow = make(
        jax.random.key(seed),
        base_dist=StandardNormal((dim,)),
        flow_layers=num_flows,
        nn_width=HIDDEN[0],
        nn_depth=len(HIDDEN),
        invert=False,
        **spline,
    )
    return _elbo_loss(flow, dim, num_particles, seed)


def _elbo_loss(flow: Any, dim: int, num_particles: int, seed: int) -> Run:
    """A step of flowjax: `ElboLoss`, and optax's Adam."""
    import equinox as eqx
    import jax
    import optax
    import paramax
    from flowjax.train.losses import ElboLoss

    key = jax.random.key(seed)
    fixed = paramax.NonTrainable
    start, static = eqx.partition(flow, eqx.is_inexact_array, is_leaf=lambda leaf: isinstance(leaf, fixed))
    loss = ElboLoss(jax_log_density(dim), num_particles)
    adam = optax.adam(LR)

    @jax.jit
    def one(params: Any, moments: Any, key: Any) -> tuple[Any, Any, Any, Any]:
        key, now = jax.random.split(key)
        value, grads = jax.value_and_grad(loss)(params, static, now)
        updates, moments = adam.update(grads, moments, params)
        return optax.apply_updates(params, updates), moments, key, value

    state = (start, adam.init(start), key)

    def run(n: int) -> None:
        nonlocal state
        for _ in range(n):
            *state_, value = one(*state)
            state = tuple(state_)
        jax.block_until_ready((state, value))

    return run


def numpyro_images_step(batch_size: int, sizes: tuple[int, int, int, int], seed: int) -> Run:
    """numpyro: `SVI.update` on the paper's model of images with a diagonal Gaussian for each datum, jitted.

    Args:
        batch_size: B.
        sizes: pixels, latents, maxout units and their window.
        seed: of all that is random.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np
    import numpyro
    import numpyro.distributions as npdist
    from numpyro.infer import SVI
    from numpyro.infer import Trace_ELBO as NumpyroELBO

    pixels, latents, hidden, window = sizes
    random = np.random.default_rng(seed)
    images = jnp.asarray((random.random((10 * batch_size, pixels)) < 0.13).astype(np.float32))

    def layer(size_in: int, size_out: int) -> dict[str, Any]:
        bound = size_in**-0.5
        return {
            "w": jnp.asarray(random.uniform(-bound, bound, (size_in, size_out)), jnp.float32),
            "b": jnp.zeros(size_out),
        }

    def at(p: Any, x: Any) -> Any:
        return x @ p["w"] + p["b"]

    def maxout(p: Any, x: Any) -> Any:
        return at(p, x).reshape(len(x), window, hidden).max(1)

    decoder = {"hidden": layer(latents, window * hidden), "out": layer(hidden, pixels)}
    encoder = {"hidden": layer(pixels, window * hidden), "loc": layer(hidden, latents), "scale": layer(hidden, latents)}

    def model(x: Any) -> None:
        p = numpyro.param("decoder", decoder)
        with numpyro.plate("data", len(x)), numpyro.handlers.scale(scale=len(images) / len(x)):
            z = numpyro.sample("z", npdist.Normal(0, 1).expand([latents]).to_event(1))
            logits = at(p["out"], maxout(p["hidden"], z))
            numpyro.sample("x", npdist.Bernoulli(logits=logits).to_event(1), obs=x)

    def guide(x: Any) -> None:
        p = numpyro.param("encoder", encoder)
        h = maxout(p["hidden"], x)
        with numpyro.plate("data", len(x)), numpyro.handlers.scale(scale=len(images) / len(x)):
            scale = jnp.exp(at(p["scale"], h))
            numpyro.sample("z", npdist.Normal(at(p["loc"], h), scale).to_event(1))

    svi = SVI(model, guide, numpyro.optim.Adam(LR), NumpyroELBO())
    state = svi.init(jax.random.key(seed), images[:batch_size])
    update = jax.jit(lambda state, rows: svi.update(state, images[rows]))
    order, turn = random.permutation(len(images)), 0

    def run(n: int) -> None:
        nonlocal state, turn
        for _ in range(n):
            first = turn % (len(images) // batch_size) * batch_size
            state, value = update(state, order[first : first + batch_size])
            turn += 1
        jax.block_until_ready((state, value))

    return run


def jax_log_density(dim: int) -> Callable[[Any], Any]:
    """`energy`'s log density at one point, in jax."""
    import jax.numpy as jnp

    def u2(z: Any) -> Any:
        off = (z[1] - jnp.sin(jnp.pi * z[0] / 2)) / 0.4
        wall = jnp.maximum(jnp.abs(z[0]) - 4, 0) / 0.1
        return -0.5 * (off**2 + wall**2)

    def funnel(z: Any) -> Any:
        scaled = z[1:] * jnp.exp(-0.5 * jnp.maximum(z[0], -80))
        return -0.5 * ((z[0] / 3) ** 2 + (dim - 1) * z[0] + (scaled**2).sum())

    return u2 if dim == 2 else funnel


def planar_steps(peers: Sequence[str], dim: int, num_particles: int, num_flows: int, seed: int) -> dict[str, Run]:
    """The whole planar step of each of the peers that has one.

    Args:
        peers: names of those installed.
        dim: D.
        num_particles: S.
        num_flows: K.
        seed: of all that is random.
    """
    target = energy(dim)
    make: dict[str, Callable[[], Run]] = {
        "pyro": lambda: pyro_svi(_model(target), (), num_particles, num_flows, 0),
        "normflows": lambda: normflows_step(dim, num_particles, num_flows),
        "flowjax": lambda: flowjax_step(dim, num_particles, num_flows, seed),
    }
    torch.manual_seed(seed)
    return {peer: make[peer]() for peer in peers if peer in make}


def _model(target: Energy) -> Callable[[], None]:
    def model() -> None:
        # Masked: it tells Pyro where z lives and where to start, and has no part in the density.
        flat = dist.Normal(torch.zeros(target.dim), 1.0).to_event(1).mask(False)
        z = pyro.sample("z", flat)
        pyro.factor("log_density", target.log_density(z))

    return model
