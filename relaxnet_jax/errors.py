"""The exception raised for input that users can correct."""


class InputError(ValueError):
    """Bad input. The message, of one line, names the cause (file, field) and the remedy.

    The command line prints it without a traceback and exits with code 2.
    """
