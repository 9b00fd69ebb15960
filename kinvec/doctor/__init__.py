"""The data doctor: what `kinvec check` prints, and what a run keeps of its data as `doctor.json`.

Both are of this shape:

    {"verdict": str,                       # of all sources, one sentence
     "sources": [{
        "source": str, "wrong": bool, "verdict": str,
        "summary": {"kind": str, "rows": int, …},
        "looked": {rule: str},             # what was looked for, and in how much: "all 10,003 texts", "20,000 of 3 M texts"
        "not_looked": {rule: str},         # what was not, and what to give so that it is: "--model MODEL"
        "findings": [{                     # worst first
           "severity": "error" | "warning" | "note", "rule": str, "file": str, "line": int,
           "count": int, "share": float | None,   # of what was looked at, 0 to 1
           "message": str, "remedy": str,
           "examples": [{"note": str, "texts": [{"text": str, "file": str, "line": int}]}]}],
        "lengths": {side: {"edges": [float], "counts": [int]}},   # characters; edges are one more than counts, log-spaced
        "languages": {side: {code: int}},  # texts of the sample; "und": none can be told
        "labels": {label: int}}]}          # commonest first, at most 200; empty where there are none

A side is `queries`, `documents` or `texts`.
"""
