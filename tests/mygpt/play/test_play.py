"""The playground: what it sends is what the model says, to this machine's browser alone."""

import http.client
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mygpt.generate import Sampling, generate
from mygpt.play.__main__ import MAX_BODY, Handler, Player, Server, main
from tests.browser import CHROMIUM, browser
from tests.mygpt.support import STEPS, gpt2_dataset, write_run
from tests.training import environment

pytestmark = pytest.mark.usefixtures("quick")

EVIL = '<img src="x" onerror="document.title = 1"> & </pre>'
ASKED = {"model": 0, "prompt": "a b", "temperature": 0, "top_k": 0, "max_new_tokens": 6, "seed": 1}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("play")
    write_run(folder / "a <run>", gpt2_dataset(folder / "data"))
    return folder / "a <run>"


@pytest.fixture(scope="module")
def server(run: Path) -> Iterator[Server]:
    server = Server(("127.0.0.1", 0), Handler)
    server.players = [Player(str(run), torch.device("cpu")) for _ in range(2)]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def ask(
    server: Server, method: str = "POST", path: str = "/continue", body: Any = None, **headers: str
) -> tuple[int, str, http.client.HTTPMessage]:
    """(status, body, headers) of an answer; names of headers with _ for -."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
    content = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    if method == "POST":
        given = {"Content-Type": "application/json"} | given
    connection.request(method, path, content, given)
    answer = connection.getresponse()
    found = answer.status, answer.read().decode(), answer.headers
    connection.close()
    return found


def test_the_page_loads_nothing_from_elsewhere(server: Server) -> None:
    status, page, headers = ask(server, "GET", "/")
    assert status == 200 and page.startswith("<!doctype html>")
    assert "default-src 'none'; connect-src 'self'" in headers["Content-Security-Policy"]
    assert "http://" not in page and "https://" not in page and "innerHTML" not in page
    status, models, _ = ask(server, "GET", "/models")
    about = f"step {STEPS} · 0.8M parameters · 24 tokens of context"
    assert [model["about"] for model in json.loads(models)] == [about] * 2
    assert ask(server, "GET", "/favicon.ico")[0] == 404


def test_tokens_and_probabilities_are_the_models(server: Server) -> None:
    status, body, _ = ask(server, body=ASKED)
    note, *parts, last = map(json.loads, body.splitlines())
    assert (status, note) == (200, {"note": ""})
    player = server.players[0]
    prompt = [player.tokenizer.eot, *player.tokenizer.encode("a b")]
    tokens = generate(player.model, [prompt], Sampling(6, temperature=0))[0]
    text = "".join(part["text"] for part in [*parts, last])
    assert text == player.tokenizer.decode(tokens)
    assert last["end"] == "the requested length"
    logits, _ = player.model(torch.tensor([[*prompt, *tokens]]))
    probs = logits[0].softmax(1)
    for place, (token, part) in enumerate(zip(tokens, parts, strict=True), start=len(prompt) - 1):
        assert part["p"] == pytest.approx(probs[place, token].item(), rel=1e-3)
        assert part["others"][0][1] == pytest.approx(part["p"])  # the likeliest was taken
        assert part["others"][0][0] == player.tokenizer.decode([token])
        shares = [share for _, share in part["others"]]
        assert shares == sorted(shares, reverse=True) and len(shares) == 5


def test_a_space_at_the_end_is_noted(server: Server) -> None:
    _, body, _ = ask(server, body=ASKED | {"prompt": "a "})
    assert json.loads(body.splitlines()[0])["note"].startswith("note: the prompt 'a ' ends in")


@pytest.mark.parametrize(
    "body",
    [
        *(b"{", b"[]", b"\xff", b"NaN", b'{"model": 0}', b"null"),
        *(ASKED | {"model": model} for model in (2, -1, "0", None)),
        *(ASKED | {"temperature": value} for value in (-1, 11, "hot", None, [])),
        *(ASKED | {"max_new_tokens": value} for value in (0, 10**9, 1.5)),
        *(ASKED | {"seed": value} for value in (-1, 2**70)),
        *(ASKED | more for more in ({"top_k": -1}, {"prompt": 3}, {"more": 1})),
    ],
    ids=str,
)
def test_a_wrong_request_is_one_line(
    server: Server, body: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    status, answer, _ = ask(server, body=body)
    assert status == 400
    assert "\n" not in json.loads(answer)["error"]
    assert capsys.readouterr() == ("", "")


def test_only_our_page_is_answered(server: Server) -> None:
    assert ask(server, body=ASKED, Content_Type="text/plain")[0] == 400
    assert ask(server, body=ASKED, Content_Length="x")[0] == 400
    assert ask(server, body=b" ", Content_Length=str(MAX_BODY + 1))[0] == 400
    for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example:80", ""):
        for method, path in (("GET", "/"), ("GET", "/models"), ("POST", "/continue")):
            assert ask(server, method, path, ASKED if method == "POST" else None, Host=host)[0] == (
                403
            )
    assert ask(server, "GET", "/", Host="localhost:1234")[0] == 200  # forwarded by ssh
    assert ask(server, "OPTIONS", "/continue", Origin="http://evil.example")[0] == 501


def test_a_reader_may_leave(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(3):
        connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
        body = json.dumps(ASKED | {"max_new_tokens": 10_000})
        connection.request("POST", "/continue", body, {"Content-Type": "application/json"})
        connection.getresponse().readline()
        connection.close()
    assert ask(server, body=ASKED)[0] == 200
    assert capsys.readouterr() == ("", "")


def test_a_port_that_is_taken(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--port", str(server.server_port)])
    assert exit_.value.code == 2
    assert capsys.readouterr().err.endswith("Address already in use; give another with --port\n")


@pytest.mark.slow
def test_ctrl_c_ends_it_in_the_middle_of_a_text(run: Path) -> None:
    command = [sys.executable, "-m", "mygpt.play", str(run), "--port", "0", "--device", "cpu"]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, env=environment(), stdout=pipe, stderr=pipe, text=True
    ) as process:
        assert process.stdout and process.stderr
        line = process.stdout.readline()
        port = int(line.split()[1].rpartition(":")[2])
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        body = json.dumps(ASKED | {"max_new_tokens": 10_000})
        connection.request("POST", "/continue", body, {"Content-Type": "application/json"})
        connection.getresponse().readline()
        os.kill(process.pid, signal.SIGINT)
        assert process.wait(30) == 0
        assert process.stderr.read() == ""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here to open the page in")
@pytest.mark.parametrize("width", [390, 1200])
def test_in_a_browser(server: Server, width: int, tmp_path: Path) -> None:
    """Type, stream, stop, point at a token, reload in the middle, a second tab."""
    url = f"http://127.0.0.1:{server.server_port}/"
    is_idle = "document.querySelector('button').textContent === 'Continue'"
    click = "document.querySelector('button').click()"
    with browser(tmp_path) as open_:
        page = open_(url, width)
        page.wait_for("document.querySelectorAll('article').length === 2")
        page.run("document.querySelector('textarea').focus()")
        page.type(EVIL)
        page.run("document.getElementById('max_new_tokens').value = 12; " + click)
        page.wait_for(f"document.querySelectorAll('pre b').length >= 20 && {is_idle}")
        assert page.run("document.querySelector('pre i').textContent") == EVIL
        assert page.run("[document.title, document.images.length]") == ["Playground · myGPT", 0]
        assert page.run("document.querySelector('h2').textContent").endswith("a <run>")
        page.move_to("pre b:nth-of-type(3)")
        page.wait_for("document.querySelectorAll('#tip:not([hidden]) div').length === 6")
        shown = page.run("document.querySelector('#tip div').textContent")
        assert shown.endswith("%")
        assert page.run("document.documentElement.scrollWidth") == width

        page.run("document.getElementById('max_new_tokens').value = 10000; " + click)
        page.wait_for("document.querySelectorAll('pre b').length > 30")
        other = open_(url, width)  # while the first tab is still reading
        other.wait_for("document.querySelectorAll('article').length === 2")
        other.run("document.getElementById('max_new_tokens').value = 3; " + click)
        other.wait_for(f"document.querySelectorAll('pre b').length >= 4 && {is_idle}")
        page.call("Page.reload")
        page.wait_for(f"document.querySelectorAll('article').length === 2 && {is_idle}")
        assert page.run("document.querySelector('textarea').value") == EVIL  # kept
        page.run(click)
        page.wait_for("document.querySelectorAll('pre b').length > 3")
        page.run(click)  # stop
        page.wait_for(is_idle)
        assert page.run("document.querySelectorAll('.error').length") == 0
