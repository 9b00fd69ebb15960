"""kinvec turns any BERT or LLM into an embedding model for your own data, and proves that it got better."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {  # name → the module that holds it; imported when first asked for, so that `import kinvec` is instant
    "Embedder": "kinvec.embedder",
    "plan": "kinvec.verbs.plan",
    "train": "kinvec.verbs.train",
    "evaluate": "kinvec.verbs.evaluate",
    "compare": "kinvec.verbs.compare",
    "embed": "kinvec.verbs.embed",
    "check": "kinvec.verbs.check",
    "report": "kinvec.verbs.report",
    "search": "kinvec.verbs.search",
    "convert": "kinvec.verbs.convert",
    "info": "kinvec.verbs.info",
    "prepare": "kinvec.verbs.prepare",
    "mine": "kinvec.verbs.mine",
    "init": "kinvec.verbs.init",
    "demo": "kinvec.verbs.demo",
}

__all__ = ["__version__", *_PUBLIC]  # noqa: PLE0604 - the names are strings


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'kinvec' has no attribute '{name}'")
    return getattr(importlib.import_module(_PUBLIC[name]), name)
