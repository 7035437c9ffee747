"""Pictures that a check has seen whole, and that must still be the same when they are opened."""

from __future__ import annotations

from mirage_dist.data.pictures.colours import Size


class Checked(str):
    """The path of a picture, or the place where a table stores it, that a check has decoded to its last byte.

    sha256: of its bytes, in hexadecimal. size: as `size_of` has it. It is the path in every other respect, and equal to
    it; but whoever opens it gets these bytes or an error (see `opening`).
    """

    sha256: str
    size: Size

    def __new__(cls, path: str, sha256: str, size: Size) -> Checked:
        self = super().__new__(cls, path)
        self.sha256, self.size = sha256, size
        return self

    def __getnewargs__(self) -> tuple[str, str, Size]:
        return str(self), self.sha256, self.size
