"""Imported by the fork server after `preload`, where torch models are served.

It must run no torch operation and touch no CUDA device: threads and contexts do not survive a fork.
"""

from contextlib import suppress

with suppress(ImportError):  # without torch only emulated models are served
    # What torch.export.load imports when it is first called, in torch 2.13: 1.4 s and 20 MiB a worker.
    import torch.export._trace
    import torch.export.passes
    import torch.export.pt2_archive._package  # noqa: F401  # what workers are forked with
