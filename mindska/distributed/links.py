"""Links: sockets between rank 0 and every other rank, for the small things that ranks tell each other.

A link carries pickles, so both of its ends first prove by HMAC that they know a random key. Until then all messages
have fixed lengths: a stranger can make rank 0 neither wait for more nor hold more.

1. Rank 0 sends a nonce.
2. The other one sends its rank, a nonce of its own, and a proof that it knows the key.
3. Rank 0 sends its own proof.
"""

import contextlib
import errno
import hmac
import json
import secrets
import select
import selectors
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

from ..errors import WorldError

NONCE = 32
PROOF = 32
INTRODUCTION = struct.Struct(f"!I{NONCE}s{PROOF}s")
HANDSHAKE_TIMEOUT = 10  # seconds, for what takes a few milliseconds
MAX_HANDSHAKES = 128  # at a time; more are strangers, and the oldest goes


def link(rank: int, size: int, host: str, timeout: float, share: Callable[[Any], Any]) -> list[Connection]:
    """Link this rank to rank 0; on rank 0, link it to all others.

    Args:
        rank: of this process.
        size: the number of ranks.
        host: on rank 0, the address to listen at.
        timeout: seconds for all of it.
        share: returns on every rank what rank 0 gives it (a str of less than 256 bytes).

    Returns:
        the links to rank 1, 2, ... on rank 0; the link to rank 0 on the others.

    Raises:
        WorldError: ranks are missing after that time; or rank 0 cannot listen at ``host``.
    """
    if rank:
        host, port, key = json.loads(share(None))
        return [connect_to_rank_0((host, port), bytes.fromhex(key), rank, timeout)]
    key = secrets.token_bytes(32)
    try:
        listener = socket.create_server((host, 0), backlog=max(size, MAX_HANDSHAKES))
    except OSError as error:
        raise WorldError(f"rank 0 cannot listen at {host} ({error}): is MS_WORKER_IP an address of its host?") from None
    with listener:
        share(json.dumps([*listener.getsockname(), key.hex()]))
        return accept_ranks(listener, key, size, timeout)


def accept_ranks(listener: socket.socket, key: bytes, size: int, timeout: float) -> list[Connection]:
    """Wait until all other ranks have connected to rank 0 and have proved that they know the key.

    Other connections are dropped. They delay nobody: no connection is waited for alone.

    Args:
        listener: a listening socket.
        key: what the ranks know and others do not.
        size: the number of ranks, with rank 0.
        timeout: seconds for all of it.

    Returns:
        the links to rank 1, 2, ...

    Raises:
        WorldError: ranks are missing after that time; says which.
    """
    deadline = time.monotonic() + timeout
    with contextlib.closing(_Reception(listener, key, size)) as reception:
        while reception.missing():
            if time.monotonic() > deadline:
                host, port = listener.getsockname()[:2]
                raise WorldError(
                    f"of {size} ranks, {_names(reception.missing())} did not connect to rank 0 at {host}:{port} within "
                    f"{timeout:g} seconds (MS_TOPO_TIMEOUT); can every host reach that address? Other connections that "
                    f"were turned away: {reception.turned_away}."
                )
            reception.receive()
        return [_as_link(reception.ranks.pop(rank)) for rank in range(1, size)]


@dataclass
class _Handshake:
    deadline: float = field(default_factory=lambda: time.monotonic() + HANDSHAKE_TIMEOUT)
    nonce: bytes = field(default_factory=lambda: secrets.token_bytes(NONCE))
    received: bytes = b""


class _Reception:
    """Rank 0's side of all handshakes at once."""

    def __init__(self, listener: socket.socket, key: bytes, size: int) -> None:
        self.listener, self.key, self.size = listener, key, size
        self.ranks: dict[int, socket.socket] = {}
        self.handshakes: dict[socket.socket, _Handshake] = {}  # the oldest first
        self.turned_away = 0
        self.selector = selectors.DefaultSelector()
        self.selector.register(listener, selectors.EVENT_READ)
        listener.setblocking(False)

    def missing(self) -> list[int]:
        return [rank for rank in range(1, self.size) if rank not in self.ranks]

    def receive(self) -> None:
        """Takes what has arrived; returns after a fraction of a second when nothing has."""
        for event, _ in self.selector.select(timeout=0.2):
            connection = event.fileobj
            if connection is self.listener:
                self._accept()
            elif isinstance(connection, socket.socket) and connection in self.handshakes:  # not dropped for a newer one
                self._try(self._read, connection)
        now = time.monotonic()
        for connection in [each for each, handshake in self.handshakes.items() if handshake.deadline < now]:
            self._drop(connection)

    def _accept(self) -> None:
        try:
            connection, _ = self.listener.accept()
        except OSError as error:  # it has left again; or this process may open no more files
            if error.errno in (errno.EMFILE, errno.ENFILE):
                self._drop_oldest()
                time.sleep(0.05)
            return
        if len(self.handshakes) >= MAX_HANDSHAKES:
            self._drop_oldest()
        connection.setblocking(False)
        self.handshakes[connection] = _Handshake()
        self.selector.register(connection, selectors.EVENT_READ)
        self._try(self._greet, connection)

    def _greet(self, connection: socket.socket) -> None:
        connection.send(self.handshakes[connection].nonce)  # the first bytes fit into the socket's buffer: no waiting

    def _read(self, connection: socket.socket) -> None:
        handshake = self.handshakes[connection]
        more = connection.recv(INTRODUCTION.size - len(handshake.received))
        if not more:
            raise ConnectionError("it has left")
        handshake.received += more
        if len(handshake.received) < INTRODUCTION.size:
            return
        rank, nonce, proof = INTRODUCTION.unpack(handshake.received)
        known = hmac.compare_digest(proof, _proof(self.key, b"rank", rank, handshake.nonce, nonce))
        if not known or not 0 < rank < self.size:
            raise ConnectionError("it is no rank of this world")
        connection.send(_proof(self.key, b"rank 0", rank, nonce, handshake.nonce))
        self._forget(connection)
        if rank in self.ranks:  # it has tried again: nobody is at the other end of its first connection
            self.ranks[rank].close()
        self.ranks[rank] = connection

    def _try(self, action: Callable[[socket.socket], None], connection: socket.socket) -> None:
        try:
            action(connection)
        except BlockingIOError:
            return
        except OSError:
            self._drop(connection)

    def _drop_oldest(self) -> None:
        if self.handshakes:
            self._drop(next(iter(self.handshakes)))

    def _drop(self, connection: socket.socket) -> None:
        self.turned_away += 1
        self._forget(connection)
        connection.close()

    def _forget(self, connection: socket.socket) -> None:
        self.selector.unregister(connection)
        del self.handshakes[connection]

    def close(self) -> None:
        for connection in [*self.handshakes, *self.ranks.values()]:
            connection.close()
        self.selector.close()


def connect_to_rank_0(address: tuple[str, int], key: bytes, rank: int, timeout: float) -> Connection:
    """Return this rank's link to rank 0, after each has proved to the other that it knows the key.

    Raises:
        WorldError: there is none within ``timeout`` seconds.
    """
    deadline = time.monotonic() + timeout
    while True:
        try:
            return _introduce(address, key, rank, timeout=min(max(deadline - time.monotonic(), 0.1), 3600))
        except OSError as error:
            if time.monotonic() > deadline:
                raise WorldError(
                    f"rank {rank} on {socket.gethostname()} has not reached rank 0 at {address[0]}:{address[1]} within "
                    f"{timeout:g} seconds (MS_TOPO_TIMEOUT): {error}"
                ) from None
        time.sleep(0.2)


def _introduce(address: tuple[str, int], key: bytes, rank: int, timeout: float) -> Connection:
    with socket.create_connection(address, timeout) as connection:
        nonce, theirs = secrets.token_bytes(NONCE), _receive(connection, NONCE)
        connection.sendall(INTRODUCTION.pack(rank, nonce, _proof(key, b"rank", rank, theirs, nonce)))
        if not hmac.compare_digest(_receive(connection, PROOF), _proof(key, b"rank 0", rank, nonce, theirs)):
            raise ConnectionError("who answers there is not rank 0")
        return _as_link(connection)


def _receive(connection: socket.socket, size: int) -> bytes:
    received = b""
    while len(received) < size:
        more = connection.recv(size - len(received))
        if not more:
            raise ConnectionError("the connection was closed")
        received += more
    return received


def _proof(key: bytes, role: bytes, rank: int, *nonces: bytes) -> bytes:
    return hmac.digest(key, b"mindska %s %d " % (role, rank) + b"".join(nonces), "sha256")


def _as_link(connection: socket.socket) -> Connection:
    connection.setblocking(True)
    # The system asks an idle peer whether its host is still there: a link ends two minutes after the other host has.
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in dict(TCP_KEEPIDLE=60, TCP_KEEPINTVL=10, TCP_KEEPCNT=6).items():
        if hasattr(socket, option):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return Connection(connection.detach())


def _names(ranks: list[int]) -> str:
    more = f" and {len(ranks) - 10} more" if len(ranks) > 10 else ""
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks[:10]))}{more}"


def exchange(links: list[Connection], rank: int, value: Any) -> list[Any]:
    """Return every rank's ``value`` (anything that pickles), in rank order, however long the slowest takes.

    Raises:
        WorldError: another rank has ended.
    """
    try:
        if rank == 0:
            values = [value, *(each.recv() for each in links)]
            for each in links:
                each.send(values)
            return values
        links[0].send(value)
        return links[0].recv()
    except (EOFError, OSError) as error:
        raise another_has_ended() from error


def another_has_ended() -> WorldError:
    return WorldError("another rank has ended: its own message says why")


def watch(links: list[Connection], ended: threading.Event, patience: float, action: Callable[[], None]) -> None:
    """Until ``ended`` is set, call ``action`` some time after a link was closed (Linux only; in a thread).

    Args:
        links: of this rank.
        ended: set it before the links are closed in good order.
        patience: seconds to wait before ``action``.
        action: what to do.
    """
    if not links or not hasattr(select, "POLLRDHUP"):
        return

    def wait() -> None:
        poll = select.poll()
        for each in links:
            poll.register(each.fileno(), select.POLLRDHUP)
        while not ended.is_set() and not poll.poll(1000):
            pass
        if not ended.wait(patience):
            action()

    threading.Thread(target=wait, name="mindska-watch-links", daemon=True).start()
