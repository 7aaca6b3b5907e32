"""A server on this machine that answers as the Hugging Face hub does: what tests of reading and of pushing share."""

from __future__ import annotations

from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class LocalHub(ThreadingHTTPServer):
    """Answers on a free port."""

    def __init__(self, answers: type[BaseHTTPRequestHandler]) -> None:
        super().__init__(("127.0.0.1", 0), answers)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class LocalAnswers(BaseHTTPRequestHandler):
    """Says nothing on the terminal."""

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, body: bytes, code: int = 200, **headers: str) -> None:
        """Answer with a body; an underscore in a header's name is a hyphen."""
        self.send_response(code)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
