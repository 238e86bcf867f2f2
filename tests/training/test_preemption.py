"""Signals only raise a flag between start and stop; afterwards the former handlers are back."""

import os
import signal
import threading

import pytest

from llm.training.preemption import EXIT_CODE, Preemption


@pytest.fixture
def preemption():
    watch = Preemption()
    watch.start()
    yield watch
    watch.stop()


def test_exit_code_is_that_of_a_temporary_failure():
    assert EXIT_CODE == os.EX_TEMPFAIL == 75


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_raises_the_flag(preemption, number, capfd):
    preemption.armed = True
    assert not preemption.requested()
    os.kill(os.getpid(), number)
    assert preemption.requested() and preemption.signal_name == signal.Signals(number).name
    for _ in range(3):
        os.kill(os.getpid(), signal.SIGTERM)
    assert preemption.requested()
    shown = capfd.readouterr().err
    assert shown.count("saving at the end of this step") == 1
    assert shown.count("already saving") == 3


def test_nothing_to_save_leaves_at_once(preemption):
    with pytest.raises(SystemExit) as stopped:
        os.kill(os.getpid(), signal.SIGTERM)
        signal.pause()
    assert stopped.value.code == 75


def test_former_handlers_come_back():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    watch = Preemption()
    watch.start()
    assert signal.getsignal(signal.SIGTERM) != before[0]
    watch.stop()
    watch.stop()
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_several_processes_leave_the_signal_to_jax():
    before = signal.getsignal(signal.SIGTERM)
    watch = Preemption()
    watch.start(num_processes=2)
    assert signal.getsignal(signal.SIGTERM) == before
    watch.stop()


def test_several_processes_hear_of_ctrl_c_as_sigterm(capfd):
    received = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    watch = Preemption()
    watch.start(num_processes=2)
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGINT)
    watch.stop()
    signal.signal(signal.SIGTERM, before)
    assert received == [signal.SIGTERM]
    shown = capfd.readouterr().err
    assert shown.count("all processes save after the same step") == 1
    assert shown.count("already asked for") == 1


def test_other_threads_install_nothing():
    before = signal.getsignal(signal.SIGTERM)
    watch = Preemption()
    thread = threading.Thread(target=watch.start)
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGTERM) == before and not watch.requested()
    watch.stop()
