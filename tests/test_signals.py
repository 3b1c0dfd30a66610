"""Signal handlers: remembered, repeated, restored, taken over from an ignoring parent."""

import os
import signal
import subprocess
import sys

from tests_launcher import ROOT

from trainer.loop.signals import SIGNALS, StopSignal


def test_each_signal_is_remembered_and_handlers_come_back() -> None:
    for number in SIGNALS:
        before = [signal.getsignal(n) for n in SIGNALS]
        with StopSignal() as stop:
            assert not stop.received
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number) if number != signal.SIGINT else None
            assert stop.received
        late = [signal.getsignal(n) for n in SIGNALS]
        for n, previous in zip(SIGNALS, before, strict=True):
            signal.signal(n, previous)
        assert late == [signal.SIG_IGN, signal.SIG_IGN, before[2]]
    with StopSignal():
        pass
    assert [signal.getsignal(n) for n in SIGNALS] == before


def test_a_second_interrupt_ends_the_process_at_once() -> None:
    code = (
        "import os, signal, time\nfrom trainer.loop.signals import StopSignal\n"
        "with StopSignal() as stop:\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n    os.kill(os.getpid(), signal.SIGINT)\n    print(stop.received)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n    time.sleep(60)\n"
    )
    done = subprocess.run([sys.executable, "-u", "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert done.returncode == -signal.SIGINT and done.stdout == "True\n"


def test_importing_the_handlers_is_quick() -> None:
    """Nothing heavy may be imported before the handlers are in place."""
    code = (
        "import sys, trainer.train; print(sorted(m for m in ('torch', 'omegaconf', 'deepspeed') if m in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert done.stdout == "[]\n", done.stderr
