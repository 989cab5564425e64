"""Answer a CSV of questions: id,question -> id,question,answer,reasoning_content,status,tokens,error.

    python -m workflows.csv_questions -c openai_config.yaml

The config has the sections model, runtime and io; examples lie in workflows/examples/. Without -c it is
openai_config.yaml or zhipuai_config.yaml of the current folder. Without a base_url the questions go to ZhipuAI. The key
comes from the config, the environment or .env. Result lines are kept in io.checkpoint_dir: the same command continues.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from api_request_parallel_processor import LOGGER, Settings, UsageError
from workflows import _files, _run
from workflows._replies import error_text, read_answer, tokens_of
from workflows._results import Result, Results

if TYPE_CHECKING:
    from collections.abc import Iterator

CONFIG_KEYS = {"model": _run.MODEL_KEYS, "runtime": _run.RUNTIME_KEYS, "io": _run.IO_KEYS}
NEEDED = ("model.model_name", "io.input_file", "io.output_file", "io.checkpoint_dir")
DEFAULT_CONFIGS = ("openai_config.yaml", "zhipuai_config.yaml")
ZHIPU_URL = "https://open.bigmodel.cn/api/paas/v4"
COLUMNS = ("id", "question", "answer", "reasoning_content", "status", "tokens", "error")


def find_config(given: Path | None) -> Path:
    """The config that is given, or else one of the usual names."""
    path = given or next((path for path in map(Path, DEFAULT_CONFIGS) if path.is_file()), None)
    if path is None:
        raise UsageError(f"no config: name it with -c, or call it {' or '.join(DEFAULT_CONFIGS)}")
    return path


def questions(path: Path, model: _run.Model) -> Iterator[tuple[_files.Row, tuple[_files.Row, Any] | None]]:
    """Give each row with its request (body, metadata); None if it asks nothing."""
    for row in _files.read_csv_rows(path, ("id", "question")):
        asks = row["question"].strip()
        yield row, (model.body(("user", row["question"])), {"id": row["id"]}) if asks else None


def output_row(row: _files.Row, result: Result | None) -> _files.Row:
    """Make the output row; without a result the question was empty."""
    answer: tuple[Any, ...] = ("", None, "failed", 0, "the question is empty")
    if result is not None and result.succeeded:
        read = read_answer(result.response)
        error = f"refused: {read.refusal}" if read.refusal else None
        answer = (read.text, read.reasoning, "success", tokens_of(result.response), error)
    elif result is not None:
        answer = ("", None, "failed", 0, error_text(result.response))
    return dict(zip(COLUMNS, (row["id"], row["question"], *answer), strict=True))


def main(argv: list[str] | None = None) -> int:
    """Run the workflow."""
    began = time.monotonic()
    parser = _run.new_parser(__doc__)
    parser.add_argument("-c", "--config", type=Path, help="YAML or JSON")
    parser.add_argument("--excel", action="store_true", help="CSV that a spreadsheet opens right, formulas disarmed")
    _run.add_run_flags(parser)
    arguments = parser.parse_args(argv)
    config = _run.load_config(find_config(arguments.config), CONFIG_KEYS)
    _run.required(config, *NEEDED)
    _run.load_env()
    model, runtime = _run.model_of(config["model"], ZHIPU_URL), config.get("runtime", {})
    LOGGER.setLevel(_run.log_level(runtime.get("log_level", "INFO")))
    source, output, folder = (Path(config["io"][name]) for name in _run.IO_KEYS)
    if output.suffix.lower() != ".csv" or (output.exists() and output.samefile(source)):
        raise UsageError("io.output_file is a .csv file, and another one than io.input_file")
    requests_path, results_path = _run.checkpoint(folder, output.stem)
    _files.refuse_foreign(output, ",".join(COLUMNS))
    asked = _files.write_requests(requests_path, (request for _, request in questions(source, model) if request))
    LOGGER.info("%s questions are in %s", f"{asked:,}", source)
    settings = _run.files_of(requests_path, results_path) | model.settings
    settings |= _run.settings_of(runtime) | _run.run_flags(arguments)
    if not arguments.dry_run:
        _files.keep_older(output, results_path)
    tally = _run.run_processor(Settings(**settings), arguments.cache_filepath)
    if arguments.dry_run or _run.came_to_nothing(tally, output):
        return tally.exit_code

    results = Results(results_path)
    counts = {"total": 0, "success": 0, "failed": 0, "tokens": 0}

    def rows() -> Iterator[_files.Row]:
        for row, request in questions(source, model):
            counts["total"] += 1
            result = results.take(*request) if request else None
            if result or not request:  # the others have no result yet: the run ended early
                filled = output_row(row, result)
                counts[filled["status"]] += 1
                counts["tokens"] += filled["tokens"] or 0
                yield filled

    written = _files.write_table(output, rows(), first=COLUMNS, excel=arguments.excel)
    results.close()
    if written < counts["total"]:
        LOGGER.warning(
            "%d rows have no result yet and are left out; the same command continues.", counts["total"] - written
        )
    end = "提前结束" if tally.exit_code >= 2 else "处理完成"
    print(
        f"{end}: 总数据: {counts['total']}, 成功: {counts['success']}, 失败: {counts['failed']}, "
        f"总Token: {counts['tokens']}, 总耗时: {time.monotonic() - began:.2f}秒, 结果已保存到 {output}"
    )
    return tally.exit_code or (1 if counts["failed"] else 0)


if __name__ == "__main__":
    raise SystemExit(_run.main_program(main))
