"""Calls behind the back: in order, one at a time, and no error is lost."""

from __future__ import annotations

import threading

import pytest

from quantlab.engine.behind import Behind


def test_calls_are_made_in_order_on_one_other_thread():
    seen = []
    with Behind() as behind:
        for number in range(20):
            behind.call(lambda number: seen.append((number, threading.get_ident())), number)
    assert [number for number, _ in seen] == list(range(20))
    assert len({thread for _, thread in seen} | {threading.get_ident()}) == 2


def test_one_call_at_most_is_under_way_and_who_calls_goes_on():
    started, may_end = threading.Event(), threading.Event()

    def first() -> None:
        started.set()
        may_end.wait(10)

    with Behind() as behind:
        behind.call(first)  # returns, though it has not ended
        assert started.wait(10)
        second = threading.Thread(target=behind.call, args=(lambda: None,))
        second.start()
        second.join(0.1)
        assert second.is_alive()
        may_end.set()
        second.join(10)
        assert not second.is_alive()


def fail() -> None:
    raise OSError("the disk is full")


def test_an_error_is_raised_by_the_next_call():
    with Behind() as behind:
        behind.call(fail)
        with pytest.raises(OSError, match="full"):
            behind.call(lambda: None)


def test_the_last_error_is_raised_at_the_end():
    with pytest.raises(OSError, match="full"), Behind() as behind:
        behind.call(fail)


def test_another_error_goes_first():
    def fail_twice() -> None:
        with Behind() as behind:
            behind.call(fail)
            raise KeyError

    with pytest.raises(KeyError):
        fail_twice()
