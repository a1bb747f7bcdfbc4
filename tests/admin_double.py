"""An admin port without a service behind it, for commands that ask one."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any


class AdminDouble:
    """An admin port that tells the state it is given; without one it is out of order."""

    def __init__(self) -> None:
        self.state: dict[str, Any] | None = None
        self.asked = threading.Semaphore(0)
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = b"out of order" if service.state is None else json.dumps(service.state).encode()
                self.send_response(500 if service.state is None else 200 if self.path == "/debug/state" else 404)
                self.end_headers()
                self.wfile.write(body)
                service.asked.release()

            def log_message(self, *_: object) -> None:
                """Keep quiet."""

        self._server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()

    def stop(self) -> None:
        """Close the port."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
