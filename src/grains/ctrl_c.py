"""Ctrl-C ends a script with one line, while its libraries are being imported too.

That takes seconds, and an exception raised in the midst of it comes out as a long traceback.
"""

import os
import signal

INTERRUPTED = "interrupted: what is finished is kept; run the same command again to go on"


def begin_imports() -> None:
    """Until `end_imports`, Ctrl-C ends the process at once. For scripts, before other imports."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def end_imports() -> None:
    """From here on Ctrl-C is a KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(number, frame) -> None:
    os.write(2, f"\n{INTERRUPTED}\n".encode())
    os._exit(130)
