"""Errors that the user can correct. They end a command with one line and exit code 2, without a traceback."""

import difflib
import signal
import sys
import threading
from collections.abc import Callable, Iterable


class UserError(Exception):
    """An error that the user can correct.

    The message is one line: the file or key, what was found, what was expected, what to do.
    """


def run_command(main: Callable[[list[str]], object], argv: list[str] | None = None) -> None:
    """Run ``main(argv)``. A `UserError` becomes one line on stderr and exit code 2. Ctrl-C and SIGTERM end it with one
    line and exit code 130, unless the command handles them.

    Args:
        main: takes the list of command-line arguments.
        argv: default: the arguments of this process.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()  # only there, Python receives signals
    before = signal.getsignal(signal.SIGTERM)
    if in_main_thread and before != signal.SIG_IGN:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        main(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        print("error:", " ".join(str(error).splitlines()), file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("stopped by a signal", file=sys.stderr)
        raise SystemExit(130) from None
    finally:
        if in_main_thread:
            signal.signal(signal.SIGTERM, before)


def did_you_mean(word: object, known: Iterable[object]) -> str:
    """'; did you mean X?' for the word in `known` that is most similar, or '' if none is similar."""
    near = difflib.get_close_matches(str(word), [str(k) for k in known], n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""
