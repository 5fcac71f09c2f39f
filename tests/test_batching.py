"""batching.py: what a batch writes is what each request writes alone, whoever comes, waits, shares, is sent back or has another adapter."""
import json
import random
from types import SimpleNamespace

import pytest
import torch
from test_model import GPT2, LLAMA, pair

import bench
from benches.serve import paper_counts
from beyond import cpu_kernels
from beyond.batching import Adapters, Engine, Request
from beyond.cpu_step import CPUStep
from beyond.paged_cache import PagedCache, Pool, Sequence
from checkpoint import load_model, save_model
from common.adapters import base_id, load_adapter, save_adapter, take_off
from common.cli import InputError
from common.generate import generate
from common.tokenizer import train_tokenizer
from lowrank import attach_lora
from model import Config, KVCache, Transformer
from quant import quantize

def alone(model, request, stop=()):
    """What generate, with a contiguous cache of its own, writes for a request."""
    generator = torch.Generator().manual_seed(request.seed)
    return [s[0] for s in generate(model, [request.prompt], request.max_new_tokens, request.temperature, request.top_p, stop, generator)]

def mixed_requests(count, **more):
    draw = random.Random(1)
    return [Request([draw.randrange(101) for _ in range(draw.randint(1, 30))], draw.randint(1, 18), **more) for _ in range(count)]

@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama"])
@pytest.mark.parametrize("blocks, batch", [(200, 32), (200, 3), (15, 32)], ids=["all at once", "three at a time", "a pool for two"])
def test_each_request_gets_what_it_would_get_alone(config, blocks, batch):
    model, _ = pair(config)
    engine = Engine(model, Pool(config, blocks, 4), batch_size=batch)
    requests = mixed_requests(14) + [Request([5] * 40, 30)]  # the last one ends at the context
    done = list(engine.run(requests))
    assert {id(r) for r in done} == {id(r) for r in requests}
    for request in requests:
        assert request.tokens == alone(model, request)
        assert request.ended
    assert sorted(engine.pool.free) == list(range(blocks)), "all blocks were given back"

@pytest.mark.parametrize("bits, group", [(16, None), (8, 0), (4, 32)])
def test_on_a_cpu_a_token_of_each_row_takes_one_call(bits, group, monkeypatch):
    """Its rows do not depend on each other to the last bit."""
    if cpu_kernels.load() is None:
        pytest.skip("no g++ to compile kernels_cpu.cpp with")
    torch.manual_seed(0)
    model = Transformer(Config("llama", 101, 64, blocks=2, heads=4, kv_heads=2, width=64, ffn=96)).eval()
    for p in model.parameters():
        p.data.mul_(4 if p.dim() == 2 else 1)
    if bits < 16:
        quantize(model, bits, group)
    taken, call = [], CPUStep.__call__
    monkeypatch.setattr(CPUStep, "__call__", lambda self, *args: taken.append(call(self, *args)) or taken[-1])
    requests = mixed_requests(11)
    logits = {}
    for batch in (1, 32):
        for i, request in enumerate(requests):
            taken.clear()
            again = Request(request.prompt, request.max_new_tokens)
            others = [Request(r.prompt, 18) for r in requests] if batch > 1 else []
            list(Engine(model, Pool(model.config, 200, 4), batch_size=batch).run([again, *others]))
            assert request.max_new_tokens == 1 or taken
            logits[batch, i] = again.tokens, {str(row.tolist()) for step in taken for row in step}
    for i in range(len(requests)):
        assert logits[1, i][0] == logits[32, i][0]
        assert logits[1, i][1] <= logits[32, i][1] or bits == 16  # the head is torch's

def test_a_full_pool_sends_the_last_request_back():
    """Two requests that fit together at first, and not at their ends."""
    model, _ = pair(LLAMA)
    engine, reads = Engine(model, Pool(LLAMA, 8, 4)), []
    model.embed.register_forward_pre_hook(lambda m, inputs: reads.append(tuple(inputs[0].shape)))
    requests = [Request([1, 2, 3, 4, 5], 24), Request([6, 7, 8], 24)]
    assert list(engine.run(requests)) == requests
    prompts = [T for B, T in reads if T > 1]
    assert prompts[:2] == [5, 3] and len(prompts) == 3 and prompts[2] > 3, "read again, with its tokens"
    assert [r.tokens for r in requests] == [alone(model, r) for r in requests]

def test_draws_are_a_requests_own():
    """Whatever else is in the batch, a seed gives the tokens that generate draws with it."""
    model, _ = pair(LLAMA)
    requests = mixed_requests(8, temperature=1.5, top_p=0.9)
    for seed, request in enumerate(requests):
        request.seed = seed
    list(Engine(model, Pool(LLAMA, 30, 4), batch_size=4).run(requests))
    assert [r.tokens for r in requests] == [alone(model, r) for r in requests]
    twins = [Request([3, 1, 4], 12, 1.0, seed=s) for s in (7, 7, 8)]
    list(Engine(model, Pool(LLAMA, 30, 4)).run(twins))
    assert twins[0].tokens == twins[1].tokens != twins[2].tokens

def test_requests_end_at_a_stop_token():
    model, _ = pair(GPT2)
    free = alone(model, Request([5, 6], 20))
    requests = [Request([5, 6], 20), Request([9], 20)]
    list(Engine(model, Pool(GPT2, 30, 4), stop={free[7]}).run(requests))
    assert requests[0].tokens == free[:free.index(free[7]) + 1]

# ----------------------------------------------------------------------------- adapters

def random_adapter(model, rank, targets, seed=0, size=0.3):
    """What adapters.read_adapter returns, as far as Adapters needs it."""
    generator = torch.Generator().manual_seed(int(seed))
    draw = lambda *shape: torch.randn(*shape, generator=generator) * size  # noqa: E731
    layers = {n: getattr(m, "base", m) for n, m in model.named_modules() if n.rsplit(".", 1)[-1] in targets and not n.endswith(".base")}
    return SimpleNamespace(scale=0.5 + seed / 10, factors={n: (draw(rank, m.in_features), draw(m.out_features, rank)) for n, m in layers.items()})

def merged(config, adapter):
    """The model with W + scale B A in place of W."""
    model, _ = pair(config)
    with torch.inference_mode():
        for name, (A, B) in adapter.factors.items():
            layer = model.get_submodule(name)
            layer.weight = torch.nn.Parameter(layer.weight + adapter.scale * B @ A)  # GPT-2's head leaves its embedding alone
    return model

@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_rows_with_their_own_adapters_give_the_logits_of_merged_models(config):
    """Ranks and layers differ; one row has none; prompts in a batch, then one token at a time."""
    model, _ = pair(config)
    tokens = torch.randint(0, 101, (5, 12))
    kinds = [(2, ["qkv", "q"]), (5, ["up", "down", "v"]), (1, ["o", "qkv", "q", "k", "v"]), (8, ["head"])]
    made = [random_adapter(model, rank, targets, seed) for seed, (rank, targets) in enumerate(kinds)]
    adapters = Adapters(model)
    for i, adapter in enumerate(made):
        adapters.add(f"adapter {i}", adapter)
    names = ["adapter 2", "adapter 0", None, "adapter 3", "adapter 1"]
    with torch.inference_mode():
        wanted = torch.cat([(merged(config, made[int(n[-1])]) if n else pair(config)[0])(t[None]) for n, t in zip(names, tokens)])
        adapters.select(names)
        cache = KVCache(config, 5, 12)
        logits = torch.cat([model(t, cache) for t in tokens.split([7, 1, 1, 1, 1, 1], 1)], 1)
        assert (logits - wanted).abs().max() < 1e-5 * wanted.abs().max()
        for i, name in enumerate(names):  # one name serves any batch
            adapters.select([name])
            assert (model(tokens[i:i + 1].expand(3, -1)) - wanted[i]).abs().max() < 1e-5 * wanted.abs().max()

def test_an_adapter_of_the_head_in_the_engine():
    model, _ = pair(LLAMA)
    adapters, made = Adapters(model), [random_adapter(model, rank, ["head", "up"], rank) for rank in (2, 3)]
    for name, adapter in zip("ab", made):
        adapters.add(name, adapter)
    requests = [Request([1, 2, 3], 8, adapter=name) for name in ("a", "b", None)]
    list(Engine(model, Pool(LLAMA, 40, 4), adapters=adapters).run(requests))
    singles = [merged(LLAMA, made[0]), merged(LLAMA, made[1]), pair(LLAMA)[0]]
    assert [r.tokens for r in requests] == [alone(single, r) for single, r in zip(singles, requests)]

def test_adapters_on_quantized_layers():
    config = Config(**{**LLAMA.as_dict(), "width": 64, "ffn": 128})
    torch.manual_seed(0)
    model = Transformer(config).eval()
    quantize(model, 8)
    made = [random_adapter(model, 4, ["q", "v"], seed) for seed in (1, 2)]
    tokens, wanted = torch.randint(0, 101, (3, 9)), []
    with torch.inference_mode():
        for row, adapter in zip(tokens, [*made, None]):
            if adapter:
                for name, (A, B) in adapter.factors.items():
                    layer = model.get_submodule(name)
                    layer.forward = lambda x, layer=layer, A=A, B=B, s=adapter.scale: type(layer).forward(layer, x) + s * x @ A.T @ B.T
            wanted.append(model(row[None]))
            for name in made[0].factors:
                model.get_submodule(name).__dict__.pop("forward", None)
        adapters = Adapters(model)
        adapters.add("one", made[0])
        adapters.add("two", made[1])
        adapters.select(["one", "two", None])
        assert (model(tokens) - torch.cat(wanted)).abs().max() < 1e-4  # kernels_cpu.cpp rounds x to 16 bit, some number another way

@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base on disk, sixteen adapters of it, and one of another base."""
    path = tmp_path_factory.mktemp("adapters")
    model, _ = pair(LLAMA)
    save_model(path / "base", model)
    save_model(path / "other base", pair(Config(**{**LLAMA.as_dict(), "rope_base": 600.0}))[0])
    for i in range(17):
        torch.manual_seed(i)
        model, _ = pair(LLAMA)
        attach_lora(model, r=1 + i % 4, alpha=4, targets=("q", "k", "v"))
        with torch.inference_mode():
            for name, p in model.named_parameters():
                if name.endswith(".B"):
                    p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
        save_adapter(path / f"a{i}", model, "base", base_id(path / ("base" if i < 16 else "other base")))
    return path

@pytest.mark.parametrize("blocks, batch", [(300, 32), (20, 5)])
def test_sixteen_adapters_on_one_base(folders, blocks, batch):
    model, _ = pair(LLAMA)
    adapters = Adapters(model, {f"a{i}": folders / f"a{i}" for i in range(16)}, base_id(folders / "base"))
    requests = mixed_requests(20)
    for i, request in enumerate(requests):
        request.adapter = f"a{i}" if i < 16 else None
    list(Engine(model, Pool(LLAMA, blocks, 4), adapters=adapters, batch_size=batch).run(requests))
    single, _ = pair(LLAMA)
    for request in requests:
        take_off(single)
        if request.adapter:
            load_adapter(single, folders / request.adapter)
        assert request.tokens == alone(single, request), request.adapter

def test_wrong_adapters_are_refused(folders):
    model, _ = pair(LLAMA)
    with pytest.raises(InputError, match="was trained on another base"):
        Adapters(model, {"other": folders / "a16"}, base_id(folders / "base"))
    with pytest.raises(InputError, match="is not an adapter: it has no adapter_config.json"):
        Adapters(model, {"none": folders / "nowhere"})

@pytest.mark.parametrize("request_, message", [
    (Request([1] * 49, 5), "a prompt has 49 tokens: the model reads 1 to 48"),
    (Request([1] * 15, 10), "15 tokens and up to 10 new ones need 6 blocks of 4, the pool has 5: ask for fewer"),
    (Request([], 5), "a prompt has 0 tokens: the model reads 1 to 48"),
    (Request([200], 5), "token 200 is outside the vocabulary 0..100: is this the model's tokenizer?"),
    (Request([1], 5, adapter="news"), r"no adapter is called 'news' \(a0\): give --adapter news=DIR")])
def test_what_can_never_run_is_refused(request_, message, folders):
    model, _ = pair(LLAMA)
    engine = Engine(model, Pool(LLAMA, 5, 4), adapters=Adapters(model, {"a0": folders / "a0"}))
    with pytest.raises(InputError, match=message):
        engine.submit(request_)
    assert not engine.waiting

@pytest.mark.parametrize("when", [0, 1, 5])
def test_a_cancelled_request_gives_its_blocks_back_and_the_others_do_not_notice(when):
    """While it waits, after its first token, in the middle; the last request is in the queue until then."""
    model, _ = pair(LLAMA)
    engine = Engine(model, Pool(LLAMA, 60, 4), batch_size=2)
    requests = [Request([i, 2, 3], 12) for i in (5, 6, 7)]
    for request in requests:
        engine.submit(request)
    for _ in range(when):
        engine.step()
    requests[1].cancelled = True
    done = list(engine.run([]))
    assert done[0] is requests[1] and len(requests[1].tokens) == (when + 1 if when else 0)
    assert [requests[i].tokens for i in (0, 2)] == [alone(model, requests[i]) for i in (0, 2)]
    assert len(engine.pool.free) == 60

@pytest.mark.slow
def test_the_real_model_writes_the_same_in_every_way():
    """smollm2-135m: without a cache, contiguous and paged, alone and in a batch; no adapter, one, sixteen: the same tokens, logits to 2e-5 of the largest."""
    try:
        model, tokenizer = load_model("smollm2-135m")
    except InputError as e:
        pytest.skip(f"no network: {e}")
    from pydoc_data.topics import topics
    prompts = [tokenizer.encode(topics[k][50:])[:5 + 3 * i] for i, k in enumerate(sorted(topics)[:16])]
    adapters = Adapters(model)
    for i in range(16):
        adapters.add(f"a{i}", random_adapter(model, 8, ("q", "k", "v"), i, size=0.04))
    answers = set()
    for names in ([None] * 16, ["a0"] * 16, [f"a{i}" for i in range(16)]):
        uncached, logits = [], []
        for prompt, name in zip(prompts, names):
            adapters.select([name])
            uncached.append([s[0] for s in generate(model, [prompt], 4, temperature=0, use_cache=False)])
            with torch.inference_mode():
                logits.append(model(torch.tensor([prompt + uncached[-1]]))[0])
            assert [s[0] for s in generate(model, [prompt], 4, temperature=0)] == uncached[-1]
        adapters.select(names)
        batch = list(generate(model, prompts, 4, temperature=0))
        assert [[step[i] for step in batch] for i in range(16)] == uncached
        requests = [Request(p, 4, adapter=n) for p, n in zip(prompts, names)]
        list(Engine(model, Pool(model.config, 80), adapters=adapters).run(requests))
        assert [r.tokens for r in requests] == uncached
        rows = [Sequence(pool) for pool in [Pool(model.config, 80)] for _ in prompts]
        with torch.inference_mode():
            for row, prompt, name in zip(rows, prompts, names):
                adapters.select([name])
                model.hidden(torch.tensor([prompt]), PagedCache([row]))
            adapters.select(names)
            cache = PagedCache(rows)
            for j in range(4):
                step = model(torch.tensor([[tokens[j]] for tokens in uncached]), cache)[:, 0]
                for i, prompt in enumerate(prompts):
                    expected = logits[i][len(prompt) + j]
                    assert (step[i] - expected).abs().max() < 2e-5 * expected.abs().max(), (names[i], i, j)
        answers.add(str(uncached))
    assert len(answers) == 3, "the adapters change what is written"

# ----------------------------------------------------------------------------- the paper's count

def test_the_papers_count_of_what_a_cache_saves():
    """Section III.C.2: 100 new tokens after 100; 210 TFLOP and, with r = 512, 40. Its figures are rounded up from the weights' 201.5 and 39.4."""
    rows = {(r["model"], r["cache"]): r for r in paper_counts()}
    full, low = rows["Llama2-7B", False], rows["Llama2-7B, r = 512", False]
    assert full["tokens"] == low["tokens"] == 14950 == sum(range(100, 200))
    assert round(full["weights"], 1) == 201.5 and round(low["weights"], 1) == 39.4
    assert rows["Llama2-7B", True]["tokens"] == rows["Llama2-7B, r = 512", True]["tokens"] == 199
    assert rows["Llama2-7B", True]["weights"] == pytest.approx(2 * 6.738415616e9 * 199 / 1e12)
    assert full["attention"] == pytest.approx(sum(4 * 4096 * 32 * T * (T + 1) / 2 for T in range(100, 200)) / 1e12)

@pytest.mark.parametrize("use_cache, tokens", [(False, 14950), (True, 199)])
def test_the_count_is_what_generate_reads(use_cache, tokens):
    model = Transformer(Config("llama", vocab_size=50, context=200, blocks=1, heads=2, kv_heads=1, width=8, ffn=8)).eval()
    read = []
    model.embed.register_forward_pre_hook(lambda m, inputs: read.append(inputs[0].numel()))
    list(generate(model, [[1] * 100], 100, temperature=0, use_cache=use_cache))
    assert sum(read) == tokens

def test_the_benchmark(tmp_path, text_file, capsys):
    """All engines on a small model; how fast is not asked."""
    torch.manual_seed(0)
    model = Transformer(Config("llama", vocab_size=500, context=256, blocks=2, heads=4, kv_heads=2, width=32, ffn=48)).eval()
    with torch.inference_mode():
        for p in model.parameters():
            p.mul_(8 if p.dim() > 1 else 1)  # so that no two tokens are nearly as likely
    save_model(tmp_path / "m", model, train_tokenizer([text_file.read_text(encoding="utf-8")], 500))
    bench.main(["serve", "--model", str(tmp_path / "m"), "--sequences", "6", "--new-tokens", "8", "--rounds", "1",
                "--json", str(tmp_path / "rows.json")])
    rows = {(r["engine"], r["adapters"]): r for r in json.loads((tmp_path / "rows.json").read_text())["rows"]}
    assert {e for e, _ in rows} == {"sequential", "contiguous", "paged"}
    assert {n for e, n in rows if e == "paged"} == {0, 1, 16}
    token = 2 * 2 * 2 * 8 * 4
    paged, contiguous = rows["paged", 16], rows["contiguous", 16]
    assert paged["kv_bytes_used"] == contiguous["kv_bytes_used"] and paged["kv_bytes_reserved"] % (16 * token) == 0
    assert paged["kv_bytes_used"] <= paged["kv_bytes_reserved"] <= paged["kv_bytes_used"] + 6 * 15 * token < contiguous["kv_bytes_reserved"]
    out = capsys.readouterr().out
    assert "201.5" in out and "14,950" in out
