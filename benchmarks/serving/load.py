"""Load test: Grad-CAM of a ResNet-18 on onnxruntime and in PyTorch eager, in one Triton, over gRPC on the loopback.

    python -m benchmarks.serving.load --prepare              # exports the model, once
    CONVGRAD_TRITON_PYTHON=.triton/bin/python python -m benchmarks.serving.load

The environment of Triton needs torch besides onnxruntime (README). Both models have one instance, the same number of
threads and the same batching, and merge requests alike. Answers are compared before anything is timed. Contenders
alternate in rounds of a counted number of requests; the figures are of all rounds together. Writes load.json, and the
table in README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.environment import environment
from convgrad_export.serving.config import read_config, to_text
from convgrad_export.serving.launch import Address, running, server_python
from convgrad_export.serving.options import ServingOptions
from convgrad_export.serving.repository import add_model
from convgrad_export.timing import read_ticks

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RESULT = HERE / "load.json"
README = HERE / "README.md"
MARKS = ("<!-- table: python -m benchmarks.serving.load -->\n", "<!-- end -->")
LAYERS = {"last block": "stages.7", "first block": "stages.0"}
CLIENTS = (1, 2, 4)


def model_name(kind: str, layer: str) -> str:
    return f"{kind}_{layer.replace('.', '_')}"


def prepare(folder: Path) -> None:
    """Export one model for each layer into `folder`."""
    import torch

    import convgrad_export as cg
    from benchmarks.serving.network import SIZE, grad_cam

    folder.mkdir(parents=True, exist_ok=True)
    for layer in LAYERS.values():
        x = torch.rand(2, 3, SIZE, SIZE)
        path = folder / f"{model_name('onnxruntime', layer)}.onnx"
        cg.export(grad_cam(layer), (x,), path, dynamic_shapes={"x": {0: "batch"}}, overwrite=True)


def make_repository(models: Path, repository: Path, threads: int) -> None:
    """Both contenders for each layer, with configurations that differ in nothing but what runs."""
    for layer in LAYERS.values():
        name = model_name("onnxruntime", layer)
        options = ServingOptions(backend="python", max_batch_size=8, dynamic_batching=True, threads=threads)
        add_model(models / f"{name}.onnx", repository, options)
        eager = repository / model_name("eager", layer)
        (eager / "1").mkdir(parents=True)
        shutil.copyfile(HERE / "eager_model.py", eager / "1" / "model.py")
        config = read_config(repository / name / "config.pbtxt")
        config.name = eager.name
        config.parameters["root"].string_value = str(ROOT)
        config.parameters["layer"].string_value = layer
        (eager / "config.pbtxt").write_text(to_text(config))


class Load:
    """Clients that each send one picture after another, as fast as they are answered."""

    def __init__(self, address: Address, seed: int) -> None:
        import tritonclient.grpc

        self._library = tritonclient.grpc
        self._address = address
        self._pictures = np.random.default_rng(seed).random((8, 1, 3, 96, 96), dtype=np.float32)

    def request(self, client: Any, model: str, index: int) -> np.ndarray:
        value = self._library.InferInput("x", [1, 3, 96, 96], "FP32")
        value.set_data_from_numpy(self._pictures[index % 8])
        return np.asarray(client.infer(model, [value]).as_numpy("output"))

    def run(self, model: str, clients: int, requests: int) -> tuple[list[float], float]:
        """Latency of each request in milliseconds, and the seconds that all of them took."""
        latencies: list[list[float]] = [[] for _ in range(clients)]
        connections = [self._library.InferenceServerClient(self._address.grpc) for _ in range(clients)]
        for connection in connections:
            self.request(connection, model, 0)
        barrier = threading.Barrier(clients + 1)

        def work(number: int) -> None:
            barrier.wait()
            for index in range(requests // clients):
                start = time.perf_counter()
                self.request(connections[number], model, number + index)
                latencies[number].append(1e3 * (time.perf_counter() - start))

        threads = [threading.Thread(target=work, args=(number,)) for number in range(clients)]
        for thread in threads:
            thread.start()
        barrier.wait()
        start = time.perf_counter()
        for thread in threads:
            thread.join()
        seconds = time.perf_counter() - start
        for connection in connections:
            connection.close()
        return [value for part in latencies for value in part], seconds

    def compare(self, layer: str) -> float:
        """Largest difference between the two models' maps, relative to the largest value."""
        client = self._library.InferenceServerClient(self._address.grpc)
        worst = 0.0
        for index in range(8):
            first, second = (self.request(client, model_name(kind, layer), index) for kind in ("onnxruntime", "eager"))
            worst = max(worst, float(np.abs(first - second).max() / np.abs(second).max()))
        client.close()
        if not worst < 1e-3:
            raise SystemExit(f"{layer}: the two models differ by {worst:.1e} of the largest value; nothing was timed")
        return worst


def measure(address: Address, requests: int, rounds: int) -> list[dict[str, Any]]:
    load = Load(address, seed=0)
    rows = []
    for title, layer in LAYERS.items():
        difference = load.compare(layer)
        for clients in CLIENTS:
            results: dict[str, tuple[list[float], float]] = {kind: ([], 0.0) for kind in ("onnxruntime", "eager")}
            stolen = read_ticks().stolen
            for _ in range(rounds):
                for kind, (latencies, seconds) in list(results.items()):
                    more, took = load.run(model_name(kind, layer), clients, requests)
                    results[kind] = (latencies + more, seconds + took)
            stolen = read_ticks().stolen - stolen
            for kind, (latencies, seconds) in results.items():
                rows.append(
                    {
                        "layer": title,
                        "clients": clients,
                        "handler": kind,
                        "requests": len(latencies),
                        "requests_per_second": len(latencies) / seconds,
                        "p50_ms": statistics.median(latencies),
                        "p99_ms": float(np.percentile(latencies, 99)),
                        "difference": difference,
                        "stolen_s": stolen,
                    }
                )
    return rows


def server_versions(python: str) -> dict[str, str]:
    code = (
        "import json, sys\nfrom importlib.metadata import version\n"
        "print(json.dumps({'python': sys.version.split()[0]} | {n: version(n) for n in "
        "('nvidia-pytriton', 'torch', 'onnxruntime', 'numpy')}))"
    )
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    result: dict[str, str] = json.loads(done.stdout)
    return result


def markdown(result: dict[str, Any]) -> str:
    """The table, with the ratio of the throughputs."""
    lines = [
        "| Grad-CAM of the | clients | onnxruntime: requests/s | p50 ms | p99 ms "
        "| eager: requests/s | p50 ms | p99 ms | ratio |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    rows = {(row["layer"], row["clients"], row["handler"]): row for row in result["rows"]}
    for layer in LAYERS:
        for clients in CLIENTS:
            ours, theirs = (rows[layer, clients, kind] for kind in ("onnxruntime", "eager"))
            cells = [f"{r['requests_per_second']:.1f} | {r['p50_ms']:.1f} | {r['p99_ms']:.1f}" for r in (ours, theirs)]
            ratio = ours["requests_per_second"] / theirs["requests_per_second"]
            lines.append(f"| {layer} | {clients} | {' | '.join(cells)} | {ratio:.2f}x |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prepare", action="store_true", help="export the models and stop")
    parser.add_argument("--models", type=Path, default=ROOT / "out" / "serving", help="where they are")
    parser.add_argument("--requests", type=int, default=80, help="of one round; at most 1000")
    parser.add_argument("--rounds", type=int, default=3, help="at most 20")
    parser.add_argument("--threads", type=int, default=2, help="of each model")
    arguments = parser.parse_args()
    if arguments.prepare:
        prepare(arguments.models)
        return
    requests, rounds = min(arguments.requests, 1000), min(arguments.rounds, 20)
    python = server_python("triton")
    with tempfile.TemporaryDirectory() as temporary:
        repository = Path(temporary) / "repository"
        make_repository(arguments.models, repository, arguments.threads)
        before = os.getloadavg()
        with running("triton", repository, python=python, log=Path(temporary) / "log") as (address, _):
            rows = measure(address, requests, rounds)
    result = {
        "environment": environment(),
        "server": server_versions(python),
        "threads": arguments.threads,
        "load_average_before": before,
        "rows": rows,
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    text = README.read_text()
    start, end = text.index(MARKS[0]) + len(MARKS[0]), text.index(MARKS[1])
    README.write_text(text[:start] + markdown(result) + text[end:])
    sys.stdout.write(markdown(result))


if __name__ == "__main__":
    main()
