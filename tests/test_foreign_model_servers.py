"""Real model servers on this machine's CPU, with tiny models of random weights that are made here.

Skipped without them. To run them: pip install xllamacpp gguf, and pip install "transformers[serving]" torch
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from tests.jobs import (
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

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.slow

# Each program gets the folder of its model and a port. The vocabulary is that of single bytes.
MAKE_LLAMA = """
import gguf, numpy, sys
WIDTH, BLOCKS, WORDS = 32, 2, ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\\u2581"]
random, ones = numpy.random.default_rng(0), numpy.ones(WIDTH, numpy.float32)
model = gguf.GGUFWriter(sys.argv[1] + "/tiny.gguf", "llama")
model.add_context_length(512)
model.add_embedding_length(WIDTH)
model.add_block_count(BLOCKS)
model.add_feed_forward_length(WIDTH)
model.add_head_count(2)
model.add_layer_norm_rms_eps(1e-5)
model.add_tokenizer_model("llama")
model.add_token_list(WORDS)
model.add_token_scores([0.0] * len(WORDS))
model.add_token_types([2, 3, 3, *[6] * 256, 1])
model.add_bos_token_id(1)
model.add_eos_token_id(2)
model.add_chat_template("{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\\n{% endfor %}")
shapes = {"token_embd": (len(WORDS), WIDTH), "output": (len(WORDS), WIDTH), "output_norm": None}
for block in range(BLOCKS):
    names = "attn_norm ffn_norm attn_q attn_k attn_v attn_output ffn_gate ffn_up ffn_down".split()
    shapes |= {f"blk.{block}.{name}": None if "norm" in name else (WIDTH, WIDTH) for name in names}
for name, shape in shapes.items():
    model.add_tensor(f"{name}.weight", random.standard_normal(shape).astype(numpy.float32) / 8 if shape else ones)
model.write_header_to_file()
model.write_kv_data_to_file()
model.write_tensors_to_file()
model.close()
"""
SERVE_LLAMA = """
import sys, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.port, params.hostnames = sys.argv[1] + "/tiny.gguf", int(sys.argv[2]), ["127.0.0.1"]
params.n_ctx, params.n_parallel, params.cpuparams.n_threads = 1024, 2, 1
if "embedding" in sys.argv:
    params.embedding, params.pooling_type = True, xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN
server = xllamacpp.Server(params)
sys.stdin.read()
"""
MAKE_TRANSFORMERS = """
import sys, torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
words = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
bytewise = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
bytewise.pre_tokenizer, bytewise.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
ends = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytewise, **ends)
tokenizer.chat_template = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\\n{% endfor %}"
tokenizer.save_pretrained(sys.argv[1])
torch.manual_seed(0)
size = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
ids = {"vocab_size": len(words), "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
LlamaForCausalLM(LlamaConfig(**size, **ids, max_position_embeddings=512)).save_pretrained(sys.argv[1])
"""


class Server:
    """A running server: the part of the URL before the endpoint, and the name of its model."""

    def __init__(self, url: str, model: str) -> None:
        self.url, self.model = url, model

    def run(
        self, folder: Path, requests: list[dict[str, Any]], *flags: str, endpoint: str = "/chat/completions"
    ) -> Any:
        """Run the real program on these requests without a key; gives exit code, result lines, messages."""
        requests = [{**request, "model": self.model} for request in requests]
        path = write_lines(folder / "job.jsonl", requests)
        environment = clean_environment()
        del environment["OPENAI_API_KEY"]
        limits = ["--provider", "local", "--max_requests_per_minute", "0", "--max_tokens_per_minute", "0"]
        done = run_program(path, self.url + endpoint, *limits, *flags, environment=environment)
        lines = read_lines(folder / "job_results.jsonl")
        assert one_line_each(requests, lines), told(done)
        return done.returncode, sorted(lines, key=str), told(done)


def need(install: str, *packages: str) -> None:
    """Skip where a package is missing."""
    if not all(map(importlib.util.find_spec, packages)):
        pytest.skip(f"needs: pip install {install}")


def start(folder: Path, port: int, make: str, serve: list[str]) -> Any:
    """Make a model and serve it."""
    subprocess.run([sys.executable, "-c", make, str(folder)], check=True, timeout=120, capture_output=True)
    return foreign_server(serve, f"http://127.0.0.1:{port}/health", folder, HF_HUB_OFFLINE="1")


def llama(folder: Path, *more: str) -> Iterator[Server]:
    """Serve with llama.cpp's own server, whose name for the model is a path, and which takes any name."""
    need("xllamacpp gguf", "xllamacpp", "gguf")
    port = free_port()
    with start(folder, port, MAKE_LLAMA, [sys.executable, "-c", SERVE_LLAMA, str(folder), str(port), *more]):
        yield Server(f"http://127.0.0.1:{port}/v1", "tiny")


@pytest.fixture(scope="module")
def llama_cpp(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The server of llama.cpp."""
    yield from llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def llama_cpp_embeddings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The server of llama.cpp, for embeddings only."""
    yield from llama(tmp_path_factory.mktemp("embeddings"), "embedding")


@pytest.fixture(scope="module")
def transformers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """`transformers serve`."""
    need("'transformers[serving]' torch", "transformers", "torch", "fastapi", "uvicorn", "openai")
    folder, port = tmp_path_factory.mktemp("transformers"), free_port()
    words = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(folder)]
    with start(
        folder, port, MAKE_TRANSFORMERS, [*words, "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    ):
        yield Server(f"http://127.0.0.1:{port}/v1", str(folder))


@pytest.mark.parametrize("name", ["llama_cpp", "transformers"])
def test_a_stream_is_what_the_reply_would_have_been(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Requests without randomness give the same answers, ends and token counts, streamed or not."""
    server, found = request.getfixturevalue(name), {}
    for stream in (False, True):
        folder = tmp_path / str(stream)
        folder.mkdir()
        asked = chats(6, max_tokens=8, temperature=0, stream=stream)
        code, lines, words = server.run(folder, asked, "--save_details")
        assert code == 0, words
        found[stream] = [
            [
                reply["object"],
                reply["choices"],
                {name: reply["usage"][name] for name in ("prompt_tokens", "total_tokens")},
            ]
            for _, reply, _, _ in lines
        ]
        assert all(details["tokens"] == reply["usage"]["total_tokens"] for _, reply, _, details in lines)
        assert all(choice["finish_reason"] == "length" for _, [choice], _ in found[stream])
    assert found[True] == found[False]


def test_more_than_the_server_has_places_for(llama_cpp: Server, tmp_path: Path) -> None:
    """A server with two places answers forty requests, which wait there."""
    code, lines, words = llama_cpp.run(tmp_path, chats(40, max_tokens=32))
    assert (code, len(lines)) == (0, 40), words


def test_a_request_that_is_too_long_fails_alone(llama_cpp: Server, tmp_path: Path) -> None:
    """The server's refusal of a long prompt is final, and names what it takes; the others are answered."""
    long = {"messages": [{"role": "user", "content": "x" * 5000}]}
    code, lines, words = llama_cpp.run(tmp_path, [*chats(3, max_tokens=4), long])
    assert code == 1, words
    [[error]] = [line[1] for line in lines if isinstance(line[1], list)]
    assert (error["kind"], error["status"]) == ("bad_request", 400)
    assert error["response"]["error"]["n_ctx"] == 512


@pytest.mark.parametrize(
    ("endpoint", "body", "field"),
    [
        ("/completions", {"prompt": "a", "max_tokens": 3}, "choices"),
        ("/responses", {"input": "a", "max_output_tokens": 3}, "output"),
        ("/messages", {"max_tokens": 3, "messages": [{"role": "user", "content": "a"}]}, "content"),
    ],
)
def test_other_families(llama_cpp: Server, tmp_path: Path, endpoint: str, body: dict[str, Any], field: str) -> None:
    """The server speaks other families too; their token counts are read."""
    code, [[_, reply, _, details]], words = llama_cpp.run(tmp_path, [body], "--save_details", endpoint=endpoint)
    assert code == 0, words
    assert reply[field]
    assert details["tokens"] >= 3


def test_embeddings(llama_cpp_embeddings: Server, tmp_path: Path) -> None:
    """Vectors of a real server."""
    code, [[_, reply]], words = llama_cpp_embeddings.run(tmp_path, [{"input": ["a", "b"]}], endpoint="/embeddings")
    assert code == 0, words
    assert [len(item["embedding"]) for item in reply["data"]] == [32, 32]


@pytest.mark.parametrize("name", ["llama_cpp", "transformers"])
def test_a_wrong_path_is_named(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """A path that the server does not have ends the run at once with advice."""
    server = request.getfixturevalue(name)
    done = run_program(write_lines(tmp_path / "job.jsonl", chats(3)), f"{server.url}/nowhere/chat/completions")
    assert done.returncode == 3
    assert "nothing at /v1/nowhere/chat/completions" in told(done)
