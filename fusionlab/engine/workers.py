"""The engine's threads, and the collecting of what they measure in an order that does not depend on them."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Generic, TypeVar

import torch
from torch import Tensor

from fusionlab.blocks.sums import exact_sum

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class Found:
    """Partial sums by (key, name) and position, and counts by key, as blocks return them in any order.

    Numbers are kept, no tensor of a block: a small one that lives on keeps the allocator from using again what the
    block had freed beside it, and memory would grow with the model.
    """

    def __init__(self) -> None:
        self.counts: dict[str, Tensor] = {}
        self._partials: dict[str, dict[str, list[tuple[int, list[float]]]]] = {}

    def add(self, result: tuple[str, int, dict[str, Tensor]]) -> None:
        """Take what was measured on the block of ``name`` that begins at ``start``."""
        name, start, measured = result
        for key, values in measured.items():
            if values.is_floating_point():
                self._partials.setdefault(key, {}).setdefault(name, []).append((start, values.tolist()))
            elif key in self.counts:
                self.counts[key] += values
            else:
                self.counts[key] = values.clone()

    def sums(self) -> dict[str, dict[str, tuple[float, ...]]]:
        """Key -> name -> exact expansion, from the partials in the order of their cuts."""
        return {
            key: {name: exact_sum(_in_order(parts)) for name, parts in by_name.items()}
            for key, by_name in self._partials.items()
        }


def _in_order(parts: list[tuple[int, list[float]]]) -> list[float]:
    return [value for _, values in sorted(parts, key=lambda part: part[0]) for value in values]


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Torch's own threads set to one, so that the engine's threads share the cores and every order is fixed."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _garbage_later() -> Iterator[None]:
    """No cyclic collections inside: blocks make no cycles, and a scan of all imported libraries is slow."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def for_each(
    items: Iterable[_Item],
    work: Callable[[_Item], _Result],
    threads: int,
    collect: Callable[[_Result], None] = lambda result: None,
    weigh: Callable[[_Item], int] | None = None,
    capacity: int = 0,
) -> None:
    """``collect(work(item))`` for every item, ``work`` on ``threads`` threads, ``collect`` on one at a time.

    Always on threads of its own, where neither autograd nor autocast of the caller is active. The first exception ends
    all and is raised here.

    Args:
        items: taken in order.
        work: called without a lock.
        threads: at least 1.
        collect: called under a lock, in the order in which items finish.
        weigh: an item's weight; items in work never weigh more than ``capacity`` together.
        capacity: see ``weigh``.
    """
    with _garbage_later():
        _Pool(iter(items), work, collect, weigh, capacity).run(threads)


class _Pool(Generic[_Item, _Result]):
    def __init__(
        self,
        items: Iterator[_Item],
        work: Callable[[_Item], _Result],
        collect: Callable[[_Result], None],
        weigh: Callable[[_Item], int] | None,
        capacity: int,
    ) -> None:
        self.items, self.work, self.collect, self.weigh = items, work, collect, weigh
        self.free = capacity
        self.changed = threading.Condition()
        self.failure: BaseException | None = None

    def run(self, threads: int) -> None:
        with ThreadPoolExecutor(threads) as pool:
            workers = [pool.submit(self._work) for _ in range(threads)]
            try:
                wait(workers)
            except BaseException as interrupt:  # such as KeyboardInterrupt: let the workers end before it goes on
                self.failure = self.failure or interrupt
                raise
        if self.failure is not None:
            raise self.failure

    def _work(self) -> None:
        try:
            with torch.no_grad():
                while (taken := self._take()) is not None:
                    item, weight = taken
                    result = self.work(item)
                    with self.changed:
                        self.collect(result)
                        self.free += weight
                        self.changed.notify_all()
        except BaseException as error:  # handed to the caller's thread, which raises it
            with self.changed:
                self.failure = self.failure or error
                self.changed.notify_all()

    def _take(self) -> tuple[_Item, int] | None:
        with self.changed:
            if self.failure is not None:
                return None
            item = next(self.items, None)
            if item is None:
                return None
            weight = self.weigh(item) if self.weigh is not None else 0
            while weight > self.free and self.failure is None:
                self.changed.wait()
            self.free -= weight
            return item, weight
