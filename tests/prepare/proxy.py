"""A proxy on loopback before an S3 server that spoils some of the answers, as networks do."""

import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType

# An error of the server's, a connection cut before an answer, or midway through one. Clients try
# again after these; after "400" they give up at once.
FAULTS = ("500", "reset", "short")
ERROR = b"HTTP/1.1 %s Error\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
BLOCK = 1 << 16


class Proxy:
    """Hands requests on to (host, port) of `upstream`; a context manager, its `url` is the answer.

    `choose` is called with the method and path of each request and says which fault befalls it, if
    any. `requests` lists those that came, with their faults.
    """

    def __init__(self, upstream: tuple[str, int]) -> None:
        self.requests: list[tuple[str, str, str]] = []
        self.choose: Callable[[str, str], str] = lambda method, path: ""
        self._upstream = upstream
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self) -> "Proxy":
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):  # the listener was closed
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        """One request and its answer; then the connection is closed, for simplicity's sake."""
        with client, suppress(OSError):  # either side may go away at any moment
            head = b""
            while b"\r\n\r\n" not in head:
                block = client.recv(BLOCK)
                if not block:
                    return
                head += block
            method, path, _ = head.split(b"\r\n", 1)[0].decode().split(" ")
            with self._lock:
                fault = self.choose(method, path)
                self.requests.append((method, path, fault))
            if fault == "reset":
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            elif fault in ("400", "500"):
                client.sendall(ERROR % fault.encode())
            else:
                self._relay(client, head, fault == "short")

    def _relay(self, client: socket.socket, head: bytes, short: bool) -> None:
        line, rest = head.split(b"\r\n", 1)
        with socket.create_connection(self._upstream) as server:
            server.sendall(line + b"\r\nConnection: close\r\n" + rest)
            threading.Thread(target=_pump, args=(client, server), daemon=True).start()
            if not short:
                _pump(server, client)
                return
            answer = b"".join(iter(lambda: server.recv(BLOCK), b""))
        begin = answer.index(b"\r\n\r\n") + 4
        client.sendall(answer[: begin + (len(answer) - begin) // 2])
        client.shutdown(socket.SHUT_RDWR)  # to close it would not do: the pump still reads from it


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with suppress(OSError):
        while block := source.recv(BLOCK):
            sink.sendall(block)
