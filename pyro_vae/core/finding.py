"""The finding of a diagnostic, in words."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

Level: TypeAlias = Literal["fine", "doubtful", "bad"]


@dataclass(frozen=True)
class Finding:
    """The finding of a diagnostic: a judgement, the reason for it, and the next step.

    Args:
        about: the subject in a few words, such as "importance weights".
        level: ``"fine"``, ``"bad"``, or ``"doubtful"`` if the evidence is inconclusive or only some data are bad.
        why: one sentence with the numbers, their errors and their thresholds.
        next: the next step, one sentence; empty if all is fine.

    Example:
        >>> print(Finding("importance weights", "fine", "k̂ is below 0.5 for 100 of 100 data"))
        fine      importance weights: k̂ is below 0.5 for 100 of 100 data
    """

    about: str
    level: Level
    why: str
    next: str = ""

    def __str__(self) -> str:
        text = f"{self.level:9s} {self.about}: {self.why}"
        return f"{text}. Next: {self.next}" if self.next else text
