"""serve.py by the openai client: answers are those of the model alone, whoever else asks, leaves or errs."""
import functools
import gc
import http.client
import json
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import openai
import pytest
import torch
import uvicorn
from fastapi.testclient import TestClient

import serve
from checkpoint import load_model, save_model
from common.adapters import base_id, load_adapter, save_adapter
from common.cli import InputError
from common.device import give_back_memory
from common.generate import generate
from common.tokenizer import render_chat, train_tokenizer
from lowrank import attach_lora
from model import Config, Transformer
from sample import open_model

TEMPLATE = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}\n{% endfor %}<|assistant|>"
NAMES = ("news", "tweets", "mail", "law")

@pytest.fixture(scope="module")
def folder(tmp_path_factory, text_file):
    """A model and four adapters of it."""
    path = tmp_path_factory.mktemp("serve")
    torch.manual_seed(0)
    config = Config("llama", vocab_size=500, context=64, blocks=2, heads=4, kv_heads=2, width=32, ffn=48)
    tokenizer = train_tokenizer([text_file.read_text(encoding="utf-8")], 500)
    tokenizer.chat_template = TEMPLATE
    model = Transformer(config)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(8 if p.dim() > 1 else 1)  # so that no two tokens are nearly as likely
    save_model(path / "model", model, tokenizer)
    for seed, name in enumerate(NAMES):
        model, _ = load_model(path / "model")
        attach_lora(model, r=2 + seed, alpha=8, targets=("q", "v"))
        with torch.no_grad():
            for key, p in model.named_parameters():
                if key.endswith(".B"):
                    p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)))
        save_adapter(path / name, model, "model", base_id(path / "model"))
    return path

@pytest.fixture(scope="module")
def alone(folder):
    """What the model alone writes, greedily: its text, its prompt and its tokens."""
    @functools.cache
    def model_of(adapter):
        model, tokenizer = load_model(folder / "model")
        if adapter:
            load_adapter(model, folder / adapter)
        return model, tokenizer

    @functools.cache
    def write(text, adapter=None, count=12, special=False):
        model, tokenizer = model_of(adapter)
        ids = tokenizer.encode(text, special=special)
        tokens = [s[0] for s in generate(model, [ids], count, temperature=0, stop=tokenizer.stop_ids)]
        text = tokenizer.decode([t for t in tokens if t not in tokenizer.stop_ids])
        return SimpleNamespace(text=text, ids=ids, tokens=tokens, model=model)
    return write

def make_server(folder, names=NAMES):
    model, tokenizer, _ = open_model(str(folder / "model"), 16)
    return serve.Server(str(folder / "model"), model, tokenizer, {name: folder / name for name in names})

@pytest.fixture(scope="module")
def server(folder):
    return make_server(folder)

@pytest.fixture(scope="module")
def port(server):
    """A server in a thread of this process."""
    listener = socket.create_server(("127.0.0.1", 0))
    http = uvicorn.Server(uvicorn.Config(serve.make_app(server), log_level="error"))
    thread = threading.Thread(target=http.run, args=([listener],))
    thread.start()
    yield listener.getsockname()[1]
    http.should_exit = True
    thread.join()

@pytest.fixture(scope="module")
def client(port):
    return openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)

def complete(client, prompt, model="", **more):
    model = model or client.models.list().data[0].id
    return client.completions.create(model=model, prompt=prompt, **dict(max_tokens=12, temperature=0) | more)

def test_a_completion_is_the_greedy_text(folder, client, alone):
    wanted, answer = alone("The statement"), complete(client, "The statement")
    assert answer.choices[0].text == wanted.text and answer.choices[0].finish_reason == "length"
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(wanted.ids), 12) and answer.created > 1e9
    assert usage.total_tokens == len(wanted.ids) + 12 and answer.model == str(folder / "model")
    assert complete(client, wanted.ids).choices[0].text == wanted.text, "a prompt may be token ids"

def test_models_and_health_and_metrics(folder, client, port):
    assert [row.id for row in client.models.list()] == [str(folder / "model"), *NAMES]
    complete(client, "a b c", max_tokens=3)
    assert get(port, "/health") == (200, '{"status":"ok"}')
    status, text = get(port, "/metrics")
    assert status == 200 and "# TYPE fingpt_requests_total counter\n" in text
    values = {row.split()[0]: float(row.split()[1]) for row in text.splitlines() if row[0] != "#"}
    assert values["fingpt_tokens_total"] >= 3 and values["fingpt_requests_total"] >= 1
    assert values["fingpt_blocks_used"] == values["fingpt_running"] == 0 < values["fingpt_blocks"]

def get(port, path, **headers):
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("GET", path, headers=headers)
    answer = connection.getresponse()
    return answer.status, answer.read().decode()

def test_a_chat_is_the_models_own_format(folder, client, alone):
    messages = [dict(role="user", content="One?")]
    wanted = alone(render_chat(load_model(folder / "model")[1], messages), special=True)
    asked = dict(model=str(folder / "model"), messages=messages, temperature=0)
    answer = client.chat.completions.create(**asked, max_tokens=12)
    assert answer.choices[0].message.content == wanted.text and answer.choices[0].message.role == "assistant"
    assert answer.usage.prompt_tokens == len(wanted.ids)
    answer = client.chat.completions.create(**asked, max_completion_tokens=5)
    assert answer.usage.completion_tokens == 5

def test_streams_carry_the_same_text_and_the_usage(folder, client, alone):
    wanted = alone("The statement")
    parts = list(complete(client, "The statement", stream=True, stream_options=dict(include_usage=True)))
    assert "".join(p.choices[0].text for p in parts[:-1]) == wanted.text and len(parts) > 2
    assert [p.choices[0].finish_reason for p in parts[:-1]] == [None] * (len(parts) - 2) + ["length"]
    assert parts[-1].choices == [] and parts[-1].usage.completion_tokens == 12
    messages = [dict(role="user", content="One?")]
    chat = dict(model=str(folder / "model"), messages=messages, max_tokens=12, seed=5)
    parts = list(client.chat.completions.create(**chat, stream=True))
    assert [p.choices[0].delta.role for p in parts] == ["assistant"] + [None] * (len(parts) - 1)
    assert {p.object for p in parts} == {"chat.completion.chunk"}
    whole = client.chat.completions.create(**chat).choices[0].message.content
    assert "".join(p.choices[0].delta.content for p in parts) == whole

@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_ends_before_a_stop_text(client, stream, alone):
    """Of several tokens, of which a stream must not show the first."""
    text = alone("The statement").text
    stop = text[3:9]
    answer = complete(client, "The statement", stop=["never there", stop], stream=stream)
    parts = [part.choices[0] for part in answer] if stream else answer.choices
    assert "".join(part.text for part in parts) == text[:text.index(stop)]
    assert parts[-1].finish_reason == "stop"
    assert stream or answer.usage.completion_tokens < 12

def test_a_seed_gives_the_same_draws(client):
    texts = [complete(client, "a", temperature=1.5, top_p=0.95, seed=s).choices[0].text for s in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]

@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_are_those_of_the_models_logits(folder, client, stream, alone):
    wanted = alone("The statement", "law")
    with torch.inference_mode():
        logits = wanted.model(torch.tensor([wanted.ids + wanted.tokens]))[0, len(wanted.ids) - 1:-1].double()
    exact = logits.log_softmax(-1)
    chosen = exact[torch.arange(12), wanted.tokens]
    asked = dict(model="law", max_tokens=12, temperature=0, stream=stream)
    answer = client.completions.create(prompt="The statement", logprobs=2, **asked)
    found = [part.choices[0].logprobs for part in answer] if stream else [answer.choices[0].logprobs]
    values = torch.tensor([p for logprobs in found for p in logprobs.token_logprobs], dtype=torch.double)
    assert (values - chosen).abs().max() < 1e-5
    best = torch.tensor([sorted(p.values()) for logprobs in found for p in logprobs.top_logprobs])
    assert (best - exact.topk(2).values.flip(-1)).abs().max() < 1e-5
    answer = client.chat.completions.create(messages=[dict(role="user", content="One?")], logprobs=True,
                                            top_logprobs=3, **asked)
    choices = [part.choices[0] for part in answer] if stream else answer.choices
    rows = [row for choice in choices for row in choice.logprobs.content]
    assert len(rows) == 12 and all(len(row.top_logprobs) == 3 and row.logprob <= 0 for row in rows)
    assert all(row.top_logprobs[0].token == row.token for row in rows), "greedy"

def test_thirty_two_clients_with_four_adapters_are_answered_as_alone(client, alone):
    """Each as it would be alone in float32, whole and streamed, with lengths and adapters of their own."""
    jobs = [("The statement " * (1 + i % 3) + str(i % 11), (None, *NAMES)[i % 5]) for i in range(64)]
    wanted = [alone(*job).text for job in jobs]

    def ask(i):
        answer = complete(client, *jobs[i], stream=i % 2 == 1)
        return "".join(part.choices[0].text for part in (answer if i % 2 else [answer]))
    with ThreadPoolExecutor(32) as threads:
        assert list(threads.map(ask, range(64))) == wanted
    assert len(set(wanted)) > 30

def post(port, body, path="/v1/completions"):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", path, body)
    return connection

WRONG = dict(long=(dict(prompt="word " * 500), 400), type=(dict(max_tokens="12"), 400),
             nobody=(dict(model="nobody"), 404), field=(dict(tools=[]), 400))
KINDS = [*WRONG, "broken", "half", *["leaves", "leaves a stream"] * 3, *["whole", "stream"] * 4]

def one_of_many(port, alone, i):
    """A client of the load test, and how it went: answered, sent away, left, refused or lost."""
    draw = random.Random(i)
    kind, name = draw.choice(KINDS), (None, *NAMES)[i % 5]
    body = dict(prompt=f"The statement {i % 11}", model=name, max_tokens=12, temperature=0,
                stream="stream" in kind)
    wanted = alone(body["prompt"], name).text
    if kind == "half":
        connection = http.client.HTTPConnection("127.0.0.1", port)
        connection.putrequest("POST", "/v1/completions")
        connection.putheader("Content-Length", "100")
        connection.endheaders(b'{"prompt"')
    elif kind.startswith("leaves"):
        connection = post(port, json.dumps(body | dict(max_tokens=50)))
        time.sleep(draw.random() * 0.1)
        if body["stream"]:
            answer = connection.getresponse()
            for _ in range(draw.randrange(20)):
                answer.readline()
    else:
        change, status = WRONG.get(kind, ({}, 400 if kind == "broken" else 200))
        connection = post(port, json.dumps(body | change)[:-3 if kind == "broken" else None])
        answer = connection.getresponse()
        content = answer.read().decode()
        connection.close()
        if answer.status != status:
            return "sent away" if (answer.status, status) == (429, 200) else f"lost: {kind} {answer.status}"
        if status >= 400:
            return "refused"
        parts = content.split("data: ")[1:-1] if body["stream"] else [content]
        text = "".join(json.loads(part)["choices"][0]["text"] for part in parts)
        return "answered" if text == wanted else f"lost: {text!r} for {wanted!r}"
    connection.close()
    return "left"

def resident():
    gc.collect()
    give_back_memory()
    return int(re.search(r"VmRSS:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

def test_two_thousand_clients_leave_nothing_behind(server, port, alone, monkeypatch):
    """Good requests, wrong ones, and clients that leave at any moment, so many at a time that some are sent
    away. None is lost; memory and blocks in use return to where they began."""
    monkeypatch.setattr(serve, "WAITING", 16)
    monkeypatch.setattr(server.engine, "batch_size", 8)
    free, outcomes, memory = len(server.engine.pool.free), Counter(), []
    ask = functools.partial(one_of_many, port, alone)
    for start in range(0, 2000, 500):  # the first 500 warm up
        with ThreadPoolExecutor(32) as threads:
            outcomes.update(threads.map(ask, range(start, start + 500)))
        end = time.monotonic() + 20
        while server.answers and time.monotonic() < end:
            time.sleep(0.02)
        assert not server.answers and len(server.engine.pool.free) == free
        memory.append(resident())
    assert set(outcomes) == {"answered", "sent away", "left", "refused"}, outcomes
    assert outcomes.total() == 2000 and outcomes["answered"] > 200
    assert memory[-1] - memory[0] < 2 << 20, memory  # the answers alone would take 3 MB
    assert get(port, "/health") == (200, '{"status":"ok"}')

def test_a_client_that_leaves_is_noticed_before_its_answer_ends(server, port):
    """Whole or streamed, running or waiting: most of what it asked for is never computed."""
    before, step = server.totals["tokens"], server.engine.step
    server.engine.step = lambda: time.sleep(0.02) or step()
    try:
        body = json.dumps(dict(prompt="The statement", max_tokens=50, temperature=0))
        connections = [post(port, body) for _ in range(40)]
        time.sleep(0.1)
        for connection in connections:
            connection.close()
        end = time.monotonic() + 20
        while server.answers and time.monotonic() < end:
            time.sleep(0.02)
    finally:
        server.engine.step = step
    assert not server.engine.running and len(server.engine.pool.free) == server.engine.pool.blocks
    assert server.totals["tokens"] - before < 40 * 25

def test_a_full_queue_sends_clients_away(server, client, monkeypatch):
    monkeypatch.setattr(serve, "WAITING", 3)
    monkeypatch.setattr(server.engine, "batch_size", 2)
    step = server.engine.step
    monkeypatch.setattr(server.engine, "step", lambda: time.sleep(0.02) or step())

    def ask(i):
        try:
            return len(complete(client, "The statement", model="law", max_tokens=10).choices)
        except openai.RateLimitError as e:
            assert "3 requests are waiting already" in e.message
            return 0
    with ThreadPoolExecutor(20) as threads:
        assert 0 < sum(threads.map(ask, range(20))) < 20
    assert ask(0) == 1

@pytest.mark.parametrize("body, status, message", [
    ("nonsense", 400, "the body is not a JSON object"),
    ("[" * 100_000, 400, "the body is not a JSON object"),
    ("[1]", 400, "the body is not a JSON object"),
    (" " * (1 << 21), 413, "the body must have a Content-Length of at most 1048576"),
    (dict(), 400, "prompt: Field required"),
    (dict(prompt=5), 400, "prompt: str: Input should be a valid string, got 5"),
    (dict(prompt=["a"]), 400, "prompt: str: Input should be a valid string, got ['a']"),
    (dict(prompt=[10 ** 30]), 400, "is outside the vocabulary 0..499"),
    (dict(prompt=""), 400, "a prompt has 0 tokens: the model reads 1 to 64"),
    (dict(prompt="word " * 100), 400, "the model reads 1 to 64"),
    (dict(prompt="a", model="nobody\ud800"), 404, "no model is called 'nobody\\ud800': there are"),
    (dict(prompt="a", max_tokens=0), 400, "max_tokens: Input should be greater than or equal to 1, got 0"),
    (dict(prompt="a", max_tokens=True), 400, "max_tokens: Input should be a valid integer, got True"),
    (dict(prompt="a", temperature=-1), 400, "temperature: Input should be greater than or equal to 0, got -1"),
    (dict(prompt="a", temperature=10 ** 400), 400, "temperature: Input should be a valid number, got 1000"),
    (dict(prompt="a", temperature=float("nan")), 400, "temperature: Input should be"),
    (dict(prompt="a", top_p=2), 400, "top_p: Input should be less than or equal to 1, got 2"),
    (dict(prompt="a", top_p=0), 400, "top_p: Input should be greater than 0, got 0"),
    (dict(prompt="a", seed=-1), 400, "seed: Input should be greater than or equal to 0, got -1"),
    (dict(prompt="a", stop=[1]), 400, "stop: "), (dict(prompt="a", stop=""), 400, "stop: "),
    (dict(prompt="a", logprobs=21), 400, "logprobs: Input should be less than or equal to 20, got 21"),
    (dict(prompt="a", n=2), 400, "n: Input should be less than or equal to 1, got 2"),
    (dict(prompt="a", logit_bias={}), 400, "logit_bias: Extra inputs are not permitted")])
def test_wrong_requests(body, status, message, port):
    text = body if isinstance(body, str) else json.dumps(body)
    answer = post(port, text).getresponse()
    error = json.load(answer)["error"]
    assert answer.status == status and message in error["message"] and "\n" not in error["message"], error
    assert set(error) == {"message", "type", "param", "code"}

@pytest.mark.parametrize("messages", [None, [], ["a"], [dict(role="user")], [dict(role="user", content=5)],
                                      [dict(role="user", content="a", tool_calls=[])]])
def test_wrong_messages(messages, port):
    answer = post(port, json.dumps(dict(messages=messages)), "/v1/chat/completions").getresponse()
    assert answer.status == 400 and json.load(answer)["error"]["message"].startswith("messages: ")

def test_the_openai_clients_own_errors(client, port):
    with pytest.raises(openai.NotFoundError, match="no model is called 'gpt-4o'"):
        complete(client, "a", model="gpt-4o")
    with pytest.raises(openai.BadRequestError, match="tools: Extra inputs are not permitted"):
        messages = [dict(role="user", content="One?")]
        client.chat.completions.create(model="law", messages=messages, tools=[dict(type="function", function={})])
    assert get(port, "/v1/nowhere") == (404, json.dumps(serve.error("404: Not Found"), separators=(",", ":")))

def test_a_key(folder):
    with TestClient(serve.make_app(make_server(folder, ()), "a secret")) as client:
        for headers, status in (({}, 401), (dict(Authorization="Bearer a secre"), 401),
                                (dict(Authorization="Bearer a secret"), 200)):
            assert client.get("/v1/models", headers=headers).status_code == status
            body = dict(prompt="a", max_tokens=1)
            assert client.post("/v1/completions", json=body, headers=headers).status_code == status
            assert client.get("/health", headers=headers).status_code == 200

@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_broken_engine_leaves_nobody_waiting(folder):
    server = make_server(folder, ())

    def broken():
        raise RuntimeError("out of memory")
    server.engine.step = broken
    with TestClient(serve.make_app(server)) as client:
        for _ in range(2):
            answer = client.post("/v1/completions", json=dict(prompt="a"))
            assert answer.status_code == 500 and "out of memory" in answer.json()["error"]["message"]
        assert "out of memory" in client.post("/v1/completions", json=dict(prompt="a", stream=True)).text
        assert client.get("/health").status_code == 500
        assert "out of memory" in client.get("/health").json()["error"]["message"]

def test_the_command_and_sigterm(folder, run, alone):
    """As a user runs it; the help needs no FastAPI. SIGTERM in the middle of answers: they are finished."""
    assert len(run("serve.py", "--help").stdout) > 200
    with socket.create_server(("127.0.0.1", 0)) as s:
        port = s.getsockname()[1]
    command = [sys.executable, "serve.py", "--model", folder / "model", "--port", port, "--adapter",
               f"news={folder / 'news'}"]
    process = subprocess.Popen([str(word) for word in command], cwd=serve.__file__.rpartition("/")[0],
                               stdout=subprocess.PIPE, text=True)
    try:
        assert f"news at http://127.0.0.1:{port}/v1" in process.stdout.readline()
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
        asked = dict(model="news", max_tokens=50, stream=True)
        streams = [complete(client, "The statement", **asked) for _ in range(20)]
        first = [next(stream).choices[0].text for stream in streams]
        process.send_signal(signal.SIGTERM)
        wanted = alone("The statement", "news", 50).text
        rest = ["".join(part.choices[0].text for part in stream) for stream in streams]
        assert [a + b for a, b in zip(first, rest)] == [wanted] * 20
        assert process.wait(timeout=60) == 0, "nothing was lost"
        with pytest.raises(OSError):
            get(port, "/health")
    finally:
        process.kill()
        process.wait()

def test_bad_input(folder, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        model, port = str(folder / "model"), str(taken.getsockname()[1])
        for args, message in ((["--adapter", "a="], "is not an adapter: it has no adapter_config.json"),
                              (["--adapter", f"{model}={folder}/law"], "an adapter and the model are called"),
                              (["--port", "0"], "argument --port: must be a whole number, at least 1"),
                              (["--port", port], "can't listen at 127.0.0.1:.*in use"),
                              (["--host", "0.0.0.0"], "--host 0.0.0.0 is open to others: give an --api-key"),
                              (["--host", "no such host", "--api-key", "a"], "can't listen at no such host")):
            with pytest.raises(InputError, match=message):
                serve.main(["--model", model, *args])
    with pytest.raises(InputError, match="no such folder or file"):
        serve.main(["--model", "/nowhere", "--port", port])
    monkeypatch.setitem(sys.modules, "fastapi", None)
    with pytest.raises(InputError, match="pip install fastapi uvicorn"):
        serve.main(["--model", str(folder / "model")])
