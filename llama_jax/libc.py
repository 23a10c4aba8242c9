"""Calls of the C library that Python does not offer. Where the library lacks them, they do nothing."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
from pathlib import Path

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of linux/fs.h
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -3, -4, -8  # of malloc.h


def _missing() -> contextlib.suppress:
    return contextlib.suppress(OSError, AttributeError, TypeError)  # another C library


def exchange(a: Path, b: Path) -> bool:
    """Swaps two names of a file system in one step; returns False where the system cannot."""
    with _missing():
        renameat2 = ctypes.CDLL(None).renameat2
        return renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0
    return False


def keep_freed_memory() -> None:
    """Tells glibc to keep what is freed: for steps on a CPU.

    Else each step's temporaries go back to the system and come again in pages of zeros: for SmolLM2, 4 x 256 tokens,
    400,000 page faults, 0.6 of 11 seconds of processor time.
    """
    with _missing():
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_ARENA_MAX, 1)  # the arenas of threads map what is large all the same
        libc.mallopt(_M_TRIM_THRESHOLD, -1)  # never; the largest number, 2**31 - 1, is less than such temporaries


def return_large_blocks() -> None:
    """Tells glibc to give blocks of 64 KiB and more back when they are freed.

    Else the arena of each of tensorstore's threads keeps what it once needed: 2 to 4 GB after saving 6 GB.
    """
    with _missing():
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 16)


def sleep_on_abort() -> None:
    """Makes `abort` wait 6 seconds: C's `sleep` handles SIGABRT, and is called with the signal's number."""
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))
