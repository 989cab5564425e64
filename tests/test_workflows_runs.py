"""Runs of the workflows against the local provider: golden outputs, faults, interrupts, caches, every example."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import api_request_parallel_processor as processor
from api_request_parallel_processor import UsageError, loads
from workflows import _run, answers, csv_questions, prompt_matrix, prompts, response_cache, structured_output

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "workflows" / "examples"
WORKFLOWS = (answers, csv_questions, prompt_matrix, prompts, response_cache, structured_output)
PLAIN = {
    "faults": {},
    "fault_script": [],
    "statuses": [],
    "latency": 0.0,
    "latency_spread": 0.0,
    "reasoning": False,
    "reset": True,
}
HOSTS = re.compile(r"https://(?:api\.\w[\w.-]*|ark[\w.-]*|open\.bigmodel\.cn)")
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="sends signals")


class Server:
    """The local provider as a process, steered over HTTP."""

    def __init__(self, url: str) -> None:
        self.url = url

    def set(self, **options: Any) -> None:
        data = json.dumps(options).encode()
        request = urllib.request.Request(f"{self.url}/_control", data, {"Content-Type": "application/json"})
        urllib.request.urlopen(request, timeout=10).close()

    def stats(self) -> dict[str, Any]:
        with urllib.request.urlopen(f"{self.url}/_stats", timeout=10) as reply:
            return dict(json.load(reply))


@pytest.fixture(scope="module")
def running_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    port_file = tmp_path_factory.mktemp("server") / "port"
    command = [
        sys.executable,
        str(ROOT / "tests/local_provider.py"),
        "--port_file",
        str(port_file),
        "--exit_with_parent",
    ]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        try:
            for _ in range(500):
                if port_file.exists():
                    break
                time.sleep(0.02)
            yield Server(f"http://127.0.0.1:{port_file.read_text('ascii').strip()}")
        finally:
            process.terminate()


@pytest.fixture
def server(running_server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    """The server without faults, an empty current folder, no keys and no wait between tries."""
    running_server.set(**PLAIN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for name in [name for name in os.environ if name.endswith(("_API_KEY", "_TOKEN"))]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(processor, "retry_delay", processor.retry_delay)
    return running_server


def run(module: Any, *argv: str) -> int:
    """Run a workflow as its program does, within this process."""
    return _run.main_program(module.main, list(argv))


def start(module: str, *argv: str) -> subprocess.Popen[str]:
    """Start a workflow as a program of its own."""
    command = [sys.executable, "-m", f"workflows.{module}", *argv]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for_lines(path: Path, count: int) -> None:
    """Wait until a file has some lines."""
    for _ in range(1000):
        if path.exists() and path.read_bytes().count(b"\n") >= count:
            return
        time.sleep(0.01)
    pytest.fail(f"{path} has no {count} lines")


def example(name: str, server: Server) -> Path:
    """Copy a config of the examples into the current folder, with the local provider in the place of the real one."""
    text = (EXAMPLES / name).read_text("utf-8")
    if not HOSTS.search(text):  # ZhipuAI by default
        text = text.replace("model:", f'model:\n  base_url: "{server.url}/api/paas/v4"', 1)
    shutil.copytree(EXAMPLES, "workflows/examples", dirs_exist_ok=True)
    path = Path(name)
    path.write_text(HOSTS.sub(server.url, text), "utf-8")
    return path


# ---- prompts and answers ---------------------------------------------------------------------------------------------


def test_prompts_to_answers(server: Server) -> None:
    """A text file becomes requests, the processor answers them in any order, the table has the order of the prompts."""
    Path("p.txt").write_text("".join(f"question {n}\n" for n in range(20)), "utf-8")
    assert run(prompts, "p.txt", "--model", "m", "--request_url", f"{server.url}/v1", "--max_tokens", "99") == 0
    server.set(latency=0.02, latency_spread=1.0, faults={"error_500": 0.1})
    argv = ["--requests_filepath", "p_requests.jsonl", "--save_filepath", "r.jsonl", "--progress", "none"]
    assert processor.main([*argv, "--request_url", f"{server.url}/v1/chat/completions"]) == 0
    assert run(answers, "r.jsonl", "a.csv", "--requests_filepath", "p_requests.jsonl") == 0
    rows = Path("a.csv").read_text("utf-8").splitlines()
    assert rows[0] == "prompt,answer,reasoning,status,tokens,error"
    starts = [f"question {n},You said: question {n} [" for n in range(20)]
    assert all(row.startswith(start) for row, start in zip(rows[1:], starts, strict=True))


# ---- csv_questions ---------------------------------------------------------------------------------------------------

ZHIPU_CONFIG = """
model:
  api_key: "您的智谱AI API密钥"
  base_url: "{url}/api/paas/v4"
  model_name: "glm-z1-airx"
  system_prompt: "你是人工智能助手"
  temperature: 0.7
  top_p: 0.9
  max_tokens: 4096
runtime:
  max_concurrent: 5
  retry_times: 3
  retry_delay: 0
  save_interval: 10
  log_level: "INFO"
io:
  input_file: "./data/questions.csv"
  output_file: "./data/results.csv"
  checkpoint_dir: "./checkpoints/"
"""


def write_questions(server: Server, lines: list[str], encoding: str = "utf-8") -> None:
    Path("data").mkdir()
    Path("data/questions.csv").write_bytes("\n".join(["id,question", *lines, ""]).encode(encoding))
    Path("zhipuai_config.yaml").write_text(ZHIPU_CONFIG.format(url=server.url), "utf-8")


def test_csv_questions_golden(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    """The seed's config without -c, a GBK table, thinking, a failure, an empty question: the exact output."""
    lines = ['1,"什么是人工智能？"', "2,think", "3,endless", "4,hopeless", "5,", '6,"say ""hi"", please"', "1,think"]
    write_questions(server, lines, "gbk")
    server.set(
        statuses=[
            {"contains": "think", "answer": "<think>\nhm\n</think>\n\n42"},
            {"contains": "endless", "answer": "<think>and then"},
            {"contains": "hopeless", "status": 400, "body": {"error": {"code": "1210", "message": "参数错误"}}},
            {"contains": "say", "answer": "hi, there"},
            {"contains": "人工", "answer": "机器的智能"},
        ]
    )
    assert run(csv_questions) == 1
    text = Path("data/results.csv").read_bytes().decode()
    assert re.sub(r"success,\d+,", "success,N,", text) == (
        "id,question,answer,reasoning_content,status,tokens,error\n"
        "1,什么是人工智能？,机器的智能,,success,N,\n"
        "2,think,42,hm,success,N,\n"
        "3,endless,,and then,success,N,\n"
        "4,hopeless,,,failed,0,bad_request 400: 参数错误\n"
        "5,,,,failed,0,the question is empty\n"
        '6,"say ""hi"", please","hi, there",,success,N,\n'
        "1,think,42,hm,success,N,\n"
    )
    assert re.search(r"处理完成: 总数据: 7, 成功: 5, 失败: 2, 总Token: \d+, 总耗时: \d", capsys.readouterr().out)
    body = loads(Path("checkpoints/results_requests.jsonl").read_bytes().splitlines()[0])
    assert body["messages"][0] == {"role": "system", "content": "你是人工智能助手"}
    assert (body["temperature"], body["max_tokens"], body["metadata"]) == (0.7, 4096, {"id": "1"})


def test_csv_questions_again_asks_only_what_failed(server: Server) -> None:
    """A second start sends nothing that has an answer, and tries what failed."""
    write_questions(server, [f"{n},q{n}" for n in range(8)])
    server.set(statuses=[{"contains": "q3", "status": 400, "body": {"error": {"message": "no"}}}])
    assert run(csv_questions, "--excel") == 1
    assert Path("data/results.csv").read_bytes().startswith(b"\xef\xbb\xbfid,")
    server.set(statuses=[], reset=True)
    assert run(csv_questions) == 0
    assert server.stats()["calls"] == 1
    assert Path("data/results.csv").read_text("utf-8").count(",success,") == 8


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_csv_questions_interrupted(server: Server, number: int) -> None:
    """After Ctrl-C, a termination or kill -9 in the middle the same command asks the rest, and nothing twice."""
    write_questions(server, [f"{n},question {n}" for n in range(40)])
    server.set(latency=0.1, faults={"error_500": 0.2})
    with start("csv_questions") as process:
        wait_for_lines(Path("checkpoints/results_results.jsonl"), 10)
        process.send_signal(number)
        process.communicate(timeout=30)
    assert process.returncode == (-number if number == signal.SIGKILL else 128 + number)
    done = Path("checkpoints/results_results.jsonl").read_bytes().count(b"\n")
    assert 10 <= done < 40
    time.sleep(0.15)  # what was in flight at a kill is over
    server.set(latency=0.0, faults={}, reset=True)
    assert run(csv_questions) == 0
    assert server.stats()["calls"] == 40 - done
    text = Path("data/results.csv").read_text("utf-8").splitlines()
    assert [line.split(",")[0] for line in text[1:]] == [str(n) for n in range(40)]
    assert all(f"You said: question {n} " in line for n, line in enumerate(text[1:]))


def test_csv_questions_keeps_its_answers_when_a_changed_config_fails(server: Server) -> None:
    """A run that ends before its first answer, here since the key is refused, leaves the earlier output as it is."""
    write_questions(server, ["1,a", "2,b"])
    assert run(csv_questions) == 0
    before = Path("data/results.csv").read_bytes()
    config = Path("zhipuai_config.yaml")
    config.write_text(config.read_text("utf-8").replace("glm-z1-airx", "another"), "utf-8")
    server.set(statuses=[{"status": 401, "body": {"error": {"message": "wrong key"}}}])
    assert run(csv_questions) == 3
    assert Path("data/results.csv").read_bytes() == before


def test_csv_questions_leaves_other_files_alone(server: Server) -> None:
    """An output that is no output of this program, or the input itself, stops the start."""
    write_questions(server, ["1,a"])
    Path("data/results.csv").write_text("id,my own notes\n", "utf-8")
    assert run(csv_questions) == 2
    assert Path("data/results.csv").read_text("utf-8") == "id,my own notes\n"
    assert not server.stats()["calls"]


def test_csv_questions_without_config(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    """Without -c and without one of the usual names the message says so."""
    assert run(csv_questions) == 2
    assert "openai_config.yaml or zhipuai_config.yaml" in capsys.readouterr().err


def test_zhipu_is_the_default() -> None:
    """No base_url means ZhipuAI."""
    assert _run.model_of({"model_name": "m"}, csv_questions.ZHIPU_URL).url.startswith("https://open.bigmodel.cn/")


# ---- prompt_matrix ---------------------------------------------------------------------------------------------------


def write_matrix(server: Server, name: str = "kimi", **changes: Any) -> str:
    Path("测试输入问答记录").mkdir(exist_ok=True)
    Path("测试输入问答记录/患者1.txt").write_text("头痛三天\n", "utf-8")
    Path("测试输入问答记录/患者2.json").write_text('[{"问": "睡眠？", "答": "不好"}]', "utf-8")
    Path("多个Prompt.json").write_text('["概括", {"prompt": "追问"}]', "utf-8")
    config = {
        "prompts_file": "多个Prompt.json",
        "records_dir": "测试输入问答记录",
        "output_dir": f"./output/raw_{name}",
        "api_config": {"api_key": None, "base_url": f"{server.url}/v1"},
        "models": ["moonshot-v1-8k", "org/model"],
        "max_retries": 5,
        "max_tokens": 2000,
        "log_file": f"batch_process_{name}.log",
        "log_level": "INFO",
        "retry_delay": 0,
    }
    Path(f"{name}.json").write_text(
        "// as in the seed\n" + json.dumps(config | changes)[:-1] + ", /* last */}", "utf-8"
    )
    return f"{name}.json"


def test_prompt_matrix_golden(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    """The seed's banner, plan, files, structure and closing count."""
    path = write_matrix(server)
    server.set(statuses=[{"contains": "概括", "answer": "头痛"}, {"contains": "追问", "answer": "多久了？"}])
    assert run(prompt_matrix, "-c", path, "--provider", "moonshot") == 0
    assert capsys.readouterr().out == (
        f"{'=' * 80}\n批量处理系统 - Kimi (月之暗面) 基座\n{'=' * 80}\n\n"
        f"配置信息:\n  API地址: {server.url}/v1\n  使用模型: moonshot-v1-8k, org/model\n"
        "  最大重试次数: 5\n  最大Token数: 2000\n\n"
        "开始批量处理: 2 个模型 × 2 个患者 = 4 个文件\n2 models x 2 people = 4 files\n"
        "处理完成！\n共生成 4 个JSON文件\n"
    )
    names = ["moonshot-v1-8k-患者1", "moonshot-v1-8k-患者2", "org_model-患者1", "org_model-患者2"]
    assert sorted(path.stem for path in Path("output/raw_kimi").glob("*.json")) == names
    talk = {"model": "org/model", "prompt": "概括", "people": "患者2", "chat": "问: 睡眠？\n答: 不好"}
    talk |= {"Input": "概括\n\n问: 睡眠？\n答: 不好", "Output": "头痛"}
    second = talk | {"prompt": "追问", "Input": "追问\n\n问: 睡眠？\n答: 不好", "Output": "多久了？"}
    whole = {"model": "org/model", "people": "患者2", "conversations": {"1": talk, "2": second}}
    whole["result"] = "头痛\n多久了？"
    text = Path("output/raw_kimi/org_model-患者2.json").read_text("utf-8")
    assert text == json.dumps(whole, ensure_ascii=False, indent=2) + "\n"


def test_prompt_matrix_failures_and_retries(server: Server) -> None:
    """What failed is an ERROR in its file and told by model and person in the log; the next start makes up for it."""
    path = write_matrix(server, models=["m"])
    server.set(
        statuses=[
            {"contains": "头痛三天", "status": 500, "times": 1, "body": {"error": {"message": "Connection timeout"}}},
            {"contains": "追问\\n\\n问", "status": 400, "body": {"error": {"message": "too bad"}}},
        ]
    )
    assert run(prompt_matrix, "-c", path) == 1
    whole = json.loads(Path("output/raw_kimi/m-患者2.json").read_text("utf-8"))
    assert whole["conversations"]["2"]["Output"] == "ERROR: bad_request 400: too bad"
    assert whole["result"].endswith("\nERROR: bad_request 400: too bad")
    log = Path("batch_process_kimi.log").read_text("utf-8")
    stamp = r"(?m)^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d - "
    assert re.search(rf"{stamp}WARNING - \[m\]\[患者1\] 对话 [12] 失败 \(第1次尝试\): Connection timeout$", log)
    assert re.search(rf"{stamp}INFO - \[m\]\[患者1\] 将在 0\.0 秒后重试\.\.\.$", log)
    assert re.search(rf"{stamp}INFO - \[m\]\[患者1\] 对话 [12] 重试成功 \(第2次尝试，耗时: [\d.]+秒\)$", log)
    server.set(statuses=[], reset=True)
    assert run(prompt_matrix, "-c", path) == 0
    assert server.stats()["calls"] == 1
    assert "ERROR" not in Path("output/raw_kimi/m-患者2.json").read_text("utf-8")


@pytest.mark.slow
def test_prompt_matrix_side_by_side(server: Server) -> None:
    """Several configs run in one go, each with its own limits, log and outputs; a signal reaches all of them."""
    configs = [arg for name in ("kimi", "doubao") for arg in ("-c", write_matrix(server, name, max_concurrent=1))]
    server.set(latency=0.3)
    with start("prompt_matrix", *configs) as process:
        for name in ("kimi", "doubao"):
            wait_for_lines(Path(f"output/raw_{name}/checkpoint/conversations_results.jsonl"), 1)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)
    assert process.returncode == 143
    server.set(latency=0.0)
    assert run(prompt_matrix, *configs) == 0
    for name in ("kimi", "doubao"):
        assert len(list(Path(f"output/raw_{name}").glob("*.json"))) == 4
        assert "INFO" in Path(f"batch_process_{name}.log").read_text("utf-8")
    assert server.stats()["accepted"] == 16


def test_prompt_matrix_endpoint_id(server: Server) -> None:
    """Ark's endpoint id is what is sent as the model; the name stays in the output."""
    path = write_matrix(server, models=["doubao-pro"], api_config={"base_url": server.url, "endpoint_id": "ep-1"})
    assert run(prompt_matrix, "-c", path) == 0
    line = loads(Path("output/raw_kimi/checkpoint/conversations_requests.jsonl").read_bytes().splitlines()[0])
    assert (line["model"], line["metadata"]["model"]) == ("ep-1", "doubao-pro")
    assert Path("output/raw_kimi/doubao-pro-患者1.json").exists()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"models": ["a/b", "a:b"]}, "would hold both"),
        ({"models": ["a", "A"]}, "would hold both"),
        ({"models": ["a", "a"]}, "stands there twice"),
        ({"models": []}, "no models"),
        ({"api_config": {}}, "no base_url"),
        ({"records_dir": "nowhere"}, "is no folder"),
        ({"max_retry": 1}, "did you mean 'max_retries'"),
    ],
)
def test_prompt_matrix_refuses_before_sending(
    server: Server, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], reason: str
) -> None:
    """Outputs that would share a file and configs that cannot be meant are told before anything is sent."""
    assert run(prompt_matrix, "-c", write_matrix(server, **changes)) == 2
    assert reason in capsys.readouterr().err
    assert not server.stats()["calls"]


def test_prompt_matrix_refuses_to_replace_other_files(server: Server) -> None:
    """A JSON file that somebody else wrote is left alone."""
    path = write_matrix(server, models=["m"])
    Path("output/raw_kimi").mkdir(parents=True)
    Path("output/raw_kimi/m-患者1.json").write_text('{"mine": 1}', "utf-8")
    assert run(prompt_matrix, "-c", path) == 2
    assert not server.stats()["calls"]


def test_prompt_matrix_leaves_out_what_is_no_record(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    """Empty records, folders and other files are told, and nobody is asked about them."""
    path = write_matrix(server, models=["m"])
    Path("测试输入问答记录/病房").mkdir()
    Path("测试输入问答记录/空.txt").write_text("\ufeff\n", "utf-8")
    Path("测试输入问答记录/备注.docx").touch()
    assert run(prompt_matrix, "-c", path) == 0
    told = capsys.readouterr()
    assert "1 models x 2 people = 2 files" in told.out
    assert [name for name in ("病房", "空.txt", "备注.docx") if f"{name} is left out" not in told.err] == []


def test_prompt_matrix_side_by_side_needs_two_folders(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    """Two configs with one output_dir would write the same checkpoint."""
    configs = [write_matrix(server, name, output_dir="out", models=[name]) for name in ("a", "b")]
    assert run(prompt_matrix, "-c", configs[0], "-c", configs[1]) == 2
    assert "each needs its own" in capsys.readouterr().err
    assert not server.stats()["calls"]


def test_prompt_matrix_keeps_the_outputs_of_the_old_script(server: Server) -> None:
    """They look like ours; the first run renames them, a later one replaces its own."""
    path = write_matrix(server, models=["m"])
    Path("output/raw_kimi").mkdir(parents=True)
    Path("output/raw_kimi/m-患者1.json").write_text('{\n  "model": "m", "result": "old"}', "utf-8")
    assert run(prompt_matrix, "-c", path, "--dry_run") == 0
    assert "old" in Path("output/raw_kimi/m-患者1.json").read_text("utf-8")
    for _ in range(2):
        assert run(prompt_matrix, "-c", path) == 0
        [older] = Path("output/raw_kimi").glob("m-患者1.*Z.json")
        assert "old" in older.read_text("utf-8")


def test_keys_of_ark(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The key of Doubao may stand in .env under either of its names."""
    Path(".env").write_text("DOUBAO_API_KEY=sk-of-doubao\n", "utf-8")
    monkeypatch.setattr(os, "environ", os.environ.copy())
    _run.load_env()
    assert os.environ[processor.PROVIDERS["ark"].key_env[0]] == "sk-of-doubao"


# ---- structured_output -----------------------------------------------------------------------------------------------

TASK_CONFIG = """
model: {{base_url: "{url}/v1", model_name: m}}
runtime: {{retry_delay: 0}}
io: {{input_file: rows.csv, output_file: "{output}", checkpoint_dir: points}}
task:
  prompt_file: prompt.md
  schema: {{type: object, properties: {{category: {{enum: [pos, neg]}}}}, required: [category]}}
  ask_again: 1
  logprobs: true
  label_column: category
"""


def reply_with(content: str | None, **message: Any) -> dict[str, Any]:
    tokens = [
        {"token": '{"category": "', "logprob": -1},
        {"token": "pos", "logprob": -0.5},
        {"token": '"}', "logprob": 0},
    ]
    choice = {"message": {"content": content, **message}, "finish_reason": "stop", "logprobs": {"content": tokens}}
    return {"choices": [choice], "usage": {"prompt_tokens": 1, "completion_tokens": 1}}


def write_task(server: Server, output: str) -> None:
    Path("rows.csv").write_text("id,text,category\n1,good,pos\n2,odd,neg\n3,awful,neg\n4,secret,pos\n", "utf-8")
    Path("prompt.md").write_text('Classify {text}. Example: {{"category": "pos"}}', "utf-8")
    Path("task.yaml").write_text(TASK_CONFIG.format(url=server.url, output=output), "utf-8")
    server.set(
        statuses=[
            {"contains": "good", "status": 200, "body": reply_with('{"category": "pos"}')},
            {"contains": "That was not valid", "answer": '```json\n{"category": "neg"}\n```'},
            {"contains": "odd", "answer": "Hm."},
            {"contains": "awful", "status": 400, "body": {"error": {"message": "no"}}},
            {"contains": "secret", "status": 200, "body": reply_with(None, refusal="I will not.")},
        ]
    )


def test_structured_output_golden(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows come back with fields, probabilities, errors and raw texts; an invalid answer is asked again, corrected."""
    write_task(server, "out.jsonl")
    Path("out.jsonl").write_text("my own", "utf-8")
    assert run(structured_output, "-c", "task.yaml") == 2
    Path("out.jsonl").unlink()
    assert run(structured_output, "-c", "task.yaml") == 1
    rows = [json.loads(line) for line in Path("out.jsonl").read_text("utf-8").splitlines()]
    nothing = {"category_probability": None, "category_first_token_probability": None}
    assert rows == [
        {
            "id": "1",
            "text": "good",
            "category": "pos",
            "category_answer": "pos",
            "category_probability": pytest.approx(0.60653066),
            "category_first_token_probability": pytest.approx(0.60653066),
        },
        {"id": "2", "text": "odd", "category": "neg", "category_answer": "neg", **nothing},
        {
            "id": "3",
            "text": "awful",
            "category": "neg",
            "category_answer": None,
            **nothing,
            "error": "bad_request 400: no",
            "raw": "",
        },
        {
            "id": "4",
            "text": "secret",
            "category": "pos",
            "category_answer": None,
            **nothing,
            "error": "refused: I will not.",
            "raw": "I will not.",
        },
    ]
    assert capsys.readouterr().out.splitlines() == [
        "  category    (none)       neg       pos",
        "       neg         1         1         0",
        "       pos         1         0         1",
        "2 of 4 right (50.0%)",
        "2 valid, 2 failed; the rows are in out.jsonl",
    ]
    again = loads(Path("points/out_round2_requests.jsonl").read_bytes())
    assert [turn["role"] for turn in again["messages"]] == ["user", "assistant", "user"]
    server.set(reset=True)
    assert run(structured_output, "-c", "task.yaml") == 1
    assert server.stats()["calls"] == 1  # the bad request; the rest is known


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("label_column: category", "label_column: truth", "needs the columns truth"),
        ("out.jsonl", "out.xlsx", "ends in .csv, .tsv, .jsonl"),
        ("rows.csv", "points/out_requests.jsonl", "which this program would write"),
    ],
)
def test_structured_output_refuses_before_sending(
    server: Server, capsys: pytest.CaptureFixture[str], old: str, new: str, reason: str
) -> None:
    """What would go wrong at the end is told before anything is paid."""
    write_task(server, "out.jsonl")
    Path("points").mkdir()
    Path("points/out_requests.jsonl").write_text('{"text": "a", "category": "pos"}\n', "utf-8")
    Path("task.yaml").write_text(Path("task.yaml").read_text("utf-8").replace(old, new), "utf-8")
    assert run(structured_output, "-c", "task.yaml") == 2
    assert reason in capsys.readouterr().err
    assert not server.stats()["calls"]


def test_structured_output_as_csv(server: Server) -> None:
    """The same as a table."""
    write_task(server, "out.csv")
    run(structured_output, "-c", "task.yaml")
    assert Path("out.csv").read_text("utf-8").splitlines()[::3] == [
        "id,text,category,category_answer,category_probability,category_first_token_probability,error,raw",
        "3,awful,neg,,,,bad_request 400: no,",
    ]


@pytest.mark.slow
def test_structured_output_killed(server: Server) -> None:
    """After kill -9 in the middle of a run with faults the same command asks the rest, and nothing twice."""
    write_task(server, "out.jsonl")
    Path("rows.csv").write_text("text,category\n" + "".join(f"row {n},neg\n" for n in range(40)), "utf-8")
    server.set(statuses=[{"contains": "row", "answer": '{"category": "neg"}'}], latency=0.1, faults={"error_500": 0.2})
    with start("structured_output", "-c", "task.yaml", "--progress", "none") as process:
        wait_for_lines(Path("points/out_results.jsonl"), 10)
        process.kill()
        process.communicate(timeout=30)
    done = Path("points/out_results.jsonl").read_bytes().count(b"\n")
    assert 10 <= done < 40
    time.sleep(0.15)  # what was in flight is over
    server.set(latency=0.0, faults={}, reset=True)
    assert run(structured_output, "-c", "task.yaml") == 0
    assert server.stats()["calls"] == 40 - done
    rows = [json.loads(line) for line in Path("out.jsonl").read_text("utf-8").splitlines()]
    assert [(row["text"], row["category_answer"]) for row in rows] == [(f"row {n}", "neg") for n in range(40)]


# ---- response_cache --------------------------------------------------------------------------------------------------


def write_samples(name: str, contents: list[str], start: int = 0) -> None:
    """Write a request file; the same content stands for samples of one prompt."""
    lines = [
        {"model": "m", "messages": [{"role": "user", "content": content}], "metadata": {"n": n}}
        for n, content in enumerate(contents, start)
    ]
    Path(name).write_bytes(b"".join(processor.dumps(line) + b"\n" for line in lines))


def run_cached(server: Server, name: str, *flags: str) -> int:
    url = f"{server.url}/v1/chat/completions"
    budgets = ["--max-requests-per-minute=0", "--max_tokens_per_minute", "0"]
    argv = ["run", "--cache_filepath", "c.sqlite", "--requests_filepath", name, "--request_url", url]
    return run(response_cache, *argv, *budgets, *flags)


def test_cache_keeps_samples_apart(server: Server) -> None:
    """Five samples of one prompt stay five; another file gets the same five, and asks for the sixth."""
    write_samples("a.jsonl", ["same"] * 5 + ["other"])
    answers = [{"contains": "same", "answer": f"sample {n}", "times": 1} for n in range(5)]
    server.set(statuses=answers)
    assert run_cached(server, "a.jsonl") == 0
    write_samples("b.jsonl", ["other"] + ["same"] * 6, start=100)
    server.set(statuses=[{"contains": "same", "answer": "sample 5"}], reset=True)
    assert run_cached(server, "b.jsonl") == 0
    assert server.stats()["calls"] == 1
    lines = [loads(line) for line in Path("b_results.jsonl").read_bytes().splitlines()]
    texts = sorted(line[1]["choices"][0]["message"]["content"] for line in lines)[1:]
    assert sorted(line[2]["n"] for line in lines) == list(range(100, 107))
    assert texts == [f"sample {n}" for n in range(6)]
    assert Path("c.sqlite").stat().st_mode & 0o77 == 0


def test_cache_knows_a_url_in_either_form(server: Server) -> None:
    """An answer of the base URL is an answer of the endpoint that the processor makes of it."""
    write_samples("a.jsonl", ["one"])
    base = ["--requests_filepath", "a.jsonl", "--request_url", f"{server.url}/v1"]
    assert run(response_cache, "run", "--cache_filepath", "c.sqlite", *base) == 0
    write_samples("b.jsonl", ["one"], start=7)
    server.set(reset=True)
    assert run_cached(server, "b.jsonl") == 0
    assert server.stats()["calls"] == 0


def test_cache_takes_no_bad_answers(server: Server) -> None:
    """Failed, cut off and filtered answers are asked again."""
    write_samples("a.jsonl", ["fail", "cut", "filtered", "fine"])
    server.set(
        statuses=[
            {"contains": "fail", "status": 400, "body": {"error": {"message": "no"}}},
            {"contains": "cut", "answer": "x", "finish": "length"},
            {"contains": "filtered", "answer": "x", "finish": "content_filter"},
        ]
    )
    run_cached(server, "a.jsonl")
    server.set(statuses=[], reset=True)
    assert run_cached(server, "a.jsonl", "--restart") == 0
    assert server.stats()["calls"] == 3
    assert len(list(Path().glob("a_results.*.jsonl"))) == 1  # the former results are kept, once


def test_cache_stores_what_an_interrupted_run_left(server: Server) -> None:
    """Results that were never stored are stored at the next start."""
    write_samples("a.jsonl", ["one", "two"])
    url = f"{server.url}/v1/chat/completions"
    assert processor.main(["--requests_filepath", "a.jsonl", "--request_url", url]) == 0
    assert run_cached(server, "a.jsonl") == 0
    Path("a_results.jsonl").unlink()
    server.set(reset=True)
    assert run_cached(server, "a.jsonl") == 0
    assert not server.stats()["calls"]


@pytest.mark.slow
def test_cached_run_killed(server: Server) -> None:
    """What a killed run has answered is in the cache after the next start."""
    write_samples("a.jsonl", [f"question {n}" for n in range(40)])
    server.set(latency=0.1, faults={"reset": 0.1})
    url = f"{server.url}/v1/chat/completions"
    flags = ["--cache_filepath", "c.sqlite", "--requests_filepath", "a.jsonl", "--request_url", url]
    with start("response_cache", "run", *flags) as process:
        wait_for_lines(Path("a_results.jsonl"), 10)
        process.kill()
        process.communicate(timeout=30)
    time.sleep(0.15)
    done = Path("a_results.jsonl").read_bytes().count(b"\n")
    server.set(latency=0.0, faults={}, reset=True)
    assert run_cached(server, "a.jsonl") == 0
    assert server.stats()["calls"] == 40 - done
    Path("a_results.jsonl").unlink()
    assert run_cached(server, "a.jsonl") == 0
    assert server.stats()["calls"] == 40 - done


def test_a_broken_cache_is_a_warning(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    """A cache file that is none is told and left alone; the run goes on."""
    write_samples("a.jsonl", ["one"])
    Path("c.sqlite").write_bytes(b"no database at all" * 100)
    assert run_cached(server, "a.jsonl") == 0
    assert "going on without it" in capsys.readouterr().err
    assert Path("c.sqlite").read_bytes().startswith(b"no database")


@pytest.mark.parametrize("command", ["info", "store"])
def test_cache_commands_tell_what_is_wrong(server: Server, capsys: pytest.CaptureFixture[str], command: str) -> None:
    """A file that is no cache, and one that is not there, end in a message; nothing is made."""
    flags = ["--requests_filepath", "r.jsonl"] if command == "store" else []
    write_samples("r.jsonl", ["a"])
    Path("r_results.jsonl").touch()
    Path("broken.sqlite").write_text("no database, no database", "utf-8")
    assert run(response_cache, command, "--cache_filepath", "broken.sqlite", *flags) == 2
    assert "the cache broken.sqlite cannot be used: file is not a database" in capsys.readouterr().err
    Path("r_results.jsonl").unlink()
    assert run(response_cache, command, "--cache_filepath", "typo.sqlite", *flags) == 2
    assert "there is no" in capsys.readouterr().err
    assert not Path("typo.sqlite").exists()
    assert run(response_cache, command, "--cache_filepath", "typo.sqlite", "--cache_max_days", "-1", *flags) == 2


def test_cache_limits(tmp_path: Path) -> None:
    """What is too old does not count and goes; of the rest the newest stay."""
    cache = response_cache.Cache(tmp_path / "c.sqlite", "u", max_days=10, max_megabytes=0.001)
    now, day = time.time(), response_cache.SECONDS_PER_DAY
    rows = [(bytes([n]), os.urandom(400), now - n * day) for n in (0, 1, 2, 11)]
    cache.database.executemany("INSERT INTO answers VALUES (?, ?, ?)", rows)
    assert cache.get(bytes([11])) is None
    assert cache.shrink() == 2
    assert [row[0] for row in cache.database.execute("SELECT key FROM answers ORDER BY key")] == [b"\0", b"\1"]
    cache.close()
    # closed without a trace of WAL
    assert [path.name for path in tmp_path.iterdir()] == ["c.sqlite"]


def test_cache_of_a_workflow(server: Server) -> None:
    """--cache_filepath of a workflow answers its questions from another run."""
    write_questions(server, ["1,a", "2,b"])
    assert run(csv_questions, "--cache_filepath", "c.sqlite") == 0
    shutil.rmtree("checkpoints")
    server.set(reset=True)
    assert run(csv_questions, "--cache_filepath", "c.sqlite") == 0
    assert not server.stats()["calls"]
    assert Path("data/results.csv").read_text("utf-8").count(",success,") == 2


def test_cache_needs_a_file(server: Server) -> None:
    """Standard input can be read only once."""
    assert run_cached(server, "-", "--save_filepath", "r.jsonl") == 2


# ---- examples --------------------------------------------------------------------------------------------------------

COMMAND = re.compile(r"python -m workflows\.(\w+) -c (workflows/examples/(\S+))")
COMMANDS = {
    path.name: match
    for path in sorted(EXAMPLES.iterdir())
    if path.is_file() and (match := COMMAND.search(path.read_text("utf-8")))
}


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_run(server: Server, name: str) -> None:
    """Every config of the examples does what the command at its top says, against the local provider."""
    assert COMMANDS[name][3] == name
    module = {module.__name__: module for module in WORKFLOWS}[f"workflows.{COMMANDS[name][1]}"]
    answer = '{"reasoning_steps": [], "category": "neutral"}'
    server.set(statuses=[{"contains": "Classify", "answer": answer}])
    assert run(module, "-c", str(example(name, server))) == 0
    assert server.stats()["calls"] >= 3
    text = (EXAMPLES / name).read_text("utf-8")
    outputs = re.findall(r'"output_(?:dir|file)": "(.*?)"|output_(?:dir|file): "(.*?)"', text)
    assert all(Path(output).exists() for pair in outputs for output in pair if output)


def test_help_of_every_workflow(capsys: pytest.CaptureFixture[str]) -> None:
    """--help shows the module's own words."""
    for module in WORKFLOWS:
        with pytest.raises(SystemExit):
            module.main(["--help"])
        assert (module.__doc__ or "").split("\n")[0] in capsys.readouterr().out.replace("\n", " ")


def test_a_reader_that_goes_away_is_no_failure(tmp_path: Path) -> None:
    """`| head` ends a program quietly."""
    line = json.dumps([{"model": "m"}, {"choices": []}]) + "\n"
    (tmp_path / "r.jsonl").write_text(line, "utf-8")
    command = f"'{sys.executable}' -m workflows.report '{tmp_path / 'r.jsonl'}' | head -c 1 >/dev/null"
    done = subprocess.run(["sh", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert not done.stderr


def test_usage_errors_are_messages(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    """A usage error ends a workflow with its message and exit code 2."""

    def refuse(_argv: list[str] | None) -> int:
        raise UsageError("no")

    assert _run.main_program(refuse, []) == 2
    assert capsys.readouterr().err == "Cannot start: no\n"
