"""Threads beside the one that asks."""

from __future__ import annotations

import multiprocessing
import threading

from howyouseeme import crew


def test_pieces_come_back_in_order_and_run_beside_each_other() -> None:
    both = threading.Barrier(3, timeout=30)

    def work(first: int, last: int) -> tuple[int, int]:
        both.wait()  # gets by only when all three are there
        return first, last

    assert crew.run(work, [(0, 2), (2, 5), (5, 6)]) == [(0, 2), (2, 5), (5, 6)]


def test_a_forked_process_gets_threads_of_its_own() -> None:
    crew.run(lambda first, last: last, [(0, 1), (1, 2)])  # threads that the child won't have
    if "fork" not in multiprocessing.get_all_start_methods():
        return
    child = multiprocessing.get_context("fork").Process(target=_in_child)
    child.start()
    child.join(60)
    assert child.exitcode == 0


def _in_child() -> None:
    assert crew.run(lambda first, last: last, [(0, 1), (1, 2)]) == [1, 2]
