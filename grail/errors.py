"""The one exception that means "the user can mend this": one sentence, exit code 2, nothing half-written."""


class GrailError(ValueError):
    """Bad input. The message is one sentence that names the file, site or option and says what to do."""
