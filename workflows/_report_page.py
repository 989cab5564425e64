"""The page of workflows.report: one HTML file that needs no network, and lets no text from a file become code."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workflows._files import whole_file
from workflows._report_plots import KIND_COLOURS, Plot, plots_of
from workflows._report_summary import (
    QUANTILES,
    attempt_rows,
    caveats,
    figure,
    money,
    parts_of,
    percent,
    period,
    price_words,
)
from workflows._run import optional

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from workflows._report_excerpts import Excerpt
    from workflows._report_numbers import Numbers
    from workflows._report_summary import Summary

START = "<!doctype html><!-- made by workflows.report -->\n"
HERE = Path(__file__).parent
# What HTML cannot hold or a reader cannot see: control characters get their pictures.
VISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"}
VISIBLE |= {127: 0x2421, **dict.fromkeys(range(0x80, 0xA0), 0xFFFD)}
SURROGATES = re.compile("[\ud800-\udfff]")
FACTS = {
    "line": "line",
    "started": "started",
    "attempts": "attempts",
    "refusals": "refusals",
    "estimated_tokens": "estimated tokens",
    "tokens": "tokens",
}


def write_page(path: Path, summary: Summary, numbers: Numbers) -> None:
    """Write the page."""
    plots = plots_of(numbers, summary)
    library = optional("plotly.offline").get_plotlyjs()
    own = (HERE / "_report_page.js").read_text("utf-8")
    data = [{"id": f"plot-{plot.name}", "traces": plot.traces, "layout": plot.layout} for plot in plots.values()]
    scripts = [library, own]
    with whole_file(path) as file:
        file.write(START)
        file.write(head(summary, (HERE / "_report_page.css").read_text("utf-8"), scripts))
        for part in body(summary, numbers, plots):
            file.write(part + "\n")
        file.write(f'<script type="application/json" id="plots">{json_for_html(data)}</script>\n')
        file.writelines(f"<script>{script}</script>\n" for script in scripts)
        file.write("</body>\n</html>\n")


def head(summary: Summary, style: str, scripts: Sequence[str]) -> str:
    """The head; its policy lets the browser load nothing, and run these scripts only."""
    digests = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts)
    hashes = " ".join(f"'sha256-{digest}'" for digest in digests)
    policy = f"default-src 'none'; script-src {hashes}; "
    policy += "style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; form-action 'none'"
    return f"""<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<title>{escaped(Path(summary["results"]).name)} · report</title>
<style>
{style}</style>
</head>
<body>
"""


def body(summary: Summary, numbers: Numbers, plots: dict[str, Plot]) -> Iterator[str]:
    """The parts of the page, in order."""
    sections = {"pace": "Pace", "latency": "Latency", "tokens": "Tokens and cost"}
    sections |= {"failed": "Failed requests", "slowest": "Slowest requests", "about": "About the numbers"}
    yield '<a class="skip" href="#main">Skip to the numbers</a>'
    yield f'<div class="wide">\n<header>\n<h1>{escaped(Path(summary["results"]).name)}</h1>'
    yield f'<p class="when">{escaped(period(summary) or "The file tells no times.")}</p>'
    links = "".join(f'<li><a href="#{name}">{title}</a></li>' for name, title in sections.items())
    yield f'<nav aria-label="Sections"><ul>{links}</ul></nav>\n</header>\n<main id="main">'
    yield '<noscript><p class="note">The plots need JavaScript; all else does not.</p></noscript>'
    yield facts(summary)
    yield section("pace", sections, pace(summary, plots))
    yield section("latency", sections, latency(summary, plots))
    yield section("tokens", sections, tokens(summary, plots))
    yield section("failed", sections, failed(summary, numbers))
    yield section("slowest", sections, slowest(numbers))
    yield "</main>"
    yield f'<footer id="about"><h2>{sections["about"]}</h2><ul>{"".join(notes(summary))}</ul></footer>\n</div>'


def section(name: str, titles: dict[str, str], content: str) -> str:
    """One section under its heading."""
    title = f'<h2 id="{name}-title">{titles[name]}</h2>'
    return f'<section id="{name}" aria-labelledby="{name}-title">{title}{content}</section>'


# ---- sections --------------------------------------------------------------------------------------------------------


def facts(summary: Summary) -> str:
    """The few numbers that everybody asks for, and a bar of how requests ended."""
    total, cost, seconds = summary["requests"], summary["cost"], summary["seconds"]
    share = summary["succeeded"] / max(1, total)
    reasons = ", ".join(row["kind"].replace("_", " ") for row in summary["failures"][:2])
    found = [
        ("Requests", f"{total:,}", f"{summary['succeeded']:,} succeeded ({percent(share)})"),
        ("Failed", f"{summary['failed']:,}", reasons or "none"),
    ]
    if seconds:
        more = f"95 % within {figure(seconds['p95'])} s, longest {figure(seconds['max'])} s"
        found.append(("Median latency", f"{figure(seconds['p50'])} <small>s</small>", more))
    counts = summary["tokens"]
    if counts["input"] or counts["output"]:
        more = f"{figure(counts['input'], whole=True)} in, {figure(counts['output'], whole=True)} out"
        found.append(("Tokens", figure(counts["input"] + counts["output"], whole=True), more))
    if cost["total"] is not None:
        unit = f" ({cost['currency']})" if cost["currency"] else ""
        more = "at least: see below" if cost["incomplete"] else f"{money(cost['total'] / max(1, total))} a request"
        found.append((f"Cost{unit}", money(cost["total"]), more))
    for name, peak in summary["peak_per_minute"].items():
        if peak is not None:
            budget = summary["budget_per_minute"][name]
            more = (
                f"{percent(peak / budget)} of the budget of {budget:,.0f}"
                if budget
                else f"{name} in the fullest minute"
            )
            found.append((f"Peak {name}/min", figure(peak, whole=True), more))
    items = "".join(
        f'<dl class="card fact"><dt>{name}</dt><dd><div class="value">{value}</div>'
        f'<div class="more">{escaped(more)}</div></dd></dl>'
        for name, value, more in found
    )
    return f'<div class="cards">{items}</div>{outcome_bar(summary)}'


def outcome_bar(summary: Summary) -> str:
    """How requests ended, as a bar; the words are in the facts and in the table of failures."""
    parts = [(summary["succeeded"], "--good", "succeeded")]
    parts += [(row["requests"], KIND_COLOURS.get(row["kind"], "--bad"), row["kind"]) for row in summary["failures"][:9]]
    spans = "".join(
        f'<span style="flex:{n} 0 0;background:var({colour})" title="{escaped(words)}: {n:,}"></span>'
        for n, colour, words in parts
        if n
    )
    return f'<div class="bar" aria-hidden="true">{spans}</div>'


def pace(summary: Summary, plots: dict[str, Plot]) -> str:
    """Requests, tokens and errors over time."""
    if "requests" not in plots:
        return '<p class="note">These results have no times. A run with <code>--save_details</code> records them.</p>'
    budgets = summary["budget_per_minute"]
    missing = [f"--max_{name}_per_minute" for name in ("requests", "tokens") if not budgets[name]]
    hint = f"With {' and '.join(missing)}, as the run was told, its budgets are drawn, too." if missing else ""
    hint = f'<p class="note">{hint}</p>' if hint else ""
    none = '<div class="card panel"><h3>Errors over time</h3><p>Nothing failed, was refused or repeated.</p></div>'
    figures = "".join(figure_of(plots[name]) for name in ("requests", "tokens"))
    figures += figure_of(plots["errors"]) if "errors" in plots else none
    return f'{hint}<div class="grid">{figures}{tries(summary)}</div>'


def tries(summary: Summary) -> str:
    """Attempts and refusals as a table."""
    rows = [["", "requests"], *([words, f"{count:,}"] for words, count in attempt_rows(summary))]
    words = "Nothing was refused."
    if summary["refusals"]:
        words = f"{summary['refusals']:,} refusals (rate limits) of {summary['refused_requests']:,} requests besides."
    return f'<div class="card panel"><h3>Attempts</h3><p>{words}</p>{table(rows)}</div>'


def latency(summary: Summary, plots: dict[str, Plot]) -> str:
    """Distribution of seconds."""
    if "latency" not in plots:
        return '<p class="note">Nothing to show: no success tells how long it took.</p>'
    spread = summary["seconds"]
    names = {
        "min": "shortest",
        "mean": "mean",
        **{q: q.replace("p", "") + " % within" for q in QUANTILES},
        "max": "longest",
    }
    rows = [["of successes", "seconds"], *([words, figure(spread[name])] for name, words in names.items())]
    words = f"Percentiles are within 1 % of the exact ones. {spread['count']:,} requests."
    panel = f'<div class="card panel"><h3>Percentiles</h3><p>{words}</p>{table(rows)}</div>'
    return f'<div class="grid">{figure_of(plots["latency"])}{panel}</div>'


def tokens(summary: Summary, plots: dict[str, Plot]) -> str:
    """Tokens and what they cost."""
    counts, per_reply = summary["tokens"], summary["tokens_per_reply"]
    names = ("mean", "p50", "p95", "max")
    rows = [["tokens", "total", *names]]
    parts: list[int] = []
    for side in ("input", "output"):
        spread = per_reply[side]
        rows.append(
            [
                side,
                f"{counts[side]:,}",
                *(figure(spread[name], whole=name != "mean") if spread else "" for name in names),
            ]
        )
        for name, count in parts_of(side, counts):
            parts.append(len(rows))
            rows.append([name, f"{count:,}", percent(count / max(1, counts[side])), "", "", ""])
    panels = f'<div class="card panel"><h3>Tokens per reply</h3>{table(rows, parts=parts)}</div>'
    found = "".join(figure_of(plots[name]) for name in ("estimates", "lengths") if name in plots)
    return f'<div class="grid">{found}{panels}{models(summary)}</div>'


def models(summary: Summary) -> str:
    """Totals by model, with the prices that were taken."""
    rows = [["model", "requests", "input", "cached", "output", "cost"]]
    for row in summary["models"][:12]:
        cost = "unknown" if row["cost"] is None else money(row["cost"])
        amounts = (row["requests"], row["input_tokens"], row["cached_tokens"], row["output_tokens"])
        rows.append([row["model"], *(f"{amount:,}" for amount in amounts), cost])
    words = "; ".join(price_words(summary)[:12])
    return f'<div class="card panel"><h3>Models</h3><p>{escaped(words)}</p>{table(rows)}</div>'


def failed(summary: Summary, numbers: Numbers) -> str:
    """Why requests failed, and some of them to be read."""
    if not summary["failed"]:
        return '<p class="note">None.</p>'
    rows = [["kind", "status", "requests", "for example"]]
    rows += [
        [row["kind"], row["status"] or "", f"{row['requests']:,}", row["example"]] for row in summary["failures"][:20]
    ]
    reasons = f'<div class="card panel">{table(rows, words=3)}</div>'
    found = sorted(numbers.failures, key=lambda excerpt: excerpt.tag)
    count = len(found)
    note = "" if count == summary["failed"] else f"{count:,} of {summary['failed']:,}, some of each kind."
    return f'<div class="stack">{reasons}{items("failed-list", found, note)}</div>'


def slowest(numbers: Numbers) -> str:
    """The slowest requests to be read."""
    found = numbers.slowest.items()
    if not found:
        return '<p class="note">These results have no times.</p>'
    return items("slowest-list", found, f"The {len(found)} that took longest, whether they succeeded or not.")


def notes(summary: Summary) -> Iterator[str]:
    """What must be known to read the numbers right."""
    always = (
        "Of an attempt that was refused or repeated the file has no time: only the first start and the end are known.",
        "Tokens are what replies tell, those in errors included. Cost is tokens times price, tools are not in it.",
    )
    for note in (*caveats(summary), *always):
        yield f"<li>{escaped(note)}</li>"


# ---- pieces ----------------------------------------------------------------------------------------------------------


def figure_of(plot: Plot) -> str:
    """The place of a plot, with its words and its numbers."""
    label = escaped(f"{plot.title}. {plot.caption}")
    return (
        f'<figure class="card"><figcaption><h3>{escaped(plot.title)}</h3><p>{escaped(plot.caption)}</p></figcaption>'
        f'<div class="plot" id="plot-{plot.name}" role="img" aria-label="{label}"></div>'
        f'<details class="data"><summary>Numbers of this plot</summary>{table(plot.table)}</details></figure>'
    )


def table(rows: Sequence[Sequence[str]], *, parts: Sequence[int] = (), words: int | None = None) -> str:
    """A table; `parts` are rows that belong to the one above them, `words` is a column of text."""

    def mark(column: int) -> str:
        return ' class="words"' if column == words else ""

    top = "".join(f'<th scope="col"{mark(i)}>{escaped(cell)}</th>' for i, cell in enumerate(rows[0]))
    lines = []
    for number, (first, *rest) in enumerate(rows[1:], 1):
        cells = "".join(f"<td{mark(i)}>{escaped(cell)}</td>" for i, cell in enumerate(rest, 1))
        part = ' class="part"' if number in parts else ""
        lines.append(f'<tr{part}><th scope="row">{escaped(first)}</th>{cells}</tr>')
    inside = f"<thead><tr>{top}</tr></thead><tbody>{''.join(lines)}</tbody>"
    label = f'tabindex="0" role="region" aria-label="{escaped(rows[0][0])}"'
    return f'<div class="scroll" {label}><table>{inside}</table></div>'


def items(name: str, excerpts: Sequence[Excerpt], note: str) -> str:
    """Requests that open when they are clicked."""
    button = f'<button type="button" data-list="{name}" hidden>Open all</button>'
    inside = "".join(item(excerpt) for excerpt in excerpts)
    top = f'<div class="head"><p class="note">{escaped(note)}</p>{button}</div>'
    return f'<div>{top}<div class="card items" id="{name}">{inside}</div></div>'


def item(excerpt: Excerpt) -> str:
    """One request."""
    known = excerpt.facts
    bad = " bad" if excerpt.failed else ""
    seconds = f"{figure(float(known['seconds']))} s" if isinstance(known.get("seconds"), int | float) else ""
    facts = "".join(
        f"<div><dt>{words}</dt><dd>{escaped(shown(known[fact]))}</dd></div>"
        for fact, words in FACTS.items()
        if fact in known
    )
    texts = "".join(
        f'<h4>{title}</h4><pre tabindex="0">{escaped(text)}</pre>' for title, text in excerpt.sections.items()
    )
    return (
        f'<details class="item"><summary><span class="tag{bad}">{escaped(excerpt.tag)}</span>'
        f'<span class="headline">{escaped(excerpt.headline)}</span><span class="seconds">{seconds}</span></summary>'
        f'<div class="body"><dl class="facts">{facts}</dl>{texts}</div></details>'
    )


def shown(value: Any) -> str:
    """A fact as text."""
    return f"{value:,}" if isinstance(value, int) else str(value)


def escaped(text: str) -> str:
    """Foreign text for a page: its marks are no tags, what cannot be seen is shown."""
    text = text.replace("\r\n", "\n").translate(VISIBLE)
    return html.escape(SURROGATES.sub("\N{REPLACEMENT CHARACTER}", text))


def json_for_html(value: Any) -> str:
    """JSON that can stand in a script element: without any character that could end it."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
