r"""Make a request file of prompts: a text file with one prompt a line, a CSV or a JSONL file.

    python -m workflows.prompts prompts.txt --model gpt-4o-mini --requests_filepath requests/mine.jsonl
    python -m workflows.prompts rows.csv --model qwen-plus --template 'Translate into French: {text}' \
        --request_url https://dashscope.aliyuncs.com/compatible-mode/v1

A template fills the fields of a row into {field} placeholders; {{ and }} stand for braces. Without one the field
"prompt" is the prompt. All fields of a row become its request's metadata, so that they come back beside the answer.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from api_request_parallel_processor import UsageError, loads
from workflows import _files, _run

if TYPE_CHECKING:
    from collections.abc import Iterator


def parameter(text: str) -> tuple[str, Any]:
    """Read one --parameter: 'enable_thinking=false' -> ("enable_thinking", False); what is no JSON is a text."""
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise UsageError(f"--parameter {text!r}: write it as name=value")
    try:
        return name, loads(value)
    except ValueError:
        return name, value


def main(argv: list[str] | None = None) -> int:
    """Make the request file."""
    parser = _run.new_parser(__doc__)
    parser.add_argument("input", type=Path, help=".csv, .jsonl, or text with one prompt a line")
    parser.add_argument("--requests_filepath", type=Path, help="default: the input's name with _requests.jsonl")
    parser.add_argument("--model", required=True)
    parser.add_argument("--request_url", default="https://api.openai.com/v1", help="decides what requests look like")
    parser.add_argument("--provider", default="auto")
    parser.add_argument("--system_prompt", default="")
    for name, kind in _run.SAMPLING_KEYS.items():
        parser.add_argument(f"--{name}", type=kind)
    parser.add_argument(
        "--parameter", action="append", default=[], metavar="NAME=VALUE", help="repeatable; JSON or text"
    )
    parser.add_argument("--template", default="", help="the prompt, with {field} placeholders")
    parser.add_argument("--template_filepath", type=Path, help="the same, in a file")
    parser.add_argument("--overwrite", action="store_true", help="replace another request file of that name")
    arguments = parser.parse_args(argv)
    template, source = arguments.template, "--template"
    if arguments.template_filepath:
        template, source = _files.read_text(arguments.template_filepath), str(arguments.template_filepath)
    fill = _files.compile_template(template or "{prompt}", source if template else "no --template is given")
    output = arguments.requests_filepath or arguments.input.with_name(f"{arguments.input.stem}_requests.jsonl")
    if output.exists() and (not arguments.overwrite or output.samefile(arguments.input)):
        raise UsageError(f"{output} exists: delete it, or say --overwrite, or name another --requests_filepath")
    section = {name: getattr(arguments, name) for name in ("provider", "system_prompt", *_run.SAMPLING_KEYS)}
    section |= {"model_name": arguments.model, "base_url": arguments.request_url}
    model = _run.model_of({**section, "parameters": dict(map(parameter, arguments.parameter))})

    def requests() -> Iterator[tuple[_files.Row, Any]]:
        for row in _files.read_rows(arguments.input):
            yield model.body(("user", fill(row))), row

    count = _files.write_requests(output, requests())
    print(f"{count:,} requests are in {output}, made for {model.url}")
    return 0


if __name__ == "__main__":
    raise SystemExit(_run.main_program(main))
