"""Imports point one way through the package's layers; held by parsing, so that no import needs to run."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import convgrad_export

PACKAGE = Path(convgrad_export.__file__).parent

# Lowest first; a module may import from its own layer and from those before it.
LAYERS = [
    ["errors"],
    [
        "arguments",
        "dtypes",
        "files",
        "operators",
        "provider_names",
        "session_memory",
        "tensor_names",
        "timing",
        "windows",
    ],
    ["geometry_checks"],
    ["geometry"],
    ["depth_planes"],
    ["functions", "lowering"],
    ["torch_convolution"],
    ["accuracy", "web_target"],
    ["reference"],
    ["emit"],
    ["selection"],
    ["runtime"],
    ["build", "model_check"],
    ["integrations"],
    ["recipes"],
    ["training"],
    ["serving"],
    ["bench"],
    ["commands"],
    ["cli"],
    ["__main__"],
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


def layer_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_layers(source: str, depth: int) -> set[str]:
    """Top-level names inside the package that a module `depth` folders down imports anywhere in its body."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            absolute = node.level == 0 and (node.module or "").split(".")[0] == "convgrad_export"
            if node.level == depth + 1 or absolute:
                parts = (node.module or "").split(".")[1 if absolute else 0 :]
                found |= {parts[0]} if parts and parts[0] else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("convgrad_export.")}
    return found


def violations(path: Path) -> list[str]:
    own = layer_of(path)
    depth = len(path.relative_to(PACKAGE).parts) - 1
    return [
        f"{path.relative_to(PACKAGE)} imports {name}"
        for name in imported_layers(path.read_text(), depth)
        if name != own and name in RANK and RANK[name] >= RANK[own]
    ]


MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down_only(path: Path) -> None:
    assert layer_of(path) in RANK, f"{path} belongs to no layer: add it to LAYERS"
    assert violations(path) == []


def test_the_check_can_fail() -> None:
    assert imported_layers("from ..runtime.session import GradientSession", depth=1) == {"runtime"}
    assert imported_layers("from convgrad_export.cli import main", depth=1) == {"cli"}
    assert imported_layers("from .blocks import pad", depth=1) == set()
    assert imported_layers("def f():\n    from ..training import step", depth=1) == {"training"}


@pytest.mark.parametrize("name", ["errors.py", "arguments.py", "geometry.py"])
def test_geometry_needs_neither_torch_nor_onnx(name: str) -> None:
    imported = {
        alias.name.split(".")[0]
        for node in ast.walk(ast.parse((PACKAGE / name).read_text()))
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    assert not imported & {"torch", "onnx", "onnx_ir", "onnxscript", "numpy"}
