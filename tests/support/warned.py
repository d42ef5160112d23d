"""What a test run tells without failing."""


class NeverRecorded(UserWarning):
    """A kernel is in no recorded run yet: whoever has the GPU records it, and whoever has none goes on."""
