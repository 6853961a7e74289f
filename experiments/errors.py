"""The one exception that a user sees as a sentence instead of a traceback."""


class UserError(Exception):
    """A mistake outside the program: its message says what, where, what to expect, what to do."""
