"""The page of serve.py in headless Chromium, and the rank bench against decompositions in float64."""
import copy
import json
import math
import socket
import threading
import time
from pathlib import Path

import httpx
import pytest
import torch
import torch.nn.functional as F
import uvicorn

import serve
from beyond.batching import Request
from checkpoint import load_model, save_model
from common.adapters import base_id, save_adapter
from common.cli import InputError
from common.data import calibration_batches
from common.device import stored_bytes
from common.generate import generate
from common.tokenizer import train_tokenizer
from decompose import main as decompose
from lowrank import LowRankLinear, attach_lora
from model import Config, Transformer, count_parameters, is_linear
from quant import quantize
from sample import open_model

CHROMIUM = "/usr/bin/chromium"
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]
TEMPLATE = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}\n{% endfor %}<|assistant|>"
TEXT = "The statement returns a new object, which is bound to the name of the function."

@pytest.fixture(scope="module")
def folder(tmp_path_factory, text_file):
    """A model whose spectra fall, an adapter of it, and its decomposition at rank 20."""
    path = tmp_path_factory.mktemp("page")
    torch.manual_seed(0)
    tokenizer = train_tokenizer([text_file.read_text(encoding="utf-8")], 500)
    tokenizer.chat_template = TEMPLATE
    model = Transformer(Config("llama", 500, context=256, blocks=2, heads=4, kv_heads=2, width=64, ffn=96))
    with torch.inference_mode():
        model.embed.weight.mul_(8)
        for p in model.blocks.parameters():
            if p.dim() > 1:
                U, S, V = torch.linalg.svd(20 * p, full_matrices=False)
                p.copy_(U * (S * 0.95 ** torch.arange(len(S))) @ V)
    save_model(path / "model", model, tokenizer)
    attach_lora(model, r=4, alpha=8, targets=("q", "v"))
    with torch.inference_mode():
        for name, p in model.named_parameters():
            if name.endswith(".B"):
                p.normal_()
    save_adapter(path / "news", model, "model", base_id(path / "model"))
    decompose(["--model", str(path / "model"), "--rank", "20", "--out-dir", str(path / "low")])
    return path

def make_server(folder, name="model", adapters=(), teach=True):
    model, tokenizer, _ = open_model(str(folder / name), 16)
    return serve.Server(str(folder / name), model, tokenizer, {a: folder / a for a in adapters}, teach)

@pytest.fixture(scope="module")
def server(folder):
    return make_server(folder, adapters=["news"])

@pytest.fixture(scope="module")
def listening():
    """listening(server, key) -> the address at which it is served until the end."""
    threads = []

    def start(server, key=None):
        listener = socket.create_server(("127.0.0.1", 0))
        http = uvicorn.Server(uvicorn.Config(serve.make_app(server, key), log_level="error"))
        threads.append((http, threading.Thread(target=http.run, args=([listener],))))
        threads[-1][1].start()
        return f"http://127.0.0.1:{listener.getsockname()[1]}"
    yield start
    for http, thread in threads:
        http.should_exit = True
        thread.join()

@pytest.fixture(scope="module")
def address(server, listening):
    return listening(server)

@pytest.fixture(scope="module")
def browser():
    if not Path(CHROMIUM).exists():
        pytest.skip(f"the page is tested in Chromium, and {CHROMIUM} is not there: apt-get install chromium")
    from playwright.sync_api import sync_playwright
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)

@pytest.fixture
def page(browser):
    """A new page, which in the end has asked no other host and has raised no error."""
    context = browser.new_context(viewport=dict(width=1280, height=800))
    page, asked, errors = context.new_page(), [], []
    page.set_default_timeout(20_000)
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda e: errors.append(str(e)))
    yield page
    context.close()
    assert asked and not errors
    assert all(url.startswith(("http://127.0.0.1:", "data:")) for url in asked), asked

def expect(locator):
    from playwright.sync_api import expect
    return expect(locator)

@pytest.fixture
def slow(server, monkeypatch):
    """Steps that can be watched."""
    step = server.engine.step
    monkeypatch.setattr(server.engine, "step", lambda: time.sleep(0.05) or step())

def ask(address, model, temperature=0, **body):
    """What the API answers."""
    path = "chat/completions" if "messages" in body else "completions"
    body |= dict(model=model, temperature=temperature)
    choice = httpx.post(f"{address}/v1/{path}", json=body, timeout=60).raise_for_status().json()["choices"][0]
    return choice["message"]["content"] if "messages" in body else choice["text"]

def say(page, text, model=None):
    expect(page.locator("#send")).to_be_enabled()
    page.fill("#temperature", "0")
    if model:
        page.select_option("#model", model)
    page.fill("#prompt", text)
    page.press("#prompt", "Enter")

def text_of(page, selector):
    """Once it has stopped growing."""
    text = None
    while text != (text := page.locator(selector).last.text_content()) or not text:
        page.wait_for_timeout(300)
    return text

def test_an_answer_is_shown_as_it_comes_and_can_be_stopped(folder, server, address, page, slow):
    page.goto(address)
    answers, model = page.locator(".message.assistant .content"), str(folder / "model")
    say(page, "One?")
    expect(page.locator("#stop")).to_be_enabled()
    expect(answers).not_to_be_empty()
    first = answers.text_content()
    page.click("#stop")
    expect(page.locator("#send")).to_be_enabled()
    whole = ask(address, model, messages=[dict(role="user", content="One?")], max_tokens=40)
    stopped = answers.text_content()
    assert whole.startswith(stopped) and stopped.startswith(first) and 0 < len(first) < len(whole)
    end = time.monotonic() + 10
    while server.answers and time.monotonic() < end:
        time.sleep(0.02)
    assert not server.answers, "who stops leaves nothing behind"

def test_an_adapter_is_another_model(folder, address, page):
    page.goto(address)
    answers = []
    for name in (str(folder / "model"), "news"):
        say(page, "Two?", name)
        expect(page.locator(".message.assistant .content")).not_to_be_empty()
        expect(page.locator("#send")).to_be_enabled(timeout=60_000)
        answers.append(page.locator(".message.assistant .content").text_content())
        assert answers[-1] == ask(address, name, messages=[dict(role="user", content="Two?")], max_tokens=512)
        assert page.locator(".message.assistant small").text_content() == name
        page.click("#new")
    assert answers[0] != answers[1] and page.locator(".message").count() == 0

def test_a_conversation_goes_on(folder, address, page):
    """Each answer is given the whole of it."""
    page.route("**/v1/chat/completions", lambda route: route.continue_(
        post_data=json.dumps(json.loads(route.request.post_data) | dict(max_tokens=10))))
    page.goto(address)
    talk = []
    for question in ("One?", "Two?"):
        say(page, question)
        talk.append(dict(role="user", content=question))
        wanted = ask(address, str(folder / "model"), messages=talk, max_tokens=10)
        expect(page.locator(".message.assistant .content").last).to_have_text(wanted)
        talk.append(dict(role="assistant", content=wanted))

def test_output_is_text_and_never_html(address, page):
    bad = "<script>document.title='bad'</script><img src=x onerror=\"document.title='bad'\">"
    content = json.dumps(dict(choices=[dict(delta=dict(content=bad))]))
    page.route("**/v1/chat/completions", lambda route: route.fulfill(body=f"data: {content}\n\ndata: [DONE]\n\n"))
    page.goto(address)
    say(page, bad)
    expect(page.locator(".message.assistant .content")).to_have_text(bad)
    assert page.locator(".message.user .content").text_content() == bad
    assert page.title() == "FinGPT-HPC" and page.locator("main script, main img").count() == 0

def test_errors_are_told(folder, server, address, page):
    page.goto(address)
    say(page, "word " * 600)
    expect(page.locator("#error")).to_contain_text("tokens: the model reads 1 to 256")
    assert page.locator(".message").count() == 0 and page.input_value("#prompt").startswith("word word")
    page.route("**/v1/**", lambda route: route.abort())
    say(page, "a")
    expect(page.locator("#error")).to_contain_text("The server can't be reached")

def test_a_key_is_asked_for_and_without_teach_the_bench_says_how(folder, listening, page):
    address = listening(make_server(folder, teach=False), "a secret")
    assert httpx.get(f"{address}/about").status_code == httpx.post(f"{address}/measure", json={}).status_code == 401
    page.goto(address)
    for key, message in (("wrong", "this server wants its --api-key"), ("a secret", "")):
        expect(page.locator("#key-form")).to_be_visible()
        page.fill("#key", key)
        page.click("#key-form button")
        expect(page.locator("#error")).to_contain_text(message)
    expect(page.locator("#key-form")).to_be_hidden()
    say(page, "One?")
    expect(page.locator(".message.assistant .content")).not_to_be_empty()
    page.click("#bench-tab")
    expect(page.locator("#no-bench")).to_contain_text("--teach")
    expect(page.locator("#with-bench")).to_be_hidden()
    answer = httpx.post(f"{address}/measure", json={}, headers=dict(authorization="Bearer a secret"))
    assert answer.status_code == 400 and "start serve.py with --teach" in answer.text

# ------------------------------------------------------------------------------------- the rank bench

def perplexity(model, tokenizer, text):
    ids = torch.tensor([tokenizer.encode(text, around=True)])
    with torch.inference_mode():
        return math.exp(F.cross_entropy(model(ids)[0, :-1].double(), ids[0, 1:]))

def second_moments(model, tokenizer):
    """name -> X X^T in float64, of the inputs of each linear layer of the blocks, with the ridge; by hooks."""
    H, hooks = {}, []
    for name, layer in model.blocks.named_modules():
        if is_linear(layer):
            def look(m, x, name="blocks." + name):
                x = x[0].double().flatten(0, -2)
                H[name] = H.get(name, 0) + x.T @ x
            hooks.append(layer.register_forward_pre_hook(look))
    with torch.inference_mode():
        for window in calibration_batches("builtin", tokenizer, 256, 2048):
            model.hidden(window)
    for hook in hooks:
        hook.remove()
    return {name: h + 1e-4 * h.diagonal().mean() * torch.eye(len(h)) for name, h in H.items()}

@pytest.fixture(scope="module")
def exact(folder):
    """name -> W, C and U, S of the SVD of W C, in float64; H = C C^T."""
    model, tokenizer = load_model(folder / "model")
    found = {}
    for name, H in second_moments(model, tokenizer).items():
        W, C = model.get_submodule(name).weight.detach().double(), torch.linalg.cholesky(H)
        found[name] = W, C, *torch.linalg.svd(W @ C)[:2]
    return found

def low_rank(layer, B, A):
    new = LowRankLinear(layer.in_features, layer.out_features, len(A), bias=False)
    new.load_state_dict(dict(A=A, B=B))
    return new

def reduced(folder, exact, share, bits):
    """The model of such a position, made anew from the exact decomposition."""
    model, tokenizer = load_model(folder / "model")
    for name, (W, _, U, S) in exact.items():
        r, (out, width) = max(1, share * len(S) // 100), W.shape
        if r * (out + width) < out * width:
            model.set_submodule(name, low_rank(model.get_submodule(name), U[:, :r], U[:, :r].T @ W))
    if bits < 16:
        quantize(model, bits)
    return model, tokenizer

def test_every_prefix_of_the_factors_is_the_best_of_its_rank(server, exact):
    for name, (W, C, _, S) in exact.items():
        B, A, values = server.bench.factors[name]
        assert (len(A) + 1) * sum(W.shape) >= W.numel() > len(A) * sum(W.shape) and len(values) == min(W.shape)
        assert (values - S.square()).abs().max() < 1e-5 * values[0]
        for r in range(1, len(A) + 1):
            error = ((W - B[:, :r].double() @ A[:r].double()) @ C).square().sum()
            assert error - S[r:].square().sum() < 1e-6 * S.square().sum(), (name, r)

@pytest.mark.parametrize("share, bits", [(100, 16), (60, 16), (25, 16), (1, 16), (100, 8), (60, 8), (25, 4)])
def test_measurements_are_those_of_a_model_made_by_itself(folder, server, exact, share, bits):
    found = server.bench.measure(f"rank-{share}%-{bits}bit", TEXT)
    model, tokenizer = reduced(folder, exact, share, bits)
    assert found["parameters"] == count_parameters(model)
    # 8 and 4 bits: factors that differ by the rounding of float32 are rounded to other integers here and there
    assert found["perplexity"] == pytest.approx(perplexity(model, tokenizer, TEXT), rel=2e-3 if bits == 16 else 0.05)
    assert found["bytes"] == stored_bytes(model.bfloat16())

@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_positions_are_quantized_by_quant(server, folder, bits):
    """The bench's own factors in a model of their own, and quant.quantize: the same perplexity."""
    model, tokenizer = load_model(folder / "model")
    for name, (B, A, _) in server.bench.factors.items():
        if (r := 40 * min(model.get_submodule(name).weight.shape) // 100) <= len(A):
            model.set_submodule(name, low_rank(model.get_submodule(name), B[:, :r], A[:r]))
    quantize(model, bits)
    found = server.bench.measure(f"rank-40%-{bits}bit", TEXT)
    assert found["perplexity"] == pytest.approx(perplexity(model, tokenizer, TEXT), rel=1e-4)

def test_a_decomposed_folder_keeps_its_own_factors(folder):
    bench = make_server(folder, "low").bench
    model, tokenizer = load_model(folder / "low")
    whole = bench.measure("rank-100%-16bit", TEXT)
    assert whole["perplexity"] == pytest.approx(perplexity(model, tokenizer, TEXT), rel=1e-4)
    assert whole["parameters"] == count_parameters(model)
    rows = {row["kind"]: row for row in bench.facts}
    assert rows["q"]["rank"] == rows["q"]["whole"] == 20
    low = [name for name, m in model.named_modules() if isinstance(m, LowRankLinear)]
    assert len(low) == len(bench.factors)
    for name in low:
        layer = model.get_submodule(name)
        model.set_submodule(name, low_rank(layer, layer.B[:, :10], layer.A[:10]))
    half = bench.measure("rank-50%-16bit", TEXT)
    assert half["perplexity"] == pytest.approx(perplexity(model, tokenizer, TEXT), rel=1e-4)
    assert half["parameters"] == count_parameters(model) < whole["parameters"]

def test_without_adapters_each_position_writes_with_its_own_weights(folder):
    """On a CPU a step is one call, of one model's weights."""
    bench, prompt = make_server(folder).bench, [5, 6, 7]
    requests = [Request(prompt, 12, adapter=name) for name in (None, "rank-50%-16bit", None, "rank-100%-4bit")]
    for model, request in zip((bench.model, bench.model_of("rank-50%-16bit")), requests):
        alone = [step[0] for step in generate(model, [prompt], 12, temperature=0)]
        assert [r.tokens for r in bench.run([request])] == [alone]
    apart = [r.tokens for r in requests[:2]]
    assert apart[0] != apart[1]
    together = [Request(prompt, 12, adapter=r.adapter) for r in requests]
    list(bench.run(together))
    assert [r.tokens for r in together[:3]] == [*apart, apart[0]] and together[3].tokens != apart[0]

def test_answers_of_all_positions_in_one_batch_are_those_alone(server, address, folder, exact):
    from concurrent.futures import ThreadPoolExecutor
    names = [str(folder / "model"), "news", "rank-60%-16bit", "rank-30%-16bit", "rank-100%-4bit", "rank-100%-16bit"]

    def write(name):
        return ask(address, name, prompt="The statement", max_tokens=20)
    alone = [write(name) for name in names]
    with ThreadPoolExecutor(12) as threads:
        assert list(threads.map(write, 2 * names)) == 2 * alone
    assert len(set(alone)) == 5 and alone[0] == alone[-1]
    model, tokenizer = reduced(folder, exact, 60, 16)
    ids = tokenizer.encode("The statement", around=True)
    for _ in range(20):
        with torch.inference_mode():
            ids.append(model(torch.tensor([ids]))[0, -1].argmax().item())
    assert tokenizer.decode(ids) == "The statement" + alone[2]

def numbers(page, side):
    """Once they are there."""
    expect(page.locator(f"#{side} dl")).not_to_have_class("waiting")
    return page.locator(f"#{side} dd").evaluate_all("cells => cells.map(c => c.firstChild.textContent)")

def shown(measured):
    """As the page writes it."""
    x = measured["perplexity"]
    rounded = f"{float(f'{x:.4g}'):,.10g}" if x < 1e6 else None
    return [rounded, f"{measured['parameters'] / 1e6:.1f} M", f"{measured['bytes'] / 1e6:.1f} MB"]

def test_the_sliders_change_answer_numbers_and_cuts(folder, server, address, page):
    page.goto(address)
    page.click("#bench-tab")
    page.fill("#bench-prompt", "The statement")
    page.click("summary >> nth=1")
    page.fill("#text", TEXT)
    page.click("#ask-form button.main")
    wanted = dict(prompt="The statement", max_tokens=60)
    assert text_of(page, "#whole .answer") == ask(address, str(folder / "model"), **wanted)
    whole = shown(server.bench.measure("rank-100%-16bit", TEXT))
    assert numbers(page, "whole") == whole and page.locator("#spectra svg").count() == 7
    assert page.locator("#spectra polyline").count() == 14
    seen = set()
    for share, bits, place in ((100, 16, 0), (60, 16, 0), (20, 16, 0), (20, 8, 1), (100, 4, 2)):
        page.fill("#share", str(share))
        page.fill("#bits", str(place))
        expect(page.locator("#position")).to_have_text(f"{share}% of the rank, {bits} bits")
        name = f"rank-{share}%-{bits}bit"
        expect(page.locator("#reduced .answer")).to_have_text(ask(address, name, **wanted))
        assert numbers(page, "reduced") == shown(server.bench.measure(name, TEXT))
        seen.add((page.locator("#reduced .answer").text_content(), *numbers(page, "reduced")))
        assert page.locator("#spectra line").first.get_attribute("x1") == str(2 * share)
    assert len(seen) == 5
    captions = page.locator("figcaption").all_text_contents()
    assert captions[0].startswith("qwhole: rank 64 would be no smaller"), captions
    page.fill("#share", "25")
    expect(page.locator("figcaption").first).to_contain_text("rank 16:")
    kept = [row["kept"][24] for row in server.bench.facts if row["kind"] == "q"]
    expect(page.locator("figcaption").first).to_contain_text(f": keeps {100 * sum(kept) / 2:.3g}% of |WX|²")
    page.fill("#text", "word " * 600)
    page.locator("#text").blur()
    expect(page.locator("#error")).to_contain_text("the measured text has")

def test_a_newer_position_cancels_the_answer_under_way(server, address, page, slow):
    page.goto(address)
    page.click("#bench-tab")
    before = server.totals["tokens"]
    for share in range(20, 40, 2):
        page.fill("#share", str(share))
        page.wait_for_timeout(250)
    wanted = ask(address, "rank-38%-16bit", prompt="The bank said on Monday that its profit", max_tokens=60)
    expect(page.locator("#reduced .answer")).to_have_text(wanted)
    assert server.totals["tokens"] - before < 60 * 7, "ten answers of 60 tokens, the whole one and ours"

def test_what_can_not_be_shown_is_refused(folder, tmp_path):
    model, tokenizer = load_model(folder / "model", bits=8)
    save_model(tmp_path / "int8", model, tokenizer)
    for args in (["--model", str(tmp_path / "int8")], ["--model", str(folder / "model"), "--bits", "8"]):
        with pytest.raises(InputError, match="--teach needs a model of 16 bits, dense or low-rank, not with QuantLinear"):
            with socket.create_server(("127.0.0.1", 0)) as s:
                port = s.getsockname()[1]
            serve.main([*args, "--teach", "--port", str(port)])
    bench = make_server(folder).bench
    for name, text, message in (("rank-50%-8bit", "a " * 999, "the measured text has 1,?[0-9]+ tokens: give 2 to 256"),
                                ("rank-50%-8bit", "", "has 0 tokens|has 1 tokens"), ("nobody", "a b", "nobody is not measured")):
        with pytest.raises(InputError, match=message):
            bench.measure(name, text)
    assert copy.copy(bench.settings).keys() == {f"rank-{s}%-{b}bit" for s in range(1, 101) for b in (16, 8, 4)}
