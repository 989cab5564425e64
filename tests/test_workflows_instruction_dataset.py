"""workflows.instruction_dataset: a folder of papers becomes a dataset, live or through a batch."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import pytest

from tests.local_batches import Batches, BatchOptions, Response, reply, serving
from workflows import _run, instruction_dataset
from workflows.instruction_dataset import cut, objects_in, samples_of

if TYPE_CHECKING:
    from pathlib import Path

GOOD = [
    {"instruction": "What is a qubit?", "input": "", "output": "A two-level system."},
    {"instruction": "Name a gate.", "input": "Think of Hadamard.", "output": "H"},
]
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def nothing_from_outside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No key, setting or .env of the machine."""
    monkeypatch.chdir(tmp_path)
    for name in list(os.environ):
        if name.endswith("_API_KEY") or name.startswith(
            ("QIANWEN", "BATCH_", "USE_BATCH", "MAX_", "OUTPUT_", "PAPERS")
        ):
            monkeypatch.delenv(name)


def chat(text: str) -> dict[str, Any]:
    """A reply with this answer."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    return {"choices": [choice], "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}}


def answers(body: bytes) -> Response:
    """Answer by what the paper says."""
    text = json.loads(body)["messages"][-1]["content"]
    if "PAPER-A" in text:
        return reply(chat(f"<think>hm {{</think>Here:\n```json\n{json.dumps(GOOD)}\n```\nDone."))
    if "PAPER-B" in text:
        return reply(chat(json.dumps({"samples": [GOOD[0], {"instruction": "B?", "output": "b"}, {"output": "x"}]})))
    return reply(chat("I cannot."))


def make_papers(folder: Path) -> None:
    """Papers of all kinds."""
    (folder / "papers" / "deep").mkdir(parents=True)
    (folder / "papers" / "a.txt").write_text("PAPER-A " + "qubits and gates. " * 50)
    (folder / "papers" / "deep" / "b.md").write_text("# PAPER-B\n\ntext")
    (folder / "papers" / "c.txt").write_text("PAPER-C")
    (folder / "papers" / "empty.txt").write_text(" \n")
    (folder / "papers" / "broken.pdf").write_bytes(b"no pdf")
    (folder / "papers" / "image.png").write_bytes(b"not read")


def dataset_of(path: Path) -> list[Any]:
    """The lines of a dataset."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(*words: str) -> int:
    """Run the program; gives its exit code."""
    return _run.main_program(instruction_dataset.main, list(words))


def test_live(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples come in the order of the papers, without duplicates and empty ones; what is invalid is told."""
    make_papers(tmp_path)
    monkeypatch.setenv("DASHSCOPE_API_KEY", "sk-secret-key-12345678")
    with serving(Batches(), answers) as url:
        words = ("papers", "--request_url", f"{url}/v1", "--provider", "dashscope", "--output", "out/set.jsonl")
        assert run(*words) == 1
        told = capsys.readouterr()
        assert run(*words) == 1
    found = dataset_of(tmp_path / "out" / "set.jsonl")
    assert [(line["instruction"], line["paper"]) for line in found] == [
        ("What is a qubit?", "a.txt"),
        ("Name a gate.", "a.txt"),
        ("B?", "deep/b.md"),
    ]
    assert found[1] == {**GOOD[1], "paper": "a.txt"}
    assert "3 samples of 3 papers" in told.out
    assert "1 duplicates, 1 invalid, 2 left out" in told.out
    assert "c.txt: no samples in the answer 'I cannot.'" in told.err
    assert "empty.txt holds no text" in told.err
    assert "broken.pdf is no readable PDF" in told.err
    assert "********5678 (DASHSCOPE_API_KEY)" in told.err
    assert "sk-secret" not in told.err


def test_batch_and_the_names_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The batch takes the place of the live run; everything may stand in the environment."""
    make_papers(tmp_path)
    batches = Batches(BatchOptions(provider="dashscope"))
    monkeypatch.setattr(
        "tests.local_batches.answer", lambda request, _: json.loads(answers(json.dumps(request).encode())[2])
    )
    with serving(batches) as url:
        for name, value in (
            ("QIANWEN_API_KEY", "sk-secret-key-12345678"),
            ("QIANWEN_BASE_URL", f"{url}/compatible-mode/v1"),
            ("QIANWEN_MODEL", "qwen-max"),
            ("USE_BATCH", "true"),
            ("BATCH_COMPLETION_WINDOW", "48h"),
            ("MAX_SAMPLES_PER_PAPER", "1"),
            ("OUTPUT_FILE", "quantum.jsonl"),
            ("PAPERS_DIR", "papers"),
        ):
            monkeypatch.setenv(name, value)
        assert run("--provider", "dashscope", "--poll-seconds", "0.02") == 1
        assert run("--provider", "dashscope", "--live", "--dry_run") == 0
    (job,) = batches.jobs.values()
    assert job.fields["completion_window"] == "48h"
    assert {line["body"]["model"] for line in job.lines} == {"qwen-max"}
    assert "Write 1 training samples" in job.lines[0]["body"]["messages"][0]["content"]
    assert [line["paper"] for line in dataset_of(tmp_path / "quantum.jsonl")] == ["a.txt"]


def test_pdf_with_text(tmp_path: Path) -> None:
    """The text of a PDF is read page by page."""
    pytest.importorskip("pypdf")
    stream = b"BT /F1 12 Tf 72 720 Td (Qubits are two-level systems) Tj ET"
    objects = [
        b"<</Type/Catalog/Pages 2 0 R>>",
        b"<</Type/Pages/Kids[3 0 R]/Count 1>>",
        b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 612 792]/Contents 4 0 R/Resources<</Font<</F1 5 0 R>>>>>>",
        b"<</Length %d>>stream\n%b\nendstream" % (len(stream), stream),
        b"<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>",
    ]
    data, places = b"%PDF-1.4\n", []
    for number, content in enumerate(objects, 1):
        places.append(len(data))
        data += b"%d 0 obj%b endobj\n" % (number, content)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    head = b"xref\n0 6\n0000000000 65535 f \n" + table + b"trailer<</Size 6/Root 1 0 R>>\nstartxref\n%d\n%%%%EOF"
    (tmp_path / "p.pdf").write_bytes(data + head % len(data))
    assert instruction_dataset.read_paper(tmp_path / "p.pdf") == "Qubits are two-level systems"


def test_papers_are_cut_by_tokens() -> None:
    """The beginning of a long paper stays, as many tokens as fit; a short one is whole."""
    words = "word " * 1000
    kept = cut(words, 100, lambda text: len(text.split()))
    assert 90 <= len(kept.split()) <= 100
    assert words.startswith(kept)
    assert cut("short", 100, len) == "short"


@pytest.mark.parametrize(
    ("text", "count"),
    [
        (json.dumps(GOOD), 2),
        ("Sure! " + json.dumps(GOOD[0]) + "\nand\n" + json.dumps(GOOD[1]) + " Bye {", 2),
        (json.dumps({"data": GOOD})[:-20], 1),
        ("none", 0),
        ('{"instruction": "line\nbreak", "output": "x"}', 1),
    ],
)
def test_samples_in_any_answer(text: str, count: int) -> None:
    """Samples are found in fences, in objects, one after the other, and in an answer that breaks off."""
    assert len(list(objects_in(text))) == count


def test_empty_samples_are_dropped() -> None:
    """A sample without instruction or output is none; more than wanted are cut off."""
    samples, problem = samples_of(chat(json.dumps([{"instruction": "", "output": "x"}, *GOOD])), 1)
    assert samples == [GOOD[0]]
    assert not problem
    assert samples_of(chat('{"instruction": "a", "output": " "}'), 4) == ([], "empty samples")


def test_samples_that_are_no_texts() -> None:
    """Numbers and lists of an answer are written as JSON, zero included."""
    text = json.dumps([{"instruction": "Count.", "input": {"a": None}, "output": 0}])
    assert samples_of(chat(text), 4) == ([{"instruction": "Count.", "input": '{"a":null}', "output": "0"}], "")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["nowhere"], "is no folder"),
        (["empty"], "holds no paper"),
        (["empty", "--output", "mine.jsonl"], "is no output of this program"),
        (["empty", "--output", "d.xlsx"], "ends in .csv"),
        (["empty", "--output", "other.jsonl"], "other_requests.jsonl is a request file of other use"),
        (["empty", "--prompt_filepath", "mine.jsonl"], "has no {text}"),
    ],
)
def test_wrong_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], told: str) -> None:
    """What cannot be meant is told, and nothing of the user's is touched."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "mine.jsonl").write_text('{"my": "requests"}\n', "utf-8")
    (tmp_path / "other_requests.jsonl").write_text('{"messages": [], "metadata": {"prompt": "hi"}}\n', "utf-8")
    assert run(*words) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("value", ["x", "0", "-1"])
def test_a_wrong_number_in_the_environment(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], value: str
) -> None:
    """A setting that is no number ends in a message, not in a traceback."""
    monkeypatch.setenv("MAX_SAMPLES_PER_PAPER", value)
    with pytest.raises(SystemExit) as end:
        run()
    assert end.value.code == 2
    assert f"'{value}' is no whole number above 0" in capsys.readouterr().err
