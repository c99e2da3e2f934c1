"""Servers that answer as vLLM's do, or as something else does, without any model."""

from __future__ import annotations

import contextlib
import json
import socketserver
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tulu_mega.weight_transfer import counterpart
from tulu_mega.weight_transfer.counterpart import ABOUT, Model

CONFIG = {"architectures": ["LlamaForCausalLM"], "vocab_size": 424, "hidden_size": 64, "num_hidden_layers": 2}
MODEL = Model("DIR", "float32", counterpart.shape(CONFIG))


def about(model: Model = MODEL, process: str = "p", **changed: Any) -> dict[str, Any]:
    """What a server says of itself."""
    return {"incarnation": 1, "longest": 512, "vocabulary": 424, "process": process, **counterpart.told(model), **changed}


@contextlib.contextmanager
def answering(answers: Mapping[str, tuple[int, Any]], key: str = "k", host: str = "127.0.0.1") -> Iterator[str]:
    """A server's URL.

    Args:
        answers: by path, status and JSON; 404 for others.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, content = answers.get(self.path, (404, {"detail": "Not Found"}))
            if self.headers.get("Authorization") != f"Bearer {key}":
                status, content = 401, {}
            told = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(told)))
            self.end_headers()
            self.wfile.write(told)

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.do_GET()

        def log_message(self, *_: Any) -> None:
            pass

    with _listening(ThreadingHTTPServer((host, 0), Handler)) as port:
        yield f"http://{host}:{port}"


def ready(**changed: Any) -> dict[str, tuple[int, Any]]:
    """Answers of a server that can be used."""
    return {ABOUT: (200, about(**changed)), "/health": (200, {})}


@contextlib.contextmanager
def speaking(words: bytes) -> Iterator[str]:
    """The URL of something that says a word and listens to nothing."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.sendall(words)
            self.request.recv(1000)

    with _listening(socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)) as port:
        yield f"http://127.0.0.1:{port}"


@contextlib.contextmanager
def _listening(server: socketserver.BaseServer) -> Iterator[int]:
    server.daemon_threads = True
    with server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
