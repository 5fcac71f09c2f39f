"""Serve a model and its adapters over HTTP in OpenAI's JSON: many finetuned models on one base (section V.B).

    python serve.py --model smollm2-135m --bits 8 --adapter news=out/a --adapter tweets=out/b
    curl localhost:8000/v1/completions -d '{"model": "news", "prompt": "Profit rose.", "max_tokens": 20}'

    POST /v1/completions         prompt: a text, or token ids
    POST /v1/chat/completions    messages: [{"role": "user", "content": "..."}], by the model's own template
    GET  /v1/models              the base and its adapters; a request's "model" is one of their names
    GET  /health  /metrics       whether it works; what it does, in the text form of Prometheus
    GET  /                       a page: chat, and with --teach the rank bench (beyond/rank_bench.py)

The `openai` client works as it is. What a request asks for and can't have is refused, never ignored.

One thread computes. Before each step the engine (beyond/batching.py) is handed the new requests, so that
those of different times and adapters share every product; after it, their handlers send the new text. Models
compute in float32 here, so that an answer does not depend on the others in the batch (batching.py says how
exactly). A client that leaves cancels its request. After SIGTERM the server finishes what it has begun. It
listens on this machine alone: another --host needs an --api-key.
"""
import asyncio
import contextlib
import hmac
import json
import random
import socket
import time
import traceback
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from checkpoint import decomposed_from
from common.adapters import base_id
from common.cli import InputError, Parser, at_least_1, command, refuse, say
from common.tokenizer import Utf8Decoder, render_chat, valid
from sample import make_pool, named_folders, open_model

WAITING = 256  # requests beside those in the batch; a client that comes then is told to come later
MOST_BYTES = 1 << 20  # of a request's body: more than any context holds

class Refusal(InputError):
    """With a status of HTTP other than 400."""

    def __init__(self, status, message):
        super().__init__(message)
        self.status_code = status

def error(e):
    return dict(error=dict(message=valid(str(e)), type="invalid_request_error", param=None, code=None))

def forms():
    """Requests for completions, chats and measurements as models of pydantic. What is not here is refused."""
    from pydantic import AliasChoices, Field, constr, create_model
    strict, text = dict(extra="forbid", strict=True), constr(min_length=1)
    most = AliasChoices("max_completion_tokens", "max_tokens")
    both = dict(model=(str, ""), user=(str, ""), n=(int, Field(1, ge=1, le=1)),
                temperature=(float, Field(1.0, ge=0, le=2)), top_p=(float, Field(1.0, gt=0, le=1)),
                max_tokens=(int, Field(256, ge=1, validation_alias=most)), stop=(text | list[text], []),
                seed=(int, Field(default_factory=lambda: random.getrandbits(31), ge=0, lt=1 << 62)),
                stream=(bool, False), stream_options=(dict, {}), __config__=strict)
    message = create_model("Message", role=(str, ...), content=(str, ...), __config__=strict)
    completion = create_model("Completion", prompt=(str | list[int], ...),
                              logprobs=(int, Field(None, ge=0, le=20)), **both)
    chat = create_model("Chat", messages=(list[message], Field(min_length=1)), logprobs=(bool, False),
                        top_logprobs=(int, Field(0, ge=0, le=20)), **both)
    return completion, chat, create_model("Measurement", model=(str, ""), text=(str, ""), __config__=strict)

class Answer:
    """A request on its way. The engine's thread makes its tokens; its handler makes text of them."""

    def __init__(self, request, tokenizer, stop, chat):
        self.request, self.tokenizer, self.stop, self.chat = request, tokenizer, stop, chat
        self.news, self.read, self.finish = asyncio.Event(), 0, None  # tokens that are text; why it ended

    async def watch(self, http):
        """Cancel the request when its client leaves."""
        while (await http.receive())["type"] != "http.disconnect":
            pass
        self.request.cancelled = True

    async def pieces(self, server):
        """Yield (text, positions of its tokens) until the end. What may begin a stop text is `held_back`."""
        request, decoder, text, sent, shown = self.request, Utf8Decoder("replace"), "", 0, 0
        try:
            while not self.finish:
                await self.news.wait()
                self.news.clear()
                server.check()
                over = request.ended  # asked first: if it has ended now, all of its tokens are there
                while self.read < len(request.tokens) and not self.finish:
                    token = request.tokens[self.read]
                    ends = token in self.tokenizer.stop_ids
                    text += decoder.decode(b"" if ends else self.tokenizer.piece(token), ends)
                    if self.read == 0 and self.tokenizer.adds_space:
                        text = text.removeprefix(" ")
                    found = [text.index(s) for s in self.stop if s in text]
                    text = text[:min(found, default=None)]
                    self.finish = "stop" if ends or found else None
                    self.read += 1
                if over and not self.finish:
                    text, self.finish = text + decoder.decode(b"", True), "length"
                end = len(text) if self.finish else len(text) - self.held_back(text)
                if end > sent or self.finish:
                    yield text[sent:end], range(shown, self.read)
                    sent, shown = end, self.read
        finally:
            request.cancelled = True

    def held_back(self, text):
        """The length of the longest end of the text that is the beginning of a stop text."""
        return max((n for s in self.stop for n in range(1, len(s)) if text.endswith(s[:n])), default=0)

    def choice(self, text, positions, key):
        """A piece of the answer in OpenAI's form. key: delta or message, for a chat."""
        content = dict(content=text, role="assistant") if positions.start == 0 else dict(content=text)
        content = {key: content} if self.chat else dict(text=text)
        return content | dict(index=0, finish_reason=self.finish, logprobs=self.logprobs(positions))

    def logprobs(self, positions):
        """Of the tokens there, in the form of chats or of completions; None if nobody asked."""
        def entry(token, logprob):
            piece, logprob = self.tokenizer.piece(token), max(logprob, -9999.0)  # JSON has no infinity
            return dict(token=piece.decode("utf-8", "replace"), logprob=logprob, bytes=list(piece))
        if self.request.top is None:
            return None
        rows = []
        for i in positions:
            logprob, best = self.request.scores[i]
            best = dict(top_logprobs=[entry(*likely) for likely in best])
            rows.append(entry(self.request.tokens[i], logprob) | best)
        if self.chat:
            return dict(content=rows)
        best = [{likely["token"]: likely["logprob"] for likely in row["top_logprobs"]} for row in rows]
        return dict(tokens=[row["token"] for row in rows], token_logprobs=[row["logprob"] for row in rows],
                    top_logprobs=best)

    def usage(self):
        prompt = len(self.request.prompt)
        return dict(prompt_tokens=prompt, completion_tokens=self.read, total_tokens=prompt + self.read)

    async def whole(self, server, head):
        text = "".join([text async for text, _ in self.pieces(server)])
        return head | dict(choices=[self.choice(text, range(self.read), "message")], usage=self.usage())

    async def events(self, server, head, with_usage):
        """Server-sent events: a line of JSON for each piece."""
        def event(content):
            return f"data: {json.dumps(content)}\n\n"
        try:
            async for text, positions in self.pieces(server):
                yield event(head | dict(choices=[self.choice(text, positions, "delta")]))
            if with_usage:
                yield event(head | dict(choices=[], usage=self.usage()))
            yield "data: [DONE]\n\n"
        except InputError as e:
            yield event(error(e))

class Server:
    """The one thread that computes, and what handlers need to give it requests."""

    def __init__(self, name, model, tokenizer, folders, teach=False):
        from beyond.batching import Adapters, Engine
        adapters = Adapters(model, folders, base_id(name) if folders else None)
        self.tokenizer, self.names = tokenizer, [name, *folders]
        parts = model, make_pool(model), tokenizer.stop_ids, tokenizer.vocab_size, adapters
        if teach:
            from beyond.rank_bench import Bench
            self.engine = self.bench = Bench(tokenizer, decomposed_from(name) is not None, *parts)
        else:
            self.engine, self.bench = Engine(*parts), None
        self.thread = ThreadPoolExecutor(1)
        self.answers, self.new, self.failure = {}, [], None  # request -> its Answer; those not yet begun
        self.totals = Counter(requests=0, prompt_tokens=0, tokens=0)

    def check(self):
        if self.failure:
            raise Refusal(500, f"the engine has failed: {self.failure}")

    def submit(self, form, chat, http):
        """The Answer of a request that is on its way."""
        from beyond.batching import Request
        if chat:
            messages = [message.model_dump() for message in form.messages]
            ids = self.tokenizer.encode(render_chat(self.tokenizer, messages), special=True)
            top = form.top_logprobs if form.logprobs else None
        else:
            ids, top = form.prompt, form.logprobs
        if isinstance(ids, str):
            ids = self.tokenizer.encode(ids, around=True)
        adapter = form.model if form.model not in ("", self.names[0]) else None
        if adapter and adapter not in self.engine.adapters.names:
            raise Refusal(404, f"no model is called {adapter!r}: there are {', '.join(self.names)}")
        request = Request(ids, form.max_tokens, form.temperature, form.top_p, form.seed, adapter, top)
        self.check()
        self.engine.check(request)
        if self.state()["waiting"] >= WAITING:
            raise Refusal(429, f"{WAITING} requests are waiting already: try again later")
        stop = [form.stop] if isinstance(form.stop, str) else form.stop
        answer = self.answers[request] = Answer(request, self.tokenizer, stop, chat)
        answer.watching = asyncio.create_task(answer.watch(http))  # kept, or it would be collected
        self.new.append(request)
        if len(self.answers) == 1:
            self.working = asyncio.create_task(self.work())
        return answer

    async def work(self):
        """One step after the other in the thread, as long as there are requests."""
        try:
            while self.answers:
                for request in self.new:
                    self.engine.submit(request)
                self.new.clear()
                ended = await self.compute(self.engine.step)
                for request in [*self.engine.running, *ended]:
                    self.answers[request].news.set()
                for request in ended:
                    del self.answers[request]
                    prompt, written = len(request.prompt), len(request.tokens)
                    self.totals.update(requests=1, prompt_tokens=prompt, tokens=written)
        except Exception as e:  # out of memory, say: nobody is left waiting, now and later
            self.failure = e
            traceback.print_exc()
            for answer in self.answers.values():
                answer.news.set()
            self.answers.clear()

    def compute(self, function, *args):
        """Await what the thread makes of it: steps, and things between them."""
        return asyncio.get_running_loop().run_in_executor(self.thread, function, *args)

    def state(self):
        """Requests in the batch and before it; blocks of the cache."""
        pool, running = self.engine.pool, len(self.engine.running)
        return dict(running=running, waiting=len(self.answers) - running, blocks=pool.blocks,
                    blocks_used=pool.blocks - len(pool.free))

def make_app(server, api_key=None):
    from fastapi import Depends, FastAPI, Request
    from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, StreamingResponse
    from pydantic import ValidationError
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect

    async def allowed(http: Request):
        given, wanted = http.headers.get("authorization", "").encode(), f"Bearer {api_key}".encode()
        if api_key and http.url.path not in ("/", "/health") and not hmac.compare_digest(given, wanted):
            raise Refusal(401, "this server wants its --api-key: Authorization: Bearer KEY")
    completion, chat, measurement = forms()
    app = FastAPI(dependencies=[Depends(allowed)], docs_url=None, redoc_url=None, openapi_url=None)

    @app.exception_handler(InputError)
    @app.exception_handler(HTTPException)
    @app.exception_handler(ClientDisconnect)
    async def say_no(http, e):
        return JSONResponse(error(e), e.status_code if isinstance(e, (Refusal, HTTPException)) else 400)

    @app.get("/health")
    def health():
        server.check()
        return dict(status="ok")

    @app.get("/metrics")
    def metrics():
        rows = [(f"{name}_total", "counter", n) for name, n in server.totals.items()]
        rows += [(name, "gauge", n) for name, n in server.state().items()]
        lines = [f"# TYPE fingpt_{name} {kind}\nfingpt_{name} {n}\n" for name, kind, n in rows]
        return PlainTextResponse("".join(lines), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models")
    def models():
        rows = [dict(id=name, object="model", created=0, owned_by="local") for name in server.names]
        return dict(object="list", data=rows)

    @app.get("/")
    def page():
        return FileResponse(Path(__file__).with_name("beyond") / "page.html")

    @app.get("/about")
    def about():
        return dict(chat=bool(server.tokenizer.chat_template), bench=server.bench and server.bench.facts)

    async def read(http, form):
        """A request's fields, without those that are null, as a form."""
        size = http.headers.get("content-length", "")
        if not size.isdigit() or int(size) > MOST_BYTES:
            raise Refusal(413, f"the body must have a Content-Length of at most {MOST_BYTES}, got {size!r}")
        try:
            fields = json.loads(await http.body())
            if fields.get("max_completion_tokens"):  # the newer name of max_tokens
                fields.pop("max_tokens", None)
            return form(**{name: value for name, value in fields.items() if value is not None})
        except ValidationError as e:
            first = e.errors()[0]
            where = ": ".join(map(str, first["loc"]))
            raise InputError(f"{where}: {first['msg']}, got {repr(first['input'])[:200]}") from None
        except (ValueError, RecursionError, AttributeError) as e:
            raise InputError(f"the body is not a JSON object: {e}") from None

    @app.post("/measure")
    async def measure(http: Request):
        refuse(not server.bench, "there is no rank bench: start serve.py with --teach")
        form = await read(http, measurement)
        return await server.compute(server.bench.measure, form.model, form.text)

    async def answered(http, form, objects):
        form = await read(http, form)
        answer = server.submit(form, isinstance(form, chat), http)
        head = dict(id=f"answer-{random.getrandbits(64):016x}", object=objects[form.stream],
                    created=int(time.time()), model=form.model or server.names[0])
        if not form.stream:
            return await answer.whole(server, head)
        events = answer.events(server, head, form.stream_options.get("include_usage"))
        return StreamingResponse(events, media_type="text/event-stream")

    @app.post("/v1/completions")
    async def completions(http: Request):
        return await answered(http, completion, ["text_completion"] * 2)

    @app.post("/v1/chat/completions")
    async def chat_completions(http: Request):
        return await answered(http, chat, ["chat.completion", "chat.completion.chunk"])
    return app

def main(argv=None):
    p = Parser(__doc__)
    p.add_argument("--model", default="out/train", help="folder, file or known name (default: %(default)s)")
    p.add_argument("--bits", type=int, default=16, help="8 or 4: quantize the weights (default: %(default)s)")
    p.add_argument("--adapter", action="append", default=[], metavar="NAME=DIR",
                   help="an adapter of finetune.py or PEFT, any number of times (default: none)")
    p.add_argument("--host", default="127.0.0.1", help="the address to listen at (default: %(default)s)")
    p.add_argument("--port", type=at_least_1, default=8000, help="(default: %(default)s)")
    p.add_argument("--teach", action="store_true", help="decompose the model, for the rank bench of the page")
    p.add_argument("--api-key", help="what clients must send to be answered (default: none)")
    args = p.parse_args(argv)
    try:
        import fastapi  # noqa: F401
        import uvicorn
    except ImportError as e:
        raise InputError(f"serve.py needs FastAPI and uvicorn ({e}): pip install fastapi uvicorn") from None
    folders = named_folders(args.adapter)
    refuse(args.model in folders, f"an adapter and the model are called {args.model}: rename the adapter")
    refuse(args.host != "localhost" and not args.host.startswith("127.") and not args.api_key,
           f"--host {args.host} is open to others: give an --api-key")
    try:
        listener = socket.create_server((args.host, args.port))
    except OSError as e:
        raise InputError(f"can't listen at {args.host}:{args.port}: {e.strerror}; choose another") from None
    model, tokenizer, _ = open_model(args.model, args.bits)
    app = make_app(Server(args.model, model, tokenizer, folders, args.teach), args.api_key)
    say(f"serving {', '.join([args.model, *folders])} at http://{args.host}:{args.port}/v1, and a page at /")
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises it again when all answers are finished
        uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listener])

if __name__ == "__main__":
    command(main)
