"""Talking to a server with tritonclient, by REST and by gRPC, with one interface for the tests."""

from __future__ import annotations

import http.client
from collections.abc import Mapping
from typing import Any

import numpy as np
import tritonclient.grpc
import tritonclient.http
from tritonclient.utils import np_to_triton_dtype

from convgrad_export.serving.launch import Address


class Client:
    """`binary` is whether REST carries raw tensors; MLServer takes JSON only."""

    def __init__(self, protocol: str, address: Address, *, binary: bool = True) -> None:
        self.protocol, self.address, self.binary = protocol, address, binary
        self.library = tritonclient.http if protocol == "http" else tritonclient.grpc
        where = address.http if protocol == "http" else address.grpc
        self.client: Any = self.library.InferenceServerClient(where)

    def close(self) -> None:
        self.client.close()

    def infer(self, model: str, feeds: Mapping[str, np.ndarray], outputs: list[str] | None = None, **more: Any) -> Any:
        """The arrays by output name. `outputs` is needed where REST is to answer in JSON."""
        inputs = []
        for name, array in feeds.items():
            value = self.library.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
            if self.protocol == "http":
                value.set_data_from_numpy(array, binary_data=self.binary)
            else:
                value.set_data_from_numpy(array)
            inputs.append(value)
        wanted = None
        if outputs is not None and self.protocol == "http":
            wanted = [self.library.InferRequestedOutput(name, binary_data=self.binary) for name in outputs]
        elif outputs is not None:
            wanted = [self.library.InferRequestedOutput(name) for name in outputs]
        result = self.client.infer(model, inputs, outputs=wanted, **more)
        names = outputs
        if names is None:
            answer = result.get_response()
            listed = answer["outputs"] if self.protocol == "http" else answer.outputs
            names = [entry["name"] if self.protocol == "http" else entry.name for entry in listed]
        return {name: result.as_numpy(name) for name in names}


def post(address: Address, path: str, body: bytes, headers: Mapping[str, str] | None = None) -> tuple[int, bytes]:
    """One raw request: what no client library would send."""
    connection = http.client.HTTPConnection(address.host, address.http_port, timeout=30)
    try:
        connection.request("POST", path, body, dict(headers or {}))
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def post_cut_off(address: Address, path: str, body: bytes, announced: int) -> None:
    """Announce more bytes than are sent, and hang up."""
    connection = http.client.HTTPConnection(address.host, address.http_port, timeout=10)
    connection.putrequest("POST", path)
    connection.putheader("Content-Length", str(announced))
    connection.endheaders()
    connection.send(body)
    connection.close()
