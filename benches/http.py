"""Tokens a second over HTTP (section V.C): serve.py beside llama.cpp's own server, for 1 client and for many.

    python bench.py http

Each client streams one greedy answer after another; texts may differ. The servers have the same GGUF file and
as many threads, each in a process of its own, and answer the same prompts in turn. Prompts are read within
the time. llama.cpp (of xllamacpp) computes with the file's own bits.
"""
import json
import socket
import statistics
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from benches.common import Worker, installed, interleaved, llama_cpp, table
from benches.serve import LONGEST, mixed_prompts
from checkpoint import locate
from sample import open_model

TURNS = 2  # requests of each client in a round
DEFAULTS = dict(gguf="smollm2-135m", bits=[8, 4], clients=[1, 8, 32], new_tokens=64, rounds=3)

# For a Worker: both start a server and give a function that says where it listens.

def ours(file, bits):
    import uvicorn

    import serve
    model, tokenizer, _ = open_model(file, bits)
    app = serve.make_app(serve.Server(file, model, tokenizer, {}))
    listener = socket.create_server(("127.0.0.1", 0))
    http = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    threading.Thread(target=http.run, args=([listener],), daemon=True).start()
    return lambda _: "http://127.0.0.1:{1}".format(*listener.getsockname())

def theirs(file, clients, tokens):
    server = llama_cpp(file, clients, tokens)
    return lambda _: server.listening_address

def ask(address, new, prompt):
    """(seconds until the first token, tokens) of one streamed answer."""
    body = dict(prompt=prompt, max_tokens=new, temperature=0, stream=True,
                stream_options=dict(include_usage=True))
    request = urllib.request.Request(f"{address}/v1/completions", json.dumps(body).encode(),
                                     {"Content-Type": "application/json"})
    first, start = None, time.perf_counter()
    with urllib.request.urlopen(request) as answer:
        for line in answer:
            first = first or time.perf_counter() - start
            if b'"usage"' in line:
                tokens = json.loads(line.removeprefix(b"data: "))["usage"]["completion_tokens"]
    return first, tokens

def bench(args):
    file, most = str(locate(args.gguf)), max(args.clients)
    model, tokenizer, device = open_model(file, 8)
    prompts = mixed_prompts(model, tokenizer, most * TURNS, args.new_tokens)
    prompts = [tokenizer.decode(ids) for ids in prompts]
    servers = {("ours", bits): Worker(ours, file, bits) for bits in args.bits}
    if installed("xllamacpp"):
        servers["llama.cpp", "its own"] = Worker(theirs, file, most, LONGEST + args.new_tokens)
    found, rows = {}, []

    def load(engine, clients):
        one = partial(ask, servers[engine].ask(None), args.new_tokens)
        with ThreadPoolExecutor(clients) as threads:
            answers = list(threads.map(one, prompts[:clients * TURNS]))
        found.setdefault((engine, clients), []).extend(answers)
    steps = {(engine, n): partial(load, engine, n) for n in args.clients for engine in servers}
    for (engine, clients), (s, _) in interleaved(steps, args.rounds).items():
        answers = found[engine, clients][clients * TURNS:]  # without the warm-up's
        firsts = sorted(first for first, _ in answers)
        rows.append(dict(engine=engine[0], bits=engine[1], file=args.gguf, clients=clients,
                         requests=len(answers), first_p50=statistics.median(firsts),
                         first_p95=firsts[int(0.95 * len(firsts))],
                         tokens_per_second=sum(n for _, n in answers) / args.rounds / s))
    return device, rows

def report(rows):
    return table(rows, first="engine file bits clients requests", columns={
        "tokens/s": ("tokens_per_second", "{:.0f}"), "first token s, median": ("first_p50", "{:.2f}"),
        "p95": ("first_p95", "{:.2f}")})
