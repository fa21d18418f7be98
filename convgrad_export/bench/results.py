"""The result file: JSON, one measurement a line, replaced as a whole after every measurement."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import BenchmarkError
from ..files import check_output, write_atomically
from ..geometry import ConvGeometry
from ..reference import OPERATIONS

FORMAT = "convgrad bench 1"
_MACHINE = ("cpu", "cores")


@dataclass
class Results:
    """What was measured so far.

    Attributes:
        environment: CPU, cores, versions, of the first run that wrote the file. settings: of the latest run.
        records: by `plan.Item.key`; each holds what `measure.measure` returns, with ``operation``, ``batch``,
            ``threads``, ``geometry``, ``uses`` and ``commit``.
    """

    environment: dict[str, Any]
    settings: dict[str, Any] = field(default_factory=dict)
    records: dict[str, dict[str, Any]] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Replace the file; a reader sees the old one or the new one.

        Raises:
            OutputPathError: it cannot be written.
        """
        head = {"format": FORMAT, "environment": self.environment, "settings": self.settings}
        lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in head.items()]
        records = ",\n".join(f"{json.dumps(key)}: {json.dumps(record)}" for key, record in self.records.items())
        body = ",\n".join([*lines, f'"records": {{\n{records}\n}}'])
        write_atomically(path, f"{{\n{body}\n}}\n".encode(), overwrite=True)

    @property
    def commits(self) -> list[str]:
        """Versions of this package that records come from, in order of first use; an installed package says none."""
        return list(dict.fromkeys(commit for record in self.records.values() if (commit := record.get("commit"))))


def load(path: str | os.PathLike[str]) -> Results:
    """Read a result file.

    Raises:
        BenchmarkError: no such file, or it holds something else.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise BenchmarkError(f"result file {path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise BenchmarkError(f"result file {path} is not JSON: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise BenchmarkError(f"result file {path} has format {found!r}, expected {FORMAT!r}: run convgrad bench again")
    try:
        results = Results(dict(content["environment"]), dict(content["settings"]), dict(content["records"]))
        if not isinstance(results.environment.get("versions", {}), dict):
            raise TypeError("its versions are no object")
        for record in results.records.values():
            _check(record)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BenchmarkError(f"result file {path} is damaged: {type(error).__name__}: {error}") from error
    return results


def open_results(
    path: str | os.PathLike[str], environment: Mapping[str, Any], *, resume: bool, overwrite: bool
) -> Results:
    """The file to go on with, or an empty one.

    Raises:
        OutputExistsError: it exists, and neither `resume` nor `overwrite` was asked for.
        OutputPathError: a folder, or its parent is no folder.
        BenchmarkError: with `resume`, no result file, or one from another machine or other versions.
    """
    target = check_output(path, overwrite=resume or overwrite)
    if not (resume and target.exists()):
        return Results(dict(environment))
    results = load(target)
    for name in (*_MACHINE, "versions"):
        before, here = results.environment.get(name), environment.get(name)
        if before != here:
            raise BenchmarkError(
                f"result file {target} was measured with {name} {before!r}, here it is {here!r}: the figures cannot be "
                f"mixed; give another file"
            )
    return results


def geometry_of(record: Mapping[str, Any]) -> ConvGeometry:
    return ConvGeometry.from_dict(record["geometry"])


def _check(record: Mapping[str, Any]) -> None:
    """Everything that reports and a resumed run read of a record."""
    geometry_of(record)
    counts = (record["batch"], record["threads"])
    if record["operation"] not in OPERATIONS or not all(isinstance(count, int) and count > 0 for count in counts):
        raise ValueError(f"operation {record['operation']!r}, batch and threads {counts}")
    if not record["uses"]:
        raise ValueError("a measurement of no layer")
    for network, layer, count in record["uses"]:
        if not isinstance(network, str) or not isinstance(layer, str) or int(count) < 1:
            raise ValueError(f"a use of {network!r}, {layer!r}, {count!r}")
    for kind in ("wrong", "failed", "memory"):
        if not isinstance(record.get(kind, {}), dict):
            raise TypeError(f"{kind} is {record[kind]!r}")
    if "times" in record:
        _check_times(record)


def _check_times(record: Mapping[str, Any]) -> None:
    for timing in record["times"].values():
        if not (float(timing["min_ms"]) > 0 and float(timing["median_ms"]) > 0 and int(timing["rounds"]) > 0):
            raise ValueError(f"a time of {timing}")
    if not all(name is None or isinstance(name, str) for name in record["choices"].values()):
        raise TypeError(f"choices {record['choices']}")
    if int(record["multiplications"]) < 1:
        raise ValueError(f"{record['multiplications']} multiplications")
    rounds = record["rounds"]
    if int(rounds["kept"]) < 1 or min(int(rounds["discarded"]), int(rounds["disturbed"])) < 0:
        raise ValueError(f"rounds {rounds}")
