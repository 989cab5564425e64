"""Distributions, times and pairs of a million results in bounded memory: what workflows.report counts with."""

from __future__ import annotations

import heapq
import math
from collections import defaultdict
from itertools import pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


class Histogram:
    """Counts by the logarithm of a value: any quantile within 1 % of the exact one (DDSketch, Masson et al. 2019)."""

    GROWTH = 1.02  # of a bin over the one before it
    RELATIVE_ERROR = (GROWTH - 1) / (GROWTH + 1)
    BINS_PER_E = 1 / math.log(GROWTH)
    LEAST, MOST = 1e-3, 1e12  # less counts as nothing, more as MOST: at most 1,750 bins

    def __init__(self) -> None:
        self.bins: defaultdict[int, int] = defaultdict(int)  # bin i holds GROWTH**(i - 1) < value <= GROWTH**i
        self.count = self.zeros = 0
        self.total = 0.0
        self.least, self.most = math.inf, -math.inf

    def add(self, value: float) -> None:
        """Count one value from 0 up."""
        self.count += 1
        self.total += value
        self.least = min(self.least, value)
        self.most = max(self.most, value)
        if value < self.LEAST:
            self.zeros += 1
        else:
            self.bins[math.ceil(math.log(min(self.MOST, value)) * self.BINS_PER_E)] += 1

    def quantile(self, share: float) -> float:
        """The least value that so large a share of all does not exceed; NaN if there are none. 0.5 is the median."""
        if not self.count:
            return math.nan
        left = max(1, math.ceil(share * self.count)) - self.zeros
        if left <= 0:
            return max(0.0, self.least)
        for number in sorted(self.bins):
            left -= self.bins[number]
            if left <= 0:
                middle = 2 * self.GROWTH**number / (self.GROWTH + 1)  # as far from both ends, relatively
                return min(max(middle, self.least), self.most)
        return self.most

    @property
    def mean(self) -> float:
        """The exact mean; NaN if there are no values."""
        return self.total / self.count if self.count else math.nan

    def bars(self, most: int) -> list[tuple[float, float, int]]:
        """Lower end, upper end and count of at most so many bars without a gap between them, for a logarithmic axis."""
        if not self.bins:
            return []
        first, last = min(self.bins), max(self.bins)
        step = max(1, math.ceil((last - first + 1) / most))
        counts: defaultdict[int, int] = defaultdict(int)
        for number, count in self.bins.items():
            counts[(number - first) // step] += count
        ends = [self.GROWTH ** (first - 1 + step * i) for i in range(max(counts) + 2)]
        return [(low, high, counts[i]) for i, (low, high) in enumerate(pairwise(ends))]


class Timeline:
    """Named amounts by time, in buckets of a second that are merged into wider ones when the run is long.

    The buckets are a dict, so that pauses between runs cost nothing.
    """

    WIDTHS = (1, 5, 10, 30, 60, 300, 1800, 3600, 21600, 86400)  # seconds; then ten times as much each
    BUCKETS, PAUSES = 4096, 20
    MINUTE = 60

    def __init__(self) -> None:
        self.width = self.WIDTHS[0]  # seconds of a bucket
        self.buckets: dict[int, defaultdict[str, float]] = {}

    def add(self, time: float, **amounts: float) -> None:
        """Add amounts at a time, in seconds since 1970."""
        while (number := int(time // self.width)) not in self.buckets and len(self.buckets) >= self.BUCKETS:
            self.widen()
        if (bucket := self.buckets.get(number)) is None:
            bucket = self.buckets[number] = defaultdict(float)
        for name, amount in amounts.items():
            bucket[name] += amount

    def widen(self) -> None:
        """Merge the buckets into wider ones."""
        wider = next((width for width in self.WIDTHS if width > self.width), 10 * self.width)
        factor, self.width = wider // self.width, wider
        merged: dict[int, defaultdict[str, float]] = {}
        for number, bucket in self.buckets.items():
            merge(merged.setdefault(number // factor, defaultdict(float)), bucket)
        self.buckets = merged

    def names(self) -> list[str]:
        """All names that have amounts."""
        return sorted({name for bucket in self.buckets.values() for name in bucket})

    def per_minute(self, *names: str) -> Iterator[tuple[float, list[float]]]:
        """Give (time, amounts of the 60 s before it), which is the quantity that budgets limit.

        Once buckets are longer than that, it is the mean per minute of each. Where nothing happens for long there are
        no points but zeros at the ends.
        """
        window, scale = max(1, self.MINUTE // self.width), min(1, self.MINUTE / self.width)
        numbers = sorted(number for number, bucket in self.buckets.items() if any(bucket.get(name) for name in names))
        for first, last in runs_of(numbers, window):
            sums = [0.0] * len(names)
            yield first * self.width, list(sums)
            for number in range(first, last + window + 1):
                for sign, at in ((1, number), (-1, number - window)):
                    if bucket := self.buckets.get(at) if at >= first else None:
                        sums = [total + sign * bucket.get(name, 0) for total, name in zip(sums, names, strict=True)]
                yield (number + 1) * self.width, [max(0.0, total) * scale for total in sums]

    def peak(self, *names: str) -> float:
        """The largest sum of amounts per minute."""
        return max((sum(amounts) for _, amounts in self.per_minute(*names)), default=0.0)

    def binned(self, most: int, names: Sequence[str]) -> tuple[float, list[tuple[float, list[float]]]]:
        """Width in seconds, then (start, amounts) of about so many intervals, those without any left out."""
        found = sorted(number for number, bucket in self.buckets.items() if any(bucket.get(name) for name in names))
        pauses = sum(b - a for a, b in self.pauses())
        step = max(1, math.ceil((found[-1] - found[0] + 1 - pauses / self.width) / most)) if found else 1
        sums: dict[int, list[float]] = {}
        for number in found:
            row = sums.setdefault(number // step, [0.0] * len(names))
            for i, name in enumerate(names):
                row[i] += self.buckets[number].get(name, 0)
        return step * self.width, [(number * step * self.width, row) for number, row in sums.items()]

    def pauses(self, least: float = 1800) -> list[tuple[float, float]]:
        """From when to when nothing happened for at least so many seconds, and for 5 % of the rest of the time.

        Of many pauses these are the longest.
        """
        numbers = sorted(self.buckets)
        gaps = [((a + 1) * self.width, b * self.width) for a, b in pairwise(numbers)]
        gaps = [(a, b) for a, b in gaps if b - a >= max(least, 2 * self.width)]
        busy = (numbers[-1] - numbers[0] + 1) * self.width - sum(b - a for a, b in gaps) if numbers else 0
        longest = heapq.nlargest(self.PAUSES, gaps, key=lambda gap: gap[1] - gap[0])
        return sorted((a, b) for a, b in longest if b - a >= busy / 20)


def merge(into: defaultdict[str, float], other: defaultdict[str, float]) -> None:
    """Add the amounts of a bucket to another one."""
    for name, amount in other.items():
        into[name] += amount


def runs_of(numbers: Sequence[int], window: int) -> Iterator[tuple[int, int]]:
    """Give first and last of each run of sorted numbers whose steps are within a window."""
    if not numbers:
        return
    first = numbers[0]
    for number, following in pairwise(numbers):
        if following - number > window:
            yield first, number
            first = following
    yield first, numbers[-1]


def thinned(points: Sequence[tuple[float, list[float]]], most: int) -> list[tuple[float, list[float]]]:
    """At most so many of the points, of each group the highest: a curve that hides no peak."""
    step = math.ceil(len(points) / most) if points else 1
    groups = (points[i : i + step] for i in range(0, len(points), step))
    return [max(group, key=lambda point: sum(point[1])) for group in groups]


class Pairs:
    """Counts of pairs of numbers from 1 up by their logarithms, on a grid that becomes coarser when it is full."""

    CELLS = 1000
    FINEST = 16  # cells by which a number doubles

    def __init__(self) -> None:
        self.cells: defaultdict[tuple[int, int], int] = defaultdict(int)
        self.per_doubling = float(self.FINEST)

    def add(self, x: float, y: float) -> None:
        """Count one pair."""
        scale = self.per_doubling
        self.cells[int(math.log2(max(1, x)) * scale), int(math.log2(max(1, y)) * scale)] += 1
        while len(self.cells) > self.CELLS:
            self.per_doubling /= 2
            cells, self.cells = self.cells, defaultdict(int)
            for (i, j), count in cells.items():
                self.cells[i // 2, j // 2] += count

    def points(self) -> list[tuple[float, float, int]]:
        """Middle of each cell, and how many pairs are in it."""
        scale = self.per_doubling
        return [(2 ** ((i + 0.5) / scale), 2 ** ((j + 0.5) / scale), n) for (i, j), n in sorted(self.cells.items())]


class Largest:
    """The few items with the largest numbers, of equal ones the first."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.heap: list[tuple[float, int, Any]] = []
        self.seen = 0

    def wants(self, number: float) -> bool:
        """Whether an item with this number would be kept."""
        return len(self.heap) < self.size or number > self.heap[0][0]

    def add(self, number: float, item: Any) -> None:
        """Keep an item, if it is one of the largest."""
        self.seen += 1
        entry = (number, -self.seen, item)
        if len(self.heap) < self.size:
            heapq.heappush(self.heap, entry)
        else:
            heapq.heappushpop(self.heap, entry)

    def items(self) -> list[Any]:
        """The items, the largest first."""
        return [item for _, _, item in sorted(self.heap, key=lambda entry: entry[:2], reverse=True)]
