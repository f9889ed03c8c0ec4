"""The one error that is the user's to mend."""

from __future__ import annotations


class UserError(ValueError):
    """Something that the user gave cannot be used; the text names the place and the remedy in one line.

    The command line prints the text alone, without a traceback, and exits with code 2.
    """


def first_line(error: Exception) -> str:
    """The first line of what an error says; what kind it is, if it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
