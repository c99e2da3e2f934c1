"""Triton kernels for tulu_mega, each beside a torch reference that is both its CPU path and its oracle.

There are none yet: they arrive in later releases. Until then tulu_mega's own torch code does all of the work, on every device.
"""

__version__ = "0.1.0"
