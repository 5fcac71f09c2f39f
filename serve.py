"""Serve a model and its adapters over HTTP in OpenAI's JSON: many finetuned models on one base (section V.B).

    python serve.py --model smollm2-135m --bits 8 --adapter news=out/a --adapter tweets=out/b
    curl localhost:8000/v1/completions -d '{"model": "news", "prompt": "Profit rose.", "max_tokens": 20}'

    GET  /health                 {"status": "ok", "running": 2, "waiting": 0}
    GET  /v1/models              the base and its adapters; a request's "model" is one of their names
    POST /v1/completions         prompt: a text
    POST /v1/chat/completions    messages: [{"role": "user", "content": "..."}], by the model's own template

Both also take max_tokens, temperature (0: greedy), top_p, seed and stop (a text or a list of texts, where the
answer ends). Wrong requests get status 400 or 404 and one line. Answers come whole: "stream" is refused.

Handlers only queue requests. One thread owns the model: before each step it moves what is queued into the
engine (beyond/batching.py), so that requests that come at different times share every product, each with its
adapter. Needs `pip install fastapi uvicorn`. There is no password: it listens on this machine alone, unless
--host says otherwise.
"""
import asyncio
import json
import queue
import random
import threading
import time
from concurrent.futures import Future

from common.adapters import base_id
from common.cli import InputError, Parser, at_least_1, command
from common.tokenizer import render_chat
from sample import make_pool, named_folders, open_model, with_begin

# field of a request -> types of its value, the value where there is none
FIELDS = dict(model=([str], None), prompt=([str], None), messages=([list], None), max_tokens=([int], 256),
              temperature=([int, float], 1.0), top_p=([int, float], 1.0), seed=([int], None),
              stop=([str, list], []), stream=([bool], False), n=([int], 1))


class NotFound(InputError):
    """The model of a request is not here."""


class EngineThread(threading.Thread):
    """The one thread that computes. `submit` may be called from any other, after Engine.check."""

    def __init__(self, engine):
        super().__init__(daemon=True)
        self.engine, self.incoming, self.futures, self.failure = engine, queue.Queue(), {}, None
        self.start()

    def submit(self, request):
        """A Future of the request that has ended."""
        future = Future()
        self.incoming.put((request, future))
        if self.failure:
            self.refuse_all()
        return future

    def run(self):
        try:
            while True:
                while not self.incoming.empty() or not self.futures:  # with nothing to do, wait for a request
                    request, future = self.incoming.get()
                    if future.set_running_or_notify_cancel():
                        self.engine.submit(request)
                        self.futures[request] = future
                for request in self.engine.step():
                    self.futures.pop(request).set_result(request)
        except Exception as e:  # out of memory, say: nobody is left waiting
            self.failure = e
            for future in self.futures.values():
                future.set_exception(e)
            self.refuse_all()
            raise

    def refuse_all(self):
        try:
            while True:
                self.incoming.get_nowait()[1].set_exception(self.failure)
        except queue.Empty:
            return


def checked(body, names):
    """The fields of a request's body, each of its type, with defaults for those that are not there."""
    if not isinstance(body, dict):
        raise InputError("the body must be a JSON object")
    unknown = sorted(set(body) - set(FIELDS))
    if unknown:
        raise InputError(f"{unknown[0]!r} is not supported: fields are {', '.join(FIELDS)}")
    values = {}
    for name, (types, default) in FIELDS.items():
        values[name] = default if body.get(name) is None else body[name]
        if values[name] is not default and type(values[name]) not in types:
            raise InputError(f"{name} must be of type {' or '.join(t.__name__ for t in types)}")
    if values["stream"] or values["n"] != 1:
        raise InputError("there is one answer, and it comes whole: leave stream and n out")
    if values["model"] not in (None, *names):
        raise NotFound(f"no model is called {values['model']!r}: there are {', '.join(names)}")
    if isinstance(values["stop"], str):
        values["stop"] = [values["stop"]]
    if not all(isinstance(s, str) and s for s in values["stop"]):
        raise InputError("stop must be a text or a list of texts")
    if values["seed"] is None:
        values["seed"] = random.getrandbits(31)
    if not 0 <= values["seed"] < 1 << 62:
        raise InputError(f"seed must be in 0..2^62, got {values['seed']}")
    return values


class Api:
    """Bodies of requests to requests of the engine, and its answers to bodies."""

    def __init__(self, name, model, tokenizer, folders):
        from beyond.batching import Adapters, Engine
        adapters = Adapters(model, folders, base_id(name) if folders else None)
        self.tokenizer, self.names = tokenizer, [name, *folders]
        self.engine = Engine(model, make_pool(model), tokenizer.stop_ids, tokenizer.vocab_size, adapters)
        self.thread = EngineThread(self.engine)

    def ids(self, values, key):
        try:
            if key == "messages":
                messages = values["messages"]
                if not messages or not all(isinstance(m["role"] + m["content"], str) for m in messages):
                    raise TypeError
                text = render_chat(self.tokenizer, messages)
                return self.tokenizer.encode(text, special=True)
            return with_begin(self.tokenizer, values["prompt"])
        except (TypeError, KeyError, AttributeError):
            form = dict(prompt="a text", messages='[{"role": "user", "content": "a text"}, ...]')[key]
            raise InputError(f"{key} must be {form}") from None

    def cut(self, tokens, stop):
        """(text before the first of the stop texts, whether one was there)."""
        text = self.tokenizer.decode([t for t in tokens if t not in self.tokenizer.stop_ids])
        found = [text.index(s) for s in stop if s in text]
        return text[:min(found)] if found else text, bool(found)

    async def answer(self, body, key):
        """key: prompt or messages."""
        from beyond.batching import Request
        values = checked(body, self.names)
        name, stop = values["model"] or self.names[0], values["stop"]

        def ends(tokens):
            return self.cut(tokens, stop)[1]
        request = Request(self.ids(values, key), values["max_tokens"], values["temperature"], values["top_p"],
                          values["seed"], name if name in self.names[1:] else None, ends if stop else None)
        self.engine.check(request)
        await asyncio.wrap_future(self.thread.submit(request))
        text, found = self.cut(request.tokens, stop)
        ended = found or request.tokens[-1] in self.tokenizer.stop_ids
        choice = dict(index=0, finish_reason="stop" if ended else "length")
        choice |= dict(text=text) if key == "prompt" else dict(message=dict(role="assistant", content=text))
        read, written = len(request.prompt), len(request.tokens)
        return dict(id=f"answer-{random.getrandbits(64):016x}", created=int(time.time()), model=name,
                    object="text_completion" if key == "prompt" else "chat.completion", choices=[choice],
                    usage=dict(prompt_tokens=read, completion_tokens=written, total_tokens=read + written))


def make_app(api):
    from fastapi import FastAPI, Request
    from fastapi.responses import JSONResponse
    app = FastAPI()

    @app.exception_handler(InputError)
    async def refuse(request, error):
        status = 404 if isinstance(error, NotFound) else 400
        return JSONResponse(dict(error=dict(message=str(error), type="invalid_request_error")), status)

    @app.get("/health")
    def health():
        failure, engine = api.thread.failure, api.engine
        state = dict(status=f"failed: {failure}" if failure else "ok", running=len(engine.running),
                     waiting=len(engine.waiting))
        return JSONResponse(state, 500 if failure else 200)

    @app.get("/v1/models")
    def models():
        rows = [dict(id=name, object="model", created=0, owned_by="local") for name in api.names]
        return dict(object="list", data=rows)

    async def answered(request, key):
        try:
            body = json.loads(await request.body())
        except ValueError as e:
            raise InputError(f"the body is not JSON: {e}") from None
        return await api.answer(body, key)

    @app.post("/v1/completions")
    async def completions(request: Request):
        return await answered(request, "prompt")

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request):
        return await answered(request, "messages")
    return app


def main(argv=None):
    p = Parser(__doc__)
    p.add_argument("--model", default="out/train", help="folder, file or known name (default: %(default)s)")
    p.add_argument("--bits", type=int, default=16,
                   help="8 or 4: quantize the weights while loading (default: %(default)s)")
    p.add_argument("--adapter", action="append", default=[], metavar="NAME=DIR",
                   help="an adapter of finetune.py or PEFT, any number of times (default: none)")
    p.add_argument("--host", default="127.0.0.1", help="the address to listen at (default: %(default)s)")
    p.add_argument("--port", type=at_least_1, default=8000, help="(default: %(default)s)")
    args = p.parse_args(argv)
    try:
        import fastapi  # noqa: F401
        import uvicorn
    except ImportError as e:
        raise InputError(f"serve.py needs FastAPI and uvicorn ({e}): pip install fastapi uvicorn") from None
    folders = named_folders(args.adapter)
    model, tokenizer, _ = open_model(args.model, args.bits)
    uvicorn.run(make_app(Api(args.model, model, tokenizer, folders)), host=args.host, port=args.port)


if __name__ == "__main__":
    command(main)
