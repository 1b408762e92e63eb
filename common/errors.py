"""A user's error ends in one line and exit code 2; a programming error keeps its traceback."""

import difflib
import sys


class UserError(Exception):
    """Something the user can mend. The message is one line: what (file or key), found, expected, what to do."""


def run_command(main, argv=None):
    """Run ``main(argv)``; a `UserError` becomes one line on stderr and exit code 2.

    Args:
        main (callable): takes the list of command-line arguments.
        argv (list of str, optional): defaults to the process's own.
    """
    try:
        main(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        print("error:", " ".join(str(error).splitlines()), file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("stopped by the user", file=sys.stderr)
        raise SystemExit(130) from None


def did_you_mean(word, known):
    """'; did you mean X?' for the nearest of `known`, or '' where nothing is near."""
    near = difflib.get_close_matches(str(word), [str(k) for k in known], n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""
