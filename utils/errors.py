"""Mistakes of the user, told in one line."""


class UserError(Exception):
    """A fault that the user can mend. Its text says what is wrong and what to do;
    :func:`utils.cli.run` prints it as one line on stderr and exits with status 1."""
