"""A page on this machine: drop an image, see its classes and, of SKNets, which kernels the network chose.

Python's own HTTP server, on 127.0.0.1 only. It knows two addresses, the page and `/predict`, and no files: an upload is
bounded, read as a photo by the same code as everywhere, and forgotten.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from mindspore import Tensor, nn

from .data.images import read_image
from .errors import RunError, UserError, printable
from .prediction import Predictor

HOST = "127.0.0.1"
MOST_BYTES = 32 << 20  # of an upload
PATIENCE = 30  # seconds for a client to send what it has announced
PAGE = Path(__file__).with_name("demo.html")
IMAGE = "application/octet-stream"  # pages of other origins may not send it without being asked
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; img-src blob:; connect-src 'self'; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}

Answer = Callable[[bytes], dict[str, Any]]


class Refused(Exception):
    """A request that is not served: HTTP's status and a sentence."""


def answers(predictor: Predictor, topk: int = 5) -> Answer:
    """A function from the bytes of an image file to what the page shows of it.

    Returns, as JSON has it: `classes` (name, index, probability), the likeliest first, and of an SKNet `attention` (see
    `attention_shares`); or `error`.
    """

    def answer(content: bytes) -> dict[str, Any]:
        with tempfile.TemporaryDirectory(prefix="mindska") as folder:
            path = Path(folder) / "image"
            path.write_bytes(content)
            (prediction,) = predictor([str(path)], topk)
            found = prediction.as_dict()
            found.pop("path")
            if "error" in found:
                return {"error": printable(found["error"].replace(str(path), "the image"))}
            if hasattr(predictor.network, "attention_weights"):
                image = predictor.transform(read_image(str(path), exif_orientation=predictor.exif_orientation))
                found["attention"] = attention_shares(predictor.network, Tensor(image[None]))
            return {"model": predictor.model, **found}

    return answer


def attention_shares(network: nn.Cell, images: Tensor) -> list[dict[str, Any]]:
    """Of each unit of an SKNet the share of every path in its attention, the mean over channels and images.

    Returns:
        [{"unit": "stages.0.0", "paths": [{"kernel": "3x3", "share": 0.4}, ...]}, ...]; a dilated kernel is called by
        the size that it covers.
    """
    units = {f"stages.{i}.{j}": unit for i, stage in enumerate(network.stages) for j, unit in enumerate(stage)}
    shares = []
    for name, weights in network.attention_weights(images).items():
        kernels = [path.conv.dilation[0] * (path.conv.kernel_size[0] - 1) + 1 for path in units[name].sk.paths]
        means = weights.asnumpy().mean((0, 2))
        shares.append(
            {"unit": name, "paths": [{"kernel": f"{k}x{k}", "share": float(share)} for k, share in zip(kernels, means)]}
        )
    return shares


class DemoServer(ThreadingHTTPServer):
    """The page of a function `answer`, on 127.0.0.1. `port` 0: any that is free; `url` says which.

    Raises:
        RunError: the port is taken.
    """

    daemon_threads = True

    def __init__(self, answer: Answer, port: int = 0) -> None:
        try:
            super().__init__((HOST, port), _Handler)
        except (OSError, OverflowError) as error:
            raise RunError(
                f"Port {port} cannot be used: {getattr(error, 'strerror', None) or error}; choose another with --port"
            ) from None
        self.page = PAGE.read_bytes()
        self.answer = answer
        self.network = ThreadPoolExecutor(1)  # one image at a time, always in the same thread
        self.names = {f"{host}:{self.server_port}" for host in (HOST, "localhost")}
        self.url = f"http://{HOST}:{self.server_port}/"


class _Handler(BaseHTTPRequestHandler):
    server: DemoServer
    timeout = PATIENCE
    server_version, sys_version = "mindska", ""

    def do_GET(self) -> None:
        self._serve("/", lambda: ("text/html; charset=utf-8", self.server.page))

    def do_POST(self) -> None:
        self._serve("/predict", self._predict)

    def _serve(self, path: str, content: Callable[[], tuple[str, bytes]]) -> None:
        try:
            if self.headers.get("Host") not in self.server.names:  # a name that another site has for this machine
                raise Refused(403, "this page is for this machine only")
            if self.path != path:
                raise Refused(404, "there is no such page")
            self._send(200, *content())
        except Refused as error:
            status, reason = error.args
            self.close_connection = True  # what it may still send is not read
            self._send(status, *_json({"error": reason}))

    def _predict(self) -> tuple[str, bytes]:
        if self.headers.get("Content-Type") != IMAGE:
            raise Refused(415, f"expected the bytes of an image file, as {IMAGE}")
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit()):
            raise Refused(411, "expected the number of bytes")
        if len(length) > 12 or int(length) > MOST_BYTES:
            raise Refused(413, f"the file is larger than {MOST_BYTES >> 20} MiB")
        try:
            content = self.rfile.read(int(length))
        except OSError:
            content = b""
        if len(content) < int(length) or not content:
            raise Refused(400, "the file has not arrived whole")
        try:
            return _json(self.server.network.submit(self.server.answer, content).result())
        except UserError as error:
            return _json({"error": str(error)})

    def _send(self, status: int, kind: str, content: bytes) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), **HEADERS}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *words: Any) -> None:
        """Nothing is printed for a request."""


def _json(content: dict[str, Any]) -> tuple[str, bytes]:
    return "application/json", json.dumps(content, allow_nan=False).encode("ascii")


def open_demo(predictor: Predictor, port: int = 0, topk: int = 5) -> DemoServer:
    """The page of a predictor; `serve_forever()` runs it."""
    return DemoServer(answers(predictor, topk), port)
