"""The money that a teacher behind a network really costs."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

from distill.errors import DistillError


class Purse:
    """What was ever spent, in a file to which every process appends; what is set aside is spent until it is put back.

    Args:
        path: The file, one amount of usd in a line.
        limit: Most that may be spent; None for no bound.
    """

    def __init__(self, path: Path, limit: Fraction | None) -> None:
        self.limit = limit
        self._path = path
        self._read_bytes = 0
        self._spent = Fraction(0)

    def spent(self) -> Fraction:
        """All that was written so far."""
        if self._path.exists():
            with self._path.open("rb") as file:
                file.seek(self._read_bytes)
                new = file.read()
            new = new[: new.rfind(b"\n") + 1]
            try:
                self._spent += sum(map(Fraction, new.decode().split()), Fraction(0))
            except ValueError:
                raise DistillError(
                    f"{self._path} is damaged; delete it to count from 0 again", "teacher.max_usd"
                ) from None
            self._read_bytes += len(new)
        return self._spent

    def take(self, usd: Fraction) -> bool:
        """Spend so much, if there is enough."""
        if self.limit is not None and self.spent() + usd > self.limit:
            return False
        self.add(usd)
        return True

    def add(self, usd: Fraction) -> None:
        """Spend so much; negative to put it back."""
        if usd:
            with self._path.open("ab", buffering=0) as file:
                file.write(f"{usd}\n".encode())
