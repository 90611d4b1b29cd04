"""What a diagnostic found, in words."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

Level: TypeAlias = Literal["fine", "doubtful", "bad"]


@dataclass(frozen=True)
class Finding:
    """What a diagnostic found: a judgement, why, and what to try next.

    Args:
        about: what was asked, in a few words, as "importance weights".
        level: ``"fine"``, ``"doubtful"`` (told apart neither from fine nor from bad, or bad for some data), or
            ``"bad"``.
        why: one sentence with the numbers, their errors and their thresholds.
        next: what to try next, one sentence; empty where all is fine.

    Example:
        >>> print(Finding("importance weights", "fine", "k̂ is below 0.5 for 100 of 100 data"))
        fine      importance weights: k̂ is below 0.5 for 100 of 100 data
    """

    about: str
    level: Level
    why: str
    next: str = ""

    def __str__(self) -> str:
        told = f"{self.level:9s} {self.about}: {self.why}"
        return f"{told}. Next: {self.next}" if self.next else told
