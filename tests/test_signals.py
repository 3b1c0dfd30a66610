"""Signal handlers: remembered, repeated, restored, taken over from an ignoring parent."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests_launcher import ROOT

from trainer.loop.signals import LAUNCHERS, SIGNALS, StopSignal


def test_each_signal_is_remembered_and_handlers_come_back() -> None:
    for number in SIGNALS:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored where the tests run under nohup
        before = [signal.getsignal(n) for n in SIGNALS]
        with StopSignal() as stop:
            assert not stop.received
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number) if number != signal.SIGINT else None
            assert stop.received
        late = [signal.getsignal(n) for n in SIGNALS]
        for n, previous in zip(SIGNALS, before, strict=True):
            signal.signal(n, previous)
        assert late == [signal.SIG_IGN] * 3 + before[3:]
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


def test_a_run_under_nohup_outlives_its_terminal() -> None:
    code = (
        "import os, signal\nfrom trainer.loop.signals import StopSignal\n"
        "with StopSignal() as stop:\n    os.kill(os.getpid(), signal.SIGHUP)\n    print(stop.received)\n"
    )
    command = ["nohup", sys.executable, "-u", "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0 and done.stdout == "False\n"


@pytest.mark.parametrize("launcher", [True, False])
def test_the_death_of_a_launcher_counts_as_a_signal_that_of_a_shell_does_not(tmp_path: Path, launcher: bool) -> None:
    code = (
        "import sys, time\nfrom trainer.loop.signals import StopSignal\n"
        "with StopSignal() as stop:\n"
        "    print(stop.received, flush=True)\n    time.sleep(1)\n    print(stop.received, flush=True)\n"
    )
    (tmp_path / "worker.py").write_text(code)
    shell = f"{sys.executable} worker.py > out & while ! [ -s out ]; do sleep 0.02; done"
    names = {name: "1" for name in LAUNCHERS} if launcher else {}
    clean = {name: value for name, value in os.environ.items() if name not in LAUNCHERS}
    subprocess.run(
        ["sh", "-c", shell], cwd=tmp_path, env=clean | names | {"PYTHONPATH": str(ROOT)}, timeout=30, check=True
    )
    for _ in range(200):
        if (tmp_path / "out").read_text().count("\n") == 2:
            break
        time.sleep(0.1)
    assert (tmp_path / "out").read_text().split() == ["False", str(launcher)]


def test_the_death_of_deepspeeds_outer_process_counts_too(tmp_path: Path) -> None:
    """`deepspeed` starts a process that starts the ranks. Here it ends once the rank has begun, that one does not."""
    (tmp_path / "worker.py").write_text(
        "import time\nfrom trainer.loop.signals import StopSignal\n"
        "with StopSignal() as stop:\n    print(stop.received, flush=True)\n"
        "    while not stop.received:\n        time.sleep(0.02)\nprint(True, flush=True)\n"
    )
    (tmp_path / "launch").write_text(f"{sys.executable} worker.py > out; touch ended")
    (tmp_path / "deepspeed").write_text("sh launch & while ! [ -s out ]; do sleep 0.02; done")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CROSS_RANK": "0"}
    subprocess.run(["sh", "deepspeed"], cwd=tmp_path, env=environment, timeout=30, check=True)
    for _ in range(100):
        if (tmp_path / "ended").exists():
            break
        time.sleep(0.1)
    assert (tmp_path / "out").read_text().split() == ["False", "True"]


def test_importing_the_handlers_is_quick() -> None:
    """Nothing heavy may be imported before the handlers are in place."""
    code = (
        "import sys, trainer.train; print(sorted(m for m in ('torch', 'omegaconf', 'deepspeed') if m in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert done.stdout == "[]\n", done.stderr
