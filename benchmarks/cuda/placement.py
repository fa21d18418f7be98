"""Where onnxruntime-gpu places the nodes of every layer's gradients, shown without a GPU.

    python -m benchmarks.cuda.placement [--opsets 18 22] [--networks resnet50 ...] [--dtypes float32 ...]
    python -m benchmarks.cuda.placement --registry

Run it with a Python that has onnxruntime-gpu. Where no GPU is found it builds stand-ins for the CUDA libraries
(`benchmarks.cuda.stand_in`), which make the provider start and compute nothing: onnxruntime places nodes before it
runs any. Prints each node that left the CUDA provider and exits with 1 if there is one. ``--registry`` writes the
kernel registry's entries for the operators that lowerings record to tests/lowering/cuda_kernels.json instead.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.cuda import stand_in

REGISTRY = Path(__file__).parents[2] / "tests" / "lowering" / "cuda_kernels.json"
_INSIDE = "CONVGRAD_CUDA_STAND_IN"
_TYPES = {"float": "float32", "double": "float64", "float16": "float16", "bfloat16": "bfloat16"}
GRADIENTS = ("input", "weight", "bias")


def registry() -> dict[str, dict[str, list[list[int]]]]:
    """Operator, element type, and the ranges of opsets (first, last; 0 for open) that have a CUDA kernel."""
    from onnxruntime.capi._pybind_state import get_all_opkernel_def

    from convgrad_export.lowering.kernels import CUDA_KERNELS

    found: dict[str, dict[str, set[tuple[int, int]]]] = {name: {} for name in sorted(CUDA_KERNELS)}
    for kernel in get_all_opkernel_def():
        if kernel.provider != "CUDAExecutionProvider" or kernel.domain != "" or kernel.op_name not in found:
            continue
        first, last = kernel.version_range
        for name in kernel.type_constraints.get("T", kernel.type_constraints.get("T1", [])):
            short = name.removeprefix("tensor(").removesuffix(")")
            if short in _TYPES:
                found[kernel.op_name].setdefault(_TYPES[short], set()).add((first, last if last < 1000 else 0))
    return {
        name: {dtype: [list(pair) for pair in sorted(ranges)] for dtype, ranges in sorted(types.items())}
        for name, types in found.items()
    }


def placed_nodes(networks: Sequence[str], dtypes: Sequence[str], opsets: Sequence[int]) -> Iterator[dict[str, Any]]:
    """For every layer, gradient, dtype and opset: the lowering, and its nodes that left the CUDA provider."""
    import onnxruntime

    from convgrad_export import GradientSession
    from convgrad_export.bench.networks import NETWORKS
    from convgrad_export.emit.onnx import GradientRequest, emit_model
    from convgrad_export.lowering import CUDA, preferred_opset
    from convgrad_export.selection.policy import choose

    for network in networks or NETWORKS:
        for layer in NETWORKS[network]():
            for dtype in dtypes:
                for opset in opsets or [preferred_opset(dtype, CUDA)]:
                    geometry = layer.geometry(8).with_batch("batch")
                    lowerings = {name: choose(name, geometry, dtype, provider=CUDA, opset=opset) for name in GRADIENTS}
                    model = emit_model(GradientRequest(geometry, lowerings, dtype, opset, CUDA), "backward")
                    options = onnxruntime.SessionOptions()
                    options.log_severity_level = 3
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore")  # the report below says the same
                        placement = GradientSession(model, "cuda", session_options=options).placement()
                    yield {
                        "case": f"{network} {layer.name} {dtype} opset {opset}",
                        "lowerings": [lowering.name for lowering in lowerings.values()],
                        "nodes": len(placement.nodes),
                        "left": [node.op_type for node in placement.left],
                    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--registry", action="store_true", help="write the kernel registry for the tests")
    parser.add_argument("--networks", nargs="*", default=[])
    parser.add_argument("--dtypes", nargs="*", default=["float32", "float64", "float16", "bfloat16"])
    parser.add_argument("--opsets", nargs="*", type=int, default=[], help="default: the one that sessions take")
    options = parser.parse_args(argv)
    if _INSIDE not in os.environ and not Path("/dev/nvidiactl").exists():
        return _with_stand_ins(argv)
    import onnxruntime

    print(f"onnxruntime-gpu {onnxruntime.__version__}")
    if options.registry:
        entries = ",\n".join(f"  {json.dumps(name)}: {json.dumps(types)}" for name, types in registry().items())
        REGISTRY.write_text(f'{{\n  "onnxruntime-gpu": "{onnxruntime.__version__}",\n{entries}\n}}\n')
        return 0
    models = nodes = left = 0
    for result in placed_nodes(options.networks, options.dtypes, options.opsets):
        models, nodes, left = models + 1, nodes + result["nodes"], left + len(result["left"])
        if result["left"]:
            print(f"{result['case']}: {', '.join(result['left'])} left CUDA; lowerings {result['lowerings']}")
    print(f"{models} models, {nodes} nodes, {left} not on the CUDA provider")
    return 1 if left or not models else 0


def _with_stand_ins(argv: Sequence[str] | None) -> int:
    """The same command in a process whose loader finds the stand-ins."""
    found = importlib.util.find_spec("onnxruntime")
    capi = Path(str(found.origin)).parent / "capi" if found else Path()
    if not (capi / "libonnxruntime_providers_cuda.so").exists():
        print("onnxruntime-gpu is not installed in this Python")
        return 2
    with tempfile.TemporaryDirectory() as folder:
        stand_in.build(capi, Path(folder))
        path = os.pathsep.join(filter(None, [folder, os.environ.get("LD_LIBRARY_PATH")]))
        command = [sys.executable, "-m", "benchmarks.cuda.placement", *(sys.argv[1:] if argv is None else argv)]
        environment = {**os.environ, "LD_LIBRARY_PATH": path, _INSIDE: "1"}
        return subprocess.run(command, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
