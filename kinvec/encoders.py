"""Whatever turns texts into vectors, opened by its name: a model of ours, sentence-transformers', or one on a server.

`open_encoder` is the one place where a name becomes an `Encoder`. BM25 gives no vectors, and vectors on disk need no
texts: `kinvec evaluate` takes both by other ways (`tasks.bm25`, `tasks.from_vectors`).
Shapes: n = texts, d = embedding dimensions.
"""

from __future__ import annotations

import base64
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Protocol

import httpx
import numpy as np
import torch
import xxhash
from jaxtyping import Float, Float32

from kinvec.backbone import find_model, quiet, resolve_device, resolve_precision
from kinvec.console import progress, say
from kinvec.contracts import Encoder, KinvecError, RecipeError
from kinvec.embedder import Embedder, state_fingerprint, with_prompts


class LastingEncoder(Encoder, Protocol):
    """An encoder whose `fingerprint` says whether vectors of another day are still its own."""

    @property
    def fingerprint(self) -> str: ...


LIBRARY = "st:"  # before the name of a model that sentence-transformers itself is to open
SERVER = ("http://", "https://")
SIDES = ("query", "document")
REMEMBERED = 4 << 30


def open_encoder(
    name: str, *, precision: str = "auto", device: str = "auto", prompts: Mapping[str, str] | None = None,
    api_model: str | None = None,
) -> LastingEncoder:  # fmt: skip
    """The encoder of a name: a model folder, hub name or `pkg:NAME`; `st:` before one; or the address of a server.

    `prompts` (by `query` and `document`) take the place of those that the model brings. A server, `https://HOST/v1`,
    answers as OpenAI's does, and `api_model` says which of its models is asked. Every encoder has a `fingerprint`,
    which says whether vectors of another day are still its own. Raises `RecipeError` for arguments that do not go
    together, `KinvecError` for a model that does not open.
    """
    prompts = dict(prompts or {})
    if unknown := next((side for side in prompts if side not in SIDES), None):
        raise RecipeError(f"unknown prompt '{unknown}'; there are {' and '.join(SIDES)}")
    if name.startswith(SERVER):
        if not api_model:
            raise RecipeError(f"{name} is a server; say which of its models to ask: --api-model NAME")
        return HttpEncoder(name, api_model, prompts)
    if api_model:
        raise RecipeError(f"--api-model is for the address of a server, and '{name}' is none; leave it out")
    if name.startswith(LIBRARY):
        return LibraryEncoder(name.removeprefix(LIBRARY), precision, device, prompts)
    return with_prompts(Embedder.load(name, precision=precision, device=device), prompts)


def each(encoder: Encoder, side: str) -> Callable[[Iterable[Sequence[str]]], Iterator[Float[np.ndarray, "n d"]]]:
    """What gives the vectors of one window of texts after another, as of queries (`query`) or documents (`document`).

    A model of ours reads and tokenizes the next window on the way, where that pays (`machine.ahead`).
    """
    if isinstance(encoder, Embedder):
        return partial(encoder.encode_each, prompt=encoder.prompts.get(side, ""))
    encode = encoder.encode_queries if side == "query" else encoder.encode_documents
    return partial(map, encode)


class Remembering:
    """An encoder that keeps the vectors of documents: of several searches of one corpus, the first one encodes it.

    At most `REMEMBERED` bytes are kept; a block of documents beyond that is encoded again.
    """

    def __init__(self, encoder: Encoder) -> None:
        self.encoder, self.name = encoder, encoder.name
        self.kept: dict[int, np.ndarray] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.encoder, name)

    def encode_queries(self, texts: Sequence[str]) -> Float[np.ndarray, "n d"]:
        return self.encoder.encode_queries(texts)

    def encode_documents(self, texts: Sequence[str]) -> Float[np.ndarray, "n d"]:
        key = hash(tuple(texts))
        vectors = self.kept.get(key)
        if vectors is None:
            vectors = self.encoder.encode_documents(texts)
            if vectors.nbytes + sum(block.nbytes for block in self.kept.values()) <= REMEMBERED:
                self.kept[key] = vectors
        return vectors


def named_prompts(given: Sequence[str]) -> dict[str, str]:
    """Prompts by name from `query=TEXT` and `document=TEXT`. Raises `RecipeError` for anything else."""
    found = dict(text.partition("=")[::2] for text in given if "=" in text)
    if wrong := next((text for text in given if "=" not in text), None):
        raise RecipeError(f"--prompt {wrong}: write it as query=TEXT or document=TEXT")
    return found


def _joined(name: str, parts: Iterable[np.ndarray], rows: int) -> Float32[np.ndarray, "n d"]:
    """Batches one below the other, with progress while they are made."""
    found: list[np.ndarray] = []
    with progress("encoding", rows) as bar:
        for part in parts:
            if found and part.shape[1] != found[0].shape[1]:
                raise KinvecError(f"{name} gave vectors of {found[0].shape[1]} and of {part.shape[1]} dimensions")
            found.append(part)
            bar.advance(len(part))
    return np.concatenate(found) if found else np.empty((0, 0), dtype=np.float32)


# --- sentence-transformers --------------------------------------------------------------------------------------------

LIBRARY_ROWS = 2048  # texts that the library sorts by length and encodes at a time


class LibraryEncoder:
    """A model opened and run by sentence-transformers itself, whatever its modules; code of a model is never run."""

    def __init__(self, name: str, precision: str, device: str, prompts: Mapping[str, str]) -> None:
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError:
            raise KinvecError("st: needs sentence-transformers; pip install 'sentence-transformers>=5.2'") from None
        if precision == "int8":
            raise RecipeError("st: opens a model in fp32 or bf16; int8 is for models opened by kinvec itself")
        place = resolve_device(device)
        self.precision = resolve_precision(precision, place)
        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32
        try:
            with quiet():
                model = SentenceTransformer(find_model(name), device=str(place), model_kwargs={"dtype": dtype})
        except (OSError, ValueError, KeyError, TypeError, ImportError, RuntimeError) as error:
            raise KinvecError(f"{name}: sentence-transformers cannot open it: {str(error).splitlines()[0]}") from None
        model.prompts |= prompts
        self._model, self.device = model, place
        self.name = f"{LIBRARY}{name}"
        self.prompts = {side: text for side, text in model.prompts.items() if text}
        self.similarity = str(model.similarity_fn_name)
        self.max_length = model.max_seq_length

    @property
    def fingerprint(self) -> str:
        """A hash of the weights, the modules, the prompts, the maximum length and the precision."""
        modules = [type(module).__name__ for module in self._model]
        said = ["sentence-transformers", modules, self.prompts, self.max_length, self.precision]
        return state_fingerprint(self._model, said)

    def encode_queries(self, texts: Sequence[str]) -> Float[np.ndarray, "n d"]:
        """Vectors by the library's `encode_query`, float32."""
        return self._encode(self._model.encode_query, texts)

    def encode_documents(self, texts: Sequence[str]) -> Float[np.ndarray, "n d"]:
        """Vectors by the library's `encode_document`, float32."""
        return self._encode(self._model.encode_document, texts)

    def _encode(self, encode: Callable[..., Any], texts: Sequence[str]) -> Float32[np.ndarray, "n d"]:
        parts = (list(texts[start : start + LIBRARY_ROWS]) for start in range(0, len(texts), LIBRARY_ROWS))
        found = (np.asarray(encode(part, show_progress_bar=False), dtype=np.float32) for part in parts)
        return _joined(self.name, found, len(texts))


# --- A server ---------------------------------------------------------------------------------------------------------

API_KEY = "KINVEC_API_KEY"  # the environment variable; what it holds is sent, and never printed or written
REQUEST_TEXTS = 32  # what every known server takes at once (text-embeddings-inference's limit, unless it is set)
IN_FLIGHT = 4  # requests under way at the same time: the way there and back is most of the wait
SECONDS = 120.0  # for a reply: a server without an accelerator needs many for a batch of long texts
PAUSES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)  # seconds before each further try
LONGEST_PAUSE = 60.0  # whatever the server asks for
SHOWN = 300  # characters of what a server says


class HttpEncoder:
    """A model behind `POST /v1/embeddings`, as OpenAI, vLLM, text-embeddings-inference, Ollama and others serve it.

    Too many requests (429), a server's own errors (5xx) and broken connections are tried again after growing pauses;
    an address that never answered is not. Texts go as they are, after the prompt: how long they may be is the server's.
    """

    similarity, precision = "cosine", ""

    def __init__(self, url: str, model: str, prompts: Mapping[str, str]) -> None:
        try:
            address = httpx.URL(url)
        except httpx.InvalidURL as error:
            raise RecipeError(f"'{url}' is no address of a server: {error}") from None
        if address.userinfo or address.query:
            raise RecipeError(f"the address of a server has no password or key in it; set {API_KEY} in the environment")
        self.url = url.rstrip("/").removesuffix("/embeddings") + "/embeddings"
        self.name = f"{model} ({address.netloc.decode()})"
        self.prompts = dict(prompts)
        self._model = model
        self._answered = False
        key = os.environ.get(API_KEY, "").strip()
        self._headers = httpx.Headers({"Authorization": f"Bearer {key}"} if key else {})

    @property
    def fingerprint(self) -> str:
        """A hash of address, model name and prompts: nobody can look into a server, so its word is taken."""
        return xxhash.xxh3_128_hexdigest(json.dumps([self.url, self._model, self.prompts], sort_keys=True).encode())

    def encode_queries(self, texts: Sequence[str]) -> Float[np.ndarray, "n d"]:
        """Vectors of queries, float32, in their order."""
        return self._encode(texts, self.prompts.get("query", ""))

    def encode_documents(self, texts: Sequence[str]) -> Float[np.ndarray, "n d"]:
        """Vectors of documents, float32, in their order."""
        return self._encode(texts, self.prompts.get("document", ""))

    def _encode(self, texts: Sequence[str], prompt: str) -> Float32[np.ndarray, "n d"]:
        asked = [prompt + text for text in texts]
        batches = [asked[start : start + REQUEST_TEXTS] for start in range(0, len(asked), REQUEST_TEXTS)]
        with httpx.Client(headers=self._headers, timeout=SECONDS) as client, ThreadPoolExecutor(IN_FLIGHT) as pool:
            return _joined(self.name, pool.map(lambda batch: self._ask(client, batch), batches), len(asked))

    def _ask(self, client: httpx.Client, texts: list[str]) -> Float32[np.ndarray, "n d"]:
        """The vectors of one request. base64 is what OpenAI's own client asks for; numbers are understood as well."""
        body = {"model": self._model, "input": texts, "encoding_format": "base64"}
        for pause in (*PAUSES, None):
            try:
                reply = client.post(self.url, json=body)
            except httpx.TransportError as error:
                trouble, again, wait = f"{type(error).__name__} ({error})", self._answered, 0.0
            else:
                self._answered = True
                if reply.is_success:
                    return self._vectors(reply, len(texts))
                trouble = f"{reply.status_code} {reply.reason_phrase}: {self._words(reply)}"
                again, wait = reply.status_code == 429 or reply.status_code >= 500, _asked_to_wait(reply)
            if not again or pause is None:
                raise KinvecError(f"{self.url}: {trouble}")
            wait = min(max(pause, wait), LONGEST_PAUSE)
            say(f"{self.url}: {trouble}; again in {wait:.0f} s")
            time.sleep(wait)
        raise AssertionError("the last pause is None")

    def _words(self, reply: httpx.Response) -> str:
        """What the server says went wrong, without the key should it repeat that."""
        try:
            said = reply.json()
            said = said.get("error", said) if isinstance(said, dict) else said
            said = said.get("message", said) if isinstance(said, dict) else said
        except ValueError:
            said = reply.text
        key = self._headers.get("Authorization", "").removeprefix("Bearer ")
        words = " ".join(str(said).split())
        return (words.replace(key, "***") if key else words)[:SHOWN]

    def _vectors(self, reply: httpx.Response, count: int) -> Float32[np.ndarray, "n d"]:
        """The embeddings in the order of the texts, which `index` tells. Raises `KinvecError` for anything else."""
        try:
            rows = {int(row["index"]): _vector(row["embedding"]) for row in reply.json()["data"]}
            vectors = np.stack([rows[place] for place in range(count)])
        except (ValueError, TypeError, KeyError, IndexError) as error:
            raise KinvecError(
                f"{self.url}: the reply holds no {count} embeddings, each with its index ({type(error).__name__}: "
                f"{str(error)[:SHOWN]}); is this an OpenAI-style /v1/embeddings?"
            ) from None
        if vectors.ndim != 2 or len(rows) != count:
            raise KinvecError(f"{self.url}: asked for {count} vectors, got {len(rows)} of shape {vectors.shape[1:]}")
        return vectors


def _vector(said: Any) -> Float32[np.ndarray, "..."]:
    if isinstance(said, str):
        return np.frombuffer(base64.b64decode(said, validate=True), dtype="<f4").astype(np.float32)
    return np.asarray(said, dtype=np.float32)


def _asked_to_wait(reply: httpx.Response) -> float:
    """Seconds that the server asks to wait for; 0 where it does not, or names a date."""
    try:
        return float(reply.headers.get("retry-after", "0"))
    except ValueError:
        return 0.0
