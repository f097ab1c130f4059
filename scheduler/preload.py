"""Imported once by the fork server, so that workers start in milliseconds and share its memory."""

import atexit
import os
import signal

import scheduler.backends.emulated
import scheduler.worker  # noqa: F401  # what workers are forked with

# Ctrl-C goes to the whole process group. It is the daemon's to handle, also while the fork server is still importing.
signal.signal(signal.SIGINT, signal.SIG_IGN)
# It leaves nothing to tidy up, and taking torch's modules to pieces would take it a second.
atexit.register(os._exit, 0)
