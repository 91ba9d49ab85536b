"""A TCP forwarder that a test can shut: what passes it is cut at once, and nothing new gets through."""

from __future__ import annotations

import contextlib
import socket
import threading

from tests.system.targets import listener, port_of


class Gate:
    """Forwards connections to a port of 127.0.0.1; threads, so that it works whatever the test's loop does."""

    def __init__(self, to_port: int) -> None:
        self._to = to_port
        self._sock = listener()
        self.port = port_of(self._sock)
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._shut = False
        threading.Thread(target=self._accept, daemon=True).start()

    def shut(self) -> None:
        """Cut everything and let nothing through."""
        with self._lock:
            self._shut = True
            for sock in self._open:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)

    def open(self) -> None:
        """Let new connections through again."""
        with self._lock:
            self._shut = False

    def close(self) -> None:
        self.shut()
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._sock.accept()
            except OSError:
                return
            threading.Thread(target=self._join, args=(near,), daemon=True).start()

    def _join(self, near: socket.socket) -> None:
        far = socket.socket()
        try:
            if self._shut:
                return
            far.connect(("127.0.0.1", self._to))
            with self._lock:
                if self._shut:
                    return
                self._open |= {near, far}
            back = threading.Thread(target=self._pump, args=(far, near), daemon=True)
            back.start()
            self._pump(near, far)
            back.join()
        except OSError:
            pass
        finally:
            with self._lock:
                self._open -= {near, far}
            near.close()
            far.close()

    @staticmethod
    def _pump(source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                sink.sendall(data)
        except OSError:
            pass
        finally:
            for sock in (source, sink):
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
