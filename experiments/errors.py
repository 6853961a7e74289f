"""The exception that entry points print instead of a traceback."""

LONGEST = 2000  # characters


class UserError(Exception):
    """A mistake outside the program: its message says what, where, what to expect, what to do.

    Messages quote files that others wrote. One is a line of printable characters, of bounded
    length, whatever they hold: no second line, no colours or commands of a terminal.
    """

    def __init__(self, message: str):
        line = "".join(c if c.isprintable() else _visible(c) for c in message)
        half = LONGEST // 2
        super().__init__(line if len(line) <= LONGEST else f"{line[:half]} … {line[-half:]}")


def _visible(character: str) -> str:
    return " " if character.isspace() else ascii(character)[1:-1]
