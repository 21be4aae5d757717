"""Bad calls of everything public: each gives a result, or says by a typed error what is wrong.

`fuzz_calls` has a good call of every public callable, and flaws. One argument of a call is replaced by a flaw, left
out, or joined by one that isn't known. What may come of it is a result, an exception of `flowvi.errors`, and

- Python's own TypeError for a call that doesn't fit the signature, where an argument was left out or is not known;
- what a schedule of the user's raises, or a function given to `sbc`: they come through as they are, on purpose, so that
  a caller's own exception can end a fit, and a programming error is not taken for a failed fit;
- OSError of a call that reads or writes a file: there is no such file, the disk is full. It names the file.
"""

from __future__ import annotations

import inspect
import re
import warnings
from dataclasses import dataclass

import matplotlib.pyplot as plt
import pytest
from fuzz_calls import CALLS, EXCUSED, FLAWS, is_dear, is_sensible, names
from hangs import time_limit
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import flowvi
from flowvi import energies, plotting, transforms
from flowvi.errors import FlowVIError
from flowvi.transforms import registry

SECONDS = 120  # for one call: a refinement without a limit takes 20
SIGNATURE = re.compile(r"missing \d+ required|unexpected keyword argument")


@dataclass(frozen=True)
class BadCall:
    """A call of `fuzz_calls.CALLS`, and what is wrong with it."""

    name: str
    argument: str | None = None
    flaw: str = ""  # what the argument is replaced by; "missing": it is left out; "unknown": it is one too many

    def run(self):
        function, good = CALLS[self.name]()
        arguments = dict(good)
        if self.flaw == "missing":
            arguments.pop(self.argument, None)
        elif self.flaw == "unknown":
            arguments["no_such_argument"] = 1
        elif self.argument is not None:
            arguments[self.argument] = FLAWS[self.flaw]
        return function(**arguments)

    def check(self):
        """Raises whatever else than a result or a typed error comes of it."""
        with time_limit(SECONDS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they are for people
            try:
                self.run()
            except FlowVIError as error:
                if len(str(error)) < 20:
                    raise AssertionError("an error that says too little") from error
            except Exception as error:
                if not self.is_allowed(error):
                    raise

    def is_allowed(self, error):
        """Whether an exception that isn't flowvi's own is one of those that are named above."""
        if callable(FLAWS.get(self.flaw)) and self.argument in ("anneal", "fit", "quantities"):
            return True
        if isinstance(error, OSError):
            return self.argument in ("path", "checkpoint")
        bad_name = self.flaw in ("missing", "unknown")
        return bad_name and isinstance(error, TypeError) and SIGNATURE.search(str(error)) is not None


def bad_calls(dear: bool):
    """Every second one of the calls that take long, or none."""
    cheap = st.sampled_from([name for name in CALLS if not is_dear(name)])
    some = st.one_of(cheap, st.sampled_from([name for name in CALLS if is_dear(name)])) if dear else cheap
    flaws = st.sampled_from([*FLAWS, "missing", "unknown"])
    of_name = some.flatmap(
        lambda name: st.builds(BadCall, st.just(name), st.sampled_from(names(name) or (None,)), flaws)
    )
    return of_name.filter(lambda call: is_sensible(call.argument, call.flaw))


@pytest.fixture(autouse=True)
def apart(tmp_path, monkeypatch):
    """Files go to a folder of the test's own, pictures to no screen, and the registry stays as it was."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    plt.switch_backend("Agg")
    yield
    plt.close("all")


def generated(num):
    return settings(
        max_examples=num,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate,),
    )


def test_every_public_callable_has_a_call():
    called = [CALLS[name]()[0] for name in CALLS]
    public = {n: getattr(m, n) for m in (flowvi, energies, plotting, transforms) for n in m.__all__ if n not in EXCUSED}
    wanted = {n for n, f in public.items() if inspect.isfunction(f) or inspect.isclass(f)}
    assert {n for n in wanted if n not in CALLS and not any(public[n] is f for f in called)} == set()


@pytest.mark.parametrize("name", [name for name in CALLS if not is_dear(name)])
def test_good_call(name):
    BadCall(name).run()


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CALLS if is_dear(name)])
def test_good_dear_call(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        BadCall(name).run()


@generated(300)
@given(bad_calls(dear=False))
def test_some_bad_calls(call):
    call.check()


@pytest.mark.slow
@generated(1000)
@given(bad_calls(dear=True))
def test_a_thousand_bad_calls(call):
    call.check()
