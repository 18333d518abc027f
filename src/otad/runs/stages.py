"""Seconds per stage of a job, and a line when each begins and ends."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["Stages"]

logger = logging.getLogger("otad.runs")


class Stages:
    """Names the stages of a job in the log and keeps their seconds.

    Attributes:
        seconds: stage -> seconds, in the order they ran.
    """

    def __init__(self, count: int) -> None:
        self.seconds: dict[str, float] = {}
        self._count = count
        self._begun = 0

    @contextmanager
    def stage(self, name: str, words: str) -> Iterator[None]:
        """Time what happens inside; `words` say it to the reader."""
        self._begun += 1
        logger.info("[%d/%d] %s", self._begun, self._count, words)
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start
        logger.info("[%d/%d] done in %.1f s", self._begun, self._count, self.seconds[name])
