"""The result file: written whole, read back, and never mixed with another machine's figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from convgrad_export.bench.results import geometry_of, load, open_results
from convgrad_export.errors import BenchmarkError, OutputExistsError, OutputPathError

from .records import ENVIRONMENT, example


def test_a_file_reads_back_as_it_was(tmp_path: Path) -> None:
    results = example()
    results.settings = {"rounds": 7}
    results.save(tmp_path / "r.json")
    again = load(tmp_path / "r.json")
    assert again == results
    assert again.commits == ["abc1234"]
    assert geometry_of(next(iter(again.records.values()))).input_shape == (8, 64, 56, 56)
    assert len((tmp_path / "r.json").read_text().splitlines()) == 9  # one measurement a line
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]


def test_an_existing_file_is_kept_unless_asked_otherwise(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    example().save(path)
    before = path.read_bytes()
    with pytest.raises(OutputExistsError, match=r"r\.json exists already"):
        open_results(path, ENVIRONMENT, resume=False, overwrite=False)
    assert len(open_results(path, ENVIRONMENT, resume=True, overwrite=False).records) == 2
    assert not open_results(path, ENVIRONMENT, resume=False, overwrite=True).records
    assert path.read_bytes() == before
    with pytest.raises(OutputPathError, match="does not exist"):
        open_results(tmp_path / "missing" / "r.json", ENVIRONMENT, resume=True, overwrite=False)


@pytest.mark.parametrize(
    ("name", "value"), [("cpu", "another processor"), ("cores", 64), ("versions", {"torch": "2.14.0"})]
)
def test_figures_of_another_machine_are_not_continued(tmp_path: Path, name: str, value: object) -> None:
    example().save(tmp_path / "r.json")
    with pytest.raises(BenchmarkError, match=f"was measured with {name} .*, here it is .*cannot be mixed"):
        open_results(tmp_path / "r.json", ENVIRONMENT | {name: value}, resume=True, overwrite=False)


def test_other_files_are_refused_with_the_reason(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    with pytest.raises(BenchmarkError, match="cannot be read: No such file"):
        load(path)
    path.write_text("{")
    with pytest.raises(BenchmarkError, match="is not JSON"):
        load(path)
    path.write_text("[]")
    with pytest.raises(BenchmarkError, match="format 'list', expected 'convgrad bench 1'"):
        load(path)
    example().save(path)
    content = json.loads(path.read_text())
    first = next(iter(content["records"].values()))
    for name, value in (
        ("times", {"torch": {"min_ms": 0}}),
        ("geometry", {}),
        ("uses", None),
        ("uses", []),
        ("uses", [["resnet18", "conv1"]]),
        ("operation", "bias"),
        ("batch", "many"),
        ("threads", 0),
        ("rounds", None),
        ("rounds", {"kept": 3, "disturbed": 0}),
        ("choices", None),
        ("choices", {"policy": []}),
        ("multiplications", None),
        ("failed", []),
    ):
        changed = {**first, name: value}
        if value is None:
            del changed[name]
        path.write_text(json.dumps({**content, "records": {"a": changed}}))
        with pytest.raises(BenchmarkError, match="is damaged"):
            load(path)
