"""The one exception users see for input they can mend."""


class InputError(ValueError):
    """Bad input: the message names the culprit (file, field) and the way out, on one line.

    The command line prints it without a traceback and exits with code 2.
    """
