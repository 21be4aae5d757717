"""Rows of a long experiment on disk as they come, so that a run that was cut off goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flowvi.errors import OptionError

__all__ = ["Journal"]


class Journal:
    """A file of JSON lines: first what the rows depend on, then one row a line.

    It is removed once the report is written, for that holds all of it; so a finished run is never mistaken for a
    new one.

    Args:
        path: the file, made where missing; None keeps the rows in memory only.
        config: what every row depends on.

    Raises:
        OptionError: the file is from a run with another `config`.
    """

    def __init__(self, path: Path | None, config: Mapping[str, Any]) -> None:
        self.path = path
        self.rows: dict[str, dict[str, Any]] = {}
        header = json.loads(json.dumps({"config": dict(config)}))
        if path is None:
            return
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        entries = [entry for entry in map(_parse, lines) if entry is not None]
        if not entries:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(header) + "\n", encoding="utf-8")
        elif entries[0] != header:
            raise OptionError(
                f"{path} has rows of an unfinished run with other options ({entries[0].get('config')}): go on "
                "with those, delete the file, or give another --out."
            )
        self.rows = {entry["key"]: entry["row"] for entry in entries[1:]}

    def add(self, key: str, row: dict[str, Any]) -> None:
        """Keep a row under its key."""
        self.rows[key] = row
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, "row": row}) + "\n")

    def remove(self) -> None:
        """Delete the file: the report is written."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def _parse(line: str) -> dict[str, Any] | None:
    """A line's content; None for one that was cut off."""
    try:
        entry = json.loads(line)
    except json.JSONDecodeError:
        return None
    return entry if isinstance(entry, dict) else None
