"""The same answers on a GPU: steps, fits, draws. Skipped where there is none."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch

import flowvi
from flowvi.fit.adam import FlatAdam, FlatParameters
from flowvi.fit.replay import make_update
from flowvi.fit.steps import make_step

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]


@pytest.mark.parametrize("name", ["planar", "radial", "real_nvp"])
def test_a_step_on_the_gpu_is_the_step_on_the_cpu(name):
    class Same:
        def value_and_grad(self, z):
            return -0.5 * (z - 1).square().sum(-1), 1 - z

    grads = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        flow = flowvi.Flow.from_spec(flowvi.FlowSpec(name, 3, 4), dtype=torch.float64)
        with torch.no_grad():
            for p in flow.parameters():
                p.add_(0.1 * torch.randn_like(p))
        flow = flow_on(flow, device)
        flat = FlatParameters(flow.module)
        step = make_step(flow, Same(), flowvi.BalancedELBO(100_000), flat)
        step(1.0, torch.Generator(device).manual_seed(0))
        grads.append(flat.grad.cpu().clone())
        flat.release()
    scale = grads[0].abs().max()
    assert (grads[0] - grads[1]).abs().max() < 0.05 * scale  # other random numbers, the same expectation


def flow_on(flow, device):
    spec, state = flow.spec, flow.state_dict()
    out = flowvi.Flow.from_spec(spec, dtype=torch.float64, device=device)
    out.load_state_dict(state)
    return out


def test_the_loop_does_not_wait_for_the_device():
    flow = flowvi.Flow.from_spec(flowvi.FlowSpec("planar", 2, 8), device="cuda")
    target = flowvi.as_density(flowvi.energies.U2(), device="cuda")
    flat = FlatParameters(flow.module)
    step, adam = make_step(flow, target, flowvi.BalancedELBO(256), flat), FlatAdam(flat.vector, flat.grad)
    generator = torch.Generator("cuda").manual_seed(0)
    num, _ = step(1.0, generator)
    torch.cuda.set_sync_debug_mode("error")
    try:
        num, _ = step(1.0, generator)
        adam.step(1e-3, num > 0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        flat.release()


@pytest.mark.parametrize("name", ["planar", "radial", "real_nvp"])
def test_a_replayed_fit_is_the_fit(name):
    found = []
    for record in (None, refused):
        torch.manual_seed(0)
        flow = flowvi.Flow.from_spec(flowvi.FlowSpec(name, 2, 8), device="cuda")
        target = flowvi.as_density(flowvi.energies.U2(), device="cuda")
        flat = FlatParameters(flow.module)
        step, adam = make_step(flow, target, flowvi.ELBO(256), flat), FlatAdam(flat.vector, flat.grad)
        update = make_update(step, adam, torch.Generator("cuda").manual_seed(0), record=record)
        found.append((update.recorded, torch.stack([update(1.0, 1e-3)[1].clone() for _ in range(20)])))
        flat.release()
    assert [recorded for recorded, _ in found] == [True, False]
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-2, atol=1e-2)


def refused(function, generator):
    raise RuntimeError


def test_fit_on_the_gpu():
    posterior = flowvi.fit(flowvi.energies.U2(), num_flows=32, device="cuda", seed=0, progress=False)
    assert posterior.config["device"].startswith("cuda")
    assert posterior.diagnose().kl < 0.01
    assert posterior.sample(10)["z"].device.type == "cuda"

    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    y = torch.arange(5.0)
    posterior = flowvi.fit(model, (y,), device="cuda", seed=0, progress=False)
    assert posterior.mean()["mu"].item() == pytest.approx(10 / 6, abs=0.02)
