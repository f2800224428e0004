"""The one exception that speaks to the user."""


class UserError(Exception):
    """Something the user can mend: the message says what is wrong, in which file, and what to do.

    Entry scripts print the message alone and exit with a non-zero status; every other exception is
    a bug of ours and keeps its stack trace.
    """
