"""A wire to an HTTP server that can lose the answer to a request that was carried out."""

import http.client
import http.server
import os
import socket
import struct
import threading
from dataclasses import dataclass
from urllib.parse import urlsplit

# Longer than any answer takes, also that of a publisher whose store is broken.
TIMEOUT_SECONDS = 60


@dataclass(frozen=True)
class Exchange:
    """A request that reached the server, and what the server answered, whatever the client got."""

    operation: str
    request: bytes
    status: int
    answer: bytes


def bad_gateway(handler):
    """What a gateway says that gave up waiting for the answer."""
    page = b"<html><body>502 Bad Gateway</body></html>"
    handler.send_response(502)
    handler.send_header("content-type", "text/html")
    handler.send_header("content-length", str(len(page)))
    handler.end_headers()
    handler.wfile.write(page)


def reset(handler):
    """The connection breaks: the client's system is told so."""
    handler.close_connection = True
    # Closed with a linger of zero seconds, a socket sends RST instead of FIN.
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    os.close(handler.connection.detach())


def hang_up(handler):
    """The server ends the connection in good order, without an answer, as one that shuts down does."""
    handler.close_connection = True


class LossyProxy:
    """Passes everything on, and loses the answers that it is told to. A context manager."""

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
                """Says nothing: the tests do."""

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def lose_next(self, how):
        """Loses the next answer: `bad_gateway`, `reset` or `hang_up`."""
        self._losses.append(how)

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()
