"""Ctrl-C and SIGTERM end a process in order, whichever of its threads the kernel gives them to."""

from __future__ import annotations

import signal
import subprocess
import sys
from textwrap import dedent

import pytest

PROCESS = """
    import os, signal, socket, threading, time
    from signal import SIGINT, SIGTERM, SIGWINCH
    from sparksgd.training import interrupts

    waiting, _ = socket.socketpair()
    other = threading.Thread(target=threading.Event().wait, daemon=True)
    other.start()

    def main_waits():
        with open(f"/proc/self/task/{os.getpid()}/syscall") as now:  # its number, and its arguments
            return now.read().split()[1:2] == [hex(waiting.fileno())]

    def strike(numbers, then):
        while not main_waits():
            time.sleep(0.01)
        for number in numbers:
            signal.pthread_kill(other.ident, number)
        then()

    def struck(*numbers, then=lambda: None):
        threading.Thread(target=strike, args=[numbers, then], daemon=True).start()
        waiting.recv(1)
"""


def ended(body: str) -> tuple[int, str]:
    """Run the lines in a process of their own; return its status, and what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", dedent(PROCESS) + dedent(body)], capture_output=True, text=True,
        timeout=100, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("numbers", "raised", "by"),
    [
        ("SIGINT", "KeyboardInterrupt", signal.SIGINT),
        ("SIGTERM", "Terminated", signal.SIGTERM),
        ("SIGINT, SIGTERM", "KeyboardInterrupt", signal.SIGINT),
    ],
)
def test_a_signal_that_another_thread_gets_ends_the_wait_of_the_main_thread(
    numbers: str, raised: str, by: int
) -> None:
    body = f"""
        interrupts.end_in_order(lambda: print("first"))
        try:
            struck({numbers})
        except KeyboardInterrupt as error:
            print(type(error).__name__, interrupts.ended_by())
    """
    assert ended(body) == (0, f"first\n{raised} {int(by)}\n")


def test_a_process_that_does_not_end_is_killed_with_the_status_of_its_signal() -> None:
    body = """
        interrupts._LONGEST_END_S = 0.5
        interrupts.end_in_order()
        while True:
            try:
                struck(SIGTERM)
            except KeyboardInterrupt:
                print("goes on", flush=True)
    """
    assert ended(body) == (128 + signal.SIGTERM, "goes on\n")


def test_a_second_ctrl_c_kills_at_once_and_what_the_jvm_passes_on_does_not() -> None:
    body = """
        interrupts._LONGEST_END_S = 1e6
        interrupts.end_in_order()
        while True:
            try:
                struck(SIGINT)
            except KeyboardInterrupt:
                print("goes on", flush=True)
                struck(SIGTERM, SIGINT)
    """
    assert ended(body) == (128 + signal.SIGINT, "goes on\n")


def test_a_handler_that_another_package_has_set_since_then_is_left_alone() -> None:
    body = """
        def end(number, frame):
            raise ValueError("theirs")
        interrupts.end_in_order()
        signal.signal(SIGINT, end)
        signal.signal(SIGWINCH, lambda number, frame: None)
        try:
            struck(SIGWINCH, then=lambda: signal.pthread_kill(threading.main_thread().ident, SIGINT))
        except ValueError:
            print(interrupts.ended_by())
    """
    assert ended(body) == (0, "None\n")


def test_a_signal_to_a_forked_child_is_none_to_its_parent() -> None:
    body = """
        import multiprocessing
        interrupts.end_in_order()
        forked = multiprocessing.get_context("fork")
        for number in (SIGTERM, SIGINT, SIGINT):
            begun = forked.Event()
            def sleep():
                begun.set()
                time.sleep(1e6)
            child = forked.Process(target=sleep)
            child.start()
            begun.wait()
            os.kill(child.pid, number)
            child.join()
        try:
            struck(SIGINT)
        except KeyboardInterrupt:
            print(int(interrupts.ended_by()))
    """
    status, said = ended(body)
    assert (status, said.partition("\n")[0]) == (0, "2")


def test_it_ends_in_time_although_asyncio_took_the_place_where_signals_are_told() -> None:
    body = """
        import asyncio

        async def resized():
            loop = asyncio.get_running_loop()
            loop.add_signal_handler(SIGWINCH, print)
            loop.remove_signal_handler(SIGWINCH)

        interrupts._LONGEST_END_S = 0.5
        interrupts.end_in_order()
        asyncio.run(resized())
        try:
            signal.raise_signal(SIGTERM)
        except KeyboardInterrupt:
            print("goes on", flush=True)
        while True:
            time.sleep(1)
    """
    assert ended(body) == (128 + signal.SIGTERM, "goes on\n")
