"""The one exception that is meant for the user's eyes."""


class UserError(ValueError):
    """Something the caller can put right: one or two lines that say what, where, and what to do next."""
