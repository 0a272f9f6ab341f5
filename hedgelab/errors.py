"""Errors that are the user's to mend: one line naming the key and the fix."""


class UserError(ValueError):
    """A mistake in a config, a file or a call; the command line prints it as one line and exits with code 2."""
