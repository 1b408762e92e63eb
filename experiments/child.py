"""Run a command of the project in a process that ends when its parent ends: child.py PARENT COMMAND [OPTION ...]

run.py starts its runs this way. On Linux, the kernel kills the process if run.py is killed. SIGTERM ends the command
like Ctrl-C, so that temporary files are removed.
"""

import ctypes
import os
import runpy
import signal
import sys

_PR_SET_PDEATHSIG = 1  # of Linux's prctl(2): the signal that a process gets when its parent ends


def main() -> None:
    """Run the command. It is described at the top of the file."""
    parent, command, *options = sys.argv[1:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent):
        raise SystemExit("the parent process has ended")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.argv = [command, *options]
    sys.path[0] = os.path.dirname(command)
    runpy.run_path(command, run_name="__main__")


if __name__ == "__main__":
    main()
