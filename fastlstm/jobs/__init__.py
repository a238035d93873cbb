"""Whole jobs, run from the command line."""


class JobError(Exception):
    """What went wrong and what to do about it, in one line."""
