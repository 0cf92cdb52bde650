"""The two ways a command may fail, and the exit status each one maps to."""


class UsageError(ValueError):
    """The request itself is wrong. The command line exits with status 2.

    The message is one line and says what was got, what was expected and the remedy.
    """


class JobError(RuntimeError):
    """A well-formed request could not be carried out. The command line exits with status 1."""


class NotFiniteError(JobError):
    """A network gave logits that are NaN or infinite."""


class TooThinError(JobError):
    """An image has no voxel at the spacing of a network."""
