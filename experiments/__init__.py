"""One script a system, and the tools that work on any finished run: each calls `workflow`. In no installed package."""

import signal
import sys
from pathlib import Path


def _is_script() -> bool:
    file = getattr(sys.modules["__main__"], "__file__", None)
    return file is not None and Path(file).resolve().parent == Path(__file__).resolve().parent


# Ctrl-C in the seconds that a script's imports take ends it without a traceback, until `command_line.run` takes over.
if _is_script() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
