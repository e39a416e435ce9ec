"""The one exception a user is meant to read."""


class InputError(ValueError):
    """Bad input: the message is one line saying what is wrong, what was expected and what to do.

    The command line prints it to stderr and exits with code 2; library callers catch it as a ValueError.
    """
