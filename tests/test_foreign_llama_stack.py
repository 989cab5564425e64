"""Llama Stack's own files and batches, over the local provider: OpenAI's Batch API as other people write it.

Skipped without it. To run them: pip install llama-stack "mcp<2" "sqlalchemy[asyncio]" aiosqlite
"""

from __future__ import annotations

import importlib.util
import json
import sys
from typing import TYPE_CHECKING, Any

import pytest

from tests.jobs import KEY, ProviderProcess, foreign_server, free_port, one_line_each, read_lines, write_lines
from workflows import _run, provider_batch

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.slow
MODEL = "openai/gpt-4o-mini"  # its name for the model gpt-4o-mini of the provider openai


def config(folder: Path, backend: str) -> dict[str, Any]:
    """A server with nothing but inference, files and batches."""
    keys, tables = ({"backend": name} for name in ("kv_default", "sql_default"))
    backends = {
        "kv_default": {"type": "kv_sqlite", "db_path": str(folder / "keys.db")},
        "sql_default": {"type": "sql_sqlite", "db_path": str(folder / "tables.db")},
    }
    stores = {name: {**keys, "namespace": name} for name in ("metadata", "prompts", "connectors")}
    stores |= {name: {**tables, "table_name": name} for name in ("inference", "conversations")}
    files = {"storage_dir": str(folder / "files"), "metadata_store": {**tables, "table_name": "files"}}
    kinds = {
        "inference": ("openai", "remote::openai", {"api_key": KEY, "base_url": f"{backend}/v1"}),
        "files": ("files", "inline::localfs", files),
        "batches": ("batches", "inline::reference", {"kvstore": {**keys, "namespace": "batches"}}),
    }
    providers = {
        api: [{"provider_id": name, "provider_type": kind, "config": settings}]
        for api, (name, kind, settings) in kinds.items()
    }
    model = {"model_id": "gpt-4o-mini", "provider_id": "openai", "model_type": "llm"}
    return {
        "version": 2,
        "distro_name": "test",
        "apis": list(kinds),
        "providers": providers,
        "storage": {"backends": backends, "stores": stores},
        "registered_resources": {"models": [{**model, "provider_model_id": "gpt-4o-mini"}]},
        "server": {"host": "127.0.0.1"},
    }


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of the server."""
    if not all(map(importlib.util.find_spec, ("llama_stack", "sqlalchemy", "aiosqlite"))):
        pytest.skip("needs: pip install llama-stack")
    folder, port = tmp_path_factory.mktemp("stack"), free_port()
    with ProviderProcess(folder) as backend:
        (folder / "stack.yaml").write_text(json.dumps(config(folder, backend.url)))
        serve = "import sys; from llama_stack.cli.llama import main; sys.exit(main())"
        words = [sys.executable, "-c", serve, "stack", "run", str(folder / "stack.yaml"), "--port", str(port)]
        url = f"http://127.0.0.1:{port}"
        with foreign_server(words, f"{url}/v1/batches", folder, HOME=str(folder)):
            yield url


def requests(count: int, model: str = MODEL) -> list[dict[str, Any]]:
    """Requests whose metadata are their numbers."""
    return [
        {"model": model, "messages": [{"role": "user", "content": f"q{n}"}], "metadata": {"n": n}} for n in range(count)
    ]


def run(path: Path, url: str, command: str, *words: str) -> int:
    """Run a command of the workflow."""
    flags = ["--requests_filepath", str(path), "--request_url", f"{url}/v1", "--poll_seconds", "0.2"]
    return _run.main_program(provider_batch.main, [command, *flags, *words])


def test_a_batch_there_and_back(tmp_path: Path, stack: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Created, found in the list, collected, and not sent again."""
    path = write_lines(tmp_path / "job.jsonl", requests(30))
    assert run(path, stack, "create", "--job_name", "mine") == 0
    assert run(path, stack, "list") == 0
    assert "mine-" in capsys.readouterr().out
    assert run(path, stack, "run") == 0
    lines = read_lines(tmp_path / "job_results.jsonl")
    assert one_line_each(requests(30), lines)
    assert all(f"q{line[2]['n']}" in line[1]["choices"][0]["message"]["content"] for line in lines)
    assert run(path, stack, "run") == 0
    assert read_lines(tmp_path / "job_results.jsonl") == lines


def test_what_it_refuses(tmp_path: Path, stack: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A file that it fails for an unknown model leaves failures in its words; an unknown job is told."""
    path = write_lines(tmp_path / "job.jsonl", requests(3, "nobody"))
    assert run(path, stack, "run") == 1
    assert "'nobody' does not exist" in capsys.readouterr().err
    assert [line[1][0]["kind"] for line in read_lines(tmp_path / "job_results.jsonl")] == ["bad_request"] * 3
    assert run(path, stack, "status", "batch_9") == 2
    assert "404" in capsys.readouterr().err
