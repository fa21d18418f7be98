"""Which measurements a benchmark makes, and in which order."""

from __future__ import annotations

import pytest

from convgrad_export.bench.layer import multiplications
from convgrad_export.bench.networks import NETWORKS
from convgrad_export.bench.plan import items
from convgrad_export.errors import BenchmarkError


def test_a_geometry_that_networks_share_is_measured_once() -> None:
    found = items(["resnet18", "resnet50", "resnext50"], ["conv1"], operations=["weight"])
    stem = next(item for item in found if item.uses[0][1] == "conv1")
    assert stem.uses == [("resnet18", "conv1", 1), ("resnet50", "conv1", 1), ("resnext50", "conv1", 1)]
    assert len({item.key for item in found}) == len(found)


def test_all_networks_take_turns_and_gradients_come_first() -> None:
    found = items(["resnet18", "tcn"], batches=(1,), operations=("forward", "weight", "input"))
    assert [(item.uses[0][0], item.operation) for item in found[:4]] == [
        ("resnet18", "weight"),
        ("resnet18", "input"),
        ("tcn", "weight"),
        ("tcn", "input"),
    ]
    forward = [item.operation == "forward" for item in found]
    assert forward == sorted(forward)
    assert sum(forward) == 19


def test_the_beginning_of_a_run_is_spread_over_the_depth_of_a_network() -> None:
    found = items(["hifi_gan"], operations=("input",))
    table = [layer.name for layer in NETWORKS["hifi_gan"]()]
    places = [table.index(item.uses[0][1]) for item in found]
    assert sorted(places) == list(range(42))
    assert places[:4] == [0, 32, 16, 8]


def test_batches_and_threads_follow_each_other_as_given() -> None:
    found = items(["tcn"], batches=(8, 1), threads=(2, 1), operations=("input",))
    order = list(dict.fromkeys((item.geometry.batch, item.threads) for item in found))
    assert order == [(8, 2), (8, 1), (1, 2), (1, 1)]


def test_the_whole_is_299_geometries() -> None:
    assert len(items(operations=("input",))) == 299


def test_large_layers_can_be_left_out() -> None:
    small = items(["unet"], operations=("input",), batches=(1,), max_gmac=5.0)
    assert 0 < len(small) < 23
    assert all(multiplications(item.geometry) <= 5e9 for item in small)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"networks": ["resnet19"]}, "networks holds .'resnet19'., expected names from resnet18"),
        ({"parts": ["no such layer"]}, "layers holds 'no such layer', which is in no layer's name"),
        ({"operations": ["bias"]}, "operations is .'bias',., expected some of forward, input, weight"),
        ({"operations": []}, "operations is .., expected some of"),
        ({"batches": (8, 0)}, "batch is .8, 0., expected integers of at least 1"),
        ({"threads": ()}, "threads is .., expected integers of at least 1"),
        ({"threads": (2**31,)}, "threads is .2147483648,., expected integers of at least 1 that fit into 32 bits"),
        ({"max_gmac": 1e-9}, "max_gmac is 1e-09, and all of the layers chosen have more"),
    ],
)
def test_bad_requests_name_the_argument(arguments: dict, message: str) -> None:
    with pytest.raises(BenchmarkError, match=message):
        items(**arguments)
