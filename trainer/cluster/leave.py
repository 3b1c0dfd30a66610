"""How a program that joins a process group ends: with its exit code, and without the end of Python's interpreter."""

import atexit
import os
import sys
import threading
from collections.abc import Callable
from typing import Any, NoReturn


def run_and_leave(main: Callable[[], Any]) -> NoReturn:
    """Run a program's `main`, then all that Python runs at an exit, and end the process.

    What comes after that in Python, the freeing of modules, would abort the process now and then (SIGABRT, "terminate
    called without an active exception"), all its work done: DeepSpeed's engines and default arguments keep process
    groups alive after their end, whose threads may still be letting go of the last exchange's tensors, and a thread
    that asks for the interpreter's lock then is unwound through C++ that allows no such thing. Under load it was 2 of
    81 evaluations by two processes.
    """
    code, sound = 0, True
    try:
        main()
    except SystemExit as end:
        code = _exit_code(end)
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        code, sound = 130 if isinstance(error, KeyboardInterrupt) else 1, False
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads, as multiprocessing's processes do
    atexit._run_exitfuncs()
    if sound:
        _finalize_mpi()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            code = code or 120  # Python's own for output that nobody took
    os._exit(code)


def _exit_code(end: SystemExit) -> int:
    """As Python understands it: anything but a number is a message."""
    if end.code is None or isinstance(end.code, int):
        return end.code or 0
    print(end.code, file=sys.stderr)
    return 1


def _finalize_mpi() -> None:
    """Where mpirun has started the ranks it takes one that ends without this for lost. It waits for the other ranks;
    mpi4py does it when Python has ended.
    """
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized():
        mpi.Finalize()
