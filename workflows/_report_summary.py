"""The numbers of workflows.report as one JSON object, and as text for a terminal."""

from __future__ import annotations

import math
import textwrap
from bisect import bisect_right
from datetime import UTC, datetime
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from api_request_parallel_processor import duration
from workflows._files import columns_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from workflows._report_numbers import Numbers
    from workflows._report_sketches import Histogram

Summary = dict[str, Any]
Budgets = tuple[float, float]  # requests and tokens per minute; 0 = not told
QUANTILES = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99}
SPECIAL = {  # how tokens with a name of their own are shown, below those that they are a part of
    "cache_read": "cached",
    "cache_write": "written to cache",
    "cache_write_1h": "for an hour",
    "output_reasoning": "reasoning",
}
INSTALL = "pip install genai-prices, which knows list prices"
WIDTH = 80
MOST_ROWS = 12  # of reasons and models


# ---- the object ------------------------------------------------------------------------------------------------------


def summarize(numbers: Numbers, left_out: int, budgets: Budgets) -> Summary:
    """All numbers as JSON; what is not known is null."""
    tokens = {name: numbers.total(field) for name, field in (("input", "prompt"), ("output", "output"))}
    attempts = {str(n): count for n, count in sorted(numbers.attempts.items())}
    timeline = numbers.timeline
    return {
        "requests": numbers.requests,
        "succeeded": numbers.succeeded,
        "failed": numbers.failed,
        "not_whole": dict(numbers.ends.most_common()),
        "failures": failures_of(numbers),
        "failed_lines_made_up_for": numbers.made_up,
        "lines_left_out": left_out,
        "began": iso(numbers.began),
        "ended": iso(numbers.ended),
        "busy_seconds": round(numbers.busy_seconds, 3) if numbers.timed else None,
        "lines_with_times": numbers.timed,
        "lines_without_times": numbers.lines - numbers.timed - numbers.unsent,
        "seconds": distribution(numbers.seconds),
        "attempts": attempts,
        "refusals": numbers.refusals,
        "refused_requests": numbers.refused,
        "tokens": {**tokens, **dict(sorted(numbers.special.items()))},
        "tokens_per_reply": {"input": distribution(numbers.prompt), "output": distribution(numbers.output)},
        "replies_without_tokens": numbers.silent,
        "estimated_by_actual_tokens": distribution(numbers.ratio),
        "cost": cost_of(numbers),
        "credits": numbers.credits or None,
        "models": models_of(numbers),
        "peak_per_minute": {
            "requests": timeline.peak("started") if numbers.timed else None,
            "tokens": timeline.peak("prompt", "output") if numbers.timed else None,
        },
        "budget_per_minute": {"requests": budgets[0] or None, "tokens": budgets[1] or None},
    }


def distribution(histogram: Histogram) -> Summary | None:
    """Mean, quantiles and extremes; null if there are no values."""
    if not histogram.count:
        return None
    quantiles = {name: histogram.quantile(share) for name, share in QUANTILES.items()}
    ends = {"min": histogram.least, "p05": histogram.quantile(0.05)}
    return {"count": histogram.count, "mean": histogram.mean, **ends, **quantiles, "max": histogram.most}


def failures_of(numbers: Numbers) -> list[Summary]:
    """Reasons of failures, the most frequent first."""
    found = [
        {"kind": kind, "status": status or None, "requests": reason.requests, "example": reason.example}
        for (kind, status), reason in numbers.reasons.items()
    ]
    return sorted(found, key=lambda row: -int(row["requests"] or 0))


def models_of(numbers: Numbers) -> list[Summary]:
    """Totals of the models, those with the most tokens first."""
    found = [
        {
            "model": name,
            "requests": totals.requests,
            "input_tokens": totals.prompt,
            "cached_tokens": totals.cached,
            "output_tokens": totals.output,
            "cost": None if totals.unpriced else totals.cost,
        }
        for name, totals in numbers.models.items()
    ]
    return sorted(found, key=lambda row: -int(row["input_tokens"]) - int(row["output_tokens"]))


def cost_of(numbers: Numbers) -> Summary:
    """What it cost, as far as that is known."""
    bill, unpriced = numbers.bill, {name: t.unpriced for name, t in numbers.models.items() if t.unpriced}
    known = any(totals.replies > totals.unpriced for totals in numbers.models.values())
    return {
        "total": numbers.cost if known else None,
        "of_failures": numbers.cost_of_failures if known else None,
        "currency": None if bill.given else "USD",
        "incomplete": bool(unpriced or numbers.untold or numbers.silent),
        "replies_without_price": unpriced,
        "attempts_not_in_the_file": numbers.untold,
        "list_prices": bill.available,
        "prices": {label: dict(tariffs.steps[0].per_million) for label, tariffs in bill.used.items()},
    }


def iso(seconds: float | None) -> str | None:
    """A time as text, in UTC; null if there is none."""
    if seconds is None:
        return None
    try:
        return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
    except (OverflowError, ValueError, OSError):
        return None


# ---- words for the terminal and the page -----------------------------------------------------------------------------


def period(summary: Summary) -> str:
    """When the run was and how long it took; "" if the file does not tell."""
    if not (summary["began"] and summary["ended"]):
        return ""
    began, ended = (datetime.fromisoformat(summary[name]) for name in ("began", "ended"))
    days = "" if began.date() == ended.date() else f"{ended:%Y-%m-%d} "
    whole = (ended - began).total_seconds()
    busy = summary["busy_seconds"]
    without = f", {duration(busy)} without pauses" if busy < whole - 60 else ""
    return f"{began:%Y-%m-%d %H:%M:%S} to {days}{ended:%H:%M:%S} UTC, {duration(whole)}{without}"


def attempt_rows(summary: Summary) -> list[tuple[str, int]]:
    """How many requests took how many attempts; many attempts are counted together."""
    counts = sorted((int(n), count) for n, count in summary["attempts"].items())
    found = [("never sent" if n == 0 else f"{n} attempt{'s' * (n > 1)}", count) for n, count in counts[:5]]
    if more := counts[5:]:
        found.append((f"{more[0][0]} and more", sum(count for _, count in more)))
    return found


def parts_of(side: str, counts: dict[str, int]) -> Iterator[tuple[str, int]]:
    """The special tokens of the input or of the output, as a reader knows them."""
    for name, count in counts.items():
        if name.startswith((f"{side}_", "cache_") if side == "input" else f"{side}_"):
            yield SPECIAL.get(name, name.removeprefix(f"{side}_")), count


def price_words(summary: Summary) -> list[str]:
    """The list prices that were taken."""
    shown = {"input": "in", "cache_read": "cached", "output": "out"}
    found = []
    for label, prices in summary["cost"]["prices"].items():
        words = (f"{prices[name]:g} {word}" for name, word in shown.items() if name in prices)
        found.append(f"{label}: {', '.join(words)} per million")
    return found


def caveats(summary: Summary) -> Iterator[str]:
    """What must be known about this file to read its numbers right."""
    cost = summary["cost"]
    if count := summary["failed_lines_made_up_for"]:
        yield f"{count:,} failed lines of earlier tries count only for pace, attempts, tokens and cost."
    if count := summary["lines_left_out"]:
        yield f"Lines left out, since they are no result lines: {count:,}."
    if summary["lines_with_times"] and (count := summary["lines_without_times"]):
        yield f"{count:,} lines have no times; --save_details records them."
    if count := summary["replies_without_tokens"]:
        yield f"{count:,} replies do not tell their tokens; they are in no sum and no cost."
    if unpriced := cost["replies_without_price"]:
        names = ", ".join(list(unpriced)[:3]) + (", ..." if len(unpriced) > 3 else "")
        look = "say where the requests went with --request_url or --provider" if cost["list_prices"] else INSTALL
        yield f"No price is known for {names}: give --input_price and --output_price, or {look}."
    if (count := cost["attempts_not_in_the_file"]) and cost["total"] is not None:
        yield f"{count:,} attempts before a success are not in the file; if they were charged, it cost more."
    if summary["credits"]:
        yield f"The gateway took {summary['credits']:,g} credits."


# ---- the text --------------------------------------------------------------------------------------------------------


def as_text(summary: Summary, path: str) -> str:
    """The numbers for a terminal of 80 columns."""
    parts = [heading(summary, path), outcome(summary), tries(summary), latency(summary), tokens(summary)]
    notes = (textwrap.fill(plain(note), WIDTH, subsequent_indent="  ") for note in caveats(summary))
    parts += [peaks(summary), bill(summary), notes]
    return "\n\n".join("\n".join(lines) for part in parts if (lines := list(part)))


def heading(summary: Summary, path: str) -> Iterator[str]:
    """Name of the file and time of the run."""
    yield plain(path)
    yield from textwrap.wrap(period(summary), WIDTH, subsequent_indent="  ")


def outcome(summary: Summary) -> Iterator[str]:
    """Requests by how they ended."""
    total = summary["requests"]
    yield row("Requests", f"{total:,}")
    yield share("  succeeded", summary["succeeded"], total)
    for name, count in summary["not_whole"].items():
        yield share(f"    {name}", count, total)
    yield share("  failed", summary["failed"], total)
    for reason in summary["failures"][:MOST_ROWS]:
        label = " ".join(filter(None, (reason["kind"], reason["status"])))
        yield fitted(f"{share(f'    {label}', reason['requests'], total)}  {plain(reason['example'])}")
    if more := summary["failures"][MOST_ROWS:]:
        yield share("    other reasons", sum(reason["requests"] for reason in more), total)


def tries(summary: Summary) -> Iterator[str]:
    """Attempts and refusals."""
    if not summary["attempts"]:
        return
    counts = {int(n): count for n, count in summary["attempts"].items()}
    yield row("Attempts", f"{sum(n * count for n, count in counts.items()):,}")
    for words, count in attempt_rows(summary):
        yield share(f"  {words}", count, sum(counts.values()))
    of = f"  of {summary['refused_requests']:,} requests" if summary["refusals"] else ""
    yield row("Refusals", f"{summary['refusals']:,}", of)


def latency(summary: Summary) -> Iterator[str]:
    """Seconds from the first start to the result."""
    if summary["seconds"]:
        names = ("mean", *QUANTILES, "max")
        yield row("Seconds of successes", "", columns(names))
        yield row("  first start to result", "", columns([figure(summary["seconds"][name]) for name in names]))
    elif summary["requests"]:
        yield (
            "No success tells how long it took."
            if summary["began"]
            else "No times in this file: a run with --save_details records them."
        )


def tokens(summary: Summary) -> Iterator[str]:
    """Tokens in total and per reply."""
    counts, per_reply = summary["tokens"], summary["tokens_per_reply"]
    if not (counts["input"] or counts["output"]):
        return
    names = ("mean", *QUANTILES, "max")
    yield row("Tokens", "total", columns(names))
    for side in ("input", "output"):
        spread = per_reply[side]
        yield row(
            f"  {side}",
            f"{counts[side]:,}",
            columns([figure(spread[name], whole=name != "mean") for name in names]) if spread else "",
        )
        for name, count in parts_of(side, counts):
            yield row(f"    {name}", f"{count:,}", f"{percent(count / max(1, counts[side])):>9} of {side}")
    if ratio := summary["estimated_by_actual_tokens"]:
        yield row("  estimated / actual", "", columns([f"{ratio[name]:.2f}" for name in names]))


def bill(summary: Summary) -> Iterator[str]:
    """What it cost."""
    cost = summary["cost"]
    if cost["total"] is not None:
        unit = f" {cost['currency']}" if cost["currency"] else ""
        failed = f", {money(cost['of_failures'])} of it for failed attempts" if cost["of_failures"] else ""
        yield f"Cost: {'at least ' * cost['incomplete']}{money(cost['total'])}{unit}{failed}"
    for words in price_words(summary)[:MOST_ROWS]:
        yield plain(f"  {words}")


def peaks(summary: Summary) -> Iterator[str]:
    """The fullest minute, against the budgets."""
    for name, peak in summary["peak_per_minute"].items():
        if peak is not None:
            budget = summary["budget_per_minute"][name]
            of = f"{percent(peak / budget):>9} of the budget of {budget:,.0f}" if budget else ""
            yield row(f"Most {name} a minute", f"{peak:,.0f}", of)


def row(label: str, number: str, rest: str = "") -> str:
    """One line of the table: its label, a number in the same place, what follows."""
    return f"{label:<24}{number:>11}{rest}".rstrip()


def share(label: str, count: int, total: int) -> str:
    """One line with a count and its share."""
    label = label if len(label) <= 23 else label[:22] + "…"
    return plain(row(label, f"{count:,}", f"{percent(count / max(1, total)):>9}"))


def columns(cells: Sequence[str]) -> str:
    """Cells below each other, right of the numbers."""
    return "".join(f"{cell:>7}" for cell in cells)


def percent(share: float) -> str:
    """A share; 100 % and 0 % are all and nothing."""
    text = f"{100 * share:.1f} %"
    return {"100.0 %": "100 %" if share == 1 else "> 99.9 %", "0.0 %": "< 0.1 %" if share else "0 %"}.get(text, text)


def figure(value: float, *, whole: bool = False) -> str:
    """A number in at most six characters: 0.1234 -> "0.123", 1234.5 -> "1,234", 1234567 -> "1.23M"."""
    if not math.isfinite(value):
        return "-"
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e5, "k")):
        if value >= unit:
            return f"{value / min(unit, 1e3 if letter == 'k' else unit):.3g}{letter}"
    if whole or value >= 99.95 or value == 0:
        return f"{value:,.0f}"
    return f"{value:.{3 if value < 1 else 2 if value < 9.995 else 1}f}"


def money(value: float) -> str:
    """An amount of money, with the digits that say something."""
    return f"{value:,.2f}" if value >= 100 else f"{value:.4f}" if value >= 0.01 else f"{value:.3g}"


def fitted(text: str) -> str:
    """A line cut to the width of the terminal, on which Chinese characters take two columns."""
    places = list(accumulate(map(columns_of, text)))
    if not places or places[-1] <= WIDTH:
        return text
    return text[: bisect_right(places, WIDTH - 1)] + "…"


def plain(text: str) -> str:
    """Foreign text without what moves a terminal's cursor or changes its colours."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
