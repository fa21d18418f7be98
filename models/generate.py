"""Write the models of this folder and their manifest: `python models/generate.py [folder]`.

Everything here is generated; `tests/test_models.py` regenerates it and compares byte for byte.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import convgrad_export as cg
from convgrad_export.bench.networks import NETWORKS
from convgrad_export.operators import OPERATORS

NETWORK_NAMES = ("resnet50", "mobilenet_v2", "r3d_18", "tcn")
EVERYTHING = ("batch", "channels", "space", "kernel")


def models() -> dict[str, object]:
    """Relative path to ModelProto."""
    result = {
        f"functions/{name}.onnx": cg.build_model(name, dynamic=EVERYTHING, inline=False)
        for name, operator in OPERATORS.items()
        if operator.rank is not None
    }
    for network in NETWORK_NAMES:
        for layer in NETWORKS[network]():
            geometry = layer.geometry(1)
            for gradient in ("input", "weight"):
                result[f"{network}/{layer.name}.{gradient}.onnx"] = cg.build_model(
                    f"conv{geometry.rank}d_{gradient}", **geometry.to_dict()
                )
    return result


def generate(folder: Path) -> None:
    """Write every model and manifest.json under `folder`."""
    manifest = {}
    for path, model in models().items():
        data = model.SerializeToString(deterministic=True)
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
        metadata = {item.key.removeprefix("convgrad."): item.value for item in model.metadata_props}
        manifest[path] = {
            "sha256": hashlib.sha256(data).hexdigest(),
            "bytes": len(data),
            "opset": next(item.version for item in model.opset_import if item.domain == ""),
            "operator": metadata["op"],
            "lowering": metadata["lowering"],
            "dtype": metadata["dtype"],
            "geometry": json.loads(metadata["geometry"]),
        }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
