"""The error a user can mend, and the one way entry points report it."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable, Iterable


class DigSegError(ValueError):
    """A mistake in the input, the configuration or the environment that the user can mend.

    The text says what is wrong, where (file, key, field) and what to do about it.
    """


class StoppedError(Exception):
    """The work was asked to stop and did so with nothing lost; the same command goes on with it."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """A hint such as ``; did you mean 'camvid'?``, or the list of valid names where none is close."""
    names = sorted(valid)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; valid names: {', '.join(names)}" if names else ""


def run_main(main: Callable[[], None]) -> None:
    """Run an entry point: a :class:`DigSegError` ends it with its text on stderr and exit code 2.

    An interrupt ends it with 130, and having stopped when asked with 143, as a process that SIGTERM ended: a scheduler
    sees that the work is not done. Any other exception is a defect and keeps its traceback.
    """
    try:
        main()
    except DigSegError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except StoppedError:
        sys.exit(143)  # what stopped has said so
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        # The reader of our output went away (`digseg models list | head`): not an error of the user's.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
