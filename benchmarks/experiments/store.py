"""Where records are kept: one file for each run, whole or not there, and a lock for each run that is being made.

What others have run before, on whatever machine, comes with the repository as JSON lines and counts as made.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.experiments.declaration import identify
from cheapgrad.errors import RecordError
from cheapgrad.files import prepare_directory, write_whole

KIND = "cheapgrad.experiment"
Record = dict[str, Any]


class Store:
    """A directory of records.

    A record is a file of one line of JSON that is written under another name and renamed when it is complete. A run
    that is being made holds a lock of the operating system, which ends with its process, however that ends.

    Args:
        directory: made if need be.
        committed: files of JSON lines whose records count as made, unless the directory has a record of the same run.
    """

    def __init__(self, directory: Path, committed: Sequence[Path] = ()) -> None:
        self._records, self._locks = directory / "runs", directory / "locks"
        for each in (directory, self._records, self._locks):
            prepare_directory(each, "--out")
        self._known: dict[str, Record] = {}
        self._committed = {record["id"]: record for path in committed for record in Lines(path)}

    def find(self, identity: str) -> Record | None:
        """Return the record of a run, or None: never made, cut off while it was written, or not what it says it is."""
        if identity not in self._known:
            record = _read(self._path(identity))
            if record is None:
                # Another process may write one yet.
                return self._committed.get(identity)
            self._known[identity] = record
        return self._known[identity]

    def __iter__(self) -> Iterator[Record]:
        """Yield all records, sorted by identity."""
        names = {name.removesuffix(".json") for name in os.listdir(self._records) if name.endswith(".json")}
        for identity in sorted(names | self._committed.keys()):
            record = self.find(identity)
            if record is not None:
                yield record

    def save(self, declaration: dict[str, Any], result: dict[str, Any], environment: dict[str, Any]) -> None:
        """Write the record of a run.

        Raises:
            RecordError: if the result has values that JSON cannot hold.
        """
        identity = identify(declaration)
        record = {
            "kind": KIND,
            "version": 1,
            "id": identity,
            "declaration": declaration,
            "result": result,
            "environment": environment,
        }
        try:
            text = json.dumps(record, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise RecordError(f"the result of run {identity} cannot be written as JSON: {error}") from error
        write_whole(self._path(identity), text.encode() + b"\n")

    @contextlib.contextmanager
    def claim(self, name: str) -> Iterator[bool]:
        """Give whether this process may make a run now; if so, nobody else may until the context ends."""
        with (self._locks / name).open("a") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            # Closing the file gives the lock back.
            yield True

    def list_damaged(self) -> list[str]:
        """Return the names of files that are no whole records; their runs will be made again."""
        return sorted(path.name for path in self._records.glob("*.json") if _read(path) is None)

    def export(self, path: Path) -> int:
        """Write all records of the directory as JSON lines, sorted by identity, and return how many there are."""
        paths = sorted(self._records.glob("*.json"))
        lines = [path.read_bytes().strip() for path in paths if _read(path) is not None]
        write_whole(path, b"".join(line + b"\n" for line in lines))
        return len(lines)

    def _path(self, identity: str) -> Path:
        return self._records / f"{identity}.json"


class Lines:
    """Records from JSON lines, as `Store.export` writes them; lines that are no whole records are left out.

    Args:
        path: the file; none at all is as good as an empty one.
    """

    def __init__(self, path: Path) -> None:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
        records = [_parse(line) for line in lines]
        self._records = {record["id"]: record for record in records if record is not None}

    def find(self, identity: str) -> Record | None:
        """Return the record of a run, or None."""
        return self._records.get(identity)

    def __iter__(self) -> Iterator[Record]:
        return iter(self._records.values())


def _read(path: Path) -> Record | None:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    record = _parse(text)
    return record if record is not None and record["id"] == path.stem else None


def _parse(text: str) -> Record | None:
    try:
        record = json.loads(text)
    except json.JSONDecodeError:
        return None
    if not isinstance(record, dict) or record.get("kind") != KIND:
        return None
    if not all(isinstance(record.get(key), dict) for key in ("declaration", "result", "environment")):
        return None
    return record if record.get("id") == identify(record["declaration"]) else None
