"""Every error and warning that flowvi raises: each says what was wrong and what to do.

All errors derive from `FlowVIError`, all warnings from `FlowVIWarning`, so that a caller can catch or
filter flowvi's own without touching anybody else's. Errors derive from the built-in that a caller would
expect as well (`ValueError`, `KeyError`), so that ordinary handlers keep working.
"""

from __future__ import annotations

__all__ = [
    "CheckpointWarning",
    "DimensionError",
    "DiscreteLatentError",
    "FileFormatError",
    "FlowVIError",
    "FlowVIWarning",
    "HeldFixedWarning",
    "InterruptedWarning",
    "MemoryWarning",
    "NoLatentError",
    "NonFiniteError",
    "NumericalWarning",
    "OptionError",
    "RankLostError",
    "SlowPathWarning",
    "SubsampledLatentError",
    "TargetError",
    "TooLargeError",
    "TraceError",
    "UnknownFlowError",
    "UntrustedWarning",
]


class FlowVIError(Exception):
    """Base class of all of flowvi's errors."""


class OptionError(FlowVIError, ValueError):
    """An argument has a value that can't be used; the message names the argument and what it takes."""


class UnknownFlowError(OptionError):
    """A flow name is not registered; the message lists the names that are."""


class DimensionError(FlowVIError, ValueError):
    """A tensor's shape doesn't fit: the wrong D, the wrong number of batch dimensions."""


class TargetError(FlowVIError, ValueError):
    """A model, energy or callable can't serve as a target."""


class NoLatentError(TargetError):
    """The model has no latent variable to infer."""


class DiscreteLatentError(TargetError):
    """The model has a discrete latent variable that can't be summed out, or a guide was made for one."""


class SubsampledLatentError(TargetError):
    """The model has a latent variable inside a subsampled plate, where its slots would be shared by data."""


class NonFiniteError(TargetError):
    """The data or the log density is NaN or infinite where it must not be."""


class TraceError(TargetError):
    """The model can't be turned into a graph (used inside; a fit falls back to the eager model)."""


class TooLargeError(FlowVIError, MemoryError):
    """A fit would take far more memory than there is; the message says how much, and what takes less."""


class FileFormatError(FlowVIError, ValueError):
    """A file is not a flowvi posterior, is damaged, or was written by a newer version."""


class RankLostError(FlowVIError, RuntimeError):
    """A fit over several processes lost one of them; the message says how to go on."""


class FlowVIWarning(UserWarning):
    """Base class of all of flowvi's warnings."""


class CheckpointWarning(FlowVIWarning):
    """A checkpoint of a fit could not be written; the fit goes on without it."""


class MemoryWarning(FlowVIWarning):
    """A fit may take more memory than is free; the message says how much, and what takes less."""


class SlowPathWarning(FlowVIWarning):
    """The work goes on by a slower way; the message says why and how to get the fast one."""


class HeldFixedWarning(FlowVIWarning):
    """Something that could be learnt is held at its present value; the message says what learns it."""


class InterruptedWarning(FlowVIWarning):
    """A fit was stopped by Ctrl-C; what it had so far is returned."""


class NumericalWarning(FlowVIWarning):
    """Non-finite values were met and passed over; the message counts them."""


class UntrustedWarning(FlowVIWarning):
    """A fit is done but its diagnosis says not to trust it; the message is the verdict."""
