"""An HTTP proxy that can drop the answer to a request that the server has carried out."""

import http.client
import http.server
import os
import socket
import struct
import threading
from dataclasses import dataclass
from urllib.parse import urlsplit

# Longer than any answer takes, even from a publisher with a broken store.
TIMEOUT_SECONDS = 60


@dataclass(frozen=True)
class Exchange:
    """A request that reached the server, and the server's answer, even if the client got another one."""

    operation: str
    request: bytes
    status: int
    answer: bytes


def bad_gateway(handler):
    """Answers like a gateway that timed out waiting for the server."""
    page = b"<html><body>502 Bad Gateway</body></html>"
    handler.send_response(502)
    handler.send_header("content-type", "text/html")
    handler.send_header("content-length", str(len(page)))
    handler.end_headers()
    handler.wfile.write(page)


def reset(handler):
    """Resets the connection."""
    handler.close_connection = True
    # With a linger time of zero seconds, closing the socket sends RST instead of FIN.
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    os.close(handler.connection.detach())


def hang_up(handler):
    """Closes the connection cleanly without an answer, like a server that shuts down."""
    handler.close_connection = True


class LossyProxy:
    """Forwards all requests, and drops the answers that a test chooses. A context manager."""

    def __init__(self, server_url):
        self.exchanges = []
        self._losses = []
        proxy, server = self, urlsplit(server_url)

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = self.rfile.read(int(self.headers["content-length"]))
                connection = http.client.HTTPConnection(server.hostname, server.port, timeout=TIMEOUT_SECONDS)
                try:
                    connection.request("POST", self.path, body, dict(self.headers))
                    answer = connection.getresponse()
                    text = answer.read()
                finally:
                    connection.close()
                operation = self.path.removeprefix("/v2/")
                proxy.exchanges.append(Exchange(operation, body, answer.status, text))
                if proxy._losses:
                    proxy._losses.pop(0)(self)
                    return
                self.send_response(answer.status)
                self.send_header("content-type", answer.headers["content-type"])
                self.send_header("content-length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *_):
                """Logs nothing."""

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def lose_next(self, how):
        """Drops the next answer, by `bad_gateway`, `reset` or `hang_up`."""
        self._losses.append(how)

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()
