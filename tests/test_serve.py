"""serve.py over HTTP: an answer is sample.py's greedy text, adapters answer as alone, wrong requests get one line."""
import json
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from fastapi.testclient import TestClient  # noqa: E402

import serve
from checkpoint import load_model, save_model
from common.adapters import base_id, load_adapter, save_adapter
from common.cli import InputError
from common.generate import generate
from common.tokenizer import render_chat, train_tokenizer
from lowrank import attach_lora
from model import Config, Transformer
from sample import open_model

TEMPLATE = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}\n{% endfor %}<|assistant|>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, text_file):
    """A model and two adapters of it."""
    path = tmp_path_factory.mktemp("serve")
    torch.manual_seed(0)
    config = Config("llama", vocab_size=500, context=64, blocks=2, heads=4, kv_heads=2, width=32, ffn=48)
    tokenizer = train_tokenizer([text_file.read_text(encoding="utf-8")], 500)
    tokenizer.chat_template = TEMPLATE
    save_model(path / "model", Transformer(config), tokenizer)
    for seed, name in enumerate(("news", "tweets")):
        model, _ = load_model(path / "model")
        attach_lora(model, r=4, alpha=8, targets=("q", "v"))
        with torch.no_grad():
            for key, p in model.named_parameters():
                if key.endswith(".B"):
                    p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)))
        save_adapter(path / name, model, "model", base_id(path / "model"))
    return path


@pytest.fixture(scope="module")
def api(folder):
    model, tokenizer, _ = open_model(str(folder / "model"), 16)
    return serve.Api(str(folder / "model"), model, tokenizer, {n: folder / n for n in ("news", "tweets")})


@pytest.fixture(scope="module")
def client(api):
    with TestClient(serve.make_app(api)) as client:
        yield client


def alone(folder, text, adapter=None, count=12, special=False):
    """(text, tokens) that the model alone writes, greedily."""
    model, tokenizer = load_model(folder / "model")
    if adapter:
        load_adapter(model, folder / adapter)
    ids = tokenizer.encode(text, special=special)
    tokens = [s[0] for s in generate(model, [ids], count, temperature=0, stop=tokenizer.stop_ids)]
    return tokenizer.decode([t for t in tokens if t not in tokenizer.stop_ids]), len(ids), len(tokens)


def complete(client, **body):
    answer = client.post("/v1/completions", json=dict(dict(max_tokens=12, temperature=0), **body))
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_a_completion_is_the_greedy_text(folder, client):
    text, read, written = alone(folder, "The statement")
    body = complete(client, prompt="The statement")
    assert body["choices"] == [dict(index=0, finish_reason="length", text=text)] and body["object"] == "text_completion"
    assert body["usage"] == dict(prompt_tokens=read, completion_tokens=written, total_tokens=read + written)
    assert body["model"] == str(folder / "model") and body["id"] and body["created"] > 1e9


def test_requests_at_once_are_answered_as_alone(folder, client):
    """Twenty requests with their own lengths and adapters, from ten threads."""
    prompts = ["The statement " * (1 + i % 3) + str(i) for i in range(20)]
    names = [(None, "news", "tweets")[i % 3] for i in range(20)]
    with ThreadPoolExecutor(10) as threads:
        answers = list(threads.map(lambda p, n: complete(client, prompt=p, model=n), prompts, names))
    texts = [answer["choices"][0]["text"] for answer in answers]
    assert texts == [alone(folder, p, n)[0] for p, n in zip(prompts, names)]
    assert [answer["model"] for answer in answers] == [n or str(folder / "model") for n in names]


def test_a_chat_is_the_models_own_format(folder, client):
    messages = [dict(role="user", content="One?")]
    prompt = render_chat(load_model(folder / "model")[1], messages)
    answer = client.post("/v1/chat/completions", json=dict(messages=messages, max_tokens=12, temperature=0)).json()
    text, read, _ = alone(folder, prompt, special=True)
    assert answer["choices"][0]["message"] == dict(role="assistant", content=text)
    assert answer["object"] == "chat.completion" and answer["usage"]["prompt_tokens"] == read


def test_an_answer_ends_before_a_stop_text(folder, client):
    text, *_ = alone(folder, "The statement")
    stop = text[4:7]
    body = complete(client, prompt="The statement", stop=["never there", stop])
    assert body["choices"][0]["text"] == text[:text.index(stop)] and body["choices"][0]["finish_reason"] == "stop"
    assert body["usage"]["completion_tokens"] < 12


def test_a_seed_gives_the_same_draws(client):
    texts = [complete(client, prompt="a", temperature=1.5, seed=s)["choices"][0]["text"] for s in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_health_and_models(folder, client):
    assert client.get("/health").json() == dict(status="ok", running=0, waiting=0)
    rows = client.get("/v1/models").json()["data"]
    assert [row["id"] for row in rows] == [str(folder / "model"), "news", "tweets"]


@pytest.mark.parametrize("body, status, message", [
    ("nonsense", 400, "the body is not JSON"),
    ("[1]", 400, "the body must be a JSON object"),
    (dict(), 400, "prompt must be a text"),
    (dict(prompt=5), 400, "prompt must be of type str"),
    (dict(prompt=""), 400, "a prompt has 0 tokens: the model reads 1 to 64"),
    (dict(prompt="word " * 100), 400, "the model reads 1 to 64"),
    (dict(prompt="a", model="nobody"), 404, "no model is called 'nobody': there are"),
    (dict(prompt="a", max_tokens=0), 400, "max-new-tokens must be at least 1, got 0"),
    (dict(prompt="a", max_tokens=True), 400, "max_tokens must be of type int"),
    (dict(prompt="a", temperature=-1), 400, "temperature must be at least 0, got -1"),
    (dict(prompt="a", top_p=2), 400, "top-p must be in 0..1"),
    (dict(prompt="a", seed=-1), 400, "seed must be in 0..2^62"),
    (dict(prompt="a", stop=[1]), 400, "stop must be a text or a list of texts"),
    (dict(prompt="a", stream=True), 400, "leave stream and n out"),
    (dict(prompt="a", logit_bias={}), 400, "'logit_bias' is not supported")])
def test_wrong_requests(body, status, message, client):
    text = body if isinstance(body, str) else json.dumps(body)
    answer = client.post("/v1/completions", content=text)
    assert answer.status_code == status and message in answer.json()["error"]["message"], answer.text


@pytest.mark.parametrize("messages", [None, [], ["a"], [dict(role="user")], [dict(role="user", content=5)]])
def test_wrong_messages(messages, client):
    answer = client.post("/v1/chat/completions", json=dict(messages=messages))
    assert answer.status_code == 400 and "messages must be [{" in answer.json()["error"]["message"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_broken_engine_leaves_nobody_waiting(folder):
    model, tokenizer, _ = open_model(str(folder / "model"), 16)
    api = serve.Api(str(folder / "model"), model, tokenizer, {})

    def broken():
        raise RuntimeError("out of memory")
    api.engine.step = broken
    with TestClient(serve.make_app(api), raise_server_exceptions=False) as client:
        for _ in range(2):
            assert client.post("/v1/completions", json=dict(prompt="a")).status_code == 500
        assert client.get("/health").status_code == 500
        assert client.get("/health").json()["status"] == "failed: out of memory"


def test_the_command(folder, run):
    """As a user runs it, on a free port; the help needs no FastAPI."""
    assert len(run("serve.py", "--help").stdout) > 200
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, "serve.py", "--model", folder / "model", "--adapter", f"news={folder / 'news'}",
               "--port", port]
    process = subprocess.Popen([str(word) for word in command], cwd=serve.__file__.rpartition("/")[0],
                               stderr=subprocess.DEVNULL)
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).read()
                break
            except OSError:
                assert process.poll() is None
                time.sleep(0.1)
        body = json.dumps(dict(model="news", prompt="The statement", max_tokens=12, temperature=0)).encode()
        answer = json.load(urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/completions", body, timeout=60))
        assert answer["choices"][0]["text"] == alone(folder, "The statement", "news")[0]
    finally:
        process.terminate()
        process.wait()


def test_bad_input(folder, monkeypatch):
    for args, message in ((["--adapter", "a="], "--adapter a= has no folder"),
                          (["--port", "0"], "argument --port: must be a whole number, at least 1"),
                          (["--model", "/nowhere"], "no such folder or file")):
        with pytest.raises(InputError, match=message):
            serve.main(["--model", str(folder / "model"), *args])
    monkeypatch.setitem(sys.modules, "fastapi", None)
    with pytest.raises(InputError, match="pip install fastapi uvicorn"):
        serve.main(["--model", str(folder / "model")])
