"""The README's Python and `convgrad` examples run, and its tables are the committed measurements."""

from __future__ import annotations

import importlib.metadata
import json
import re
import shlex
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet  # pytest needs it too

from convgrad_export.cli import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def printed(code: str) -> str | None:
    """The output that the README shows below a Python block."""
    found = re.match(r"\n*prints\n*```text\n(.*?)^```", README.split(f"```python\n{code}```", 1)[1], re.M | re.S)
    return found[1] if found else None


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("code", blocks("python"), ids=lambda code: code.strip().splitlines()[-1][:40])
def test_python_blocks_run(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "block.py").write_text(code)  # torch reads the sources of what it scripts
    exec(compile(code, str(tmp_path / "block.py"), "exec"), {"__name__": "readme"})
    shown = printed(code)
    assert shown is None or capsys.readouterr().out == shown


def test_an_example_shows_its_output() -> None:
    assert any(printed(code) for code in blocks("python"))


def test_convgrad_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lines = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("convgrad ")]
    quick = [line for line in lines if line.split()[1] in ("build", "check", "lowerings")]
    assert len(quick) >= 3
    for line in quick:
        assert main(shlex.split(line)[1:]) == 0, line


def test_the_models_of_the_recipes_are_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tritonclient.grpc", reason="tritonclient and grpcio are not installed (extra serving)")
    import torch

    import convgrad_export as cg
    from convgrad_export.recipes import GradCAM

    monkeypatch.chdir(tmp_path)
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    (line,) = [line for line in lines if line.startswith("convgrad serve-repo ")]
    model = shlex.split(line)[2]
    assert any(line.startswith("convgrad export ") and line.endswith(f"-o {model}") for line in lines)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    shapes = {"x": {0: "batch", 2: "height", 3: "width"}}  # as by --dynamic
    cg.export(GradCAM(net, "0"), (torch.randn(1, 3, 32, 32),), model, dynamic_shapes=shapes, verify=False)
    assert main(shlex.split(line)[1:]) == 0


def test_links_and_pictures_exist() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target
    headings = {
        re.sub(r"[^\w -]", "", h).strip().lower().replace(" ", "-") for h in re.findall(r"^#+ (.*)$", README, re.M)
    }
    for anchor in re.findall(r"\]\(#([^)]+)\)", README):
        assert anchor in headings, anchor


def test_accuracy_table_is_the_committed_measurement() -> None:
    from benchmarks.accuracy_table import markdown

    table = json.loads((ROOT / "benchmarks" / "accuracy.json").read_text())["table"]
    assert markdown(table) in README
    assert all(cell["worst"] <= 1.0 for name in table.values() for dtype in name.values() for cell in dtype.values())


def test_the_table_of_compiled_steps_is_made_from_its_record() -> None:
    from benchmarks.torch_compile.steps import NETWORKS, RESULT, readme
    from benchmarks.torch_compile.steps import README as TABLE

    record = json.loads(RESULT.read_text())
    assert TABLE.read_text() == readme(record)
    measured = {(row["network"], row["threads"]) for row in record["results"]}
    assert measured == {(name, threads) for name in NETWORKS for threads in (1, 2)}


def test_the_ci_script_runs_the_readmes_test_command() -> None:
    (line,) = [line for block in blocks("sh") for line in block.splitlines() if "pytest" in line]
    script = (ROOT / ".ci" / "run").read_text()
    install = re.search(r"pip install (.*?) &&", line)
    assert install is not None
    assert install[1] in script
    assert line.split("python ")[-1] in script


def test_the_pinned_set_installs_on_the_python_that_is_asked_for() -> None:
    stated = re.search(r"with Python (3\.\d+) or newer", README)
    assert stated is not None
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    refused = []
    for name, version in (line.split("==") for line in lines if "==" in line):
        try:
            package = importlib.metadata.metadata(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if package["Version"].partition("+")[0] == version:
            wanted = package.get("Requires-Python") or ""
            refused += [] if SpecifierSet(wanted).contains(stated[1]) else [f"{name} {wanted}"]
    assert refused == []
