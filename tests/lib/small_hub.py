"""A hub of models on this machine's loopback, whose branches may move; as huggingface_hub asks one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import urlsplit

import huggingface_hub.constants
import pytest


class SmallHub:
    """Directories by name: each content is a commit, `main` is the one that was put there last."""

    def __init__(self) -> None:
        self._commits: dict[tuple[str, str], tuple[str, dict[str, bytes]]] = {}
        self.asked: list[str] = []
        """paths of requests"""

    def put(self, name: str, directory: Path) -> str:
        """Makes a directory's files the newest commit of a name, and returns its number."""
        files = {str(file.relative_to(directory)): file.read_bytes() for file in sorted(directory.rglob("*")) if file.is_file()}
        commit = hashlib.sha256(b"".join(path.encode() + content for path, content in files.items())).hexdigest()[:40]
        self._commits[name, commit] = self._commits[name, "main"] = commit, files
        return commit

    def files(self, name: str, revision: str) -> tuple[str, dict[str, bytes]]:
        """Number and files of a revision. Raises KeyError."""
        return self._commits[name, revision]


def _handler(hub: SmallHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = urlsplit(self.path).path
            hub.asked.append(path)
            parts = path.strip("/").split("/")
            try:
                if parts[:2] == ["api", "models"]:
                    self._about("/".join(parts[2:4]), *parts[4:])
                else:
                    commit, files = hub.files("/".join(parts[:2]), parts[3])
                    content = files["/".join(parts[4:])]
                    self._answer(200, content, {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha256(content).hexdigest()}"'})
            except (KeyError, IndexError):
                self._answer(404, b"", {"X-Error-Code": "EntryNotFound"})

        def _about(self, name: str, what: str = "revision", revision: str = "main", under: str = "") -> None:
            commit, files = hub.files(name, revision)
            if what == "revision":
                told: object = {"id": name, "sha": commit, "private": False, "siblings": [{"rfilename": each} for each in files]}
            elif under:
                raise KeyError(under)
            else:
                told = [{"type": "file", "path": path, "size": len(content), "oid": "0"} for path, content in files.items()]
            self._answer(200, json.dumps(told).encode(), {"Content-Type": "application/json"})

        def _answer(self, status: int, content: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for header, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(header, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

    return Handler


@contextmanager
def small_hub(cache: Path) -> Iterator[SmallHub]:
    """A hub that this process asks in the place of the public one.

    Args:
        cache: a directory for what is downloaded.
    """
    hub = SmallHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    Thread(target=server.serve_forever, daemon=True).start()
    here = f"http://127.0.0.1:{server.server_port}"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "ENDPOINT": here,
            "HUGGINGFACE_CO_URL_TEMPLATE": here + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_CACHE": str(cache),
        }.items():
            patch.setattr(huggingface_hub.constants, name, value)
        try:
            yield hub
        finally:
            server.shutdown()
            server.server_close()
