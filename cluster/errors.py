"""The errors a person meets: the command line answers each with one line and its exit code."""


class TokayError(Exception):
    """Something failed that the user could not have prevented; exit code 1."""

    exit_code = 1


class UserError(TokayError):
    """The user's mistake, told by what was given, what is accepted and what to do; exit code 2."""

    exit_code = 2


class StorageError(UserError):
    """A storage URI that cannot be read or written."""


class ArtifactError(TokayError):
    """An artifact whose files do not agree with its manifest."""


class TooManyRejects(TokayError):
    """A step gave up because more rows were bad than the recipe allows."""


class EngineDied(TokayError):
    """The engine that a stage works with is gone; the stage must be loaded anew."""
