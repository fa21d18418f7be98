"""DistributedDataParallel over two gloo processes gives the gradients of one process on the joined batch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812

from tests.integrations.ddp_worker import STEPS, joined_batch, network

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch was built without gloo")
@pytest.mark.parametrize("backend", ["convgrad", "convgrad_ort"])
def test_two_processes_give_the_joined_batchs_gradients(backend, tmp_path):
    saved = tmp_path / "gradients.pt"
    threads = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}  # each rank is one of two on two cores
    environment = {**os.environ, **threads, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launcher, str(ROOT / "tests" / "integrations" / "ddp_worker.py"), backend, str(saved)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    ours = torch.load(saved, weights_only=True)
    reference = network().double()
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.5)
    for step in range(STEPS):
        x, target = joined_batch(step)
        optimizer.zero_grad()
        F.cross_entropy(reference(x.double()), target).backward()
        optimizer.step()
    for gradient, parameter in zip(ours, reference.parameters(), strict=True):
        expected = parameter.grad
        error = (gradient.double() - expected).abs().max()
        # float32: at most some 1,200 products in one sum, and a second step that starts from rounded parameters.
        assert error <= 2e-5 * expected.abs().max(), error
