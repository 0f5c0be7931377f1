"""The clock: where a run stands in its schedule."""

from mtprune.reading import Entry
from mtprune.schedule import Rounds, Schedule

__all__ = ["Clock"]

_PATIENCE = 1_000
_WALK = 100_000


class Clock:
    """Counts steps and says which update is due.

    Args:
        schedule: When updates are to be made.
        opening: Whether the first update is unlike the others, and made even when later ones are
            due as well. Otherwise the latest of several late updates stands for all of them.

    Attributes:
        step: Steps so far.
        done: The step of the last update made; -1 before the first.
    """

    def __init__(self, schedule: Schedule, opening: bool) -> None:
        self._schedule = schedule
        self._opening = opening
        self.step = 0
        self.done = -1

    @property
    def next(self) -> int | None:
        """The step of the first update not yet made, None when all are."""
        return self._schedule.next_update(self.done)

    @property
    def final(self) -> int | None:
        """The step of the last update, None when all are made."""
        final = self.next
        while final is not None and (later := self._schedule.next_update(final)) is not None:
            final = later
        return final

    @property
    def at_once(self) -> list[int]:
        """The steps of the updates that are made one after the other where there is no loop."""
        final = self.final
        if isinstance(self._schedule, Rounds):
            return list(range(self.done + 1, self._schedule.n))
        return [] if final is None else [final]

    @property
    def loops(self) -> bool:
        """Whether updates are made in a training loop, or all have been made."""
        return not isinstance(self._schedule, Rounds) or self.next is None

    def read(self, step: Entry, done: Entry) -> tuple[int, int]:
        """Steps so far, and the step of the last update made, as a checkpoint holds them.

        Raises:
            ValueError: If no run with this schedule can stand there.
        """
        steps, last = step.whole(), done.whole(least=-1)
        if last >= 0 and not self._makes(last):
            raise done.wrong(f"must be -1 or the step of an update of {self._schedule!r}")
        if last > steps and self._schedule.next_update(last) is not None and self.loops:
            # In a loop updates are not made ahead of time; without one, all are.
            raise done.wrong(f"must be at most {steps}, the steps so far")
        return steps, last

    def _makes(self, step: int) -> bool:
        """Whether the schedule has an update at a step."""
        if self._schedule.next_update(step - 1) == step:
            return True
        # It may depend on where the update before was, as after the last of `Hold`'s schedule.
        update = self._schedule.next_update(-1)
        for _ in range(_WALK):
            if update is None or update >= step:
                return update == step
            update = self._schedule.next_update(update)
        return True  # too many to tell

    def due(self) -> int | None:
        """The update to make now, or None."""
        update = self.next
        if update is None or update > self.step:
            return None
        if self._opening and self.done < 0:
            return update
        while (later := self._schedule.next_update(update)) is not None and later <= self.step:
            update = later
        return update

    def near(self, lead: float) -> bool:
        """Whether an update is due, or will be within ``lead`` steps."""
        update = self.next
        return update is not None and update - self.step <= lead

    def overdue(self) -> bool:
        """Whether the next update has waited until the one after it, or for 1,000 steps."""
        update = self.next
        if update is None:
            return False
        later = self._schedule.next_update(update)
        return self.step >= (update + _PATIENCE if later is None else later)
