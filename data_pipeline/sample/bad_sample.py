"""What makes a sample unusable."""


class BadSample(Exception):
    """A sample that cannot be used; it is masked in its batch and recorded with its cause."""

    def __init__(self, cause: str, detail: str) -> None:
        super().__init__(f"{cause}: {detail}")
        self.cause, self.detail = cause, detail
