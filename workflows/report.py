"""Numbers of any results file, and one page with plots that needs no network.

    python -m workflows.report results/mine_results.jsonl
    python -m workflows.report results/mine_results.jsonl --html report.html --max_requests_per_minute 500

Counts by outcome and kind of error, attempts, latency, tokens, cost. Times and plots of them need results that were
made with --save_details. Prices are those given, else the list prices of the package genai-prices, by model; failed
attempts are counted as far as the file knows them. The page needs the package plotly: pip install plotly genai-prices
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from api_request_parallel_processor import LOGGER, PROVIDERS, UsageError, dumps
from workflows import _run
from workflows._files import refuse_foreign
from workflows._prices import Bill, Tariff
from workflows._report_numbers import Numbers
from workflows._report_page import START, write_page
from workflows._report_summary import as_text, summarize
from workflows._requests import endpoint_of
from workflows._results import Result, Results

if TYPE_CHECKING:
    import argparse

LINES_PER_NOTICE = 200_000  # so that a large file shows signs of life


def bill_of(arguments: argparse.Namespace) -> Bill:
    """How replies are priced, as the flags say."""
    named = {
        "input": arguments.input_price,
        "output": arguments.output_price,
        "cache_read": arguments.cached_input_price or None,
    }
    given = {name: price for name, price in named.items() if price is not None}
    if given and not given.keys() & {"input", "output"}:
        raise UsageError("--cached_input_price goes with --input_price: give both")
    if any(not 0 <= price < 1e9 for price in given.values()):
        raise UsageError("a price is money per million tokens: give a number from 0 up")
    url = endpoint_of(arguments.request_url, "") if arguments.request_url else ""
    return Bill(Tariff(given) if given else None, url, arguments.provider, arguments.batch)


def count(path: Path, bill: Bill) -> tuple[Numbers, int]:
    """Read a results file once; gives the numbers, and how many lines were left out."""
    numbers = Numbers(bill)

    def see(result: Result) -> None:
        numbers.see(result)
        if numbers.lines % LINES_PER_NOTICE == 0:
            LOGGER.info("%s lines read", f"{numbers.lines:,}")

    results = Results(path, see)
    for result in results.failures():
        numbers.settle(result)
    results.close()
    return numbers, results.left_out


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = _run.new_parser(__doc__)
    parser.add_argument("results", type=Path, help="results file")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with plots, too")
    parser.add_argument("--json", action="store_true", help="print the numbers as one JSON object instead")
    parser.add_argument("--max_requests_per_minute", type=float, default=0, metavar="N", help="the budget of the run")
    parser.add_argument("--max_tokens_per_minute", type=float, default=0, metavar="N", help="the budget of the run")
    parser.add_argument("--input_price", type=float, metavar="P", help="price of a million input tokens")
    parser.add_argument("--output_price", type=float, metavar="P", help="price of a million output tokens")
    parser.add_argument("--cached_input_price", type=float, metavar="P", help="of those read from a cache; 0 = as all")
    parser.add_argument("--request_url", default="", metavar="URL", help="where the requests went, for list prices")
    parser.add_argument("--provider", default="auto", choices=["auto", *PROVIDERS], metavar="NAME", help="the same")
    parser.add_argument("--batch", action="store_true", help="they went through a Batch API: its list prices")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Print the numbers, write the page."""
    arguments = build_parser().parse_args(argv)
    if arguments.html:
        if arguments.html.exists() and arguments.html.samefile(arguments.results):
            raise UsageError(f"{arguments.html} is the results file: name another file")
        refuse_foreign(arguments.html, START)
        _run.optional("plotly")
    bill = bill_of(arguments)
    budgets = (arguments.max_requests_per_minute, arguments.max_tokens_per_minute)
    if not all(0 <= budget < math.inf for budget in budgets):
        raise UsageError("a budget is a number from 0 up, as the processor was given it")
    numbers, left_out = count(arguments.results, bill)
    summary = {"results": str(arguments.results), **summarize(numbers, left_out, budgets)}
    if arguments.json:
        print(dumps(summary).decode())
    else:
        print(as_text(summary, str(arguments.results)))
    if arguments.html:
        write_page(arguments.html, summary, numbers)
        size = arguments.html.stat().st_size / 1e6
        LOGGER.info("The page is in %s (%.1f MB).", arguments.html, size)
    return 0


if __name__ == "__main__":
    raise SystemExit(_run.main_program(main))
