"""Playground: a page for the browser on which runs continue what is typed, side by side.

    python -m mygpt.play log/demo log/other

The page is served to this machine alone and needs no network. Each token shows its probability, and
those of the likeliest others.
"""

import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from typing import Any, Literal

from shards.cli import end_on_interrupt, one_line_errors

if __name__ == "__main__":
    end_on_interrupt()

import orjson
import tyro
from tyro.conf import Positional

from mygpt.settings import check_ranges


@dataclass(frozen=True)
class Options:
    """Serve a page for the browser on which runs continue what is typed, side by side."""

    run: Positional[tuple[str, ...]] = ()  # runs, checkpoints or exports; else the newest run
    port: int = 8000  # of the page; 0 takes any free one
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # auto: the first of these available


def parse(args: Sequence[str] | None) -> Options:
    """Read the flags. Raises ValueError for a port that there can't be."""
    options = tyro.cli(Options, args=args, prog="python -m mygpt.play")
    check_ranges(options, {"port": (0, 2**16 - 1)})
    return options


if __name__ == "__main__":  # answer --help before the imports below, which take seconds
    with one_line_errors():
        parse(sys.argv[1:])

import torch

from mygpt.distributed import find_device
from mygpt.eval import target
from mygpt.eval.completion import Completer, TextStream
from mygpt.generate import Sampling, trailing_space_note
from shards import stored_json

PAGE = files("mygpt.play").joinpath("play.html")
POLICY = (
    "default-src 'none'; connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; "
    "script-src 'unsafe-inline'; style-src 'unsafe-inline'"
)
RANGES = {"temperature": (0, 10), "top_k": (0, 10**6), "max_new_tokens": (1, 10**4)}
MAX_BODY = 2**20  # bytes of a request
LIKELIEST = 5  # tokens whose probabilities are sent with each token


@dataclass(frozen=True)
class Request:
    """A text for one of the models to continue."""

    model: int
    prompt: str
    temperature: float
    top_k: int
    max_new_tokens: int
    seed: int


class Player:
    """A model that continues texts: the newest checkpoint of a run, or a pretrained one."""

    def __init__(self, name: str | None, device: torch.device) -> None:
        found = target.find(name)
        self.tokenizer = found.tokenizer()
        self.model = found.load(device, self.tokenizer.n_vocab)
        step = f"step {found.state['step']:,} · " if found.state else ""
        size, context = self.model.num_params() / 1e6, self.model.config.block_size
        about = f"{step}{size:,.1f}M parameters · {context:,} tokens of context"
        self.about = {"name": str(found.run or found.name), "about": about}

    def tokens(self, request: Request) -> Iterator[dict[str, Any]]:
        """Yield each token with its probability before temperature and top-k, then why it ended."""
        length, eot, count = request.max_new_tokens, self.tokenizer.eot, 0
        sampling = Sampling(length, request.temperature, request.top_k, seed=request.seed)
        completer, text = Completer(self.model, sampling), TextStream(self.tokenizer.vocabulary())
        for token in completer.complete([eot, *self.tokenizer.encode(request.prompt)], eot):
            probs = completer.logits[0].float().softmax(0)[: self.tokenizer.n_vocab]  # (V,)
            p = probs[token].item() if token < len(probs) else 0.0
            likeliest = zip(*(part.tolist() for part in probs.topk(LIKELIEST)), strict=True)
            others = [(self.tokenizer.decode([i]), other) for other, i in likeliest]
            yield {"text": text.push(token), "p": p, "others": others}
            count += 1
        end = "the end of the document" if count < length else "the requested length"
        yield {"text": text.end(), "end": end}


class Server(ThreadingHTTPServer):
    """The page and its models, for this machine alone."""

    players: Sequence[Player] = ()
    one_token = threading.Lock()  # torch's threads are shared, so readers take turns


class Handler(BaseHTTPRequestHandler):
    """The page at /, what it says of the models at /models, continuations from /continue."""

    server: Server
    timeout = 10  # seconds for a client that says nothing

    def handle(self) -> None:
        """Answer, until the reader leaves."""
        with suppress(ConnectionError, TimeoutError):
            super().handle()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Leave the terminal to the address of the page."""

    def parse_request(self) -> bool:
        """Refuse other names of this machine: a page elsewhere could point its own name here."""
        if not super().parse_request():
            return False
        if self.headers.get("Host", "").rpartition(":")[0] in ("127.0.0.1", "localhost"):
            return True
        self.send_error(403, "open the page as http://127.0.0.1 or http://localhost")
        return False

    def do_GET(self) -> None:
        """Answer with the page or the models."""
        if self.path == "/":
            self.answer(200, PAGE.read_bytes(), "text/html; charset=utf-8")
        elif self.path == "/models":
            self.answer(200, orjson.dumps([player.about for player in self.server.players]))
        else:
            self.send_error(404)

    def do_POST(self) -> None:
        """Stream a continuation, one JSON object per line, until the reader leaves."""
        try:
            request = self.read_request()
        except ValueError as error:
            return self.answer(400, orjson.dumps({"error": " ".join(str(error).split())}))
        note = trailing_space_note([request.prompt])
        self.answer(200, orjson.dumps({"note": note}) + b"\n", "application/x-ndjson")
        tokens = self.server.players[request.model].tokens(request)
        while True:
            with self.server.one_token:
                token = next(tokens, None)
            if token is None:
                return None
            self.wfile.write(orjson.dumps(token) + b"\n")

    def read_request(self) -> Request:
        """Return the request; ValueError for anything else than our page sends."""
        # Only JSON, which a page elsewhere can't send here without asking first.
        length = int(self.headers["Content-Length"] or 0)
        if self.headers["Content-Type"] != "application/json" or not 0 < length <= MAX_BODY:
            raise ValueError(f"expected JSON of at most {MAX_BODY} bytes, found {length}")
        values = stored_json.parse(self.rfile.read(length), "the request", "reload the page")
        request = stored_json.build(Request, values, "the request", remedy="reload the page")
        models = (0, len(self.server.players) - 1)
        check_ranges(request, {**RANGES, "model": models, "seed": (0, 2**53)})
        return request

    def answer(self, code: int, body: bytes, kind: str = "application/json") -> None:
        """Send the headers, and the body or the beginning of a stream."""
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Security-Policy", POLICY)
        self.end_headers()
        self.wfile.write(body)


@one_line_errors()
def main(args: Sequence[str] | None = None) -> int:
    """Load the models and serve the page until Ctrl-C. Returns the exit code."""
    options = parse(args)
    device = torch.device(find_device(options.device))
    try:
        server = Server(("127.0.0.1", options.port), Handler)
    except OSError as error:
        raise OSError(f"port {options.port}: {error.strerror}; give another with --port") from None
    server.players = [Player(name, device) for name in options.run or (None,)]
    print(f"playground  http://127.0.0.1:{server.server_port}  (Ctrl-C ends it)", flush=True)
    with suppress(KeyboardInterrupt):
        server.serve_forever()
    server.one_token.acquire()  # kept: no thread may be inside torch when Python ends
    server.server_close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
