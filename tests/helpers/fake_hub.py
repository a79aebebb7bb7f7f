"""As much of huggingface.co as reading one public data set takes, on a port of this machine."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

REVISION = "a1" * 20
FILES = {
    "README.md": b"# A set\n",
    "data/train.jsonl": b'{"question": "q1"}\n{"question": "q2"}\n',
    "data/test.jsonl": b'{"question": "secret"}\n',
}
ENTRIES = ("data", *FILES)
API = "/api/datasets/org/name"
CONTENT = "/datasets/org/name/resolve/"
DESCRIPTION = {
    "id": "org/name",
    "sha": REVISION,
    "private": False,
    "gated": False,
    "disabled": False,
    "tags": [],
    "siblings": [{"rfilename": name} for name in FILES],
}


@contextmanager
def fake_hub() -> Iterator[str]:
    """Serve the data set "org/name"; gives the endpoint's URL."""
    with ThreadingHTTPServer(("127.0.0.1", 0), FakeHub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


class FakeHub(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == API or path.startswith(f"{API}/revision/"):
            self.answer(200, DESCRIPTION)
        elif path.startswith(f"{API}/tree/"):
            folder = path.removeprefix(f"{API}/tree/").partition("/")[2]
            inside = [name for name in ENTRIES if name.rpartition("/")[0] == folder]
            self.answer(200, [entry(name) for name in inside])
        elif path.startswith(CONTENT):
            name = path.removeprefix(CONTENT).partition("/")[2]
            if name in FILES:
                self.answer(200, FILES[name])
            else:
                self.answer(404, {}, "EntryNotFound")
        else:
            self.answer(404, {}, "RepoNotFound")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        known = [name for name in json.loads(body)["paths"] if name in ENTRIES]
        self.answer(200, [entry(name) for name in known])

    def answer(self, status: int, content: Any, error: str = "") -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        asked = self.headers.get("Range")
        start, _, end = (asked or "bytes=0-").partition("=")[2].partition("-")
        part = body[int(start) : int(end) + 1 if end else None]
        headers = {
            "Content-Length": len(part),
            "X-Repo-Commit": REVISION,
            "ETag": '"1"',
            "X-Error-Code": error,
            "Content-Range": f"bytes {start}-{int(start) + len(part) - 1}/{len(body)}",
        }
        self.send_response(206 if asked and status == 200 else status)
        for key, value in headers.items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(part)

    def log_message(self, *_: Any) -> None:
        pass


def entry(name: str) -> dict[str, Any]:
    kind = "file" if name in FILES else "directory"
    return {"type": kind, "oid": "0" * 40, "size": len(FILES.get(name, b"")), "path": name}
