"""Make a table of any results file: the metadata's fields, answer, reasoning, status, tokens, error.

    python -m workflows.answers results/mine_results.jsonl answers.csv --requests_filepath requests/mine.jsonl
    python -m workflows.answers results/mine_results.jsonl answers.csv --excel

The ending of the output's name, .csv or .jsonl, says what it becomes. Rows stand in the order of the request file, also
those that have no result yet; without --requests_filepath that is the file of the same name with _requests instead of
_results, or without both, and if there is none, rows stand as they do in the results.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from api_request_parallel_processor import LOGGER, UsageError
from workflows import _files, _run
from workflows._replies import error_text, read_answer, tokens_of
from workflows._results import Result, Results, read_requests

if TYPE_CHECKING:
    from collections.abc import Iterator

COLUMNS = ("answer", "reasoning", "status", "tokens", "error")


def answer_row(result: Result | None, metadata: Any) -> _files.Row:
    """Make the row of one result; None stands for a request without a result yet."""
    fields = metadata if isinstance(metadata, dict) else {} if metadata is None else {"metadata": metadata}
    row = {f"metadata_{name}" if name in COLUMNS else name: value for name, value in fields.items()}
    if result is None:
        return row | dict(zip(COLUMNS, (None, None, "missing", None, "no result yet"), strict=True))
    if not result.succeeded:
        return row | dict(zip(COLUMNS, (None, None, "failed", None, error_text(result.response)), strict=True))
    answer = read_answer(result.response)
    error = f"refused: {answer.refusal}" if answer.refusal else None if answer.whole else f"ended by {answer.finish}"
    values = (answer.text, answer.reasoning, "success", tokens_of(result.response), error)
    return row | dict(zip(COLUMNS, values, strict=True))


def answer_rows(results: Results, requests_path: Path | None) -> Iterator[_files.Row]:
    """Give the rows in the order of the request file, or else of the results."""
    if requests_path is None:
        for result in results.in_own_order():
            yield answer_row(result, result.metadata)
        return
    for body, metadata in read_requests(requests_path):
        yield answer_row(results.take(body, metadata), metadata)


def requests_of(results: Path) -> Path | None:
    """The request file beside a results file, by its name: mine_requests.jsonl of a workflow, else mine.jsonl."""
    stem = str(results).removesuffix("_results.jsonl")
    guesses = [Path(f"{stem}_requests.jsonl"), Path(f"{stem}.jsonl")] if stem != str(results) else []
    return next(filter(Path.is_file, guesses), None)


def main(argv: list[str] | None = None) -> int:
    """Make the table."""
    parser = _run.new_parser(__doc__)
    parser.add_argument("results", type=Path, help="results file")
    parser.add_argument("output", type=Path, help="table to make: .csv, .tsv or .jsonl")
    parser.add_argument("--requests_filepath", type=Path, help="the request file, whose order the table has")
    parser.add_argument("--excel", action="store_true", help="CSV that a spreadsheet opens right, formulas disarmed")
    parser.add_argument("--overwrite", action="store_true", help="replace another file of that name")
    arguments = parser.parse_args(argv)
    _files.check_table(arguments.output)
    if arguments.output.exists() and not arguments.overwrite:
        raise UsageError(f"{arguments.output} exists: delete it, or say --overwrite, or name another file")
    requests_path = arguments.requests_filepath or requests_of(arguments.results)
    inputs = [path for path in (arguments.results, requests_path) if path]
    if any(path.exists() and arguments.output.exists() and arguments.output.samefile(path) for path in inputs):
        raise UsageError(f"{arguments.output} is an input: name another file")
    if requests_path is None:
        LOGGER.warning("In the order of the results; --requests_filepath gives the order of the requests.")
    results = Results(arguments.results)
    if results.left_out:
        LOGGER.warning("Lines left out, since they are no result lines: %s.", f"{results.left_out:,}")
    rows = answer_rows(results, requests_path)
    count = _files.write_table(arguments.output, rows, last=COLUMNS, excel=arguments.excel)
    results.close()
    print(f"{count:,} rows are in {arguments.output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(_run.main_program(main))
