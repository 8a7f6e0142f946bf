"""Records on disk: what a directory holds, and what of it is not understood."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cheapgrad.auditing.report import AuditReport
from cheapgrad.cost.comparison import CostComparison
from cheapgrad.cost.report import CostReport
from cheapgrad.environment import Examination
from cheapgrad.errors import RecordError, nearest_match
from cheapgrad.field_types import find_misfit
from cheapgrad.planning.record import Plan
from cheapgrad.reporting.records import DemoRecord

_ORIGIN = ("environment", "seeds", "command", "label")


@dataclass(frozen=True)
class RecordKind:
    """One kind of record that reports understand.

    Attributes:
        name: what stands under ``kind`` in the file.
        version: the newest one that is understood.
        record_type: of what is read.
        read: makes the record from the file's data.
        keys: a file that states no kind and has all of these is taken for one of this kind, and said to be.
    """

    name: str
    version: int
    record_type: type
    read: Callable[[dict[str, Any]], Any]
    keys: frozenset[str]


KINDS = (
    RecordKind("cheapgrad.audit", 1, AuditReport, AuditReport.from_dict, frozenset({"subject", "band", "layers"})),
    RecordKind("cheapgrad.demo", 1, DemoRecord, DemoRecord.from_dict, frozenset({"data", "seeds", "models", "wide"})),
    RecordKind("cheapgrad.doctor", 1, Examination, Examination.from_dict, frozenset({"healthy", "findings"})),
    RecordKind("cheapgrad.plan", 1, Plan, Plan.from_dict, frozenset({"budgets", "exact", "predicted"})),
    RecordKind(
        "cheapgrad.scan", 1, CostReport, CostReport.from_dict, frozenset({"rows", "total", "operations", "uncounted"})
    ),
    RecordKind(
        "cheapgrad.comparison", 1, CostComparison, CostComparison.from_dict, frozenset({"rows", "before", "after"})
    ),
)


@dataclass(frozen=True)
class RecordFile:
    """A record and where it comes from.

    Attributes:
        name: of the file.
        kind: of the record.
        label: what the record is called on the page: what the file says, else its name without the ending.
        record: what was read.
        environment: versions and hardware, as far as the file states them.
        seeds: as far as the file states them.
        command: that made it, if the file states it.
        remark: what the reader has to know about how the file was read.
    """

    name: str
    kind: str
    label: str
    record: Any
    environment: Mapping[str, Any]
    seeds: tuple[int, ...] = ()
    command: str | None = None
    remark: str = ""


@dataclass(frozen=True)
class RefusedFile:
    """A file that is no record.

    Attributes:
        name: of the file.
        reason: why it is none.
    """

    name: str
    reason: str


@dataclass(frozen=True)
class RecordDirectory:
    """What a directory holds.

    Attributes:
        files: the records, by file name.
        refused: JSON files that are no records, by file name.
    """

    files: tuple[RecordFile, ...]
    refused: tuple[RefusedFile, ...]


def read_directory(directory: Path) -> RecordDirectory:
    """Read all records of a directory: its files that end in ``.json``, not those of directories in it.

    Args:
        directory: where they are.

    Returns:
        The records, and the JSON files that are none.

    Raises:
        RecordError: the directory is missing or has no record, or records are damaged or newer than this version of
            cheapgrad understands: all of them are named, and a report that went on without them would look complete.
    """
    if not directory.is_dir():
        what = "is a file; name the directory that it is in" if directory.is_file() else "does not exist"
        raise RecordError(f"the directory of records {str(directory)!r} {what}")
    try:
        paths = sorted(path for path in directory.iterdir() if path.suffix == ".json" and path.is_file())
    except OSError as error:
        raise RecordError(f"cannot list the directory {str(directory)!r}: {error.strerror or error}") from error
    read, damaged = [], []
    for path in paths:
        try:
            read.append(read_file(path))
        except RecordError as error:
            damaged.append(str(error))
    if damaged:
        raise RecordError("; ".join(damaged))
    files = tuple(file for file in read if isinstance(file, RecordFile))
    refused = tuple(file for file in read if isinstance(file, RefusedFile))
    if not files:
        others = "".join(f"; {file.name}: {file.reason}" for file in refused[:3])
        more = f"; {len(refused) - 3} more files" if len(refused) > 3 else ""
        raise RecordError(
            f"{str(directory)!r} holds no record{others}{more}; write one there, e.g. with "
            "'cheapgrad demo --out DIR' or 'cheapgrad scan PACKAGE.MODULE:FACTORY --json > DIR/exact.json'"
        )
    return RecordDirectory(files, refused)


def read_file(path: Path) -> RecordFile | RefusedFile:
    """Read one file.

    Args:
        path: a file of JSON.

    Returns:
        The record, or why the file is none.

    Raises:
        RecordError: it cannot be read, is no JSON, or is a record that is damaged or too new.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecordError(f"cannot read {path.name!r}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise RecordError(f"{path.name!r} is no JSON ({error}); write it again, or move it away") from error
    if not isinstance(data, dict):
        return RefusedFile(path.name, f"it holds a {type(data).__name__}, and records are objects")
    kind, remark = _find_kind(data)
    if kind is None:
        return RefusedFile(path.name, remark)
    _check_version(kind, data, path.name)
    return RecordFile(
        name=path.name,
        kind=kind.name,
        label=data["label"] if isinstance(data.get("label"), str) and data["label"] else path.stem,
        record=_read_record(kind, data, path.name),
        environment=_mapping(data.get("environment")),
        seeds=_seeds(data.get("seeds", data.get("seed"))),
        command=data["command"] if isinstance(data.get("command"), str) else None,
        remark=remark,
    )


def _find_kind(data: dict[str, Any]) -> tuple[RecordKind | None, str]:
    """Return the kind and a remark, or None and the reason."""
    name = data.get("kind")
    if name is None:
        for kind in KINDS:
            if kind.keys <= set(data):
                return kind, "it states no kind; known by its keys"
        return None, "it states no kind, and no record has its keys"
    for kind in KINDS:
        if kind.name == name:
            return kind, ""
    names = [kind.name for kind in KINDS]
    hint = nearest_match(name, names) if isinstance(name, str) else ""
    return None, f"its kind is {str(name)[:60]!r}, which reports do not know{hint}"


def _check_version(kind: RecordKind, data: dict[str, Any], name: str) -> None:
    version = data.get("version", kind.version)
    if isinstance(version, bool) or not isinstance(version, int) or not 1 <= version <= kind.version:
        raise RecordError(
            f"{name!r} is a {kind.name} of version {version!r}, and this cheapgrad reads versions 1 to {kind.version}; "
            "update cheapgrad, or move the file away"
        )


def _read_record(kind: RecordKind, data: dict[str, Any], name: str) -> Any:
    # Where a record comes from is not part of what it says, unless its type says so.
    own = {key for key in _ORIGIN if key in getattr(kind.record_type, "__dataclass_fields__", {})}
    body = {"kind": kind.name, "version": kind.version}
    body |= {key: value for key, value in data.items() if key not in _ORIGIN or key in own}
    try:
        record = kind.read(body)
    except RecordError as error:
        raise RecordError(f"{name!r} is a damaged {kind.name}: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else f"{type(error).__name__}: {error}"
        raise RecordError(f"{name!r} is a damaged {kind.name}: {what}; write it again, or move it away") from error
    misfit = find_misfit(record, kind.record_type)
    if misfit is not None:
        raise RecordError(f"{name!r} is a damaged {kind.name}: {misfit}; write it again, or move it away")
    return record


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _seeds(value: Any) -> tuple[int, ...]:
    numbers = value if isinstance(value, list) else [value]
    return tuple(number for number in numbers if isinstance(number, int) and not isinstance(number, bool))
