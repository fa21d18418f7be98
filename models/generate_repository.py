"""Write `models/repository`: the six functions and a Grad-CAM of digits, for inference servers.

    python models/generate_repository.py [folder]

`tests/test_model_repository.py` regenerates it and compares byte for byte. `digits_cnn.safetensors` holds the network's
trained weights (`convgrad train --epochs 20 --threads 1`; 98.9 % of the test digits are right): training is not
the same to the last bit on every processor, so its result is kept rather than repeated.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import onnx
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import convgrad_export as cg
from convgrad_export.operators import OPERATORS
from convgrad_export.recipes import GradCAM
from convgrad_export.serving.options import ServingOptions
from convgrad_export.serving.repository import add_model
from convgrad_export.training.digits import DigitsNetwork

HERE = Path(__file__).parent
EVERYTHING = ("batch", "channels", "space", "kernel")
LAYER = "conv2"


class ExplainedDigits(nn.Module):
    """x (N, 1, 8, 8) in [0, 1] to the scores (N, 10) and the best class's activation map (N, 8, 8)."""

    def __init__(self) -> None:
        super().__init__()
        network = DigitsNetwork()
        network.load_state_dict(load_file(HERE / "digits_cnn.safetensors"))
        self.cam = GradCAM(network.eval(), LAYER)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.cam.network(x), self.cam(x)


def generate(folder: Path) -> None:
    """Write the repository into `folder`, which must not hold one yet."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        for name, operator in OPERATORS.items():
            if operator.rank is None:
                continue
            path = Path(temporary) / f"{name}.onnx"
            onnx.save(cg.build_model(name, dynamic=EVERYTHING), path)  # inlined: any runtime reads it
            add_model(path, folder, ServingOptions(backend="python", threads=1))
        path = Path(temporary) / "digits_gradcam.onnx"
        cg.export(
            ExplainedDigits().eval(),
            (torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)),),
            path,
            output_names=["scores", "cam"],
            dynamic_shapes={"x": {0: "batch"}},
            verify=False,  # the test compares with eager
            progress=False,
        )
        labels = Path(temporary) / "labels.txt"
        labels.write_text("".join(f"{digit}\n" for digit in range(10)))
        options = ServingOptions(
            backend="python", max_batch_size=32, threads=1, labels=labels, label_output="scores", warmup="zero"
        )
        add_model(path, folder, options)


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "repository")
