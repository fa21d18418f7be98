"""Figures, tables and plots from a result file with known numbers."""

from __future__ import annotations

from pathlib import Path

import pytest

from convgrad_export.bench.report import machine_line, markdown, tables, write_plots
from convgrad_export.bench.results import Results, load
from convgrad_export.bench.summary import groups, networks_of, troubles
from convgrad_export.errors import OutputExistsError

from .records import example


def test_the_summary_is_the_geometric_mean_of_the_ratios() -> None:
    (group,) = groups(example())
    figures = group.select("weight").figures()
    assert figures["layers"] == 2
    assert figures["torch"] == pytest.approx(1.0)  # 2 and 1/2
    assert figures["torch_median"] == pytest.approx(1.0)
    assert figures["torch_worst"] == pytest.approx(0.5)
    assert figures["torch_share"] == pytest.approx(0.5)
    assert figures["conv_grad"] == pytest.approx(2.0)
    assert figures["textbook"] == pytest.approx(4.0)
    assert figures["best_torch"] == pytest.approx(10.0 / 9.5)  # tiles of 6 are not admitted by default
    assert figures["relaxed_torch"] == pytest.approx(2.5)
    assert figures["tuned_torch"] is None
    assert figures["near_best"] == 1.0
    # 8 x 64 x 64 x 9 x 56 x 56 = 128 x 128 x 9 x 28 x 28 x 8 multiplications in the GEMM's 10 ms for 1024^3
    assert figures["gemm"] == pytest.approx(8 * 64 * 64 * 9 * 56 * 56 / 1024**3)
    assert figures["memory_worst"] == pytest.approx(4.0)
    assert figures["memory_2"] == pytest.approx(0.5)
    assert networks_of(group) == ["resnet18"]
    assert group.select("input").rows == ()
    assert [row.layer for row in group.slowest()] == ["layer2", "layer1"]


def test_tables_and_markdown_say_what_was_covered() -> None:
    text = markdown(example())
    assert text.startswith("a processor, 2 cores; Python 3.11.7, torch 2.13.0, onnxruntime 1.32.0; commit abc1234.")
    assert "| 8 | 1 | weight gradient | 2 | 1.00 |" in text
    assert "2 of 299" in text
    assert "tuned / eager" not in text  # nothing was tuned
    assert "| resnet18/layer2 weight | 0.50 | weight.matmul_taps | 10 ms | weight.im2col 0.53 | 2.00 |" in text
    assert all(len(row) == len(table.headings) for table in tables(example()) for row in table.rows)


def test_what_had_no_quiet_round_decides_nothing() -> None:
    results = example()
    next(iter(results.records.values()))["rounds"]["disturbed"] = 7
    (group,) = groups(results)
    assert [row.layer for row in group.rows] == ["layer2"]
    assert markdown(results).splitlines()[-1].endswith("| 1 |")


def test_wrong_results_are_reported() -> None:
    results = example()
    first = next(iter(results.records.values()))
    first["wrong"] = dict.fromkeys(("weight.im2col", "weight.winograd6"), "error 12 times its bound")
    (line,) = troubles(results)
    names = "weight.im2col, weight.winograd6"
    assert line == f"resnet18/layer1 weight, batch 8, 1 thread: {names} wrong: error 12 times its bound"
    assert line in markdown(results)


def test_a_report_names_the_commits_that_there_are() -> None:
    assert machine_line(Results({"cpu": "a processor", "cores": 2})) == "a processor, 2 cores; Python None, ."
    installed = example()
    for record in installed.records.values():
        record["commit"] = None
    assert machine_line(installed).endswith("onnxruntime 1.32.0.")


def test_the_committed_pages_are_the_committed_measurements() -> None:
    from benchmarks.layers.__main__ import RESULT, pages

    results = load(RESULT)
    for path, text in pages(results).items():
        assert path.read_text() == text, f"{path}: run python -m benchmarks.layers"
    assert not any(record["wrong"] for record in results.records.values())


def test_an_empty_file_gives_no_tables() -> None:
    assert tables(Results({})) == []


def test_plots_are_png_files_that_are_not_replaced_unasked(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (path,) = write_plots(example(), tmp_path, "layers")
    assert path.name == "layers_batch8_threads1.png"
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(OutputExistsError):
        write_plots(example(), tmp_path, "layers")
    write_plots(example(), tmp_path, "layers", overwrite=True)
