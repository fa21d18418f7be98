"""`convgrad bench` on one tiny layer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from convgrad_export.bench.results import load
from convgrad_export.cli import main

TINY = ["--layers", "efficientnet_b0/stage1.0.squeeze", "--batch", "1", "--rounds", "3", "--seconds", "0.05"]


def test_a_layer_is_measured_resumed_and_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "r.json"
    command = ["bench", *TINY, "--output", str(output), "--gradients", "weight"]
    assert main([*command, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["measured"], report["known"], report["left"], report["failed"]) == (1, 0, 0, {})
    # On a machine that other work never leaves alone there is nothing to sum up, and the report says so.
    assert (
        sum(row["layers"] for row in report["summary"] if row["gradient"] == "weight")
        == 1 - report["left_out_disturbed"]
    )
    (record,) = load(output).records.values()
    assert record["uses"] == [["efficientnet_b0", "stage1.0.squeeze", 1]]

    assert main(command) == 2
    assert "exists already" in capsys.readouterr().err
    assert main([*command, "--resume", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["measured"], report["known"]) == (0, 1)

    assert main(["bench", "--report", str(output)]) == 0
    assert "Covered: distinct geometries of all networks" in capsys.readouterr().out
    assert main(["bench", "--report", str(output), "--markdown"]) == 0
    assert "| 1 | 1 | 0 of 299 |" in capsys.readouterr().out


def test_plots_need_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from ..bench.records import example

    example().save(tmp_path / "r.json")
    (tmp_path / "file").write_text("kept")
    for place in ("file", "file/below"):
        assert main(["bench", "--report", str(tmp_path / "r.json"), "--plots", str(tmp_path / place)]) == 2
        assert "cannot be made a folder" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("option", ["--time-limit", "--max-gmac", "--foreign-cores", "--seconds"])
def test_limits_that_are_no_numbers(option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "b.json"
    assert main(["bench", "--networks", "resnet18", option, "nan", "-o", str(output)]) == 2
    assert option.strip("-").replace("-", "_") in capsys.readouterr().err.replace("-", "_")
    assert not output.exists()


def test_plots_go_beside_the_report(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from ..bench.records import example

    example().save(tmp_path / "r.json")
    command = ["bench", "--report", str(tmp_path / "r.json"), "--plots", str(tmp_path / "plots")]
    assert main(command) == 0
    assert (tmp_path / "plots" / "r_batch8_threads1.png").is_file()
    assert main(command) == 2
    assert main([*command, "--overwrite"]) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--networks", "alexnet"], "networks holds ['alexnet'], expected names from resnet18"),
        (["--batch", "1,x"], "batch is '1,x', expected integers separated by commas"),
        (["--threads", "0"], "threads is (0,), expected integers of at least 1"),
        (["--gradients", "bias"], "operations is ('bias',)"),
        (["--report", "missing.json"], "result file missing.json cannot be read"),
        (["--markdown"], "expected them together with --report FILE"),
        (
            ["--report", "r.json", "--networks", "resnet18", "--batch", "1"],
            "--networks, --batch is given, but --report",
        ),
        (["--retry-disturbed"], "expected it together with --resume"),
        (
            ["--memory", "--rounds", "3", "--seconds", "1"],
            "--rounds, --seconds is given, but --memory measures no time",
        ),
        (["--max-gmac", "1e-9"], "max_gmac is 1e-09, and all of the layers chosen have more"),
        (["--memory", *TINY[:4], "--gradients", "forward"], "peak memory is measured of gradients"),
        (["--resume", "--overwrite"], "leave one of the two out"),
        ([*TINY, "--ort-training-python", "/no/such/python"], "cannot run /no/such/python"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    options: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["bench", *options]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert len(captured.err.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_report_of_a_file_without_rounds_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from ..bench.records import example

    results = example()
    del next(iter(results.records.values()))["rounds"]
    results.save(tmp_path / "r.json")
    assert main(["bench", "--report", str(tmp_path / "r.json")]) == 2
    (message,) = capsys.readouterr().err.splitlines()
    assert "r.json is damaged: KeyError: 'rounds'" in message
