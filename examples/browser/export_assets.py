"""Write what the page loads: the training step, the evaluation and Grad-CAM models, the digits, and Python's own run.

    python examples/browser/export_assets.py [--output examples/browser/public/assets]

Everything is seeded; the same versions give the same files. The page trains in the order that `order.bin` holds, so its
losses can be laid beside those of `reference_loss.bin`, which onnxruntime gave in Python on the same batches.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import Tensor, nn

import convgrad_export as cg
from convgrad_export.files import write_atomically
from convgrad_export.training.data import Dataset
from convgrad_export.training.digits import DigitsNetwork, load_digits

HERE = Path(__file__).parent
LAYERS = ("bn1", "bn2")  # Grad-CAM is taken at their outputs: 8x8 and 4x4


@dataclass(frozen=True)
class Run:
    """The training run that Python does and the page repeats."""

    batch_size: int = 32
    epochs: int = 20
    learning_rate: float = 0.05
    seed: int = 0


def network() -> DigitsNetwork:
    torch.manual_seed(0)
    return DigitsNetwork()


def optimizer(parameters: Iterable[Tensor], run: Run) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum.

    Not Adam: its bias corrections are computed in float64, which onnxruntime-web's WebGPU build has no kernels for
    (`convgrad check --target web` names the nodes); on the WebAssembly build either runs.
    """
    return torch.optim.SGD(parameters, lr=run.learning_rate, momentum=0.9, nesterov=True, weight_decay=1e-4)


def read_state(module: nn.Module) -> dict[str, Tensor]:
    """The tensors that an evaluation reads: all but BatchNorm's counters."""
    return {name: tensor for name, tensor in module.state_dict().items() if not name.endswith("num_batches_tracked")}


class Evaluation(nn.Module):
    """Scores of a network whose parameters are inputs, so that they can be those of any moment of a training.

    forward(x, state): x (N, 1, 8, 8), state by PyTorch's names; gives (N, 10).
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor, state: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(self.module, state, (x,))


class Explanation(nn.Module):
    """Scores, and where the evidence for a digit lies: Grad-CAM (arXiv:1610.02391, equations 1, 2) at several layers.

    forward(x, digit, state): digit (N, 10) weighs the scores that are differentiated, one-hot for one digit.
    Gives the scores (N, 10), then a map (N, h, w) for each layer.
    """

    def __init__(self, module: nn.Module, layers: tuple[str, ...] = LAYERS) -> None:
        super().__init__()
        self.module, self.layers = module, layers

    def forward(self, x: Tensor, digit: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, ...]:
        kept: list[Tensor] = []

        def keep(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
            kept.append(output if output.requires_grad else output.detach().requires_grad_())
            return kept[-1]

        handles = [self.module.get_submodule(name).register_forward_hook(keep) for name in self.layers]
        try:
            with torch.enable_grad():
                scores = torch.func.functional_call(self.module, state, (x,))
                gradients = torch.autograd.grad((scores * digit).sum(), kept)
        finally:
            for handle in handles:
                handle.remove()
        maps = [
            torch.relu((gradient.mean((2, 3), keepdim=True) * activation).sum(1))
            for gradient, activation in zip(gradients, kept, strict=True)
        ]
        return (scores.detach(), *(m.detach() for m in maps))


def batches(data: Dataset, run: Run) -> list[tuple[np.ndarray, np.ndarray]]:
    return [b for epoch in range(run.epochs) for b in data.batches(run.batch_size, epoch, run.seed)]


def order(data: Dataset, run: Run) -> np.ndarray:
    """Indices of the samples of every batch, uint16 (steps, batch_size)."""
    indices = np.arange(len(data.targets))
    numbered = Dataset(indices, indices, indices[:0], indices[:0])
    return np.stack([batch for batch, _ in batches(numbered, run)]).astype("<u2")


def reference_losses(step: Path, data: Dataset, run: Run) -> np.ndarray:
    """Python onnxruntime's loss at every step, float32."""
    session = cg.TrainingSession(step, threads=1, seed=run.seed, learning_rate=run.learning_rate)
    return np.array([session.step(*batch)["loss"] for batch in batches(data, run)], "<f4")


def export_models(folder: Path, data: Dataset, run: Run) -> None:
    """step.onnx with step.checkpoint.safetensors, evaluate.onnx and explain.onnx, each verified against PyTorch."""
    module = network()
    x, y = (torch.from_numpy(array) for array in batches(data, run)[0])
    cg.export_training_step(
        module.train(),
        "cross_entropy",
        optimizer(module.parameters(), run),
        (x, y),
        folder / "step.onnx",
        dynamic_shapes=({0: "batch"}, {0: "batch"}),
        overwrite=True,
    )
    module.eval()
    state = read_state(module)
    with torch.no_grad():  # statistics as after some training: at their start a batch normalisation does nothing
        for name, tensor in state.items():
            if name.endswith(("running_mean", "running_var")):
                tensor.uniform_(0.5, 1.5)
    free = dict.fromkeys(state)
    cg.export(
        Evaluation(module),
        (x, state),
        folder / "evaluate.onnx",
        dynamic_shapes={"x": {0: "batch"}, "state": free},
        input_names=["x", *state],
        output_names=["scores"],
        overwrite=True,
        progress=False,
    )
    cg.export(
        Explanation(module),
        (x, torch.eye(10)[y], state),
        folder / "explain.onnx",
        dynamic_shapes={"x": {0: "batch"}, "digit": {0: "batch"}, "state": free},
        input_names=["x", "digit", *state],
        output_names=["scores", *LAYERS],
        overwrite=True,
        progress=False,
    )


def nodes_without_webgpu(model: Path) -> list[str]:
    """Names of MaxPool nodes with an Indices output: onnxruntime-web's WebGPU takes them, and fails when they run."""
    nodes = onnx.load(model).graph.node
    return [node.name for node in nodes if node.op_type == "MaxPool" and len(node.output) > 1]


def write_assets(folder: Path, run: Run | None = None) -> dict[str, int]:
    """Write every file of the page's assets; the manifest comes last and names the others with their SHA-256.

    Returns:
        Bytes by file name.
    """
    run = run or Run()
    folder.mkdir(parents=True, exist_ok=True)
    data = load_digits()
    export_models(folder, data, run)
    images = np.concatenate([data.inputs, data.test_inputs])
    labels = np.concatenate([data.targets, data.test_targets])
    contents = {
        "images.bin": np.rint(images * 16).astype("u1").tobytes(),  # the pixels are 0 to 16; 16 is ink
        "labels.bin": labels.astype("u1").tobytes(),
        "order.bin": order(data, run).tobytes(),
        "reference_loss.bin": reference_losses(folder / "step.onnx", data, run).tobytes(),
    }
    for name, content in contents.items():
        write_atomically(folder / name, content, overwrite=True)
    files = ["step.onnx", "step.checkpoint.safetensors", "evaluate.onnx", "explain.onnx", *contents]
    manifest = {
        "files": {
            name: {
                "bytes": (folder / name).stat().st_size,
                "sha256": hashlib.sha256((folder / name).read_bytes()).hexdigest(),
            }
            for name in files
        },
        "image": [1, 8, 8],
        "classes": 10,
        "train": len(data.targets),
        "test": len(data.test_targets),
        "batchSize": run.batch_size,
        "stepsPerEpoch": len(data.targets) // run.batch_size,
        "learningRate": run.learning_rate,
        "seed": run.seed,
        "layers": list(LAYERS),
        "onCpu": nodes_without_webgpu(folder / "step.onnx"),
        "parameters": sum(p.numel() for p in network().parameters()),
    }
    write_atomically(folder / "manifest.json", (json.dumps(manifest, indent=1) + "\n").encode(), overwrite=True)
    return {name: (folder / name).stat().st_size for name in [*files, "manifest.json"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=HERE / "public" / "assets", help="folder for the files")
    for name, size in write_assets(parser.parse_args().output).items():
        print(f"{size:9,} bytes  {name}")


if __name__ == "__main__":
    main()
