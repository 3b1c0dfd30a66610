"""On the path of the campaign's processes: two signals by which a rank can be made to hang from outside."""

import ctypes
import signal
import time

# In the main thread, between two bytecodes, wherever it is. The first lets other threads run, the second does not.
signal.signal(signal.SIGRTMIN, lambda *_: time.sleep(3600))
signal.signal(signal.SIGRTMIN + 1, lambda *_: ctypes.PyDLL(None).sleep(3600))
