"""Supply: how batches are shared out over the rounds of one call."""

from collections.abc import Iterable, Iterator
from itertools import chain, islice
from typing import Any

__all__ = ["Supply"]


class Supply:
    """Batches, handed on from where the round before has stopped.

    What can be begun again is, when it has run out. What cannot is counted before the first round.

    Args:
        batches: The batches.
        rounds: How many rounds they have to last for.
        each: How many a round needs at most; None if that is found out on the way.

    Raises:
        ValueError: If an iterator holds too few.
    """

    def __init__(self, batches: Iterable[Any], rounds: int, each: int | None) -> None:
        self._batches = batches
        self._rounds = rounds
        self._rest: Iterator[Any] = iter(batches)
        self._again = self._rest is not batches and rounds > 1
        if rounds == 1 or self._again:
            return
        if each is not None:
            held = list(islice(self._rest, rounds * each))
            if len(held) < rounds * each:
                raise ValueError(
                    self._short(f"It holds {len(held)}, of {rounds * each} that they score on")
                )
            self._rest = chain(held, self._rest)

    def of(self, number: int) -> Iterator[Any]:
        """The batches of a round, as many as are taken.

        Args:
            number: The number of the round, from 0.

        Raises:
            ValueError: If an iterator has run out before this round.
        """
        found, none = False, object()
        while True:
            for batch in self._rest:
                found = True
                yield batch
            if not self._again:
                if not found and self._rounds > 1:
                    raise ValueError(self._short(f"It ran out before round {number + 1}"))
                return
            self._rest = iter(self._batches)
            first = next(self._rest, none)
            if first is none:  # there is nothing in it at all
                return
            yield first

    def _short(self, what: str) -> str:
        return (
            f"`batches` is an iterator that has too few for {self._rounds} rounds. {what}. Pass "
            "more, or a list or a DataLoader, which is begun again."
        )
