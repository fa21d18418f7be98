"""The torch.compile backends ``convgrad`` and ``convgrad_ort``, found by torch through their entry points.

``convgrad`` is Inductor with convolution gradients rewritten where a lowering is faster than PyTorch's kernel.
``convgrad_ort`` runs the forward and the backward graph of AOTAutograd on onnxruntime.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ..errors import ArgumentTypeError
from ..selection.policy import AUTO, check_name

Compiled = Callable[..., Any]


def convgrad(
    graph_module: torch.fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Compiled:
    """``torch.compile(model, backend="convgrad")``: rewrite convolution gradients, then Inductor.

    Args:
        mode: as with Inductor.
        options: ``{"lowering": ...}`` as in `RewriteConvolutionBackwardPass`: by default a gradient is rewritten only
            where a lowering was measured to be faster; ``"portable"`` rewrites all. Other keys are Inductor's.

    Raises:
        ArgumentTypeError: an unknown mode or option, or one of the wrong type. UnsupportedLoweringError: no lowering of
            that name.
    """
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx

    from .fx_pass import RewriteConvolutionBackwardPass, in_order

    lowering, settings = _lowering_and_others(options)
    rewrite = RewriteConvolutionBackwardPass(lowering)
    try:  # Inductor's own reading: a name may be written with dashes, and types are checked
        patches = dict(torch._TorchCompileInductorWrapper(mode, settings, None).config)
    except RuntimeError as error:
        reason = str(error).split(", known options are")[0]
        raise ArgumentTypeError(
            f"mode is {mode!r}, options has {settings!r:.200}, expected 'lowering' and what Inductor takes "
            f"(torch._inductor.list_mode_options, list_options): {reason}"
        ) from error
    name = "post_grad_custom_pre_pass"
    others = patches.get(name, getattr(config, name))
    passes = [] if others is None else list(others) if isinstance(others, (list, tuple)) else [others]
    patches[name] = in_order([*passes, rewrite])
    compiled: Any = compile_fx(graph_module, list(example_inputs), config_patches=patches)
    return compiled


def convgrad_ort(
    graph_module: torch.fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Compiled:
    """``torch.compile(model, backend="convgrad_ort")``: forward and backward graphs on onnxruntime.

    Parameters and inputs are read in place; results are written into torch's memory. Sizes that torch.compile treats as
    dynamic are dynamic in the sessions too. What has no ONNX translation runs in eager PyTorch, and is named once in a
    RuntimeWarning. Random operators stay with PyTorch's generator.

    Args:
        mode: accepted for torch.compile's sake; only None and "default" have a meaning.
        options: ``{"lowering": name}`` for one catalogue lowering in every convolution gradient.

    Raises:
        ArgumentTypeError: an unknown mode or option. UnsupportedLoweringError: no lowering of that name.
    """
    from torch._dynamo.backends.common import aot_autograd
    from torch._dynamo.convert_frame import compile_lock
    from torch._functorch.partitioners import default_partition

    from .decompositions import onnx_decompositions
    from .ort_graph import OrtGraph
    from .output_views import returned_by_forward

    if mode not in (None, "default"):
        raise ArgumentTypeError(f"mode is {mode!r}, expected None: convgrad_ort has no modes")
    lowering, settings = _lowering_and_others(options)
    check_name(lowering)
    if settings:
        raise ArgumentTypeError(f"options holds {sorted(settings)}, expected 'lowering' only")

    def compiler(graph: torch.fx.GraphModule, _inputs: Sequence[Any], returned: int | None = None) -> Compiled:
        with compile_lock:  # each thread compiles the backward graph that it finds not compiled: Inductor does the same
            partition = OrtGraph(graph, lowering, returned=returned)

        def run(arguments: list[Any]) -> list[Any]:
            return partition.run(arguments)

        run._boxed_call = True  # type: ignore[attr-defined]  # AOTAutograd's sign for "takes one list"
        return run

    decompositions = onnx_decompositions()
    for target in (torch.ops.aten.lift.default, torch.ops.aten.lift_fresh.default):
        decompositions.pop(target, None)  # they make a fake tensor of a constant: an alias of a real one is refused
    backend = aot_autograd(
        fw_compiler=lambda graph, inputs: compiler(graph, inputs, returned_by_forward()),
        bw_compiler=lambda graph, inputs: compiler(graph, inputs, 0),
        inference_compiler=compiler,
        decompositions=decompositions,
        partition_fn=default_partition,
    )
    return backend(graph_module, example_inputs)


def _lowering_and_others(options: Mapping[str, Any] | None) -> tuple[Any, dict[str, Any]]:
    """The value of "lowering", and the settings beside it.

    Raises:
        ArgumentTypeError: not a mapping from names.
    """
    if options is not None and not (isinstance(options, Mapping) and all(isinstance(key, str) for key in options)):
        raise ArgumentTypeError(f"options is {options!r:.80}, expected a dict such as {{'lowering': 'portable'}}")
    settings = dict(options or {})
    return settings.pop("lowering", AUTO), settings
