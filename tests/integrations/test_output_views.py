"""Outputs that are views of one another, from the backend convgrad_ort."""

from __future__ import annotations

import pytest
import torch

from convgrad_export.integrations import ort_partition
from convgrad_export.integrations.compile_backend import convgrad_ort


def views(x):
    y = x * 2
    return y[0], y, y.t(), torch.split(y, [1, 2]), y.transpose(0, 1) + 1, y.expand(2, 3, 4), y[1] * 3, y.unfold(1, 2, 1)


def views_without_the_whole(x):
    y = x.exp()
    return y[0], y.reshape(2, -1)[1], y.max(0)


def test_outputs_that_share_memory_see_changes_of_one_another():
    """They did not: each was a result of onnxruntime's own."""
    for function in (views, views_without_the_whole):
        compiled = torch.compile(function, backend=convgrad_ort)
        x = torch.randn(3, 4)[: 3 if function is views else 2]
        results = []
        for run in (compiled, function):
            outputs = torch.utils._pytree.tree_leaves(run(x))
            before = [output.clone() for output in outputs]
            outputs[0].add_(1)
            outputs[1].mul_(2)
            results.append((before, outputs))
        torch.testing.assert_close(*results)


def test_outputs_without_a_gradient_share_memory_in_a_training_graph():
    def function(x):
        y = x.detach() * 2
        return x.exp(), y, y[0]

    _, whole, row = torch.compile(function, backend=convgrad_ort)(torch.randn(3, 4, requires_grad=True))
    whole.zero_()
    assert row.tolist() == [0.0] * 4


@pytest.mark.parametrize("dynamic", [False, True])
def test_views_of_outputs_take_no_part_of_the_graph_from_onnxruntime(dynamic, recwarn, monkeypatch):
    monkeypatch.setattr(ort_partition, "_named", set())

    def function(x):
        y = x * 2
        return y, y[0], y[0] + 1, torch.chunk(y, 2, 1)

    for n in (4, 6):
        x = torch.randn(3, n)
        torch.testing.assert_close(torch.compile(function, backend=convgrad_ort, dynamic=dynamic)(x), function(x))
    assert not [str(warning.message) for warning in recwarn if "convgrad_ort" in str(warning.message)]
