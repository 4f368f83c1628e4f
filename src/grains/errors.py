"""The one exception that stands for a user's mistake."""


class UserError(Exception):
    """A mistake in the input: the message says what was expected, what was found, what to do.

    The scripts print it as one line and exit with a status that is not zero; every other
    exception is a bug and keeps its traceback.
    """
