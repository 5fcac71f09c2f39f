"""Serve a model and its adapters over HTTP in OpenAI's JSON: many finetuned models on one base (section V.B).

    python serve.py --model smollm2-135m --bits 8 --adapter news=out/a --adapter tweets=out/b
    curl localhost:8000/v1/completions -d '{"model": "news", "prompt": "Profit rose.", "max_tokens": 20}'

    POST /v1/completions         prompt: a text, or token ids
    POST /v1/chat/completions    messages: [{"role": "user", "content": "..."}], by the model's own template
    GET  /v1/models              the base and its adapters; a request's "model" is one of their names
    GET  /health  /metrics       whether it works; what it does, in the text form of Prometheus
    GET  /                       a page: chat, and with --teach the rank bench (beyond/rank_bench.py)

The `openai` client works as it is. What a request asks for and can't have is refused, never ignored.

One thread owns the model. Before each step it hands new requests to the engine (beyond/batching.py), so that
requests of different times and adapters share every product; after the step, their handlers send the new
text. Models compute in float32 here, so that an answer does not depend on the others in the batch
(batching.py says how exactly). A client that leaves cancels its request. After SIGTERM the server finishes
what it has begun and takes nothing new.

Needs `pip install fastapi uvicorn`. It listens on this machine alone: another --host needs an --api-key.
"""
import asyncio
import contextlib
import hmac
import ipaddress
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

WAITING = 256       # requests beside those in the batch; a client that comes then is told to come later
MAX_BODY = 1 << 20  # bytes of a request: more than any context holds
MANY = 1 << 62      # no limit

# field of a request -> types of its value, the value where there is none, the least and the largest
FIELDS = dict(model=([str], None), user=([str], None), n=([int], 1, 1, 1), max_tokens=([int], 256, 1, MANY),
              temperature=([int, float], 1.0, 0, 2), top_p=([int, float], 1.0, 0, 1),
              seed=([int], None, 0, MANY), stop=([str, list], []), stream=([bool], False),
              stream_options=([dict], {}))
OF_COMPLETIONS = dict(prompt=([str, list], None), logprobs=([int], None, 0, 20))
OF_CHATS = dict(messages=([list], None), max_completion_tokens=([int], None, 1, MANY),
                logprobs=([bool], False), top_logprobs=([int], 0, 0, 20))
OF_MEASUREMENTS = dict(text=([str], ""))


class Refusal(InputError):
    """With a status of HTTP other than 400."""

    def __init__(self, status, message):
        super().__init__(message)
        self.status_code = status


def error(e):
    return dict(error=dict(message=valid(str(e)), type="invalid_request_error", param=None, code=None))


class Answer:
    """A request on its way. The engine's thread makes its tokens; its handler makes text of them."""

    def __init__(self, request, tokenizer, stop, chat):
        self.request, self.tokenizer, self.stop, self.chat = request, tokenizer, stop, chat
        self.loop, self.news, self.came = asyncio.get_running_loop(), asyncio.Event(), time.perf_counter()
        self.read, self.finish, self.failure = 0, None, None  # tokens that are text; why it ended

    def wake(self):
        """From any thread: there is something to read."""
        with contextlib.suppress(RuntimeError):  # a loop that was closed: the server has ended
            self.loop.call_soon_threadsafe(self.news.set)

    async def watch(self, http):
        """Cancel the request when its client leaves."""
        while (await http.receive())["type"] != "http.disconnect":
            pass
        self.request.cancelled = True

    async def pieces(self):
        """Yield (text, positions of its tokens) until the answer ends. What may be the beginning of a stop
        text is held back."""
        request, decoder, text, sent, shown = self.request, Utf8Decoder("replace"), "", 0, 0
        try:
            while not self.finish:
                await self.news.wait()
                self.news.clear()
                if self.failure:
                    raise Refusal(500, f"the engine has failed: {self.failure}")
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

    async def whole(self, head):
        text = "".join([text async for text, _ in self.pieces()])
        return head | dict(choices=[self.choice(text, range(self.read), "message")], usage=self.usage())

    async def events(self, head, with_usage):
        """Server-sent events: a line of JSON for each piece."""
        def event(content):
            return f"data: {json.dumps(content)}\n\n"
        try:
            async for text, positions in self.pieces():
                yield event(head | dict(choices=[self.choice(text, positions, "delta")]))
            if with_usage:
                yield event(head | dict(choices=[], usage=self.usage()))
            yield "data: [DONE]\n\n"
        except InputError as e:
            yield event(error(e))


def checked(body, own, server):
    """The fields of a request's body, with defaults for those that are not there, and `top`, how many likely
    tokens it wants to see. own: the fields of its endpoint."""
    refuse(not isinstance(body, dict), "the body must be a JSON object")
    fields, values = FIELDS | own, {}
    unknown = [name for name in body if name not in fields]
    refuse(unknown, f"{', '.join(map(repr, unknown))} is not supported: fields are {', '.join(fields)}")
    for name, (types, default, *bounds) in fields.items():
        value = values[name] = default if body.get(name) is None else body[name]
        refuse(value is not default and type(value) not in types,
               f"{name} must be of type {' or '.join(t.__name__ for t in types)}")
        refuse(bounds and value is not None and not bounds[0] <= value <= bounds[1],
               f"{name} must be in {'..'.join(map(str, bounds))}, got {value}")
    if isinstance(values["stop"], str):
        values["stop"] = [values["stop"]]
    texts = all(isinstance(s, str) and s for s in values["stop"])
    refuse(not texts, "stop must be a text or a list of texts")
    values["model"] = values["model"] or server.names[0]
    if values["model"] not in {server.names[0], *server.engine.adapters.names}:
        raise Refusal(404, f"no model is called {values['model']!r}: there are {', '.join(server.names)}")
    if values["seed"] is None:
        values["seed"] = random.getrandbits(31)
    values["top"] = values.get("logprobs")
    if own is OF_CHATS:
        values["top"] = values["top_logprobs"] if values["logprobs"] else None
        values["max_tokens"] = values["max_completion_tokens"] or values["max_tokens"]
    return values


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
        self.thread = ThreadPoolExecutor(1)  # does in order what it is given: steps, and things between them
        self.answers, self.failure = {}, None  # request -> its Answer
        self.totals = Counter(requests=0, prompt_tokens=0, tokens=0, first_tokens=0, first_token_seconds=0)

    def begin(self, request):
        """Give a request to the engine, and set it going if it rests."""
        resting = not self.engine.running and not self.engine.waiting
        self.engine.submit(request)
        if resting or self.failure:
            self.thread.submit(self.step)

    def step(self):
        try:
            if self.failure:
                raise self.failure
            ended = self.engine.step()
        except Exception as e:  # out of memory, say: nobody is left waiting, now and later
            self.failure = e
            traceback.print_exc()
            while self.answers:
                answer = self.answers.popitem()[1]
                answer.failure = e
                answer.wake()
            return
        if self.engine.running or self.engine.waiting:
            self.thread.submit(self.step)
        for request in [*self.engine.running, *ended]:
            self.answers[request].wake()
        for request in ended:
            came = self.answers.pop(request).came
            self.totals.update(requests=1, prompt_tokens=len(request.prompt), tokens=len(request.tokens))
            if request.first:
                self.totals.update(first_tokens=1, first_token_seconds=request.first - came)

    def state(self):
        """Requests in the batch and before it; blocks of the cache."""
        pool, waiting = self.engine.pool, len(self.answers) - len(self.engine.running)
        return dict(running=len(self.engine.running), waiting=waiting, blocks=len(pool.users),
                    blocks_used=len(pool.users) - len(pool.free))

    def ids(self, values):
        try:
            if "messages" in values:
                for m in values["messages"] or [None]:
                    if set(m) != {"role", "content"} or not isinstance(m["role"] + m["content"], str):
                        raise TypeError
                return self.tokenizer.encode(render_chat(self.tokenizer, values["messages"]), special=True)
            if isinstance(values["prompt"], list) and all(type(token) is int for token in values["prompt"]):
                return values["prompt"]
            return self.tokenizer.encode(values["prompt"], around=True)
        except (TypeError, AttributeError):
            raise InputError('messages must be [{"role": "user", "content": "a text"}, ...], '
                             "prompt a text or a list of token ids") from None

    def submit(self, values, http):
        """The Answer of a request that is on its way."""
        from beyond.batching import Request
        adapter = None if values["model"] == self.names[0] else values["model"]
        request = Request(self.ids(values), values["max_tokens"], values["temperature"], values["top_p"],
                          values["seed"], adapter, values["top"])
        self.engine.check(request)
        if self.state()["waiting"] >= WAITING:
            raise Refusal(429, f"{WAITING} requests are waiting already: try again later")
        answer = self.answers[request] = Answer(request, self.tokenizer, values["stop"], "messages" in values)
        self.thread.submit(self.begin, request)
        answer.watching = asyncio.create_task(answer.watch(http))  # kept, or it would be collected
        return answer


def make_app(server, api_key=None):
    from fastapi import Depends, FastAPI, Request
    from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, StreamingResponse
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect

    async def allowed(http: Request):
        given, wanted = http.headers.get("authorization", "").encode(), f"Bearer {api_key}".encode()
        if api_key and http.url.path not in ("/", "/health") and not hmac.compare_digest(given, wanted):
            raise Refusal(401, "this server wants its --api-key: Authorization: Bearer KEY")
    app = FastAPI(dependencies=[Depends(allowed)], docs_url=None, redoc_url=None, openapi_url=None)

    @app.exception_handler(InputError)
    @app.exception_handler(HTTPException)
    @app.exception_handler(ClientDisconnect)
    async def say_no(http, e):
        return JSONResponse(error(e), e.status_code if isinstance(e, (Refusal, HTTPException)) else 400)

    @app.get("/health")
    def health():
        failure = server.failure
        return JSONResponse(dict(status=f"failed: {failure}" if failure else "ok"), 500 if failure else 200)

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

    @app.post("/measure")
    async def measure(http: Request):
        refuse(not server.bench, "there is no rank bench: start serve.py with --teach")
        values = checked(await content(http), OF_MEASUREMENTS, server)
        work = server.thread.submit(server.bench.measure, values["model"], values["text"])
        return await asyncio.wrap_future(work)

    async def content(http):
        size = http.headers.get("content-length", "")
        if not size.isdigit() or int(size) > MAX_BODY:
            raise Refusal(413, f"the body must have a Content-Length of at most {MAX_BODY}, got {size!r}")
        try:
            return json.loads(await http.body())
        except (ValueError, RecursionError) as e:
            raise InputError(f"the body is not JSON: {e}") from None

    async def answered(http, own, kinds):
        values = checked(await content(http), own, server)
        answer = server.submit(values, http)
        head = dict(id=f"answer-{random.getrandbits(64):016x}", object=kinds[values["stream"]],
                    created=int(time.time()), model=values["model"])
        if not values["stream"]:
            return await answer.whole(head)
        events = answer.events(head, values["stream_options"].get("include_usage"))
        return StreamingResponse(events, media_type="text/event-stream")

    @app.post("/v1/completions")
    async def completions(http: Request):
        return await answered(http, OF_COMPLETIONS, ["text_completion"] * 2)

    @app.post("/v1/chat/completions")
    async def chat_completions(http: Request):
        return await answered(http, OF_CHATS, ["chat.completion", "chat.completion.chunk"])
    return app


def listen(host, port, api_key):
    """The socket; where others can reach it, only with a key."""
    try:
        open_to_all = not ipaddress.ip_address(socket.gethostbyname(host)).is_loopback
        refuse(open_to_all and not api_key, f"--host {host} is open to others: give an --api-key")
        return socket.create_server((host, port))
    except OSError as e:
        raise InputError(f"can't listen at {host}, port {port}: {e.strerror}; choose another") from None


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
    listener = listen(args.host, args.port, args.api_key)
    model, tokenizer, _ = open_model(args.model, args.bits)
    app = make_app(Server(args.model, model, tokenizer, folders, args.teach), args.api_key)
    say(f"serving {', '.join([args.model, *folders])} at http://{args.host}:{args.port}/v1, and a page at /")
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises it again when all answers are finished
        uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listener])


if __name__ == "__main__":
    command(main)
