"""The LiteLLM proxy with made-up answers: families of APIs, rate limits and errors as other people write them.

Skipped without it. To run them: pip install "litellm[proxy]"
"""

from __future__ import annotations

import importlib.util
import json
import sys
from typing import TYPE_CHECKING, Any

import pytest

from tests.jobs import (
    KEY,
    chats,
    clean_environment,
    foreign_server,
    free_port,
    one_line_each,
    read_lines,
    run_program,
    told,
    write_lines,
)
from workflows._replies import read_answer, tokens_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.slow

WINDOW_SECONDS = 3  # a minute of the proxy's limits on keys
DEPLOYMENTS: dict[str, dict[str, Any]] = {  # name -> model behind it, whose answers are made up, and more
    "gpt": {"model": "openai/gpt-4o-mini"},
    "claude": {"model": "anthropic/claude-3-5-haiku-20241022"},
    "gemini": {"model": "gemini/gemini-2.5-flash"},
    "embedding": {"model": "openai/text-embedding-3-small", "mock_response": [0.1, 0.2]},
    "slow": {"model": "openai/gpt-4o-mini", "mock_delay": 0.3},
    "limited": {"model": "openai/gpt-4o-mini", "rpm": 5},
    "broken": {"model": "openai/gpt-4o-mini", "mock_response": "litellm.InternalServerError"},
    "small": {"model": "openai/gpt-4o-mini", "mock_response": "litellm.ContextWindowExceededError"},
}
CONFIG = {
    "model_list": [
        {"model_name": name, "litellm_params": {"mock_response": "pong", "api_key": "none", **more}}
        for name, more in DEPLOYMENTS.items()
    ],
    "router_settings": {"num_retries": 0, "optional_pre_call_checks": ["enforce_model_rate_limits"]},
    "general_settings": {"custom_auth": "keys.check"},
}
# A key says its own limit: sk-...-rpm_limit-4. Limits of keys need a database otherwise.
KEYS = f"""
from litellm.proxy._types import ProxyException, UserAPIKeyAuth
async def check(request, api_key):
    start, *limit = api_key.rsplit("-", 2) if "_" in api_key else [api_key]
    if start != "{KEY}":
        raise ProxyException(message="Authentication Error", type="auth_error", param="key", code=401)
    return UserAPIKeyAuth(api_key=api_key, **({{limit[0]: int(limit[1])}} if limit else {{}}))
"""


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of the proxy."""
    if not all(map(importlib.util.find_spec, ("litellm", "fastapi", "uvicorn"))):
        pytest.skip('needs: pip install "litellm[proxy]"')
    folder, port = tmp_path_factory.mktemp("litellm"), free_port()
    (folder / "config.yaml").write_text(json.dumps(CONFIG))
    (folder / "keys.py").write_text(KEYS)
    serve = "import sys; from litellm import run_server; sys.exit(run_server())"
    words = [sys.executable, "-c", serve, "--config", str(folder / "config.yaml"), "--host", "127.0.0.1"]
    url, environment = f"http://127.0.0.1:{port}", {"LITELLM_MASTER_KEY": "sk-of-nobody-0123456789-0123456789"}
    environment |= {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_RATE_LIMIT_WINDOW_SIZE": str(WINDOW_SECONDS)}
    with foreign_server([*words, "--port", str(port)], f"{url}/health/liveliness", folder, **environment):
        yield url


def run(folder: Path, url: str, requests: list[dict[str, Any]], *flags: str, limit: str = "") -> Any:
    """Run the real program on these requests, with a key of this limit; gives exit code, result lines, messages."""
    path = write_lines(folder / "job.jsonl", requests)
    budgets = ["--max_requests_per_minute", "0", "--max_tokens_per_minute", "0", "--save_details"]
    environment = clean_environment(OPENAI_API_KEY=KEY + limit)
    done = run_program(path, url, *budgets, *flags, environment=environment, timeout=150)
    lines = read_lines(folder / "job_results.jsonl")
    assert KEY not in told(done) + json.dumps(lines)
    return done.returncode, lines, told(done)


SAID = [{"role": "user", "content": "hi"}]
FAMILIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"model": "gpt", "messages": SAID},
    "/chat/completions": {"model": "gemini", "messages": SAID, "stream": True},
    "/v1/completions": {"model": "gpt", "prompt": "hi"},
    "/v1/responses": {"model": "gpt", "input": "hi"},
    "/v1/messages": {"model": "claude", "max_tokens": 9, "messages": SAID},
    "/v1beta/models/gemini:generateContent": {"contents": [{"role": "user", "parts": [{"text": "hi"}]}]},
    "/v1/embeddings": {"model": "embedding", "input": "hi"},
}


@pytest.mark.parametrize("path", FAMILIES)
def test_families(proxy: str, tmp_path: Path, path: str) -> None:
    """Each family's answer and tokens are read, whatever the proxy has made of them."""
    requests = [{**FAMILIES[path], "metadata": {"id": i}} for i in range(5)]
    code, lines, words = run(tmp_path, proxy + path, requests)
    assert code == 0, words
    assert one_line_each(requests, lines)
    for _, reply, _, details in lines:
        if "embeddings" in path:
            assert reply["data"][0]["embedding"] == [0.1, 0.2]
        else:
            assert read_answer(reply).text == "pong"
        assert details["tokens"] == tokens_of(reply)
        assert details["tokens"] > 0


@pytest.mark.parametrize(
    ("limit", "model", "path"),
    [
        ("-rpm_limit-4", "gpt", "/v1/chat/completions"),
        ("-tpm_limit-120", "gpt", "/v1/chat/completions"),
        ("-max_parallel_requests-2", "slow", "/v1/chat/completions"),
        ("-rpm_limit-4", "claude", "/v1/messages"),
    ],
)
def test_limits_of_a_key(proxy: str, tmp_path: Path, limit: str, model: str, path: str) -> None:
    """Refusals by requests, tokens or concurrency use up no attempts, and end in answers."""
    requests = chats(12, max_tokens=20)
    code, lines, words = run(tmp_path, proxy + path, [{**r, "model": model} for r in requests], limit=limit)
    assert code == 0, words
    assert len(lines) == 12
    assert {line[3]["attempts"] for line in lines} == {1}
    assert sum(line[3]["refusals"] for line in lines) > 0


def test_the_limit_of_a_deployment(proxy: str, tmp_path: Path) -> None:
    """A limit that is counted by the minute of the clock is waited for: this takes up to a minute."""
    code, lines, words = run(tmp_path, f"{proxy}/v1/chat/completions", [{**r, "model": "limited"} for r in chats(8)])
    assert code == 0, words
    assert (len(lines), {line[3]["attempts"] for line in lines}) == (8, {1})


def test_errors(proxy: str, tmp_path: Path) -> None:
    """Passing errors are tried again, hopeless ones are not; the others are answered."""
    models = ["gpt", "broken", "small", "nobody"]
    requests = [{"model": model, "messages": SAID} for model in models]
    code, lines, words = run(tmp_path, f"{proxy}/v1/chat/completions", requests, "--max_attempts", "2")
    assert code == 1, words
    found = {request["model"]: outcome for request, outcome, *_ in lines}
    kinds = {model: [error["kind"] for error in found[model]] for model in models[1:]}
    assert kinds == {"broken": ["server_error", "server_error"], "small": ["bad_request"], "nobody": ["bad_request"]}
    assert read_answer(found["gpt"]).text == "pong"


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/v1beta/models/gemini:generateContent"])
def test_a_key_that_is_refused(proxy: str, tmp_path: Path, path: str) -> None:
    """A wrong key stops the run, whatever the family."""
    body = next(body for ending, body in FAMILIES.items() if path.endswith(ending))
    done = run_program(write_lines(tmp_path / "job.jsonl", [body] * 30), proxy + path)
    assert done.returncode == 0  # this one is right
    environment = clean_environment(OPENAI_API_KEY="sk-of-somebody-else")
    done = run_program(tmp_path / "job.jsonl", proxy + path, "--restart", environment=environment)
    assert done.returncode == 3
    assert "Authentication Error" in told(done)
    assert not read_lines(tmp_path / "job_results.jsonl")
