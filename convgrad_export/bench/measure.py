"""One operation of one layer: every contender checked against float64, then timed in turns."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from ..errors import ConvGradError
from ..geometry import ConvGeometry
from ..reference import FORWARD, Expected, expected
from ..selection import runner
from ..timing import FOREIGN_CORES, Contender, alternate, timed
from . import contenders
from .contenders import CONV_GRAD, GEMM, ORT_FORWARD, SESSION, TORCH, Call
from .layer import multiplications
from .peer import OrtTraining

_TORCH_SPINS = 0.02  # seconds that its threads go on waiting for work; they would take a core from the next contender


def measure(
    operation: str,
    geometry: ConvGeometry,
    threads: int,
    *,
    rounds: int = 7,
    seconds: float = 2.0,
    peer: OrtTraining | None = None,
    foreign_cores: float = FOREIGN_CORES,
) -> dict[str, Any]:
    """Check and time all contenders for one operation.

    Args:
        operation: ``"forward"``, ``"input"`` or ``"weight"``. geometry: with its batch.
        threads: of onnxruntime, PyTorch and the peer. rounds, seconds, foreign_cores: as in
            `timing.alternate`.
        peer: onnxruntime-training, when it is to take part.

    Returns:
        JSON: ``times`` (milliseconds by contender), ``errors`` (worst error in units of the bound), ``wrong`` and
        ``failed`` (contenders that were not timed, and why), ``choices``, ``multiplications``, ``gemm_gflops``, and how
        disturbed the rounds were.
    """
    import torch

    started = time.perf_counter()
    torch.set_num_threads(threads)
    feeds = contenders.operands(geometry)
    if operation == FORWARD:
        del feeds["grad_output"]
    sample = expected(operation, geometry, feeds)
    record: dict[str, Any] = {
        "multiplications": multiplications(geometry),
        "choices": contenders.choices(operation, geometry, threads),
        "errors": {},
        "wrong": {},
        "failed": {},
    }
    checked = _checked(_calls(operation, geometry, feeds, threads, record), sample, record)
    runners: dict[str, Contender] = {name: timed(call.run) for name, call in checked.items()}
    if peer is not None and operation != FORWARD and not geometry.transposed:
        try:
            result = peer.prepare(operation, geometry, feeds, threads)
        except ConvGradError as error:
            record["failed"][CONV_GRAD] = str(error)
        else:
            if _right(CONV_GRAD, result, 1.0, sample, record):
                runners[CONV_GRAD] = peer.turn
    gemm = contenders.gemm_call(threads)
    gemm.run()
    runners[GEMM] = timed(gemm.run)
    gc.collect()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    processes = () if peer is None else (peer.process,)
    result_rounds = alternate(
        runners,
        rounds,
        seconds,
        always=(TORCH, GEMM),
        processes=processes,
        foreign_cores=foreign_cores,
        rest_after={TORCH: _TORCH_SPINS},
    )
    if CONV_GRAD in runners and peer is not None:
        peer.release()
    times = {name: timing.to_json() for name, timing in result_rounds.timings.items()}
    record["times"] = times
    record["gemm_gflops"] = round(2e-6 * contenders.GEMM_MULTIPLICATIONS / times[GEMM]["min_ms"], 1)
    record["rounds"] = {
        "kept": result_rounds.kept,
        "discarded": result_rounds.discarded,
        "disturbed": result_rounds.disturbed,
        "stolen_s": round(result_rounds.stolen, 3),
        "foreign_s": round(result_rounds.foreign, 3),
    }
    record["load"] = load
    record["seconds"] = round(time.perf_counter() - started, 2)
    return record


def _calls(
    operation: str, geometry: ConvGeometry, feeds: Mapping[str, np.ndarray], threads: int, record: dict[str, Any]
) -> dict[str, Callable[[], Call]]:
    """How to build each contender of this process, PyTorch first: the others are compared with it."""
    calls: dict[str, Callable[[], Call]] = {TORCH: lambda: contenders.torch_call(operation, geometry, feeds)}
    if operation == FORWARD:
        calls[ORT_FORWARD] = lambda: contenders.forward_call(geometry, feeds, threads)
        return calls
    content = contenders.session_model(operation, geometry, threads)
    if content is not None:
        calls[SESSION] = partial(contenders.onnx_call, content, feeds, threads)
    need, available = contenders.column_bytes(geometry), runner.available_bytes()
    for entry in contenders.applicable(operation, geometry):
        if available is not None and need > available / 2 and entry.name not in contenders.SPARING:
            record["failed"][entry.name] = f"left out: may need {need / 1e9:.1f} GB, {available / 1e9:.1f} GB are free"
            continue
        calls[entry.name] = partial(contenders.lowering_call, entry, geometry, feeds, threads)
    return calls


def _checked(calls: Mapping[str, Callable[[], Call]], sample: Expected, record: dict[str, Any]) -> dict[str, Call]:
    """The contenders whose results are right; the others go into the record."""
    good: dict[str, Call] = {}
    reference: np.ndarray | None = None
    for name, build in calls.items():
        try:
            call = build()
            result = call.result()
        except Exception as error:  # a kernel that refuses one layer must not end the benchmark
            record["failed"][name] = f"{type(error).__name__}: {str(error)[:300]}"
            continue
        if not _right(name, result, call.error_factor, sample, record):
            continue
        if reference is None:
            reference = result
        elif not sample.agrees(result, reference, call.error_factor):
            record["wrong"][name] = f"differs from {next(iter(good))} outside the sample that was checked in float64"
            continue
        good[name] = call
    return good


def _right(name: str, result: np.ndarray, error_factor: float, sample: Expected, record: dict[str, Any]) -> bool:
    report = sample.report(result, error_factor)
    record["errors"][name] = float(f"{report.worst:.3g}")
    if report.within:
        return True
    record["wrong"][name] = f"error {report.worst:.3g} times its bound, {report.largest:.3g} absolute"
    return False
