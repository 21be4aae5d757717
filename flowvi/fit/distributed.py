"""Ranks: one fit by several processes, on `torch.distributed`.

The ranks run the same program. Each has all of the parameters and computes its share of the particles (or of a
minibatch, or of the restarts); the sum of their gradients is that of one process with all of them, and every rank takes
the same step. So that they decide alike, every rank works out a decision from the same seed, and rank 0's outcome
counts (`Ranks.same`). Random numbers are drawn whole on every rank, which keeps its own rows: a fit doesn't depend on
the number of ranks but for the rounding of sums, and can be resumed by another number of them.

Whatever is not launched as several processes is `ALONE`, of one rank, where nothing here does anything.
"""

from __future__ import annotations

import atexit
import os
import pickle
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from flowvi.errors import FlowVIError, FlowVIWarning, OptionError, RankLostError
from flowvi.fit.host_memory import HostMemory

__all__ = ["ALONE", "Ranks", "Split", "local_device"]

T = TypeVar("T")

TIMEOUT = 300.0
"""Seconds that a rank waits for the others before it gives them up; `TIMEOUT_NAME` in the environment sets it."""

TIMEOUT_NAME = "FLOWVI_RANKS_TIMEOUT"

PATIENCE = timedelta(days=7)
"""For waits as long as another rank's whole fit. The end of its process is noticed at once all the same."""

LAUNCH = "torchrun --nproc-per-node 2 program.py"
VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun sets."""


class Ranks:
    """The processes of a job, as one of them sees it. Every method but `share` must be called by all, in one order.

    Args:
        rank: this process's number, from 0.
        world: how many there are.
        control: the group that plain objects go through (gloo); None of one rank.
        patient: the same, for waits without a limit.
        memory: what they share, where they run on one machine.

    Attributes:
        rank, world: as above.

    Example:
        >>> from flowvi.fit.distributed import ALONE
        >>> ALONE.share(10), ALONE.is_first
        (slice(0, 10, None), True)
    """

    def __init__(
        self,
        rank: int = 0,
        world: int = 1,
        control: Any = None,
        patient: Any = None,
        memory: HostMemory | None = None,
    ) -> None:
        self.rank, self.world = rank, world
        self._control, self._patient, self._memory = control, patient, memory
        self._stop = False

    def __repr__(self) -> str:
        return f"Ranks(rank={self.rank}, world={self.world})"

    @staticmethod
    def launched() -> bool:
        """Whether this process is one of several, by torchrun's variables or by `torch.distributed` itself."""
        if not dist.is_available():
            return False
        several = int(os.environ.get("WORLD_SIZE", "1")) > 1 and all(name in os.environ for name in VARIABLES)
        return dist.is_initialized() or several

    @staticmethod
    def join() -> Ranks:
        """The ranks of this job: `torch.distributed`'s where it is initialized, and else those of torchrun.

        Raises:
            OptionError: this process was started alone, or a variable of the environment makes no sense.
            RankLostError: the others did not come.
        """
        global _joined
        if not dist.is_available():
            raise OptionError("distributed needs a torch that is built with torch.distributed, which this one isn't.")
        if not dist.is_initialized():
            missing = [name for name in VARIABLES if name not in os.environ]
            if missing:
                raise OptionError(
                    f"distributed needs several processes, and this one was started alone (no {', '.join(missing)} in "
                    f"the environment): start the program by `{LAUNCH}`, or on several machines with torchrun's "
                    f"--nnodes and --rdzv-endpoint; or leave distributed out."
                )
            _joined = None
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
            with _talking():
                dist.init_process_group(backend, timeout=_timeout())
            atexit.unregister(_leave)
            atexit.register(_leave)  # before the interpreter ends, under the threads that listen
        if _joined is None or _joined[0] is not dist.group.WORLD:
            rank, world = dist.get_rank(), dist.get_world_size()
            with _talking():
                control, patient = (dist.new_group(backend="gloo", timeout=limit) for limit in (_timeout(), PATIENCE))
                memory = HostMemory.between(rank, world, _timeout().total_seconds(), partial(_gather, control))
            _joined = dist.group.WORLD, Ranks(rank, world, control, patient, memory)
        return _joined[1]

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which reports and writes."""
        return self.rank == 0

    def share(self, num: int) -> slice:
        """This rank's part of `num` things; the parts differ in size by one at most."""
        return slice(num * self.rank // self.world, num * (self.rank + 1) // self.world)

    # Tensors, in place, on their own device.

    def sum_(self, tensor: Tensor) -> Tensor:
        """The sum over ranks, the same bits on each."""
        if self.world > 1:
            with _talking():
                on_cpu = tensor.device.type == "cpu"
                if not (on_cpu and self._memory is not None and self._memory.sum_(tensor)):
                    dist.all_reduce(tensor, group=self._control if on_cpu else None)
        return tensor

    def shared(self, shape: tuple[int, ...], like: Tensor) -> Tensor | None:
        """Zeros that every rank sees, of the dtype of `like`; None, on all, of one rank or where there can't be any."""
        if self._memory is None or like.device.type != "cpu":
            return None
        with _talking():
            return self._memory.tensor(shape, like.dtype)

    def mean_(self, tensor: Tensor) -> Tensor:
        """The mean over ranks, such as that of flat gradients of equal shares."""
        return self.sum_(tensor).div_(self.world) if self.world > 1 else tensor

    def broadcast_(self, *tensors: Tensor) -> None:
        """Give every rank the values of rank 0."""
        if self.world > 1:
            for tensor in tensors:
                whole = tensor.detach().contiguous()
                with _talking():
                    dist.broadcast(whole, 0)
                if whole.data_ptr() != tensor.data_ptr():
                    tensor.detach().copy_(whole)

    # Plain objects.

    def same(self, value: T, *generators: torch.Generator, patient: bool = False) -> T:
        """Rank 0's value, on every rank.

        Args:
            value: this rank's; only rank 0's counts. It must be picklable.
            *generators: which get the state of rank 0's.
            patient: whether rank 0 may take any time.
        """
        if self.world == 1:
            return value
        box = [(value, [g.get_state() for g in generators]) if self.is_first else None]
        with _talking():
            dist.broadcast_object_list(box, 0, self._patient if patient else self._control)
        assert box[0] is not None
        if self.is_first:
            return value
        value, states = box[0]
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
        return value

    def first(self, function: Callable[[], T]) -> T:
        """What `function` gives on rank 0, on every rank; what it raises there is raised on every rank."""
        if self.world == 1:
            return function()
        found: T | None = None
        error: Exception | None = None
        if self.is_first:
            try:
                found = function()
                pickle.dumps(found)
            except Exception as raised:
                error = raised
        found, error = self.same((found, error))
        if error is not None:
            raise error
        return found  # type: ignore[return-value]

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, on each; waits as long as it takes."""
        if self.world == 1:
            return [value]
        with _talking():
            return _gather(self._patient, value)

    def any(self, flag: bool) -> bool:
        """Whether it is so on one of the ranks."""
        if self.world == 1:
            return flag
        count = torch.tensor(float(flag))
        with _talking():
            if self._memory is None or not self._memory.sum_(count):
                dist.all_reduce(count, group=self._control)
        return bool(count)

    def barrier(self) -> None:
        """Wait for the others; after it each sees what any of them wrote to `shared` memory before."""
        if self._memory is None:
            self.any(False)
            return
        with _talking():
            self._memory.meet()

    # The process.

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Inside, rank 0 alone warns."""
        if self.is_first:
            yield
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FlowVIWarning)
            yield

    @contextmanager
    def working(self, together: bool = True) -> Iterator[None]:
        """Inside, rank 0 alone warns, and an error lets the other ranks know. Without other ranks nothing is changed.

        Args:
            together: whether Ctrl-C waits for `stop_asked`, so that all ranks end at one step. A second Ctrl-C
                interrupts at once.
        """
        if self.world == 1:
            yield
            return
        main = threading.current_thread() is threading.main_thread()
        mine = together and main and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        self._stop = False

        def wait(signum: int, frame: Any) -> None:
            self._stop = True
            signal.signal(signal.SIGINT, signal.default_int_handler)

        try:
            if mine:
                signal.signal(signal.SIGINT, wait)
            with self.quiet():
                yield
        except FlowVIError:  # every rank has the same one, or the group is left already
            raise
        except BaseException:
            _leave()  # the others see closed connections instead of waiting
            raise
        finally:
            if mine:
                signal.signal(signal.SIGINT, signal.default_int_handler)

    def stop_asked(self) -> bool:
        """Whether Ctrl-C reached one of the ranks; they all say so at the same call."""
        return self.any(self._stop) if self.world > 1 else False


ALONE = Ranks()
"""One process."""

_joined: tuple[Any, Ranks] | None = None


class Split:
    """A step's particles over ranks: each computes its rows, and knows log p and log q of all.

    An objective's statistics (the number of finite particles, the variance of log w) are then those of all
    particles, computed by the same code as in one process.

    Args:
        ranks: the ranks.
        num_particles: S of all ranks.
        grad: the flat gradient (P,), which `finish` sums over the ranks.

    Attributes:
        rows: this rank's particles.
        size: how many.
    """

    def __init__(self, ranks: Ranks, num_particles: int, grad: Tensor) -> None:
        self.rows, self._ranks, self._num, self._grad = ranks.share(num_particles), ranks, num_particles, grad
        self.size = self.rows.stop - self.rows.start

    def whole(
        self, log_q: Tensor, log_p: Tensor, grad: Tensor, score: Tensor | None, beta: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """The same of all particles; where gradient and score are another rank's they are 0, and log p tells if finite.

        Args:
            log_q: of this rank's rows, (s,).
            log_p: likewise.
            grad: d log p/dz, (s, D).
            score: d log q/dz, (s, D), or None.
            beta: the annealing.
        """
        pull = beta * grad if score is None else score - beta * grad
        dtype = torch.promote_types(log_q.dtype, log_p.dtype)
        seen = torch.zeros(2, self._num, dtype=dtype, device=log_q.device)
        seen[0, self.rows] = log_q
        seen[1, self.rows] = torch.where(pull.isfinite().all(-1), log_p, torch.nan).to(dtype)
        self._ranks.sum_(seen)
        placed = [None if part is None else self._placed(part) for part in (grad, score)]
        assert placed[0] is not None
        return seen[0].to(log_q.dtype), seen[1].to(log_p.dtype), placed[0], placed[1]

    def _placed(self, part: Tensor) -> Tensor:
        placed = part.new_zeros(self._num, *part.shape[1:])
        placed[self.rows] = part
        return placed

    def finish(self) -> None:
        """Sum the gradient."""
        self._ranks.sum_(self._grad)


def local_device(device: torch.device | str | None, ranks: Ranks) -> torch.device | str | None:
    """The same, "cuda" being this rank's own GPU."""
    local = os.environ.get("LOCAL_RANK")
    if ranks.world == 1 or device is None or local is None:
        return device
    asked = torch.device(device)
    return torch.device("cuda", int(local)) if asked.type == "cuda" and asked.index is None else asked


def _gather(group: Any, value: T) -> list[T]:
    """The values of all ranks."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group)
    return values


def _timeout() -> timedelta:
    text = os.environ.get(TIMEOUT_NAME, str(TIMEOUT))
    try:
        seconds = float(text)
        if not 0 < seconds < PATIENCE.total_seconds():
            raise ValueError(text)
    except ValueError as error:
        raise OptionError(f"{TIMEOUT_NAME} must be seconds, up to a week, not {text!r}.") from error
    return timedelta(seconds=seconds)


@contextmanager
def _talking() -> Iterator[None]:
    """Inside, what the connections raise is a rank that was lost; after an interruption they can't be used again."""
    try:
        yield
    except RuntimeError as error:
        _leave()
        words = str(error).strip().split("\n")[0][:200]
        raise RankLostError(
            f"another rank ended, or did not answer in time ({words}), and this one can't go on alone. Launch the same "
            f"command again: with checkpoint= it goes on from the last checkpoint. If a rank is only slow, set "
            f"{TIMEOUT_NAME} to more seconds."
        ) from error
    except BaseException:
        _leave()
        raise


def _leave() -> None:
    """Close this process's connections; no group is held any longer, or its threads outlive the interpreter."""
    global _joined
    if _joined is not None:
        _joined[1]._control = _joined[1]._patient = None
        if _joined[1]._memory is not None:
            _joined[1]._memory.close()
            _joined[1]._memory = None
        _joined = None
    if dist.is_initialized():
        dist.destroy_process_group()
