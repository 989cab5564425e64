"""What workflows.report counts with stays small, and is as exact as it says."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workflows._report_sketches import Histogram, Largest, Pairs, Timeline, thinned

SECONDS = st.floats(0.001, 1e6) | st.integers(1, 10**6) | st.just(0)
MOMENTS = st.integers(0, 5000) | st.integers(-(10**9), 10**11) | st.floats(0, 1e6)


@settings(deadline=None)
@given(st.lists(SECONDS, min_size=1), st.floats(0, 1))
def test_quantiles_are_within_one_percent(values: list[float], share: float) -> None:
    """Each quantile is within the stated error of the value at that rank."""
    histogram = Histogram()
    for value in values:
        histogram.add(value)
    exact = sorted(values)[max(1, math.ceil(share * len(values))) - 1]
    assert abs(histogram.quantile(share) - exact) <= exact * Histogram.RELATIVE_ERROR * (1 + 1e-9)
    assert Histogram.RELATIVE_ERROR < 0.01
    assert histogram.mean == pytest.approx(sum(values) / len(values))
    assert (histogram.least, histogram.most) == (min(values), max(values))


@settings(deadline=None)
@given(st.lists(st.floats(0, allow_infinity=False)), st.integers(1, 50))
def test_bars_hold_all_values(values: list[float], most: int) -> None:
    """Bars are few, follow each other, and count every value above the least; there are never many bins."""
    histogram = Histogram()
    for value in values:
        histogram.add(value)
    bars = histogram.bars(most)
    assert len(bars) <= most
    assert sum(count for _, _, count in bars) == len(values) - histogram.zeros
    assert all(a[1] == b[0] for a, b in pairwise(bars))
    assert len(histogram.bins) <= 1750


def test_a_histogram_of_nothing() -> None:
    """Without values there is no quantile."""
    assert math.isnan(Histogram().quantile(0.5))
    assert math.isnan(Histogram().mean)
    assert Histogram().bars(5) == []


@settings(deadline=None)
@given(st.lists(st.tuples(MOMENTS, st.integers(0, 100)), max_size=60), st.integers(2, 20))
def test_a_timeline_loses_nothing_when_it_is_merged(events: list[tuple[float, int]], room: int) -> None:
    """However few buckets it may have, and wherever times lie, all amounts are in it."""
    timeline = Timeline()
    timeline.BUCKETS = room
    for time, amount in events:
        timeline.add(time, a=amount, b=1)
    assert len(timeline.buckets) <= room
    width, intervals = timeline.binned(10, ["a", "b"])
    assert sum(amounts[0] for _, amounts in intervals) == sum(amount for _, amount in events)
    assert sum(amounts[1] for _, amounts in intervals) == len(events)
    assert width % timeline.width == 0
    assert timeline.peak("a") <= sum(amount for _, amount in events)
    pauses = timeline.pauses()
    assert all(not a <= time < b for time, _ in events for a, b in pauses)


@settings(deadline=None)
@given(st.lists(st.integers(0, 400), min_size=1, max_size=80))
def test_the_fullest_minute(starts: list[int]) -> None:
    """With buckets of a second the peak is that of any 60 s, and each point counts the 60 s before it."""
    timeline = Timeline()
    for start in starts:
        timeline.add(start + 0.5, started=1)
    counts = Counter(starts)
    windows = [sum(counts[second] for second in range(end - 59, end + 1)) for end in range(500)]
    assert timeline.peak("started") == max(windows)
    points = dict(timeline.per_minute("started"))
    assert all(points[end + 1][0] == count for end, count in enumerate(windows) if end + 1 in points and count)
    assert max(thinned(sorted(points.items()), 7), key=lambda point: point[1])[1] == [max(windows)]
    assert list(points.values())[-1] == [0]


def test_long_runs_have_wider_buckets() -> None:
    """A run of a week is told by the minute or coarser, as a mean per minute, in bounded memory."""
    timeline = Timeline()
    for second in range(0, 7 * 86400, 10):
        timeline.add(second, started=1)
    assert timeline.width == 300
    assert timeline.peak("started") == pytest.approx(6)
    assert len(list(timeline.per_minute("started"))) <= Timeline.BUCKETS + 2


def test_pauses_between_runs_are_cut_out() -> None:
    """Two runs with a night between them: the night is a pause, a minute without starts is none."""
    timeline = Timeline()
    for start in (*range(0, 600, 60), *range(40000, 40600, 60)):
        timeline.add(start, started=1)
    assert timeline.pauses() == [(541, 40000)]
    assert len(timeline.binned(20, ["started"])[1]) == 20


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 10**9), st.integers(0, 10**9)), max_size=300))
def test_pairs_are_few_and_complete(pairs: list[tuple[int, int]]) -> None:
    """The grid becomes coarser, but counts every pair, and each near its place."""
    grid = Pairs()
    grid.CELLS = 20
    for x, y in pairs:
        grid.add(x, y)
    points = grid.points()
    assert len(points) <= 20
    assert sum(count for _, _, count in points) == len(pairs)
    for x, y in pairs:
        factor = 2 ** (0.51 / grid.per_doubling)
        near = [p for p in points if max(p[0] / max(1, x), max(1, x) / p[0]) <= factor]
        assert any(max(p[1] / max(1, y), max(1, y) / p[1]) <= factor for p in near)


@settings(deadline=None)
@given(st.lists(st.integers(0, 20)), st.integers(1, 5))
def test_the_largest_are_kept(numbers: list[int], size: int) -> None:
    """The largest come first, of equal ones the first that was seen."""
    largest = Largest(size)
    for place, number in enumerate(numbers):
        if largest.wants(number):
            largest.add(number, (number, place))
    wanted = sorted(((number, place) for place, number in enumerate(numbers)), key=lambda pair: (-pair[0], pair[1]))
    assert largest.items() == wanted[:size]
