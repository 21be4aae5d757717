"""What a user holds after `flowvi.fit(model, args, encoder=...)`: a model and a posterior for every data point."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro.infer import Trace_ELBO
from torch import Tensor

from flowvi._version import __version__
from flowvi.amortized import AmortizedGuide
from flowvi.checks import as_path, as_seed, functions, whole_numbers
from flowvi.density_fit import MeanLogProb
from flowvi.errors import FileFormatError, OptionError
from flowvi.files import AMORTIZED, plain, read, write
from flowvi.flow import Flow
from flowvi.likelihood import LogLikelihood, log_likelihood
from flowvi.local_plate import PlateOf

__all__ = ["AmortizedFit", "AmortizedHistory"]


@dataclass(frozen=True)
class AmortizedHistory:
    """The trace of a fit, one entry for every check; ELBOs are per data point, in nats.

    Attributes:
        step: steps taken so far (T,).
        train: mean ELBO of the minibatches since the last check (T,).
        validation: mean ELBO of the held-out rows (T,); NaN where none were held out.
        lr: the step size (T,).
        beta: the annealing (T,).
        best_step: the step whose parameters were kept.
        skipped_steps: steps that were not taken because the ELBO or its gradient was not finite.
    """

    step: Tensor
    train: Tensor
    validation: Tensor
    lr: Tensor
    beta: Tensor
    best_step: int
    skipped_steps: int = 0


class AmortizedFit:
    """A model and its amortized guide, learnt together.

    What the model has learnt by `pyro.param` is kept here and not in Pyro's global parameter store, which the fit
    leaves as it was: `model` and `guide` see it through `parameters_in_place`. Modules are learnt in place.

    Args:
        model: the Pyro model.
        guide: its guide, set up.
        parameters: all that was learnt.
        store: the state of Pyro's parameter store.
        example: the model's arguments for a few rows.
        config: what was decided, plain data.
        timing: seconds by phase.
        history: the trace of the fit.
        seed: the fit's seed.

    Attributes:
        model: as above.
        guide: as above; a Pyro guide for the model.
        config: as above.
        timing: as above.
        history: as above.
        seed: as above.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: AmortizedGuide,
        parameters: Sequence[Tensor],
        store: Any,
        example: tuple[tuple[Any, ...], dict[str, Any]],
        *,
        config: Mapping[str, Any],
        timing: Mapping[str, float],
        history: AmortizedHistory,
        seed: int,
    ) -> None:
        self.model, self.guide = model, guide
        self._parameters, self._store, self._example = list(parameters), store, example
        self.config, self.timing, self.history, self.seed = dict(config), dict(timing), history, seed
        self._stream = torch.Generator().manual_seed(seed + 1)

    @contextmanager
    def parameters_in_place(self) -> Iterator[None]:
        """Inside, Pyro's parameter store is this fit's, so that `model` can be run with what it has learnt."""
        with pyro.get_param_store().scope(self._store):
            yield

    @property
    def params(self) -> dict[str, Tensor]:
        """What the model learnt by `pyro.param`: name -> value."""
        with self.parameters_in_place():
            store = pyro.get_param_store()
            own = {f"{self.guide._pyro_name}.{name}" for name, _ in self.guide.named_parameters()}
            return {k: v.detach().clone() for k, v in store.items() if "$$$" not in k and k not in own}

    @contextmanager
    def _evaluation(self, seed: int | None) -> Iterator[None]:
        seed = as_seed(seed)
        if seed is None:
            seed = int(torch.randint(2**62, (), generator=self._stream))
        devices = [p.device for p in self._parameters[:1] if p.device.type == "cuda"]
        with self.parameters_in_place(), torch.no_grad(), torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            yield

    def elbo(self, *args: Any, num_samples: int = 10, seed: int | None = None, **kwargs: Any) -> MeanLogProb:
        """The ELBO per data point, ± the standard error as of data that these are a sample of.

        Args:
            *args: the data, as the model takes it.
            num_samples: draws for each data point.
            seed: makes the call reproducible by itself; None goes on with the fit's own sequence.
            **kwargs: likewise.

        Returns:
            Mean and standard error, nats. With global latents beside the local ones, the ELBO of these rows as all
            the data there is, by their number, ± the standard error of its estimate.
        """
        whole_numbers(num_samples=num_samples)
        if self.guide.has_globals:
            return self._whole_elbo(args, kwargs, num_samples, seed)
        found = self.log_likelihood(*args, num_importance_samples=num_samples, seed=seed, **kwargs).elbos
        return MeanLogProb(float(found.mean()), float(found.std() / len(found) ** 0.5) if len(found) > 1 else 0.0)

    def _whole_elbo(self, args: Any, kwargs: Any, num_samples: int, seed: int | None) -> MeanLogProb:
        num = len(self.guide._data(args, kwargs)[0])
        loss = Trace_ELBO()
        with self._evaluation(seed), pyro.validation_enabled(False):
            plates = PlateOf(num, self.guide.frame.name)
            model, guide = plates(self.model), plates(self.guide)
            found = torch.tensor([-loss.loss(model, guide, *args, **kwargs) / num for _ in range(num_samples)])
        return MeanLogProb(float(found.mean()), float(found.std() / num_samples**0.5) if num_samples > 1 else 0.0)

    def log_likelihood(
        self,
        *args: Any,
        num_importance_samples: int = 200,
        batch_size: int = 100,
        seed: int | None = None,
        **kwargs: Any,
    ) -> LogLikelihood:
        """Log p(x_n) of each data point by importance sampling; see `flowvi.log_likelihood`.

        Args:
            *args: the data, as the model takes it.
            num_importance_samples: S.
            batch_size: data points at a time.
            seed: as for `elbo`.
            **kwargs: likewise.

        Returns:
            The estimates with standard errors, and the ELBOs of the same samples.

        Raises:
            OptionError: a number is not positive.
            TargetError: the model has latents outside the data's plate.
        """
        with self._evaluation(seed), pyro.validation_enabled(False):
            return log_likelihood(
                self.model,
                self.guide,
                *args,
                num_importance_samples=num_importance_samples,
                batch_size=batch_size,
                plate=self.guide.frame.name,
                **kwargs,
            )

    def posterior(self, *args: Any, **kwargs: Any) -> Flow:
        """q(z_n | x_n) of each data point, over its unconstrained latents.

        Args:
            *args: the data, as the model takes it.
            **kwargs: likewise.

        Returns:
            The flows, of batch shape (n, ...) and event shape (D,), without a graph to the parameters.

        Raises:
            OptionError: the flows depend on a draw of global latents; `sample` draws both, and `global_posterior()` is
                the flow of those.
        """
        if self.guide.coupled:
            raise OptionError(
                "the flow of each data point depends on the draw of the global latents: use sample(), which draws "
                "both, or global_posterior(), the flow of the global ones."
            )
        with self.parameters_in_place(), torch.no_grad():
            return self.guide.posterior(self.guide.encode(*args, **kwargs))

    def global_posterior(self) -> Flow:
        """Q of the unconstrained latents outside the data's plate.

        Returns:
            The flow, of event shape (G,), without a graph to the parameters.

        Raises:
            OptionError: the model has none.
        """
        if not self.guide.has_globals:
            raise OptionError("all latents of the model are in the data's plate: use posterior().")
        with self.parameters_in_place(), torch.no_grad():
            return self.guide.globals.get_posterior()

    def sample(self, *args: Any, num_samples: int = 1, seed: int | None = None, **kwargs: Any) -> dict[str, Tensor]:
        """Joint draws of the local latents of each data point, and of the global ones.

        Args:
            *args: the data, as the model takes it.
            num_samples: S.
            seed: as for `elbo`.
            **kwargs: likewise.

        Returns:
            Site -> (S, n, *event), and (S, *shape) of global sites, each on its own support.

        Raises:
            OptionError: num_samples is not a non-negative integer.
        """
        whole_numbers(num_samples=num_samples)
        with self._evaluation(seed):
            guide = self.guide
            features = guide.encode(*args, **kwargs)
            found: dict[str, Tensor] = {}
            shape, noise = [num_samples], None
            if guide.has_globals:
                q = guide.globals.get_posterior()
                g = q.rsample(shape)
                found = guide.unpack_globals(g)[0]
                if guide.coupled:  # each draw has local flows of its own, which are drawn from once
                    shape, noise = [], q._base_point(g).reshape(num_samples, *(1,) * (features.dim() - 1), -1)
            return found | guide.unpack(guide.posterior(features, noise).rsample(shape))[0]

    def save(self, path: str | Path) -> None:
        """Writes what was learnt to a file of plain data; the model and the encoder are code, and not in it.

        Args:
            path: the file; an older one is replaced, and only when the new one is complete.
        """
        content = {
            "flowvi": __version__,
            "parameters": [p.detach() for p in self._parameters],
            "example": {"args": self._example[0], "kwargs": self._example[1]},
            "config": self.config,
            "timing": self.timing,
            "history": {f.name: getattr(self.history, f.name) for f in fields(self.history)},
            "seed": self.seed,
        }
        write(as_path("path", path), plain(content, otherwise=str), AMORTIZED)

    @classmethod
    def load(
        cls, path: str | Path, model: Callable[..., Any], encoder: Callable[..., Tensor], **options: Any
    ) -> AmortizedFit:
        """Reads what `save` wrote into a model and an encoder of the same form; no code from the file is run.

        Args:
            path: the file.
            model: the model, whose modules take the weights.
            encoder: the encoder, which takes its weights.
            **options: those of the fit that are neither numbers nor strings (`inputs=`, say).

        Returns:
            The fit.

        Raises:
            FileFormatError: the file isn't a fit with an encoder, or its weights don't fit the model and encoder.
        """
        from flowvi.fit.amortized_step import learnt_parameters

        functions(model=model, encoder=encoder)
        content = read(as_path("path", path), AMORTIZED)
        try:
            config = content["config"]
            example = tuple(content["example"]["args"]), dict(content["example"]["kwargs"])
            history = AmortizedHistory(**content["history"])
            options = config["options"] | options
            with pyro.get_param_store().scope() as store, torch.random.fork_rng(devices=[]), torch.no_grad():
                guide = AmortizedGuide(model, encoder, config["flow"], config["num_flows"], **options)
                guide(*example[0], **example[1])
                parameters = learnt_parameters(model, guide, example)
                for mine, saved in zip(parameters, content["parameters"], strict=True):
                    if mine.shape != saved.shape:
                        raise ValueError(f"weights of shape {tuple(saved.shape)} where {tuple(mine.shape)} is due")
                    mine.copy_(saved)
        except Exception as error:  # model and encoder are the user's, and so is what they may raise
            raise FileFormatError(
                f"{path} doesn't fit this model and encoder ({error}): give those that it was fitted with."
            ) from error
        return cls(
            model, guide, parameters, store, example, config=config, timing=content["timing"], history=history,
            seed=content["seed"],
        )  # fmt: skip

    def __repr__(self) -> str:
        config, history = self.config, self.history
        words = [f"<AmortizedFit of D = {config['dim']} for each of {config['num_rows']} rows"]
        words[0] += f": {config['flow']} K = {config['num_flows']}"
        words.append(f"{config['num_parameters']} parameters")
        words.append(f"step {history.best_step} of {config['num_steps']} kept ({config['stopped']})")
        if len(history.step):
            last = history.step.tolist().index(history.best_step) if history.best_step in history.step else -1
            words.append(f"ELBO per row {float(history.train[last]):.2f}")
            if config["num_held_out"]:
                words.append(f"held out {float(history.validation[last]):.2f} nats")
        words.append(f"{sum(self.timing.values()):.1f} s")
        return ", ".join(words) + ">"
