"""Imported once by the fork server, so that workers start in milliseconds and share its memory.

It must run no torch operation and touch no CUDA device: threads and contexts do not survive a fork.
"""

import signal
from contextlib import suppress

# Ctrl-C goes to the whole process group. It is the daemon's to handle, also while the fork server is still importing.
signal.signal(signal.SIGINT, signal.SIG_IGN)

with suppress(ImportError):  # without torch only emulated models are served
    # What torch.export.load imports when it is first called, in torch 2.13: 0.4 s and 20 MiB a worker.
    import torch.export._trace
    import torch.export.passes
    import torch.export.pt2_archive._package  # noqa: F401
