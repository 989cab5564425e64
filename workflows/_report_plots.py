"""The plots of workflows.report as data for plotly.js; colours are names of variables of the page's style sheet."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from api_request_parallel_processor import duration
from workflows._report_sketches import Histogram, thinned
from workflows._report_summary import figure

if TYPE_CHECKING:
    from collections.abc import Sequence

    from workflows._report_numbers import Numbers
    from workflows._report_summary import Summary

Json = dict[str, Any]
CURVE_POINTS, INTERVALS, BARS, ROWS = 500, 90, 70, 40
KIND_COLOURS = {
    "rate_limit": "--orange",
    "server_error": "--red",
    "timeout": "--purple",
    "connection": "--sky",
    "content_filter": "--pink",
    "bad_request": "--brown",
    "bad_reply": "--olive",
    "bad_line": "--grey",
    "too_large": "--teal",
}


@dataclass(frozen=True, slots=True)
class Plot:
    """One plot with its words: `table` has the same numbers, for those who cannot see it."""

    name: str
    title: str
    caption: str
    traces: list[Json]
    layout: Json
    table: list[list[str]]  # its first row is the head


def plots_of(numbers: Numbers, summary: Summary) -> dict[str, Plot]:
    """All plots for which the file has numbers, by their names."""
    found: list[Plot] = []
    if numbers.timed:
        budgets = summary["budget_per_minute"]
        found += [requests_plot(numbers, budgets["requests"]), tokens_plot(numbers, budgets["tokens"])]
        found += [plot for plot in [errors_plot(numbers)] if plot.traces]
    if numbers.seconds.bins:
        found.append(latency_plot(numbers.seconds))
    if numbers.estimates.cells:
        found.append(estimates_plot(numbers))
    if numbers.prompt.bins or numbers.output.bins:
        found.append(lengths_plot(numbers))
    return {plot.name: plot for plot in found}


# ---- over time -------------------------------------------------------------------------------------------------------


def requests_plot(numbers: Numbers, budget: float | None) -> Plot:
    """Requests that started and that finished, per minute."""
    points = {name: thinned(list(numbers.timeline.per_minute(name)), CURVE_POINTS) for name in ("started", "finished")}
    traces = [
        curve("started", points["started"], 0, line={"color": "--blue", "width": 2}, fill="tozeroy"),
        curve("finished", points["finished"], 0, line={"color": "--teal", "width": 1.5, "dash": "dot"}),
    ]
    traces[0]["fillcolor"] = "--blue-soft"
    caption = f"Counted {window_words(numbers)}, at their first start and at their end."
    peak = max((amounts[0] for one in points.values() for _, amounts in one), default=0)
    table = [["UTC", "started"]]
    table += [[utc(time), f"{amounts[0]:,.0f}"] for time, amounts in thinned(points["started"], ROWS)]
    return Plot("requests", "Requests per minute", caption, traces, time_layout(numbers, peak, budget), table)


def tokens_plot(numbers: Numbers, budget: float | None) -> Plot:
    """Tokens of the requests that started, per minute."""
    points = thinned(list(numbers.timeline.per_minute("prompt", "output")), CURVE_POINTS)
    colours = (("input", "--blue", "--blue-soft"), ("output", "--teal", "--teal-soft"))
    traces = [
        {**curve(name, points, i, line={"color": line, "width": 1.5}), "stackgroup": "tokens", "fillcolor": fill}
        for i, (name, line, fill) in enumerate(colours)
    ]
    caption = f"What the replies say they used, {window_words(numbers)}, at the first start of their request."
    peak = max((sum(amounts) for _, amounts in points), default=0)
    table = [["UTC", "input", "output"]]
    table += [[utc(time), *(f"{amount:,.0f}" for amount in amounts)] for time, amounts in thinned(points, ROWS)]
    return Plot("tokens", "Tokens per minute", caption, traces, time_layout(numbers, peak, budget), table)


def errors_plot(numbers: Numbers) -> Plot:
    """Failed requests by kind, refusals and repeated attempts."""
    there = {name.removeprefix("failed ") for name in numbers.timeline.names() if name.startswith("failed ")}
    kinds = [kind for kind in KIND_COLOURS if kind in there]
    others = sorted(there.difference(kinds))  # kinds that this program does not know
    names = [*(f"failed {kind}" for kind in (*kinds, *others)), "refusals", "repeats"]
    width, found = numbers.timeline.binned(INTERVALS, names)
    first, last = len(kinds), len(kinds) + len(others)
    intervals = [(time, [*row[:first], sum(row[first:last]), *row[last:]]) for time, row in found]
    shown = {kind: KIND_COLOURS[kind] for kind in kinds} | {"other kinds": "--blue"}
    shown |= {"refusals": "--pale", "repeated attempts": "--muted"}
    traces: list[Json] = []
    for i, (name, colour) in enumerate(shown.items()):
        if rows := [(time, amounts[i]) for time, amounts in intervals if amounts[i]]:
            bar = {"type": "bar", "name": name, "width": 1000 * width * 0.92, "marker": {"color": colour}}
            traces.append({**bar, "x": [1000 * (time + width / 2) for time, _ in rows], "y": [n for _, n in rows]})
    caption = f"Per {duration(width)}: failed requests when they ended; refusals and repeated attempts when their"
    caption += " request first started."
    peak = max((sum(amounts) for _, amounts in intervals), default=0)
    layout = {**time_layout(numbers, peak), "barmode": "stack", "bargap": 0, "showlegend": True}
    table = [["UTC", *shown], *([utc(time), *(f"{n:,.0f}" for n in amounts)] for time, amounts in intervals[:ROWS])]
    return Plot("errors", "Errors over time", caption, traces, layout, table)


def curve(name: str, points: Sequence[tuple[float, list[float]]], which: int, **more: Any) -> Json:
    """A line over time."""
    x, y = [1000 * time for time, _ in points], [round(amounts[which], 3) for _, amounts in points]
    return {"type": "scatter", "mode": "lines", "name": name, "x": x, "y": y, "hovertemplate": "%{y:,.0f}", **more}


def window_words(numbers: Numbers) -> str:
    """What a point of a curve is about."""
    width = numbers.timeline.width
    return "over the 60 s before each moment" if width <= 60 else f"as the mean of each {duration(width)}"


def time_layout(numbers: Numbers, peak: float, budget: float | None = None) -> Json:
    """The axes of a plot over time up to a peak: pauses between runs are cut out, a budget is a line."""
    pauses = numbers.timeline.pauses()
    breaks = [{"bounds": [1000 * (a + 60), 1000 * (b - 1)]} for a, b in pauses if b - a > 120]
    axis: Json = {"type": "date", "title": {"text": "UTC"}, "rangebreaks": breaks, "hoverformat": "%Y-%m-%d %H:%M:%S"}
    if numbers.began is not None and numbers.ended is not None:
        margin = max(1.0, numbers.busy_seconds / 50)
        axis["range"] = [1000 * (numbers.began - margin), 1000 * (numbers.ended + margin)]
    layout: Json = {"xaxis": axis, "yaxis": count_axis(max(peak, budget or 0)), "hovermode": "x unified"}
    shapes = [line_shape(x=1000 * (b - 1), dash="dot", colour="--grey") for _, b in pauses]
    notes = [
        {
            "x": 1000 * (b - 1),
            "y": 0,
            "yref": "paper",
            "bgcolor": "--card",
            "text": f"after {duration(b - a)}",
            "showarrow": False,
        }
        | {"font": {"color": "--muted", "size": 11}, "xanchor": "left", "yanchor": "bottom", "xshift": 3}
        for a, b in pauses * (len(pauses) < 5)
    ]
    if budget:
        shapes.append(line_shape(y=budget, dash="dash", colour="--orange"))
        text = {"text": f"budget {budget:,.0f}", "font": {"color": "--orange", "size": 12}, "showarrow": False}
        notes.append({**text, "x": 1, "xref": "paper", "xanchor": "right", "y": budget, "yanchor": "bottom"})
    return {**layout, "shapes": shapes, "annotations": notes}


def line_shape(*, x: float | None = None, y: float | None = None, dash: str, colour: str) -> Json:
    """A line across the plot at x or at y."""
    across = {"xref": "paper", "x0": 0, "x1": 1, "y0": y, "y1": y}
    along = {"yref": "paper", "y0": 0, "y1": 1, "x0": x, "x1": x}
    return {"type": "line", **(along if y is None else across), "line": {"color": colour, "width": 1.5, "dash": dash}}


def utc(time: float) -> str:
    """A time in a table."""
    try:
        return f"{datetime.fromtimestamp(time, UTC):%Y-%m-%d %H:%M:%S}"
    except (OverflowError, ValueError, OSError):
        return "-"


# ---- distributions ---------------------------------------------------------------------------------------------------


def latency_plot(seconds: Histogram) -> Plot:
    """Seconds of successes, with quantiles."""
    caption = "Of requests that succeeded, from the first start to the result, pauses and repeated attempts included."
    layout = log_layout("seconds", seconds)
    marks = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
    low, high = layout["xaxis"]["range"]
    layout["shapes"] = [line_shape(x=seconds.quantile(q), dash="dot", colour="--text") for q in marks.values()]
    layout["annotations"] = []
    for i, (name, q) in enumerate(marks.items()):
        x = math.log10(max(seconds.quantile(q), Histogram.LEAST))
        left = x > (low + 2 * high) / 3  # no room to the right
        place = {"x": x, "y": 1 - 0.1 * i, "yref": "paper", "yanchor": "top", "showarrow": False}
        place |= {"xanchor": "right", "xshift": -3} if left else {"xanchor": "left", "xshift": 3}
        words = {"text": f"{name} {figure(seconds.quantile(q))} s", "font": {"size": 11, "color": "--text"}}
        layout["annotations"].append({**place, **words, "bgcolor": "--card"})
    layout["showlegend"] = False
    trace = steps("requests", seconds, "--blue", "--blue-soft", "s")
    return Plot("latency", "Distribution", caption, [trace], layout, bars_table("seconds", {"requests": seconds}))


def lengths_plot(numbers: Numbers) -> Plot:
    """Tokens of prompts and of outputs."""
    found = {"input": numbers.prompt, "output": numbers.output}
    colours = {"input": ("--blue", "--blue-soft"), "output": ("--teal", "--teal-soft")}
    traces = [steps(name, one, *colours[name], "tokens") for name, one in found.items() if one.bins]
    caption = "Of replies that succeeded, as they tell it themselves."
    layout = log_layout("tokens", *found.values())
    return Plot("lengths", "Token lengths", caption, traces, layout, bars_table("tokens", found))


def estimates_plot(numbers: Numbers) -> Plot:
    """Estimated against actual tokens, each dot the requests around it."""
    points = numbers.estimates.points()
    most = max(n for _, _, n in points)
    sizes = [round(4 + 14 * math.sqrt(n / most), 1) if most > 1 else 6 for _, _, n in points]
    dots: Json = {"type": "scatter", "mode": "markers", "name": "requests", "x": [round(x, 1) for x, _, _ in points]}
    dots |= {"y": [round(y, 1) for _, y, _ in points], "customdata": [n for _, _, n in points]}
    dots |= {"marker": {"size": sizes, "color": "--blue", "opacity": 0.5, "line": {"width": 0}}}
    dots["hovertemplate"] = (
        "%{customdata:,} requests<br>estimated about %{x:,.0f}<br>actual about %{y:,.0f}<extra></extra>"
    )
    low, high = (f(min(x, y) if f is min else max(x, y) for x, y, _ in points) for f in (min, max))
    ideal: Json = {"type": "scatter", "mode": "lines", "name": "as estimated", "x": [low, high], "y": [low, high]}
    ideal |= {"line": {"color": "--orange", "width": 1.5, "dash": "dash"}, "hoverinfo": "skip"}
    ratio = numbers.ratio
    caption = f"Before the request started, and as charged. Half of the estimates are at most {ratio.quantile(0.5):.2f}"
    caption += f" of what was charged, 90 % lie between {ratio.quantile(0.05):.2f} and {ratio.quantile(0.95):.2f}."
    axes = {"xaxis": log_axis("estimated tokens", low, high), "yaxis": log_axis("actual tokens", low, high)}
    layout = {**axes, "hovermode": "closest"}
    top = sorted(points, key=lambda point: -point[2])[:ROWS]
    table = [["estimated", "actual", "requests"], *([f"{x:,.0f}", f"{y:,.0f}", f"{n:,}"] for x, y, n in top)]
    return Plot("estimates", "Estimated and actual tokens", caption, [ideal, dots], layout, table)


def steps(name: str, histogram: Histogram, line: str, fill: str, unit: str) -> Json:
    """A distribution as a stepped area; plotly's bars do not fit a logarithmic axis."""
    bars = histogram.bars(BARS)
    words = [f"{figure(low)} to {figure(high)} {unit}: {count:,}" for low, high, count in bars]
    x = [bars[0][0], *(low for low, _, _ in bars), bars[-1][1]]
    trace: Json = {"type": "scatter", "mode": "lines", "name": name, "x": x, "y": [0, *(n for _, _, n in bars), 0]}
    trace |= {"line": {"shape": "hv", "color": line, "width": 1.5}, "fill": "tozeroy", "fillcolor": fill}
    return {**trace, "text": ["", *words, ""], "hovertemplate": "%{text}<extra></extra>"}


def bars_table(unit: str, histograms: dict[str, Histogram]) -> list[list[str]]:
    """Distributions as a table of their quantiles."""
    shares = {"minimum": 0.0, "p5": 0.05, "p25": 0.25, "median": 0.5, "p75": 0.75, "p95": 0.95, "p99": 0.99}
    rows = [[name, *(figure(one.quantile(q)) for one in histograms.values())] for name, q in shares.items()]
    return [[unit, *histograms], *rows, ["maximum", *(figure(one.most) for one in histograms.values())]]


def log_layout(unit: str, *histograms: Histogram) -> Json:
    """The axes of distributions."""
    ends = [end for one in histograms for low, high, _ in one.bars(BARS) for end in (low, high)]
    return {
        "xaxis": log_axis(unit, min(ends), max(ends)),
        "yaxis": count_axis(max(n for one in histograms for _, _, n in one.bars(BARS))),
        "hovermode": "closest",
    }


def count_axis(peak: float) -> Json:
    """An axis of counts from 0 up to a peak; there are no fractions of a request."""
    return {"range": [0, max(1, 1.12 * peak)], "tickformat": ",~s", **({"dtick": 1} if peak < 6 else {})}


def log_axis(title: str, low: float, high: float) -> Json:
    """A logarithmic axis with ticks at 1, 2 and 5, or at 1 alone if it is long."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    digits = (1, 2, 5) if last - first < 4 else (1,)
    ticks = [digit * 10.0**power for power in range(first, last + 1) for digit in digits]
    if sum(low <= tick <= high for tick in ticks) < 2:
        ticks = [low, high]
    shown = {"tickvals": ticks, "ticktext": [f"{t:.3g}" if t < 1000 else figure(t, whole=True) for t in ticks]}
    margin = max(0.02, 0.03 * math.log10(high / low))
    ends = [math.log10(low) - margin, math.log10(high) + margin]
    return {"type": "log", "title": {"text": title}, **shown, "range": ends}
