"""What the workflows share: files, templates, configs, request bodies, replies, results in order."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import api_request_parallel_processor as processor
from api_request_parallel_processor import UsageError, dumps
from workflows import _files, _replies, _requests, _results, _run, answers, prompt_matrix, prompts, structured_output

ROOT = Path(__file__).resolve().parents[1]
QUESTIONS = 'id,question\n1,"什么是, 人工智能？"\n2,"two\nlines and ""quotes"""\n'


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "gbk", "gb18030", "utf-16"])
def test_csv_in_any_usual_encoding(tmp_path: Path, encoding: str) -> None:
    """A table reads the same as UTF-8 with and without BOM, as GBK and as UTF-16."""
    path = tmp_path / "q.csv"
    path.write_bytes(QUESTIONS.encode(encoding))
    rows = list(_files.read_rows(path, ("id", "question")))
    assert rows == [{"id": "1", "question": "什么是, 人工智能？"}, {"id": "2", "question": 'two\nlines and "quotes"'}]


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_csv_delimiters_line_ends_and_blank_lines(tmp_path: Path, delimiter: str) -> None:
    """Semicolons and tabs are recognised, CRLF and blank lines do no harm, a short row is filled up."""
    path = tmp_path / "q.csv"
    text = "id, question ,more\r\n\r\n1,a,b\r\n2,c\r\n"
    path.write_bytes(text.replace(",", delimiter).encode())
    assert [list(row.values()) for row in _files.read_rows(path)] == [["1", "a", "b"], ["2", "c", ""]]
    assert list(next(_files.read_rows(path))) == ["id", "question", "more"]


def test_csv_as_spreadsheets_write_it(tmp_path: Path) -> None:
    """Empty fields beyond the names and lines above them do no harm; of equal names the first keeps its name."""
    path = tmp_path / "q.csv"
    path.write_text("\n;;\nid;question;question\n1;a,b;;;\n2;c;d\n", "utf-8")
    first, second = _files.read_rows(path, ("id", "question"))
    assert first == {"id": "1", "question": "a,b", "question.1": ""}
    assert second == {"id": "2", "question": "c", "question.1": "d"}


@pytest.mark.parametrize("head", ["sep=;", "SEP=;", '"sep=;"', "sep=|"])
def test_csv_that_says_what_stands_between_fields(tmp_path: Path, head: str) -> None:
    """The first line that Excel writes for itself is followed, and is no row."""
    path = tmp_path / "q.csv"
    path.write_text(f"{head}\nid,x;question\n1;a, b, c\n".replace(";", head.strip('"')[-1]), "utf-8")
    assert list(_files.read_rows(path, ("question",))) == [{"id,x": "1", "question": "a, b, c"}]


def test_utf8_that_breaks_off_is_not_read_as_gbk(tmp_path: Path) -> None:
    """A file whose text was UTF-8 up to a line is told by that line, instead of asking about gibberish."""
    path = tmp_path / "q.csv"
    path.write_bytes(f"id,question\n1,{'什么是人工智能' * 4}\n2,如何".encode()[:-1])
    with pytest.raises(UsageError, match="line 3: this is no UTF-8"):
        list(_files.read_rows(path))


@pytest.mark.parametrize("name", ["rows.json", "rows.xlsx"])
def test_files_that_are_no_rows_are_not_read_as_text(tmp_path: Path, name: str) -> None:
    """A JSON array or a workbook is refused; its lines would be sent as prompts otherwise."""
    (tmp_path / name).write_text('[{"text": "a"}]', "utf-8")
    with pytest.raises(UsageError, match=r"\.csv, \.tsv or \.jsonl"):
        list(_files.read_rows(tmp_path / name))


def test_csv_fields_may_be_long(tmp_path: Path) -> None:
    """A field longer than Python's default limit is read whole."""
    path = tmp_path / "q.csv"
    path.write_text("id,question\n1," + "x" * 300_000, "utf-8")
    assert len(next(_files.read_rows(path))["question"]) == 300_000


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("id,text\n1,a\n", "question is missing in: id, text"),
        ('id,question\n1,"never closed\n2,b\n', "line 3"),
        ("id,question\n1,a,b\n", "line 2: more fields"),
        ("", "question is missing|id is missing"),
    ],
)
def test_csv_that_cannot_be_read_names_the_line(tmp_path: Path, text: str, reason: str) -> None:
    """A table that is not what was asked for is an error that says where."""
    path = tmp_path / "q.csv"
    path.write_text(text, "utf-8")
    with pytest.raises(UsageError, match=reason):
        list(_files.read_rows(path, ("id", "question")))


def test_rows_of_jsonl_and_text(tmp_path: Path) -> None:
    """JSONL gives its objects, a text file its lines."""
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"a": 1}\n\n{"a": 2}\r\n')
    assert list(_files.read_rows(tmp_path / "a.jsonl", ("a",))) == [{"a": 1}, {"a": 2}]
    (tmp_path / "a.txt").write_bytes("one\r\n\r\n二\n".encode())
    assert list(_files.read_rows(tmp_path / "a.txt")) == [{"prompt": "one"}, {"prompt": "二"}]
    (tmp_path / "b.jsonl").write_text('{"a": 1}\n{"a": \n', "utf-8")
    with pytest.raises(UsageError, match="line 2"):
        list(_files.read_rows(tmp_path / "b.jsonl"))
    for encoding in ("gbk", "utf-16"):
        (tmp_path / "c.jsonl").write_text('{"a": "二"}\n', encoding)
        assert list(_files.read_rows(tmp_path / "c.jsonl")) == [{"a": "二"}]


def test_template() -> None:
    """Fields are filled in, double braces are braces, numbers and objects are written as JSON."""
    fill = _files.compile_template('{text} {{"n": {n}, "o": {o}}}')
    assert fill({"text": "{x}", "n": 1, "o": {"k": None}}) == '{x} {"n": 1, "o": {"k":null}}'
    with pytest.raises(UsageError, match="no field 'text', did you mean 'txt'"):
        fill({"txt": "a", "n": 1, "o": 2})


@pytest.mark.parametrize("text", ["{", "}", "{}", '{"category": 1}', "{a.b!r}", "{a[0]}", "{a:>10}"])
def test_template_refuses_braces_that_mean_nothing(text: str) -> None:
    """A brace that is no placeholder is an error which says to write it twice."""
    with pytest.raises(UsageError, match="twice"):
        _files.compile_template(text)


@pytest.mark.parametrize("text", ["Classify.", "Classify {{text}}."])
def test_template_needs_a_placeholder(text: str) -> None:
    """Without one, or with that of other template languages, every row would be asked the same."""
    with pytest.raises(UsageError, match="no placeholder"):
        _files.compile_template(text)


def test_table_for_a_spreadsheet(tmp_path: Path) -> None:
    """With excel a CSV has a BOM and formulas are text; numbers stay numbers."""
    rows: list[_files.Row] = [
        {"id": -1, "answer": "=1+1"},
        {"id": 2, "answer": "@x", "more": [1]},
        {"id": None, "answer": "-"},
    ]
    _files.write_table(tmp_path / "t.csv", iter(rows), last=("answer",), excel=True)
    assert (tmp_path / "t.csv").read_bytes().decode() == "\ufeffid,more,answer\n-1,,'=1+1\n2,[1],'@x\n,,'-\n"
    _files.write_table(tmp_path / "t.jsonl", iter(rows))
    assert (tmp_path / "t.jsonl").read_text("utf-8").splitlines()[1] == '{"id":2,"answer":"@x","more":[1]}'


def test_files_appear_whole_or_not_at_all(tmp_path: Path) -> None:
    """A failure while writing leaves the old file and nothing else."""
    path = tmp_path / "t.csv"
    path.write_text("old", "utf-8")
    with pytest.raises(ZeroDivisionError), _files.whole_file(path) as file:
        file.write(f"new {1 / len(path.suffixes[1:])}")
    assert [file.name for file in tmp_path.iterdir()] == ["t.csv"]
    assert path.read_text("utf-8") == "old"


def test_foreign_files_are_not_replaced(tmp_path: Path) -> None:
    """A file that does not begin as our outputs do is left alone."""
    path = tmp_path / "t.csv"
    path.write_bytes(b"\xef\xbb\xbfid,question,answer\n")
    _files.refuse_foreign(path, "id,question,answer")
    with pytest.raises(UsageError, match="move it away"):
        _files.refuse_foreign(path, "id,question,reply")


def test_outputs_of_other_results_are_kept(tmp_path: Path) -> None:
    """An output that was there before the results, such as an old script's, is renamed; one of these results is not."""
    (tmp_path / "t.csv").write_text("id,old", "utf-8")
    (tmp_path / "t.jsonl").touch()
    for name in ("t.csv", "t.jsonl", "none.csv"):
        _files.keep_older(tmp_path / name, tmp_path / "results.jsonl")
    [older] = tmp_path.glob("t.*Z.csv")
    assert older.read_text("utf-8") == "id,old"
    assert not (tmp_path / "t.csv").exists()
    assert (tmp_path / "t.jsonl").exists()
    older.rename(tmp_path / "t.csv")
    (tmp_path / "results.jsonl").touch()
    _files.keep_older(tmp_path / "t.csv", tmp_path / "results.jsonl")
    assert (tmp_path / "t.csv").exists()


# ---- configs ---------------------------------------------------------------------------------------------------------


def test_json_config_with_comments(tmp_path: Path) -> None:
    """Comments of both kinds and a last comma are taken out, but not what looks like them inside texts."""
    path = tmp_path / "c.json"
    path.write_text('{ // one\n "a": "http://x/*y*/", /* two\n */ "b": [1, 2, ], // three\n}', "utf-8")
    assert _run.load_config(path, {"a": str, "b": list}) == {"a": "http://x/*y*/", "b": [1, 2]}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("model: {temprature: 1}", "unknown key 'temprature', did you mean 'temperature'"),
        ("modle: {}", "did you mean 'model'"),
        ("model: {temperature: hot}", "'hot' is no float"),
        ("model: {max_tokens: 1.5}", "1.5 is no int"),
        ("model: [1]", "names with values"),
        ("a: b: c", "mapping values"),
    ],
)
def test_config_errors_say_where(tmp_path: Path, text: str, reason: str) -> None:
    """Unknown keys name the nearest known one; wrong types and broken YAML name the place."""
    path = tmp_path / "c.yaml"
    path.write_text(text, "utf-8")
    with pytest.raises(UsageError, match=reason):
        _run.load_config(path, {"model": _run.MODEL_KEYS})


def test_missing_package_names_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that is not installed is named with the command that installs it."""
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(UsageError, match="pip install PyYAML"):
        _run.optional("yaml")


def test_flags_take_dashes(tmp_path: Path) -> None:
    """--max-tokens is --max_tokens; what stands behind the name is left alone."""
    (tmp_path / "p.txt").write_text("hi\n")
    flags = [
        "--model",
        "m-1",
        "--max-tokens",
        "5",
        "--parameter=top-k=2-1",
        "--requests-filepath",
        f"{tmp_path}/r-1.jsonl",
    ]
    assert prompts.main([str(tmp_path / "p.txt"), *flags]) == 0
    body = json.loads((tmp_path / "r-1.jsonl").read_text())
    assert (body["model"], body["max_tokens"], body["top-k"]) == ("m-1", 5, "2-1")


def test_a_workflow_started_as_a_file_says_how_it_is_started() -> None:
    """`python workflows/NAME.py` ends with the right command instead of a traceback."""
    command = [sys.executable, "workflows/prompts.py", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "python -m workflows.prompts" in done.stderr
    assert "Traceback" not in done.stderr


def test_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """.env fills in what the environment lacks; stand-ins of examples are no keys; keys are not shown."""
    monkeypatch.setenv("SET_KEY", "set")
    monkeypatch.setenv("UNSET_KEY", "")
    monkeypatch.delenv("UNSET_KEY")
    (tmp_path / ".env").write_text("SET_KEY=other\nUNSET_KEY='sk-$HOME'\n", "utf-8")
    _run.load_env(tmp_path / ".env")
    assert (os.environ["SET_KEY"], os.environ["UNSET_KEY"]) == ("set", "sk-$HOME")
    for encoding in ("utf-8-sig", "utf-16"):  # as Windows writes it
        monkeypatch.delenv("UNSET_KEY")
        (tmp_path / ".env").write_text("UNSET_KEY=密 # 钥匙\n", encoding)
        _run.load_env(tmp_path / ".env")
        assert os.environ["UNSET_KEY"] == "密"
    assert [_run.real_key(key) for key in ("YOUR_API_KEY", "your_key", "您的智谱AI API密钥", None, " sk-1 ")] == [
        *[""] * 4,
        "sk-1",
    ]
    assert "sk-secret" not in repr(_run.model_of({"model_name": "m", "api_key": "sk-secret"}))


def test_runtime_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries are attempts less one, no budgets mean 0, retry_delay scales the backoff."""
    monkeypatch.setattr(processor, "retry_delay", processor.retry_delay)
    settings = _run.settings_of({"max_concurrent": 5, "retry_times": 3, "retry_delay": 0.5, "save_interval": 10})
    assert settings["max_attempts"] == 4
    assert (settings["max_concurrent_requests"], settings["max_requests_per_minute"]) == (5, 0)
    assert processor.retry_delay(1, random.Random(1)) == 0.5 * _run.OWN_RETRY_DELAY(1, random.Random(1))
    for name in ("max_concurrent", "retry_times", "retry_delay"):
        with pytest.raises(UsageError, match=f"{name} is -1"):
            _run.settings_of({name: -1})


# ---- requests --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base_url", "expected"),
    [
        ("https://api.openai.com/v1/", "https://api.openai.com/v1/chat/completions"),
        ("https://api.openai.com/v1/responses", "https://api.openai.com/v1/responses"),
        ("https://open.bigmodel.cn/api/paas/v4", "https://open.bigmodel.cn/api/paas/v4/chat/completions"),
        ("https://api.anthropic.com", "https://api.anthropic.com/v1/messages"),
        ("https://api.anthropic.com/v1", "https://api.anthropic.com/v1/messages"),
        (
            "https://generativelanguage.googleapis.com/v1beta",
            "https://generativelanguage.googleapis.com/v1beta/models/m:generateContent",
        ),
        (
            "https://generativelanguage.googleapis.com/v1beta/openai/",
            "https://generativelanguage.googleapis.com/v1beta/openai/chat/completions",
        ),
        ("https://api.deepinfra.com/v1/inference", "https://api.deepinfra.com/v1/inference/m"),
        ("https://x.openai.azure.com/openai/v1", "https://x.openai.azure.com/openai/v1/chat/completions"),
        (
            "https://x.openai.azure.com/openai/deployments/d?api-version=1",
            "https://x.openai.azure.com/openai/deployments/d/chat/completions?api-version=1",
        ),
        (
            "https://dashscope.aliyuncs.com/api/v1",
            "https://dashscope.aliyuncs.com/api/v1/services/aigc/text-generation/generation",
        ),
    ],
)
def test_endpoints(base_url: str, expected: str) -> None:
    """A base URL gets the endpoint of its family; one that has an endpoint stays."""
    assert _requests.endpoint_of(base_url, "m") == expected


BODIES: dict[str, Any] = {
    "chat": {
        "model": "m",
        "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "p"}],
        "max_tokens": 9,
        "top_p": 0.5,
    },
    "completions": {"model": "m", "prompt": "s\n\np", "max_tokens": 9, "top_p": 0.5},
    "responses": {"model": "m", "input": "p", "instructions": "s", "max_output_tokens": 9, "top_p": 0.5},
    "anthropic": {
        "model": "m",
        "system": "s",
        "messages": [{"role": "user", "content": "p"}],
        "max_tokens": 9,
        "top_p": 0.5,
    },
    "gemini": {
        "systemInstruction": {"parts": [{"text": "s"}]},
        "contents": [{"role": "user", "parts": [{"text": "p"}]}],
        "generationConfig": {"maxOutputTokens": 9, "topP": 0.5},
    },
    "dashscope": {
        "model": "m",
        "input": {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "p"}]},
        "parameters": {"result_format": "message", "max_tokens": 9, "top_p": 0.5},
    },
    "deepinfra": {"input": "s\n\np", "max_new_tokens": 9, "top_p": 0.5},
}


@pytest.mark.parametrize("shape", BODIES)
def test_bodies(shape: str) -> None:
    """One prompt becomes the body that each family takes, and the processor accepts it as such."""
    parameters = {"max_tokens": 9, "top_p": 0.5, "top_k": None}
    body = _requests.build_body(shape, "m", [("user", "p")], "s", parameters)
    assert body == BODIES[shape]
    assert not processor.check_request(body, shape, processor.PROVIDERS["openai"])


def test_reasoning_models_get_the_cap_that_they_take() -> None:
    """OpenAI's reasoning models refuse max_tokens."""
    assert "max_completion_tokens" in _requests.build_body("chat", "o3-mini", [("user", "p")], "", {"max_tokens": 1})
    assert "max_tokens" in _requests.build_body("chat", "gpt-4o", [("user", "p")], "", {"max_tokens": 1})
    assert _requests.build_body("anthropic", "c", [("user", "p")])["max_tokens"] > 0


# ---- replies ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "answer", "reasoning"),
    [
        ("<think>why</think>because", "because", "why"),
        ("<think>\nwhy\n</think>\n\nbecause\n", "because", "why"),
        ("<think></think>because", "because", ""),
        ("before<think>why</think>because", "because", "why"),
        ("<think>a</think>b</think>c", "b</think>c", "a"),
        ("<think>never ends", "", "never ends"),
        ("no tags, \n", "no tags, \n", None),
        ("", "", None),
        ("swallowed start</think>because", "because", "swallowed start"),
    ],
)
def test_thinking(text: str, answer: str, reasoning: str | None) -> None:
    """Both tags: between and after; only the first: all is reasoning and the answer empty; none: no reasoning."""
    assert _replies.split_thinking(text) == (answer, reasoning)


def chat(message: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"choices": [{"message": message, "finish_reason": "stop", **more}], "usage": {"total_tokens": 7}}


REPLIES: dict[str, tuple[Any, str, str | None, str]] = {
    "chat": (chat({"content": "a"}), "a", None, "stop"),
    "own reasoning": (
        chat({"content": "<think>x</think>a", "reasoning_content": "r"}),
        "<think>x</think>a",
        "r",
        "stop",
    ),
    "reasoning": (chat({"content": "a", "reasoning": "r"}), "a", "r", "stop"),
    "empty reasoning": (chat({"content": "<think>r</think>a", "reasoning_content": ""}), "a", "r", "stop"),
    "mistral": (
        chat(
            {
                "content": [
                    {"type": "thinking", "thinking": [{"type": "text", "text": "r"}]},
                    {"type": "text", "text": "a"},
                ]
            }
        ),
        "a",
        "r",
        "stop",
    ),
    "tool call": (chat({"content": None, "tool_calls": [{"id": "1"}]}), '[{"id":"1"}]', None, "stop"),
    "null": (chat({"content": None}), "", None, "stop"),
    "completions": ({"choices": [{"text": "a", "finish_reason": "length"}]}, "a", None, "length"),
    "responses": (
        {
            "status": "incomplete",
            "incomplete_details": {"reason": "max_output_tokens"},
            "output": [
                {"type": "reasoning", "summary": [{"type": "summary_text", "text": "r"}]},
                {"type": "message", "content": [{"type": "output_text", "text": "a"}]},
            ],
        },
        "a",
        "r",
        "max_output_tokens",
    ),
    "dashscope text": ({"output": {"text": "a", "finish_reason": "stop"}}, "a", None, "stop"),
    "dashscope": (
        {"output": {"choices": [{"message": {"content": [{"text": "a"}], "reasoning_content": "r"}}]}},
        "a",
        "r",
        "",
    ),
    "deepinfra": ({"results": [{"generated_text": "<think>r</think>a"}], "inference_status": {}}, "a", "r", ""),
    "anthropic": (
        {"content": [{"type": "thinking", "thinking": "r"}, {"type": "text", "text": "a"}], "stop_reason": "end_turn"},
        "a",
        "r",
        "end_turn",
    ),
    "gemini": (
        {
            "candidates": [
                {"content": {"parts": [{"text": "r", "thought": True}, {"text": "a"}]}, "finishReason": "MAX_TOKENS"}
            ]
        },
        "a",
        "r",
        "MAX_TOKENS",
    ),
    "embeddings": ({"data": [{"embedding": [0.5, 1]}]}, "[0.5,1]", None, ""),
    "moderations": ({"results": [{"flagged": False}]}, '[{"flagged":false}]', None, ""),
    "two choices": ({"choices": [{"text": "a"}, {"text": "b"}]}, "a\n\nb", None, ""),
    "nonsense": ({"choices": [3], "usage": []}, "", None, ""),
    "nothing": ({}, "", None, ""),
}


@pytest.mark.parametrize("name", REPLIES)
def test_replies(name: str) -> None:
    """Answer, reasoning and finish reason are found in the reply of every family."""
    reply, text, reasoning, finish = REPLIES[name]
    answer = _replies.read_answer(reply)
    assert (answer.text, answer.reasoning, answer.finish) == (text, reasoning, finish)
    assert answer.whole == (finish not in ("length", "max_output_tokens", "MAX_TOKENS"))


@pytest.mark.parametrize(
    ("reply", "tokens"),
    [
        ({"usage": {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}}, 7),
        ({"usage": {"input_tokens": 3, "output_tokens": 4}}, 7),
        ({"usageMetadata": {"promptTokenCount": 3, "candidatesTokenCount": 2, "thoughtsTokenCount": 2}}, 7),
        ({"inference_status": {"tokens_input": 3, "tokens_generated": 4}}, 7),
        ({}, None),
    ],
)
def test_tokens(reply: dict[str, Any], tokens: int | None) -> None:
    """Tokens are prompt and output together, in any family's words."""
    assert _replies.tokens_of(reply) == tokens


def test_refusals_and_errors() -> None:
    """A refusal is told apart; an error is one line with kind, status and words."""
    assert _replies.read_answer(chat({"content": None, "refusal": "I won't."})).refusal == "I won't."
    assert _replies.error_text([{"kind": "rate_limit", "status": 429, "message": "slow"}]) == "rate_limit 429: slow"
    assert _replies.error_text([{"error": {"message": "old script"}}, "plain"]) == "plain"
    assert _replies.error_text([{"error": {"message": "old script"}}]) == "old script"


# ---- results ---------------------------------------------------------------------------------------------------------


def write_results(path: Path, lines: list[Any]) -> None:
    path.write_bytes(b"".join(dumps(line) + b"\n" for line in lines))


def test_results_success_before_failure(tmp_path: Path) -> None:
    """A success wins over failures wherever it stands, of failures the last counts, equal requests take turns."""
    path = tmp_path / "r.jsonl"
    a, b, c = ({"messages": [{"content": name}]} for name in "abc")
    lines = [
        [a, [{"message": "first"}]],
        [c, [{"message": "old"}], 1],
        [b, {"n": 1}],
        [a, {"n": 2}],
        [b, {"n": 3}],
        [c, [{"message": "new"}], 1],
    ]
    write_results(path, lines)
    with path.open("ab") as file:
        file.write(b'[{"torn')
    results = _results.Results(path)
    try:
        assert [result.response for result in results.in_own_order()] == [
            {"n": 1},
            {"n": 2},
            {"n": 3},
            [{"message": "new"}],
        ]
        taken = [results.take(body, None) for body in (a, b, b, b)]
        assert [result and result.response for result in taken] == [{"n": 2}, {"n": 1}, {"n": 3}, None]
        assert results.take(c, None) is None
        found = results.take(c, 1)
        assert found
        assert not found.succeeded
    finally:
        results.close()


def test_results_that_are_none(tmp_path: Path) -> None:
    """Some other file is refused with a question."""
    (tmp_path / "r.jsonl").write_text('{"messages": []}\n', "utf-8")
    with pytest.raises(UsageError, match="no result lines"):
        _results.Results(tmp_path / "r.jsonl")


def peak_of_answers(folder: Path, count: int) -> int:
    """Bytes that `answers` needs at most for shuffled results."""
    bodies = [{"messages": [{"role": "user", "content": f"question {n} " + "x" * 200}]} for n in range(count)]
    _files.write_requests(folder / f"{count}.jsonl", ((body, {"id": n}) for n, body in enumerate(bodies)))
    lines = [[body, chat({"content": f"answer {n}"}), {"id": n}] for n, body in enumerate(bodies)]
    random.Random(count).shuffle(lines)
    write_results(folder / f"{count}_results.jsonl", lines)
    del bodies, lines
    tracemalloc.start()
    code = answers.main([str(folder / f"{count}_results.jsonl"), str(folder / f"{count}.csv")])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert code == 0
    text = (folder / f"{count}.csv").read_text("utf-8").splitlines()
    assert text[0] == "id,answer,reasoning,status,tokens,error"
    assert text[1:] == [f"{n},answer {n},,success,7," for n in range(count)]
    return peak


def test_answers_of_shuffled_results_in_flat_memory(tmp_path: Path) -> None:
    """Results in any order come out in the order of the requests, for a few dozen bytes a row."""
    small, large = peak_of_answers(tmp_path, 1000), peak_of_answers(tmp_path, 6000)
    assert (large - small) / 5000 < 80


# ---- prompts, answers ------------------------------------------------------------------------------------------------


def test_prompts_of_a_table(tmp_path: Path) -> None:
    """Rows and a template become request lines that carry their rows as metadata."""
    (tmp_path / "rows.csv").write_text("id,word\n7,apple\n", "utf-8")
    arguments = [
        str(tmp_path / "rows.csv"),
        "--model",
        "m",
        "--template",
        "{word} {{in French}}?",
        "--temperature",
        "0",
    ]
    assert prompts.main([*arguments, "--parameter", "stop=[1]", "--parameter", "user=me", "--system_prompt", "s"]) == 0
    assert json.loads((tmp_path / "rows_requests.jsonl").read_text("utf-8")) == {
        "model": "m",
        "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "apple {in French}?"}],
        "temperature": 0.0,
        "stop": [1],
        "user": "me",
        "metadata": {"id": "7", "word": "apple"},
    }
    with pytest.raises(UsageError, match="--overwrite"):
        prompts.main(arguments)
    assert prompts.main([*arguments, "--overwrite"]) == 0


def test_prompts_without_a_template(tmp_path: Path) -> None:
    """The field "prompt" is the prompt; without such a field the error names those that there are."""
    (tmp_path / "p.txt").write_text("hi\n", "utf-8")
    assert prompts.main([str(tmp_path / "p.txt"), "--model", "m"]) == 0
    line = json.loads((tmp_path / "p_requests.jsonl").read_text("utf-8"))
    assert (line["messages"][0]["content"], line["metadata"]) == ("hi", {"prompt": "hi"})
    (tmp_path / "q.csv").write_text("id,question\n1,a\n", "utf-8")
    with pytest.raises(UsageError, match="no --template is given: no field 'prompt' among id, question"):
        prompts.main([str(tmp_path / "q.csv"), "--model", "m"])
    assert not (tmp_path / "q_requests.jsonl").exists()


def test_answers_find_the_requests_of_a_workflow(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """x_requests.jsonl stands beside x_results.jsonl; x.jsonl may be something else. What is no result is told."""
    result = [{"messages": [{"content": "1"}]}, chat({"content": "a"}), {"id": 1}]
    write_results(tmp_path / "x_results.jsonl", [result, {"no": "result"}])
    (tmp_path / "x.jsonl").write_text('{"instruction": "a dataset"}\n', "utf-8")
    (tmp_path / "x_requests.jsonl").write_text('{"messages": [{"content": "1"}], "metadata": {"id": 1}}\n', "utf-8")
    words = [str(tmp_path / "x_results.jsonl"), str(tmp_path / "a.csv")]
    assert answers.main(words) == 0
    assert (tmp_path / "a.csv").read_text("utf-8").splitlines()[1:] == ["1,a,,success,7,"]
    assert "no result lines: 1." in caplog.text
    with pytest.raises(UsageError, match="is an input"):
        answers.main([words[0], str(tmp_path / "x_requests.jsonl"), "--overwrite"])
    with pytest.raises(UsageError, match=r"ends in \.csv, \.tsv, \.jsonl"):
        answers.main([words[0], str(tmp_path / "a.xlsx")])


def test_answers_of_every_kind(tmp_path: Path) -> None:
    """Failed, refused, cut off and missing answers each have their row; metadata may be anything."""
    bodies = [{"messages": [{"content": str(n)}]} for n in range(5)]
    kinds: list[Any] = [{"id": 1, "answer": "x"}, "text", None, [1], {"custom_id": "e"}]
    (tmp_path / "r.jsonl").write_bytes(
        b"".join(dumps({**body, "metadata": kind}) + b"\n" for body, kind in zip(bodies, kinds, strict=True))
        + b"not json\n"
    )
    replies = [
        chat({"content": "a", "reasoning_content": "r"}),
        [{"kind": "bad_request", "status": 400, "message": "no"}],
        chat({"content": None, "refusal": "never"}),
        chat({"content": "cut"}, finish_reason="length"),
    ]
    lines = [[b, r, *([k] if k is not None else [])] for b, r, k in zip(bodies, replies, kinds, strict=False)]
    write_results(tmp_path / "r_results.jsonl", [["not json", [{"message": "line 6: bad"}]], *lines[::-1]])
    assert answers.main([str(tmp_path / "r_results.jsonl"), str(tmp_path / "a.csv")]) == 0
    assert (tmp_path / "a.csv").read_text("utf-8").splitlines() == [
        "id,metadata_answer,metadata,custom_id,answer,reasoning,status,tokens,error",
        "1,x,,,a,r,success,7,",
        ",,text,,,,failed,,bad_request 400: no",
        ",,,,,,success,7,refused: never",
        ",,[1],,cut,,success,7,ended by length",
        ",,,e,,,missing,,no result yet",
        ",,,,,,failed,,line 6: bad",
    ]
    with pytest.raises(UsageError, match="--overwrite"):
        answers.main([str(tmp_path / "r_results.jsonl"), str(tmp_path / "a.csv")])
    with pytest.raises(UsageError, match="is an input"):
        answers.main([str(tmp_path / "r_results.jsonl"), str(tmp_path / "r_results.jsonl"), "--overwrite"])


# ---- prompt_matrix ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (["a", "b"], ["a", "b"]),
        ([{"name": "x", "prompt": "a"}, {"text": "b"}], ["a", "b"]),
        ({"first": "a", "second": {"content": "b", "n": 1}}, ["a", "b"]),
    ],
)
def test_prompt_files(tmp_path: Path, value: Any, expected: list[str]) -> None:
    """Prompts are a list of texts, a list of objects, or an object of name to prompt."""
    (tmp_path / "p.json").write_text(json.dumps(value), "utf-8")
    assert prompt_matrix.read_prompts(tmp_path / "p.json") == expected


@pytest.mark.parametrize("value", [[], {}, "a", [1], [""], [{"a": "x", "b": "y"}]])
def test_prompt_files_that_hold_no_prompts(tmp_path: Path, value: Any) -> None:
    """Anything else is refused with what is expected."""
    (tmp_path / "p.json").write_text(json.dumps(value), "utf-8")
    with pytest.raises(UsageError, match="prompts are"):
        prompt_matrix.read_prompts(tmp_path / "p.json")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (
            [{"question": "q", "answer": "a"}, {"question": "r", "answer": "b"}],
            "question: q\nanswer: a\n\nquestion: r\nanswer: b",
        ),
        ([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "user: q\nassistant: a"),
        ({"messages": [{"role": "user", "content": "q"}]}, "user: q"),
        ([{"role": "user", "content": [{"type": "text", "text": "q"}]}, {"role": "a", "content": ""}], "user: q\na: "),
        ({"q1": "a1", "q2": 2}, "q1: a1\nq2: 2"),
        ({"name": "x", "qa": [{"q": "a"}]}, "name: x\nqa:\nq: a"),
        ("text", "text"),
    ],
)
def test_records(value: Any, expected: str) -> None:
    """Records in JSON are laid out as text by roles and names."""
    assert prompt_matrix.render(value) == expected


def test_names_of_files() -> None:
    """Names are made safe for every file system."""
    names = ["org/model:1-a?b", "CON", "x. ", "患者" * 100]
    assert [prompt_matrix.safe_name(name) for name in names[:3]] == ["org_model_1-a_b", "_CON", "x"]
    assert len(prompt_matrix.safe_name(names[3]).encode()) <= 200


# ---- structured_output -----------------------------------------------------------------------------------------------

LABELS = {"type": "object", "properties": {"category": {"enum": ["pos", "neg"]}}, "required": ["category"]}


@pytest.mark.parametrize(
    ("text", "value", "problem"),
    [
        ('{"category": "pos"}', {"category": "pos"}, ""),
        ('```json\n{"category": "pos"}\n```\nHope {this} helps!', {"category": "pos"}, ""),
        ('Like {"category": "x"}, no: {"category": "neg"}', {"category": "neg"}, ""),
        ('{"category": "pos\nneg"}', {"category": "pos\nneg"}, "category: 'pos\\nneg' is not one of ['pos', 'neg']"),
        ('{"a": {"category": "pos"}}', {"a": {"category": "pos"}}, "the object: 'category' is a required property"),
        ('{"category": NaN}', None, ""),
        ('{"all": [{"category": "pos"}, {"categ', None, ""),
        ('{"all": [{"category": "pos"}, ', None, ""),
        ('{"all": {"category": "pos"}, "b": tr', None, ""),
        ('The key {"category is: {"category": "pos"}', {"category": "pos"}, ""),
        ("{" * 5000, None, ""),
        ("I would say pos.", None, ""),
    ],
)
def test_json_in_answers(text: str, value: Any, problem: str) -> None:
    """The object is found between fences and chatter; the first valid one counts; what is wrong is said."""
    found = structured_output.find_object(text, structured_output.validator(LABELS))
    assert (found[0], found[2]) == (value, problem)


def test_places_of_values() -> None:
    """Members are located by parsing, not by a pattern."""
    text = 'x {"a\\"" : "v", "b":[1, {"c": "}"}] , "c" :true}'
    spans = structured_output.member_spans(text, 2)
    assert {name: text[left:right] for name, (left, right) in spans.items()} == {
        'a"': '"v"',
        "b": '[1, {"c": "}"}]',
        "c": "true",
    }


def tokens_of(pairs: list[tuple[bytes, float]]) -> dict[str, Any]:
    return {"content": [{"token": "?", "bytes": list(token), "logprob": logprob} for token, logprob in pairs]}


def test_probability_of_a_label() -> None:
    """A label's probability is that of its tokens, found by place, even where a character is split over tokens."""
    label = "负面".encode()
    parts = [(b"<think>", -9.0), (b"x</think>", -9.0), (b'{"category": "', -0.0), (label[:2], -0.5), (label[2:], -0.25)]
    parts += [(b'"}', -1.0), (b"<|end|>", -2.0)]
    text = b"".join(part for part, _ in parts[:-1]).decode()
    answer = _replies.read_answer(chat({"content": text}, logprobs=tokens_of(parts)))
    assert structured_output.weigh(answer, 0, ["category", "other"]) == {
        "category_probability": pytest.approx(0.4723665527),
        "category_first_token_probability": pytest.approx(0.6065306597),
        "other_probability": None,
        "other_first_token_probability": None,
    }
    odd = [{"token": text, "bytes": [300], "logprob": 1e-7}]  # no bytes, and more than certain
    certain = _replies.read_answer(chat({"content": text}, logprobs={"content": odd}))
    assert structured_output.weigh(certain, 0, ["category"])["category_probability"] == 1
    silent = _replies.read_answer(chat({"content": text}))
    assert set(structured_output.weigh(silent, 0, ["category"]).values()) == {None}


@pytest.mark.parametrize(
    ("base_url", "expected"),
    [
        ("https://api.openai.com/v1", "json_schema"),
        ("https://api.openai.com/v1/responses", "json_schema"),
        ("https://api.deepseek.com", "json_object"),
        ("https://dashscope.aliyuncs.com/api/v1", "json_object"),
        ("https://api.anthropic.com/v1", ""),
        ("https://api.baichuan-ai.com/v1", ""),
    ],
)
def test_response_formats(base_url: str, expected: str) -> None:
    """Each provider is asked for JSON as well as it can; the schema goes into the prompt where it has no place."""
    model = _run.model_of({"model_name": "m", "base_url": base_url})
    parameters, told = structured_output.format_parameters(model, LABELS, "auto")
    form = parameters.get("response_format") or parameters.get("text", {}).get("format", {})
    assert (form.get("type", ""), told) == (expected, expected == "json_schema")
    strict = form.get("json_schema", form).get("strict")
    assert strict is (False if told else None)


def test_gemini_takes_the_schema_as_it_is() -> None:
    """Gemini has fields of its own for it."""
    model = _run.model_of({"model_name": "m", "base_url": "https://generativelanguage.googleapis.com/v1beta"})
    parameters, told = structured_output.format_parameters(model, LABELS, "auto")
    assert told
    assert model.body(("user", "p"), **parameters)["generationConfig"]["responseJsonSchema"] == LABELS


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "objekt"},
        {"properties": []},
        {"properties": {"a": {"type": "string", "required": True}}},
        {"type": "array", "items": LABELS},
        {"enum": ["pos", "neg"], "type": ["string", "null"]},
        {"properties": {"a": {"$ref": "#/$defs/Missing"}}},
        {"properties": {"a": [{"$ref": "https://localhost:1/schema.json"}]}},
        {"properties": {"a": {"anyOf": [{"$ref": "https://localhost:1/schema.json"}]}}},
    ],
)
def test_a_broken_schema_is_an_error(tmp_path: Path, schema: Any) -> None:
    """A schema that is none, or of something else than an object, is told before anything is sent."""
    (tmp_path / "p.md").write_text("{text}", "utf-8")
    task = {"prompt_file": str(tmp_path / "p.md"), "schema": schema}
    with pytest.raises(UsageError, match="task, schema"):
        structured_output.read_task({"model": {"model_name": "m"}, "task": task})


def test_labels_may_be_defined_elsewhere() -> None:
    """Schemas made by pydantic keep enumerations in $defs, and let a field be null besides."""
    label = {"$ref": "#/$defs/a~1b"}
    properties: dict[str, Any] = {
        "plain": {"enum": ["x"]},
        "there": label,
        "described": {"allOf": [label], "description": "d"},
        "optional": {"anyOf": [label, {"type": "null"}]},
        "flag": {"type": "boolean"},
        "free": {"anyOf": [label, {"type": "string"}]},
        "itself": {"$ref": "#/properties/itself"},
        "text": {"type": "string"},
    }
    schema = {"type": "object", "properties": properties, "$defs": {"a/b": {"enum": ["x", "y"]}}}
    labelled = [name for name, kind in properties.items() if structured_output.is_labelled(kind, schema)]
    assert labelled == ["plain", "there", "described", "optional", "flag"]
    assert not structured_output.validator(schema)({"there": "y"})


def closed(**properties: Any) -> dict[str, Any]:
    """An object of these fields and no others."""
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


@pytest.mark.parametrize(
    ("schema", "strict"),
    [
        (closed(a={"enum": ["x"]}, b={"anyOf": [closed(c={"type": "null"}), {"type": "string"}]}), True),
        (closed(a={"type": "object"}), False),
        (closed(a={"oneOf": [{"type": "string"}, {"type": "null"}]}), False),
        (closed(a={"type": "array", "items": {"type": "object", "properties": {}}}), False),
        ({"anyOf": [closed(a={"type": "string"}), closed(b={"type": "string"})]}, False),
        (LABELS, False),
    ],
)
def test_strict_schemas(schema: dict[str, Any], strict: bool) -> None:
    """Only what OpenAI takes in strict mode is sent as such: it refuses the request otherwise."""
    parameters, _ = structured_output.format_parameters(_run.model_of({"model_name": "m"}), schema, "json_schema")
    assert parameters["response_format"]["json_schema"]["strict"] is strict


@pytest.mark.parametrize(
    ("task", "reason"),
    [
        ({"label_column": "truth", "schema": {"properties": {"a": {}}}}, "name the one to compare: label_field"),
        ({"label_column": "truth"}, "name the one to compare: label_field"),
        ({"label_field": "categry", "schema": LABELS}, "no field 'categry', did you mean 'category'"),
        ({"probability_fields": ["x"], "schema": LABELS}, "no field 'x'"),
    ],
)
def test_labels_that_cannot_be_compared(tmp_path: Path, task: dict[str, Any], reason: str) -> None:
    """A confusion table or a probability of a field that there is not is told before anything is sent."""
    (tmp_path / "p.md").write_text("{text}", "utf-8")
    config = {"model": {"model_name": "m"}, "task": {"prompt_file": str(tmp_path / "p.md"), **task}}
    with pytest.raises(UsageError, match=reason):
        structured_output.labels_of(config, structured_output.read_task(config))


def test_confusion_of_chinese_labels(capsys: pytest.CaptureFixture[str]) -> None:
    """The columns stand below each other on a terminal, where Chinese takes two of its columns."""
    structured_output.show_confusion(Counter({("正面", "正面"): 2, ("负面", "ok"): 1}), "label")
    assert capsys.readouterr().out.splitlines()[:2] == ["  label     ok   正面", "   正面      0      2"]
