"""Ctrl-C while the modules of a command are still being imported ends it at once, without a traceback.

Imported first of all by the package; does nothing unless this process is the command line.
"""

from __future__ import annotations

import os
import sys


def _is_command() -> bool:
    if sys.argv[:1] == ["-m"]:  # Python is looking for the module
        word = sys.orig_argv.index("-m") + 1 if "-m" in sys.orig_argv else 0
        return sys.orig_argv[word : word + 1] == ["fastlstm"]
    return os.path.basename(sys.argv[0] if sys.argv else "") == "fastlstm"


def _take_over() -> bool:
    """Let the signal end the process, where Python's own handler is in place."""
    if not _is_command():
        return False
    import signal
    import threading

    if threading.current_thread() is not threading.main_thread():
        return False
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return False
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    return True


_taken = _take_over()


def hand_back() -> None:
    """From here on Ctrl-C is a KeyboardInterrupt again."""
    global _taken
    if _taken:
        import signal  # half a millisecond that nobody else's import of the package pays

        signal.signal(signal.SIGINT, signal.default_int_handler)
        _taken = False
