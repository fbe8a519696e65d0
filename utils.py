"""Start-up of distributed runs and metric logging, shared by every entry point."""


class UserError(ValueError):
    """A mistake of the user's: the message is one line that names the value and what to do. Entry points exit with status 2."""
