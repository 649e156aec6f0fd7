"""A proxy before a server, that can lose a connection at the worst moment."""

from __future__ import annotations

import socket
import struct
import tempfile
import threading
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

COMMIT = b"COMMIT\0"  # both as the client asks for it, and as the server says that it is done


class Proxy:
    """Stands on a socket of its own before a server's.

    Parameters
    ----------
    server : Path
        The socket of the server.
    only_for : int, optional
        The only process that it lets through.

    Attributes
    ----------
    lost : int
        How many connections it has lost.
    away : bool
        Whether it turns everybody away.
    """

    def __init__(self, server: Path, only_for: int | None = None) -> None:
        self.lost = 0
        self.away = False
        self._only_for = only_for
        self._server = server
        self._lose: str | None = None
        # Short, since the path of a socket may have no more than about 100 characters.
        self._directory = tempfile.TemporaryDirectory(prefix="psnc-proxy-")
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(Path(self._directory.name, server.name)))
        self._listener.listen()
        self._sockets = [self._listener]

    @property
    def url(self) -> str:
        """URL of the server, by way of the proxy."""
        return f"postgresql://psnc@/postgres?host={self._directory.name}"

    def lose_next(self, what: str, *, be_away: bool = False) -> None:
        """Lose the connection over which the next transaction is committed.

        Parameters
        ----------
        what : {"request", "answer"}
            On the way there, so that nothing is committed, or on the way back.
        be_away : bool
            Turn everybody away from then on.
        """
        self._be_away = be_away
        self._lose = what

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for each in self._sockets:
            _hang_up(each)
        self._directory.cleanup()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                if self.away or self._only_for not in (None, _process_at(client)):
                    client.close()
                    continue
                server = socket.socket(socket.AF_UNIX)
                server.connect(str(self._server))
                self._sockets += [client, server]
                for way in (("request", client, server), ("answer", server, client)):
                    threading.Thread(target=self._pass_on, args=way, daemon=True).start()

    def _pass_on(self, what: str, giver: socket.socket, taker: socket.socket) -> None:
        with suppress(OSError):
            while data := giver.recv(1 << 20):
                if self._lose == what and COMMIT in data:
                    self._lose = None
                    self.away = self._be_away
                    self.lost += 1
                    break
                taker.sendall(data)
        _hang_up(giver)
        _hang_up(taker)


def _process_at(client: socket.socket) -> int:
    credentials = client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return int(struct.unpack("3i", credentials)[0])


def _hang_up(end: socket.socket) -> None:
    # A thread that waits for the socket would not notice that it is closed.
    with suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)
    end.close()
