"""Mistakes of the user, told in one line."""


class UserError(Exception):
    """A fault that the user can mend. Its text says what is wrong and what to do;
    :func:`utils.cli.run` prints it as one line on stderr and exits with its status."""

    status = 1


class Diverged(UserError):
    """A loss or weight that is not finite any more."""

    status = 3
