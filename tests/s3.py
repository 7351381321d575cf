"""An S3 server on loopback (moto's), and a proxy before it that answers badly now and then."""

from __future__ import annotations

import http.client
import random
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler

from loopback import Loopback

FAULTS = ("500", "503", "dropped", "lost answer", "truncated", "slow", "altered")


class Proxy:
    """Hands requests on to the server at `port`, and of these a `share`, drawn by the seed, with the fault of `kinds`
    that was least often yet.

    ``altered`` answers have one wrong byte, and are of shards only: nothing else has a checksum apart from itself. Each
    file is altered twice at most: a reader that has met three wrong answers may give up.
    asked: how many requests there were; injected: how often each fault was.
    """

    def __init__(self, port: int, share: float = 0.0, kinds: tuple[str, ...] = FAULTS, seed: int = 0) -> None:
        self.upstream, self.share, self.kinds = port, share, kinds
        self.asked, self.injected, self._altered = 0, Counter[str](), Counter[str]()
        self._random, self._lock = random.Random(seed), threading.Lock()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_any(self) -> None:
                proxy.answer(self)

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = do_any

            def log_message(self, *_: object) -> None:
                pass

        self.server = Loopback(Handler)
        self.port = self.server.server_port

    def draw(self, request: BaseHTTPRequestHandler) -> str:
        shard = request.command == "GET" and ("/c/" in request.path or request.path.endswith((".tar", ".parquet")))
        with self._lock:
            self.asked += 1
            if self._random.random() >= self.share:
                return ""
            shard = shard and self._altered[request.path] < 2
            fault = min((k for k in self.kinds if shard or k != "altered"), key=self.injected.__getitem__)
            self.injected[fault] += 1
            self._altered[request.path] += fault == "altered"
        return fault

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        fault = self.draw(request)
        if fault == "dropped":
            request.close_connection = True
            return
        if fault in ("500", "503"):
            request.send_response(int(fault))
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        upstream = http.client.HTTPConnection("127.0.0.1", self.upstream, timeout=30)
        upstream.request(request.command, request.path, body, dict(request.headers))
        found = upstream.getresponse()
        data = found.read()
        upstream.close()
        if fault == "lost answer":
            request.close_connection = True
            return
        if fault == "altered" and data:
            data = data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 16]) + data[len(data) // 2 + 1 :]
        request.send_response(found.status)
        for name, value in found.getheaders():
            if name.lower() not in ("transfer-encoding", "connection", "date", "server"):
                request.send_header(name, value)
        if found.getheader("Content-Length") is None:
            request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        if fault == "truncated":
            data = data[: len(data) // 2]
            request.close_connection = True
        if fault == "slow":
            for start in range(0, len(data), max(1, len(data) // 5)):
                time.sleep(0.01)
                request.wfile.write(data[start : start + max(1, len(data) // 5)])
        else:
            request.wfile.write(data)


@contextmanager
def running() -> Iterator[int]:
    """The port of an S3 server with an empty bucket named ``bucket``."""
    import logging

    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # not a line for every request

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    for method, path in (("POST", "moto-api/reset"), ("PUT", "bucket")):  # servers of a process share what they hold
        urllib.request.urlopen(urllib.request.Request(f"http://127.0.0.1:{port}/{path}", method=method))
    yield port
    server.stop()
