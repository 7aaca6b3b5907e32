"""The one exception that is shown to a person as a single line instead of a traceback."""


class UserError(Exception):
    """Something the user can put right: the message names the file, key or sample and says what to do.

    Commands print it as one line and exit with code 2.
    """
