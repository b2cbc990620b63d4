"""Who may connect to rank 0 while the world forms, and what strangers at its port can do: nothing."""

import contextlib
import os
import socket
import struct
import threading
import time

import pytest

from mindska.distributed import links as module
from mindska.distributed.links import accept_ranks, connect_to_rank_0, exchange, link, watch
from mindska.errors import WorldError

KEY = bytes(range(32))


class Strange:
    """Raises when it is unpickled."""

    def __reduce__(self):
        return (os._exit, (99,))


def form(size, strangers=(), timeout=20, ranks=None):
    """Form a world of threads while strangers are at rank 0's port; return rank 0's links, the others', and seconds."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address, stop, others = listener.getsockname(), threading.Event(), {}

        def join(rank):
            others[rank] = connect_to_rank_0(address, KEY, rank, timeout)

        def be_there(stranger):
            with contextlib.suppress(OSError):  # the world has formed, and the port is closed
                stranger(address, stop)

        threads = [threading.Thread(target=be_there, args=(stranger,), daemon=True) for stranger in strangers]
        for thread in threads:
            thread.start()
        time.sleep(0.3 * bool(strangers))  # they come first
        joining = [threading.Thread(target=join, args=(rank,), daemon=True) for rank in ranks or range(1, size)]
        for thread in joining:
            thread.start()
        start = time.monotonic()
        try:
            mine = accept_ranks(listener, KEY, size, timeout)
        finally:
            stop.set()
        seconds = time.monotonic() - start
    for thread in joining:
        thread.join(10)
    return mine, others, seconds


def knock(address):
    return socket.create_connection(address, timeout=5)


def says(text):
    def stranger(address, stop):
        while not stop.is_set():
            with knock(address) as connection:
                connection.sendall(text)
                stop.wait(0.05)

    return stranger


def leaves(address, stop):
    while not stop.is_set():
        knock(address).close()


def leaves_with_reset(address, stop):
    while not stop.is_set():
        with knock(address) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def is_silent(address, stop):
    kept = []
    while not stop.is_set() and len(kept) < 300:  # more than rank 0 bothers to keep
        kept.append(knock(address))
    stop.wait()


def dribbles(address, stop):
    with knock(address) as connection:
        while not stop.wait(0.05):
            connection.send(b"x")


def repeats_what_it_hears(address, stop):
    while not stop.is_set():
        with knock(address) as connection:
            connection.sendall(connection.recv(100) * 3)
            stop.wait(0.05)


def connects_out_of_descriptors(address, stop):
    kept = [knock(address) for _ in range(50)]
    stop.wait()
    return kept


def has_another_key(address, stop):
    while not stop.is_set():
        module._introduce(address, bytes(32), 1, timeout=5)


HUGE = struct.pack("!iQ", -1, 2**62) + b"x" * 100  # multiprocessing's length of a message
STRANGERS = {
    "speaks HTTP": says(b"GET / HTTP/1.0\r\n\r\n" * 10),
    "announces a huge message": says(HUGE),
    "sends noise": says(bytes(range(256))),
    "has another key": has_another_key,
    "leaves": leaves,
    "resets": leaves_with_reset,
    "is silent": is_silent,
    "dribbles": dribbles,
    "echoes": repeats_what_it_hears,
}


@pytest.mark.fault("strangers")
@pytest.mark.parametrize("stranger", STRANGERS)
def test_a_stranger_neither_stops_nor_delays_the_ranks(stranger):
    mine, others, seconds = form(4, [STRANGERS[stranger]])
    assert seconds < 5, "a stranger must not be waited for"
    for rank, mine_to_rank in enumerate(mine, start=1):
        others[rank].send(f"I am {rank}")
        assert mine_to_rank.recv() == f"I am {rank}"


@pytest.mark.fault("strangers")
def test_all_strangers_at_once():
    mine, others, _ = form(4, list(STRANGERS.values()))
    assert len(mine) == len(others) == 3


@pytest.mark.fault("strangers")
def test_descriptors_that_run_out_are_taken_from_strangers(monkeypatch):
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = max(map(int, os.listdir("/proc/self/fd")))  # noqa: PTH208
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 90, hard))
    try:
        mine, _, seconds = form(3, [connects_out_of_descriptors])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(mine) == 2 and seconds < 15


@pytest.mark.fault("strangers")
def test_missing_ranks_are_named_in_time():
    start = time.monotonic()
    with pytest.raises(WorldError, match=r"of 4 ranks, ranks 1, 3 did not connect .* within 1 seconds"):
        form(4, [STRANGERS["speaks HTTP"]], timeout=1, ranks=[2])
    assert time.monotonic() - start < 5


@pytest.mark.fault("strangers")
def test_ranks_that_cannot_be_are_turned_away():
    """With the right key: rank 0, a negative one, one too many; a rank that comes twice counts once."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
        for rank in (0, 3, 2**32 - 1, 1, 1):
            threading.Thread(target=_try_once, args=(address, rank), daemon=True).start()
        with pytest.raises(WorldError, match="of 3 ranks, rank 2 did not connect"):
            accept_ranks(listener, KEY, 3, timeout=1.5)


def _try_once(address, rank):
    try:
        module._introduce(address, KEY, rank, timeout=1)
    except OSError:
        return


@pytest.mark.fault("strangers")
def test_a_rank_that_tries_again_takes_the_place_of_its_first_connection():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address, found = listener.getsockname(), []

        def twice():
            module._introduce(address, KEY, 1, timeout=5).close()
            found.append(module._introduce(address, KEY, 1, timeout=5))
            found.append(module._introduce(address, KEY, 2, timeout=5))

        threading.Thread(target=twice, daemon=True).start()
        mine = accept_ranks(listener, KEY, 3, timeout=10)
    found[0].send("again")
    assert mine[0].recv() == "again"


@pytest.mark.fault("strangers")
def test_nothing_is_unpickled_before_the_proof():
    import pickle

    text = pickle.dumps(Strange())
    framed = struct.pack("!i", len(text)) + text
    mine, _, _ = form(2, [says(text), says(framed)])
    assert len(mine) == 1


@pytest.mark.fault("strangers")
def test_a_rank_does_not_believe_who_does_not_know_the_key():
    with socket.create_server(("127.0.0.1", 0)) as impostor:

        def answer():
            while True:
                try:
                    connection, _ = impostor.accept()
                except OSError:
                    return
                connection.sendall(bytes(32))
                connection.recv(68)
                connection.sendall(bytes(32))

        threading.Thread(target=answer, daemon=True).start()
        with pytest.raises(WorldError, match=r"rank 1 on .* has not reached rank 0 at 127.0.0.1:\d+ within 1 seconds"):
            connect_to_rank_0(impostor.getsockname(), KEY, 1, timeout=1)


@pytest.mark.fault("strangers")
@pytest.mark.parametrize("what", ["nobody", "silence"])
def test_a_rank_gives_up_in_time(what):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if what == "silence":
            server.listen()
        start = time.monotonic()
        with pytest.raises(WorldError, match="has not reached rank 0"):
            connect_to_rank_0(server.getsockname(), KEY, 1, timeout=0.5)
        assert time.monotonic() - start < 5


@pytest.mark.fault("strangers")
def test_a_rank_may_come_before_rank_0_listens():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = probe.getsockname()
    found = []
    early = threading.Thread(target=lambda: found.append(connect_to_rank_0(address, KEY, 1, timeout=20)))
    early.start()
    time.sleep(0.5)
    with socket.create_server(address) as listener:
        accept_ranks(listener, KEY, 2, timeout=20)
    early.join(20)
    assert found


def test_link_and_exchange():
    cards, results = {}, {}
    shared = threading.Event()

    def share(text):
        if text:
            cards[0] = text
            shared.set()
        assert shared.wait(10)
        return cards[0]

    def rank_main(rank):
        links = link(rank, 3, "127.0.0.1", 10, share)
        results[rank] = [exchange(links, rank, {"from": rank, "round": i}) for i in range(3)]

    ranks = [threading.Thread(target=rank_main, args=(rank,)) for rank in range(3)]
    for thread in ranks:
        thread.start()
    for thread in ranks:
        thread.join(20)
    assert len(cards[0]) < 256
    expected = [[{"from": rank, "round": i} for rank in range(3)] for i in range(3)]
    assert results == dict.fromkeys(range(3), expected)


def test_an_address_of_another_host_is_an_error():
    with pytest.raises(WorldError, match="cannot listen at 192.0.2.1 .*MS_WORKER_IP"):
        link(0, 2, "192.0.2.1", 1, lambda text: text)


def test_the_end_of_a_rank_is_noticed():
    mine, others, _ = form(3)
    noticed, ended = threading.Event(), threading.Event()
    watch(mine, ended, 0.0, noticed.set)
    assert not noticed.wait(0.3)
    others[2].close()
    assert noticed.wait(5)
    with pytest.raises(WorldError, match="another rank has ended"):
        others[1].send(1)
        exchange(mine, 0, None)


def test_an_end_in_good_order_is_none_to_notice():
    mine, others, _ = form(2)
    noticed, ended = threading.Event(), threading.Event()
    watch(mine, ended, 0.0, noticed.set)
    ended.set()
    others[1].close()
    assert not noticed.wait(1.5)
