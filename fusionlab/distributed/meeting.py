"""How the processes of a run meet, and hear that one of them leaves."""

from __future__ import annotations

import sys
import threading
import time
from datetime import timedelta

from torch import distributed

from fusionlab.distributed.ranks import started_rank
from fusionlab.errors import InputError

_LAST_TO_LEAVE = 30.0  # seconds that rank 0, which holds the meeting place, waits for all to have heard
_news: list[News] = []


def call_roll(host: str, port: int, rank: int, world_size: int, timeout: float) -> distributed.Store:
    """Wait until all ranks have come; returns the store through which they connect.

    Raises:
        InputError: some did not come in time, by number.
    """
    deadline = time.monotonic() + timeout
    where = f"{host}:{port}"
    try:
        store = distributed.TCPStore(
            host, port, world_size, rank == 0, timedelta(seconds=timeout), wait_for_workers=False
        )
        store.set(f"rank/{rank}", b"here")
        missing = [other for other in range(world_size) if other != rank]
        while missing and time.monotonic() < deadline:
            missing = [other for other in missing if not store.check([f"rank/{other}"])]
            time.sleep(0.05 if missing else 0)
    except (distributed.DistError, TimeoutError) as error:
        raise InputError(
            f"rank {rank} did not reach rank 0 at {where} within {timeout:g} s; start all {world_size} processes, with "
            f"the same MASTER_ADDR and MASTER_PORT ({str(error).splitlines()[0]})"
        ) from error
    if missing:
        numbers = ", ".join(map(str, missing))
        raise InputError(
            f"rank {numbers} of 0..{world_size - 1} did not come to {where} within {timeout:g} s (says rank {rank}); "
            f"see why it did not start, or give --start_timeout more seconds"
        )
    store.set_timeout(timedelta(seconds=max(timeout, 60)))
    return distributed.PrefixStore("connected", store)


class News:
    """Whether a process has left because of bad input, as every process hears while it waits for the others.

    A thread asks the store of rank 0 over a connection of its own, remembers, and says that it has heard. So what a
    process knows when a collective fails does not depend on who has left by then: rank 0, and with it the store,
    leaves only once all have heard.

    Args:
        host: where the processes meet.
        port: of the store there.
    """

    def __init__(self, host: str, port: int) -> None:
        self.rank, self.world_size = distributed.get_rank(), distributed.get_world_size()
        store = distributed.TCPStore(host, port, None, False, timedelta(seconds=60), wait_for_workers=False)
        self._store = distributed.PrefixStore("news", store)
        self._lock, self._ended = threading.Lock(), threading.Event()
        self.heard = False
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def tell(self) -> None:
        """Let the others know that this process leaves because of bad input, which it tells itself."""
        with self._lock:
            self._store.set("bad input", str(self.rank))
        self._hear()

    def wait_for_others(self) -> None:
        """On rank 0 wait until all have heard; a process that is gone without a word is waited for in vain."""
        deadline = time.monotonic() + _LAST_TO_LEAVE
        others = [f"heard/{rank}" for rank in range(self.world_size)] if self.rank == 0 else []
        while others and time.monotonic() < deadline:
            with self._lock:
                others = [key for key in others if not self._store.check([key])]
            time.sleep(0.05)

    def ask(self) -> bool | None:
        """Whether one has left because of bad input; None where rank 0 is gone and said nothing."""
        try:
            self._look()
        except distributed.DistError:
            return True if self.heard else None
        return self.heard

    def leave(self) -> None:
        """Stop to listen, and say so."""
        self._ended.set()
        self._thread.join()
        try:
            self._hear()
        except distributed.DistError:
            return  # rank 0 has left before, and waits for nobody

    def _listen(self) -> None:
        while not self.heard and not self._ended.wait(0.25):
            try:
                self._look()
            except distributed.DistError:
                return  # rank 0 has left without news

    def _look(self) -> None:
        with self._lock:
            told = self._store.check(["bad input"])
        if told:
            self._hear()

    def _hear(self) -> None:
        self.heard = True
        with self._lock:
            self._store.set(f"heard/{self.rank}", b"yes")


def listen(host: str, port: int) -> None:
    """Hear from here on whether another process has left; where they meet is given."""
    _news[:] = [News(host, port)]


def tell_bad_input() -> None:
    """Let the other processes know that this one leaves because of bad input, which it tells itself."""
    if _news and distributed.is_initialized():
        _news[0].tell()
        _news[0].wait_for_others()


def leave() -> None:
    """Say, however a command ends, that this process needs not be waited for."""
    if _news:
        _news.pop().leave()


def exit_code_of_others() -> int | None:
    """The exit code with which to leave where another process has left, so that waiting for it failed; else None.

    2 after bad input, which that process tells; 1 where rank 0 is gone, with whom the processes meet.
    """
    if not _news:
        return None
    told = _news[0].ask()
    if told is None:
        print(f"fusionlab: rank {started_rank()} ends, as rank 0 has ended; what that one says is why", file=sys.stderr)
        return 1
    if told:
        _news[0].wait_for_others()
        return 2
    return None
