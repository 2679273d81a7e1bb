"""Threads beside the one that asks."""

from __future__ import annotations

import multiprocessing
import threading

import torch

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


def test_every_node_is_in_one_share_and_few_edges_are_not_shared_out() -> None:
    assert crew.shares(10, edges=3) == [(0, 10)]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        found = crew.shares(100, edges=1_000_000)
        assert crew.shares(0, edges=1_000_000) == [(0, 0)]
        assert crew.shares(2, edges=1_000_000) == [(0, 1), (1, 2)]
    finally:
        torch.set_num_threads(before)
    assert len(found) == 3
    assert [n for first, last in found for n in range(first, last)] == list(range(100))
