"""Many independent cases, over worker processes, each row saved as it comes: a long run can be interrupted.

A case is a mapping of names to strings and numbers, and says all that its row depends on. A rerun reads the
rows that are there and works on what is missing; rows of other cases in the same file are left alone.
"""

from __future__ import annotations

import json
import multiprocessing
import signal
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from flowvi.errors import FlowVIError, OptionError

Case = Mapping[str, Any]
Row = dict[str, Any]


def run_cases(
    work: Callable[[Case], Row],
    cases: Sequence[Case],
    path: Path,
    *,
    workers: int = 1,
    description: str = "",
    progress: bool = True,
) -> list[Row]:
    """The row of each case, in the order of the cases; what `path` holds already is not worked on again.

    Each worker uses one torch thread. Ctrl-C, or an error of `work`, ends the run and leaves the rows so far
    in `path`.

    Args:
        work: case -> row; more than one worker needs it to be picklable.
        cases: what to work on.
        path: the file of rows, one JSON object a line: made where missing, never shortened.
        workers: how many processes; 1 works in this one.
        description: the progress bar's label.
        progress: whether the bar, with the time left, is shown.

    Raises:
        OptionError: workers is not positive.
        FlowVIError: a worker process died.
    """
    if workers < 1:
        raise OptionError(f"workers must be 1 or more, not {workers}.")
    rows = read_rows(path)
    missing = [case for case in cases if _key(case) not in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    _end_line(path)
    there = len(cases) - len(missing)
    bar = tqdm(total=len(cases), initial=there, desc=description, disable=not progress, unit="fit")
    if there and progress:
        bar.write(f"{there} of {len(cases)} are in {path} already; delete it to start afresh.")
    with bar, path.open("a", encoding="utf-8") as file:

        def save(case: Case, row: Row) -> None:
            line = json.dumps({"case": case, "row": row})  # NaN and infinities by Python's names, to come back as such
            file.write(line + "\n")
            file.flush()
            rows[_key(case)] = json.loads(line)["row"]  # the same whether read again or not
            bar.update()

        if workers == 1:
            _work_here(work, missing, save)
        elif missing:
            _work_in_processes(work, missing, save, workers)
    return [rows[_key(case)] for case in cases]


def read_rows(path: Path) -> dict[str, Row]:
    """The rows of a file by their cases; a line that an interrupted write cut short is passed over."""
    rows: dict[str, Row] = {}
    if not path.is_file():
        return rows
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            found = json.loads(line)
            rows[_key(found["case"])] = found["row"]
        except (json.JSONDecodeError, KeyError, TypeError):
            continue
    return rows


def _key(case: Case) -> str:
    return json.dumps(case, sort_keys=True)


def _end_line(path: Path) -> None:
    """End a line that was cut short, so that the next row gets its own."""
    if path.is_file() and path.stat().st_size and not path.read_bytes().endswith(b"\n"):
        with path.open("ab") as file:
            file.write(b"\n")


def _work_here(work: Callable[[Case], Row], cases: Sequence[Case], save: Callable[[Case, Row], None]) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for case in cases:
            save(case, work(case))
    finally:
        torch.set_num_threads(threads)


def _work_in_processes(
    work: Callable[[Case], Row], cases: Sequence[Case], save: Callable[[Case, Row], None], workers: int
) -> None:
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_start_worker)
    try:
        futures = {pool.submit(work, case): case for case in cases}
        for future in as_completed(futures):
            save(futures[future], future.result())
    except BrokenProcessPool as error:
        raise FlowVIError(
            "a worker process died, perhaps for want of memory: the rows so far are kept, and the same command "
            "goes on from there; try fewer workers."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    torch.set_num_threads(1)
    # Ctrl-C reaches every process of a terminal: a worker ends at once, without a word; the first process speaks.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
