"""What holds for all tests."""

import os
import signal

# Before torch is imported, and for all processes that tests start: for such small tensors a second
# thread costs more than it gives.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Whoever starts pytest in the background has it, and all processes it starts, ignore Ctrl-C, which
# several tests send. A handler here is enough: processes that are started get the default instead.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
