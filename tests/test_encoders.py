"""Encoders by name: sentence-transformers and a server give what the model itself gives, and say what is wrong."""

from __future__ import annotations

import base64
import json
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import MINILM
from tiny_models import WORDS

from kinvec import Embedder, encoders
from kinvec.contracts import Encoder, KinvecError, RecipeError
from kinvec.encoders import HttpEncoder, open_encoder
from kinvec.verbs.embed import embed
from kinvec.verbs.evaluate import evaluate

TEXTS = [f"{a} {b} in the {c}" for a, b, c in zip(WORDS, WORDS[7:], WORDS[11:], strict=False)][:40]
KEY = "sk-not-to-be-shown"
Fault = Callable[["Handler", dict[str, Any]], bool]


class Handler(BaseHTTPRequestHandler):
    """`/v1/embeddings` with a real model behind it; `server.faults` are used up first, one a request."""

    server: Server

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.one_at_a_time:
            self.server.asked.append(asked | {"key": self.headers.get("Authorization"), "path": self.path})
            if self.server.faults and self.server.faults.pop(0)(self, asked):
                return
            self.answer(200, self.server.reply(asked))

    def answer(self, status: int, said: Any, **headers: str) -> None:
        body = said if isinstance(said, bytes) else json.dumps(said).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


class Server(ThreadingHTTPServer):
    """The model served, its faults to come, and what it was asked."""

    daemon_threads = True

    def __init__(self, model: Embedder) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.model, self.faults, self.asked, self.plain = model, list[Fault](), list[dict[str, Any]](), False
        self.one_at_a_time = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def reply(self, asked: dict[str, Any]) -> dict[str, Any]:
        vectors = self.model.encode(asked["input"], progress=False)
        said = [
            row.tolist() if self.plain else base64.b64encode(row.astype("<f4").tobytes()).decode() for row in vectors
        ]
        rows = [{"object": "embedding", "index": i, "embedding": one} for i, one in enumerate(said)]
        return {"object": "list", "data": rows, "model": asked["model"]}


@pytest.fixture
def server(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(encoders, "PAUSES", (0.0, 0.0, 0.0))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    running = Server(Embedder.load(tiny_folder, precision="fp32"))
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield running
    running.shutdown()
    thread.join()
    running.server_close()


def failing(status: int, said: Any = b"", **headers: str) -> Fault:
    def fault(handler: Handler, asked: dict[str, Any]) -> bool:
        handler.answer(status, said, **headers)
        return True

    return fault


def backwards(handler: Handler, asked: dict[str, Any]) -> bool:
    reply = handler.server.reply(asked)
    handler.answer(200, reply | {"data": reply["data"][::-1]})
    return True


def hanging_up(handler: Handler, asked: dict[str, Any]) -> bool:
    handler.close_connection = True
    return True


def rows_of(change: Callable[[list[dict[str, Any]]], Any]) -> Fault:
    def fault(handler: Handler, asked: dict[str, Any]) -> bool:
        handler.answer(200, {"data": change(handler.server.reply(asked)["data"])})
        return True

    return fault


def of_model(model: Embedder, texts: Sequence[str], prompt: str = "") -> np.ndarray:
    return model.encode(texts, prompt=prompt, progress=False)


# --- A server ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plain", [False, True], ids=["base64", "numbers"])
def test_a_server_gives_the_vectors_of_its_model_in_order(server: Server, plain: bool) -> None:
    server.plain = plain
    encoder = open_encoder(server.url, api_model="tiny", prompts={"query": "find: "})
    assert isinstance(encoder, Encoder)
    np.testing.assert_allclose(encoder.encode_documents(TEXTS), of_model(server.model, TEXTS), atol=1e-6)
    np.testing.assert_allclose(encoder.encode_queries(TEXTS), of_model(server.model, TEXTS, "find: "), atol=1e-6)
    sizes = sorted(len(asked["input"]) for asked in server.asked)
    assert sizes == [8, 8, 32, 32] and {asked["model"] for asked in server.asked} == {"tiny"}
    assert {asked["path"] for asked in server.asked} == {"/v1/embeddings"}
    assert encoder.encode_queries([]).shape == (0, 0)


def test_what_passes_is_tried_again(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    server.faults = [
        failing(429, {"error": {"message": "slow down"}}, Retry_After="0"),
        failing(500),
        hanging_up,
        backwards,
    ]
    encoder = open_encoder(server.url, api_model="tiny")
    np.testing.assert_allclose(encoder.encode_documents(TEXTS), of_model(server.model, TEXTS), atol=1e-6)
    assert len(server.asked) == 2 + 3, "two batches, and three that failed"
    told = capsys.readouterr().err
    assert "429 Too Many Requests: slow down; again in 0 s" in told and "500 Internal Server Error" in told


def test_a_server_says_how_long_to_wait(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(encoders.time, "sleep", waits.append)
    soon = "Wed, 21 Oct 2026 07:28:00 GMT"
    server.faults = [failing(429, Retry_After=value) for value in ("7", "100000", soon)]
    monkeypatch.setattr(encoders, "PAUSES", (1.0, 2.0, 4.0))
    open_encoder(server.url, api_model="tiny").encode_queries(["a cell"])
    assert waits == [7.0, 60.0, 4.0]


def test_what_does_not_pass_is_an_error_with_the_servers_words(server: Server) -> None:
    encoder = open_encoder(server.url, api_model="tiny")
    server.faults = [failing(404, {"error": {"message": "the model tiny does not exist"}})]
    with pytest.raises(KinvecError, match=r"v1/embeddings: 404 Not Found: the model tiny does not exist"):
        encoder.encode_queries(["a cell"])
    assert len(server.asked) == 1, "not tried again"
    server.faults = [failing(503, b"<html>\n gone </html>")] * 9
    with pytest.raises(KinvecError, match=r"503 Service Unavailable: <html> gone </html>"):
        encoder.encode_queries(["a cell"])
    assert len(server.asked) == 1 + 4, "four tries: three pauses"


@pytest.mark.parametrize(
    "fault",
    [
        failing(200, b"no JSON"),
        failing(200, {"embeddings": [[1.0]]}),
        failing(200, [1, 2]),
        rows_of(lambda rows: rows[:-1]),
        rows_of(lambda rows: [rows[0], rows[0]]),
        rows_of(lambda rows: [*rows, rows[0] | {"index": 2}]),
        rows_of(lambda rows: [rows[0], rows[1] | {"embedding": [1.0, 2.0]}]),
        rows_of(lambda rows: [row | {"embedding": "not base64!"} for row in rows]),
        rows_of(lambda rows: [row | {"embedding": 1.0} for row in rows]),
        rows_of(lambda rows: [{"embedding": row["embedding"]} for row in rows]),
    ],
)
def test_a_reply_that_is_no_embeddings_is_refused(server: Server, fault: Fault) -> None:
    server.faults = [fault]
    with pytest.raises(KinvecError, match=r"/v1/embeddings: (the reply holds no 2 embeddings|asked for 2 vectors)"):
        open_encoder(server.url, api_model="tiny").encode_queries(["a cell", "blood"])
    assert len(server.asked) == 1


def test_vectors_of_two_lengths_are_refused(server: Server) -> None:
    server.faults = [rows_of(lambda rows: [row | {"embedding": [1.0, 2.0]} for row in rows])]
    with pytest.raises(KinvecError, match="dimensions"):
        open_encoder(server.url, api_model="tiny").encode_queries(TEXTS)


def test_an_address_where_nobody_answers_is_said_at_once(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoders, "PAUSES", (60.0,))
    server.shutdown()
    server.server_close()
    with pytest.raises(KinvecError, match=r"127\.0\.0\.1:\d+/v1/embeddings: ConnectError"):
        open_encoder(server.url, api_model="tiny").encode_queries(["a cell"])
    with pytest.raises(RecipeError, match="no address of a server"):
        open_encoder("http://host:port/v1", api_model="tiny")


def test_the_key_is_sent_and_never_shown(
    server: Server,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    tiny_pairs: Path,
) -> None:
    monkeypatch.setenv("KINVEC_API_KEY", KEY)
    server.faults = [failing(429, {"error": {"message": f"{KEY} asks too often"}})]
    result = evaluate(server.url, tiny_pairs, api_model="tiny", out=tmp_path / "result")
    assert {asked["key"] for asked in server.asked} == {f"Bearer {KEY}"}
    server.faults = [failing(401, {"error": {"message": f"Incorrect API key provided: {KEY}"}})]
    encoder = open_encoder(server.url, api_model="tiny")
    with pytest.raises(KinvecError, match=r"Incorrect API key provided: \*\*\*") as refused:
        encoder.encode_queries(["a cell"])
    shown = capsys.readouterr()
    written = "".join(path.read_bytes().decode("latin-1") for path in (tmp_path / "result").iterdir())
    for place in (shown.out, shown.err, written, repr(vars(encoder)), str(refused.value), result.model):
        assert KEY not in place
    with pytest.raises(RecipeError, match="KINVEC_API_KEY"):
        open_encoder(f"http://user:{KEY}@127.0.0.1/v1", api_model="tiny")


def test_evaluating_a_server_equals_evaluating_its_model(server: Server, tiny_folder: Path, tiny_pairs: Path) -> None:
    over_http = evaluate(server.url, tiny_pairs, api_model="tiny")
    here = evaluate(tiny_folder, tiny_pairs, precision="fp32")
    assert over_http.metrics == pytest.approx(here.metrics, abs=1e-6)
    assert over_http.per_query["nDCG@10"] == here.per_query["nDCG@10"]
    assert over_http.model == f"tiny (127.0.0.1:{server.server_port})"


def test_vectors_of_a_server_are_kept_and_what_was_asked_is_not_asked_again(
    server: Server, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = {side: tmp_path / f"{side}.jsonl" for side in ("queries", "docs")}
    for side, texts in (("queries", TEXTS[:2]), ("docs", TEXTS)):
        paths[side].write_text("".join(json.dumps({"id": f"{i}", "text": text}) + "\n" for i, text in enumerate(texts)))
    server.faults = [lambda handler, asked: False, failing(400, {"error": {"message": "no credit left"}})]
    ask = partial(embed, server.url, tmp_path / "vectors", **paths, api_model="tiny", prompts={"query": "find: "})
    with pytest.raises(KinvecError, match="no credit left"):
        ask()
    asked = len(server.asked)
    manifest = ask()
    assert [len(one["input"]) for one in server.asked[asked:]] in ([32, 8], [8, 32]), "the queries were there"
    assert manifest["dimension"] == 32 and manifest["prompts"] == {"query": "find: "}
    assert manifest["model"] == f"tiny (127.0.0.1:{server.server_port})" and "device" not in manifest["settings"]
    stored = np.load(tmp_path / "vectors" / "doc.npy")
    np.testing.assert_allclose(stored, of_model(server.model, TEXTS), atol=1e-6)
    np.testing.assert_allclose(
        np.load(tmp_path / "vectors" / "query.npy"), of_model(server.model, TEXTS[:2], "find: "), atol=1e-6
    )
    with pytest.raises(KinvecError, match="other settings"):
        embed(server.url, tmp_path / "vectors", **paths, api_model="other")


# --- sentence-transformers --------------------------------------------------------------------------------------------


def test_sentence_transformers_gives_what_our_own_encoder_gives() -> None:
    theirs = open_encoder(f"st:{MINILM}", precision="fp32", device="cpu")
    ours = open_encoder(MINILM, precision="fp32", device="cpu")
    assert isinstance(theirs, Encoder) and theirs.name == f"st:{MINILM}"
    np.testing.assert_allclose(theirs.encode_queries(TEXTS), ours.encode_queries(TEXTS), atol=1e-4)
    np.testing.assert_allclose(theirs.encode_documents(TEXTS[:3]), ours.encode_documents(TEXTS[:3]), atol=1e-4)


def test_sentence_transformers_uses_the_folders_prompts_and_those_given(tiny_folder: Path, tmp_path: Path) -> None:
    ours = Embedder.load(tiny_folder, precision="fp32")
    ours.prompts = {"query": "find: ", "document": "text: "}
    ours.save(tmp_path / "model")
    theirs = open_encoder(f"st:{tmp_path / 'model'}", precision="fp32", device="cpu")
    np.testing.assert_allclose(theirs.encode_queries(TEXTS), ours.encode_queries(TEXTS), atol=1e-5)
    np.testing.assert_allclose(theirs.encode_documents(TEXTS), ours.encode_documents(TEXTS), atol=1e-5)
    assert theirs.prompts == ours.prompts
    given = open_encoder(f"st:{tmp_path / 'model'}", precision="fp32", device="cpu", prompts={"query": "ask: "})
    np.testing.assert_allclose(given.encode_queries(TEXTS), of_model(ours, TEXTS, "ask: "), atol=1e-5)
    own = open_encoder(str(tmp_path / "model"), precision="fp32", device="cpu", prompts={"query": "ask: "})
    np.testing.assert_allclose(own.encode_queries(TEXTS), of_model(ours, TEXTS, "ask: "), atol=1e-5)
    assert given.fingerprint != theirs.fingerprint != own.fingerprint


def test_what_sentence_transformers_cannot_open_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(KinvecError, match="sentence-transformers cannot open it"):
        open_encoder(f"st:{tmp_path}")
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(KinvecError, match="pip install 'sentence-transformers"):
        open_encoder(f"st:{MINILM}")


# --- Names ------------------------------------------------------------------------------------------------------------


def test_a_fingerprint_knows_what_changes_the_vectors(tiny_folder: Path) -> None:
    names: list[tuple[str, dict[str, Any]]] = [
        ("http://a/v1", {"api_model": "x"}),
        ("http://b/v1", {"api_model": "x"}),
        ("http://a/v1", {"api_model": "y"}),
        ("http://a/v1", {"api_model": "x", "prompts": {"query": "q: "}}),
        (str(tiny_folder), {}),
        (str(tiny_folder), {"prompts": {"query": "q: "}}),
    ]
    prints = [open_encoder(name, **given).fingerprint for name, given in names]
    assert len(set(prints)) == len(prints)
    assert prints == [open_encoder(name, **given).fingerprint for name, given in names]


def test_arguments_that_do_not_go_together_are_refused(main: Callable[..., tuple[int, str]], tiny_pairs: Path) -> None:
    for given, said in (
        (["--model", "http://localhost/v1"], "--api-model NAME"),
        (["--model", MINILM, "--api-model", "x"], "address of a server"),
        (["--model", MINILM, "--prompt", "passage=x"], "unknown prompt 'passage'"),
        (["--model", MINILM, "--prompt", "x"], "query=TEXT"),
        (["--embeddings", "v", "--prompt", "query=x"], "go with --model"),
    ):
        code, told = main("evaluate", "--data", str(tiny_pairs), *given)
        assert code == 2 and said in told, told
    assert isinstance(open_encoder("https://host/v1/embeddings", api_model="x"), HttpEncoder)
