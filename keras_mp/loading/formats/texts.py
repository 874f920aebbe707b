"""A text file into the bytes that it holds, which TensorFlow and Keras take for a string."""

from __future__ import annotations

import dataclasses

TEXT_FORMATS = (".txt",)


@dataclasses.dataclass(frozen=True)
class TextReader:
    """Reads a text file: path -> bytes.

    Attributes:
        max_length: bytes that are kept of each text; None: all.
    """

    max_length: int | None

    def __call__(self, path: str) -> bytes:
        """Reads one file.

        Raises:
            OSError: it cannot be read.
        """
        with open(path, "rb") as file:
            return file.read(-1 if self.max_length is None else self.max_length)
