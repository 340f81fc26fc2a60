# SPDX-License-Identifier: Apache-2.0
"""
A TCP proxy that misbehaves on demand, between fasten and a Postgres server.

It knows one thing of the protocol: what a COMMIT looks like, so that the answer to it
can be lost.
"""

from __future__ import annotations

import socket
import struct
import threading
import time
from contextlib import suppress
from typing import Final, Literal, Self
from urllib.parse import urlsplit

__all__ = ["Mode", "Proxy"]

Mode = Literal["pass", "stall", "refuse", "drip", "lose commit", "lose reply"]
"""
`stall` holds every byte back, `refuse` cuts what is open and listens no more, `drip`
lets a few bytes through at a time; `lose commit` cuts a connection instead of
forwarding its next COMMIT, `lose reply` forwards that and cuts before the answer.
"""

COMMIT: Final = b"Q\0\0\0\x0bCOMMIT\0"
DRIP_BYTES: Final = 48
DRIP_S: Final = 0.002
_AT_ONCE: Final = struct.pack("ii", 1, 0)  # SO_LINGER: close() sends a reset


class Proxy:
    """
    Stand at a port of its own for the server of a DSN; *mode* may change any time.

    *lost* counts the COMMITs that were lost in either way.
    """

    def __init__(self, dsn: str) -> None:
        parts = urlsplit(dsn)
        self._server = (parts.hostname or "127.0.0.1", parts.port or 5432)
        self._parts = parts
        self._changed = threading.Condition()
        self._mode: Mode = "pass"
        self._links: set[_Link] = set()
        self._listener: socket.socket | None = None
        self.port = 0
        self.lost = 0

    @property
    def dsn(self) -> str:
        """
        Return the DSN of the server by way of this proxy.
        """
        user = f"{self._parts.netloc.rpartition('@')[0]}@"
        netloc = f"{user.removeprefix('@')}127.0.0.1:{self.port}"
        return self._parts._replace(netloc=netloc).geturl()

    @property
    def mode(self) -> Mode:
        """
        Return how connections are treated now.
        """
        return self._mode

    @mode.setter
    def mode(self, mode: Mode) -> None:
        with self._changed:
            before, self._mode = self._mode, mode
            self._changed.notify_all()
        if mode == "refuse":
            self._close_listener()
            self.cut()
        elif before == "refuse":
            self._listen()

    def cut(self) -> None:
        """
        Reset every connection, now.
        """
        for link in tuple(self._links):
            link.cut()

    def lead_to(self, dsn: str) -> None:
        """
        Lead to another server from now on.
        """
        parts = urlsplit(dsn)
        self._server = (parts.hostname or "127.0.0.1", parts.port or 5432)
        self.cut()

    def lose(self, what: Literal["commit", "reply"], timeout: float = 30.0) -> bool:
        """
        Lose one COMMIT or the reply to it, then go on as before; false if none came.
        """
        with self._changed:
            self._mode = "lose commit" if what == "commit" else "lose reply"
            return self._changed.wait_for(lambda: self._mode == "pass", timeout)

    # -- life ------------------------------------------------------------------------

    def __enter__(self) -> Self:
        self._listen()
        return self

    def __exit__(self, *_: object) -> None:
        self.mode = "refuse"

    def _listen(self) -> None:
        listener = socket.create_server(("127.0.0.1", self.port), backlog=128)
        self.port = listener.getsockname()[1]
        self._listener = listener
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def _close_listener(self) -> None:
        listener, self._listener = self._listener, None
        if listener is not None:
            with suppress(OSError):  # wakes the thread in accept()
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):  # closed
            while True:
                client, _ = listener.accept()
                try:
                    server = socket.create_connection(self._server, 5)
                except OSError:
                    _reset(client)
                    continue
                server.settimeout(None)
                link = _Link(client, server)
                self._links.add(link)
                for is_reply in (False, True):
                    pump = threading.Thread(
                        target=self._pump, args=(link, is_reply), daemon=True
                    )
                    pump.start()

    # -- bytes -----------------------------------------------------------------------

    def _pump(self, link: _Link, is_reply: bool) -> None:
        source, target = (
            (link.server, link.client) if is_reply else (link.client, link.server)
        )
        with suppress(OSError):
            while data := source.recv(65_536):
                if not self._is_let_through(link, data, is_reply):
                    break
                self._send(target, data)
        link.cut()
        self._links.discard(link)

    def _is_let_through(self, link: _Link, data: bytes, is_reply: bool) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._mode != "stall" or link.is_cut)
            if is_reply and link.is_doomed:
                return self._lose()
            if not is_reply and COMMIT in data:
                link.is_doomed = self._mode == "lose reply"
                if self._mode == "lose commit":
                    return self._lose()
        return not link.is_cut

    def _lose(self) -> bool:
        self.lost += 1
        self._mode = "pass"
        self._changed.notify_all()
        return False

    def _send(self, target: socket.socket, data: bytes) -> None:
        while data:
            piece = data[:DRIP_BYTES] if self._mode == "drip" else data
            target.sendall(piece)
            data = data[len(piece) :]
            if data:
                time.sleep(DRIP_S)


class _Link:
    """
    One client, and the connection to the server that was made for it.
    """

    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self.client, self.server = client, server
        self.is_doomed = self.is_cut = False
        for end in (client, server):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def cut(self) -> None:
        self.is_cut = True
        for end in (self.client, self.server):
            _reset(end)


def _reset(end: socket.socket) -> None:
    with suppress(OSError):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _AT_ONCE)
    with suppress(OSError):  # wakes the thread in recv()
        end.shutdown(socket.SHUT_RDWR)
    end.close()
