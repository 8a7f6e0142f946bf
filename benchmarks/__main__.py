"""``python -m benchmarks``: time layers and steps, measure added noise, print tables, write JSON lines."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.audit import measure_audits
from benchmarks.bias import measure_bias, measure_debiased_steps
from benchmarks.codec import measure_codecs
from benchmarks.control import measure_control
from benchmarks.curvature import measure_curvature
from benchmarks.environment import describe_environment
from benchmarks.experiments.datasets import DataError
from benchmarks.laplace import measure_laplace
from benchmarks.layer import measure_layers
from benchmarks.memory import keep_freed_memory
from benchmarks.noise import measure_noise
from benchmarks.parts import measure_parts
from benchmarks.plan import measure_plans, measure_theory
from benchmarks.published import measure_published
from benchmarks.scan import measure_scans
from benchmarks.shape import measure_shapes
from benchmarks.step import measure_steps
from benchmarks.units import measure_units
from benchmarks.whole_network import measure_networks
from benchmarks.worth import judge_worth

_NAMES = (
    "layer",
    "step",
    "noise",
    "worth",
    "networks",
    "published",
    "codec",
    "parts",
    "scan",
    "curvature",
    "bias",
    "debiased_steps",
    "laplace",
    "audit",
    "theory",
    "plan",
    "units",
    "shape",
    "control",
)

# Benchmarks whose records hold different things.
_MIXED = ("control", "parts")


def main() -> None:
    """Run the chosen benchmarks."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "names",
        nargs="*",
        choices=[*_NAMES, "all"],
        default="all",
        help="what to run (default: all); worth needs step and noise, in this run or in --out",
    )
    parser.add_argument(
        "--data",
        type=Path,
        help="zip of an image folder for noise; data of the experiments for units and shape (default: bundled digits)",
    )
    parser.add_argument("--epochs", type=int, help="epochs of exact training before noise (default: 1; digits: 15)")
    parser.add_argument("--rounds", type=int, default=15, help="interleaved rounds per timing (default: 15)")
    parser.add_argument(
        "--return-memory",
        action="store_true",
        help="leave the C library's allocator as it is (default: freed memory stays with the process)",
    )
    parser.add_argument(
        "--compiled",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="networks: measure compiled steps too (minutes; default: yes)",
    )
    parser.add_argument("--network", action="append", default=[], help="networks: only those with this in their name")
    parser.add_argument("--audits", type=int, default=9, help="audit: per method and network (default: 9)")
    parser.add_argument("--resume", action="store_true", help="audit: leave out what --out holds already")
    parser.add_argument("--steps", type=int, default=240, help="control: training steps (default: 240)")
    parser.add_argument("--method", action="append", default=[], help="networks: only methods with this in their name")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("bench.jsonl"), help="JSON lines are appended here")
    arguments = parser.parse_args()
    if arguments.data is not None and not arguments.data.exists():
        parser.error(f"--data {arguments.data} does not exist")
    names = _NAMES if "all" in arguments.names else arguments.names
    torch.manual_seed(arguments.seed)
    keeps_memory = not arguments.return_memory and keep_freed_memory()
    environment = describe_environment(arguments.seed) | {"keeps_freed_memory": keeps_memory}
    with arguments.out.open("a", encoding="utf-8") as file:
        for name in names:
            records = []
            try:
                for record in _run(name, arguments):
                    records.append(record)
                    if "environment" not in record:
                        file.write(json.dumps(record | {"environment": environment}) + "\n")
                        file.flush()
            except DataError as error:
                parser.error(str(error))
            _print(name, records, environment)


def _run(name: str, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    if name == "layer":
        return measure_layers(rounds=arguments.rounds)
    if name == "step":
        return measure_steps(rounds=arguments.rounds)
    if name == "worth":
        return judge_worth(_read_records(arguments.out))
    if name == "curvature":
        return measure_curvature(rounds=arguments.rounds)
    if name == "theory":
        return measure_theory(seeds=200)
    if name == "plan":
        return measure_plans(epochs=arguments.epochs or 3, draws=3)
    if name == "units":
        return measure_units(data=arguments.data, draws=4)
    if name == "shape":
        return measure_shapes(data=arguments.data)
    if name == "laplace":
        return measure_laplace(seeds=8)
    if name == "bias":
        return measure_bias(splits=300)
    if name == "audit":
        finished = _read_finished(arguments.out, name) if arguments.resume else {}
        return measure_audits(seeds=arguments.audits, finished=finished)
    if name == "control":
        return measure_control(
            data=arguments.data, steps=arguments.steps, windows=max(6, arguments.steps // 200), rounds=arguments.rounds
        )
    if name == "networks":
        return measure_networks(
            rounds=arguments.rounds,
            compiled=arguments.compiled,
            networks=arguments.network,
            methods=arguments.method,
        )
    if name == "published":
        return measure_published()
    if name == "codec":
        return measure_codecs(rounds=arguments.rounds)
    if name == "parts":
        return measure_parts(rounds=arguments.rounds)
    if name == "scan":
        return measure_scans(rounds=arguments.rounds)
    if name == "debiased_steps":
        return measure_debiased_steps(splits=40)
    epochs = arguments.epochs or (1 if arguments.data else 15)
    return measure_noise(data=arguments.data, epochs=epochs, batches=16, draws=2)


def _read_finished(path: Path, name: str) -> dict[str, dict[str, Any]]:
    """Return the records of a benchmark that a file of JSON lines holds, by method, each with its own environment."""
    return {record["method"]: record for record in _read_records(path) if record["benchmark"] == name}


def _read_records(path: Path) -> list[dict[str, Any]]:
    """Return the records of a file of JSON lines, those of this run among them; none if there is no file."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def _print(name: str, records: Iterable[dict[str, Any]], environment: dict[str, Any]) -> None:
    records = list(records)
    if not records:
        return
    table = Table(title=f"{name} ({environment['processor']}, {environment['threads']} threads)", title_justify="left")
    hidden = ("benchmark", "environment")
    keys = list(dict.fromkeys(key for record in records for key in record if key not in hidden))
    keys = [key for key in keys if any(record.get(key) is not None for record in records)]
    keys = [key for key in keys if key in records[0] or name in _MIXED or key.startswith("target")]
    for key in keys:
        table.add_column(key.replace("_", " "), justify="left" if key == "method" else "right")
    for record in records:
        table.add_row(*[_cell(record.get(key)) for key in keys])
    Console().print(table)


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
