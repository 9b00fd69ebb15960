"""The whole recipe: what each part declares beside its own code, composed."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Literal

from pydantic import Field

from kinvec.backbone import LoraSettings
from kinvec.config import Settings, load
from kinvec.contracts import RecipeError
from kinvec.objectives import ObjectiveSettings
from kinvec.sampling import DataSettings
from kinvec.trainer import TrainerSettings


class Recipe(Settings):
    """Everything a run depends on. `kinvec train RECIPE key=value …` sets any of it."""

    model: str = ""
    """The model to start from: a folder, a hub name, or `pkg:NAME` for one inside an installed package."""
    out: str = ""
    """The run folder."""
    seed: int = 42
    """Seed of the data order, dropout and adapters."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic: bf16 mixed precision, float32, or bf16 where the hardware multiplies it."""
    device: str = "auto"
    """`cpu`, `cuda`, or auto."""
    threads: int | None = None
    """CPU threads; unset, all cores."""
    evaluate: bool = True
    """Hold out dev (and test) data, choose by dev, evaluate base and tuned model on test; false only trains."""
    push_to_hub: str | None = None
    """Upload the finished model folder under this name."""
    prompts: dict[str, str] = {}
    """Put before every query and document, and kept with the model: `{query: "query: ", document: "passage: "}`."""
    attention: Literal["causal", "bidirectional"] | None = None
    """Let a decoder see the whole text (`bidirectional`) or only what precedes (`causal`); unset, as the model is."""
    pooling: str | list[str] | None = None
    """Token vectors to one: mean, cls, lasttoken, weightedmean, max, or several, joined; unset, as the model is."""
    append_eos: bool | None = None
    """End every text with the end-of-sequence token; unset, where `pooling` is set to `lasttoken`."""
    pool_prompt: bool | None = None
    """Whether the prompt's tokens count in pooling; unset, as the model says."""
    data: DataSettings = Field(default_factory=DataSettings)
    """The data."""
    objective: ObjectiveSettings = Field(default_factory=ObjectiveSettings)
    """The objective."""
    trainer: TrainerSettings = Field(default_factory=TrainerSettings)
    """The loop."""
    lora: LoraSettings = Field(default_factory=LoraSettings)
    """Adapters."""


def shipped() -> dict[str, Path]:
    """The recipes in the package, by name."""
    folder = Path(str(files("kinvec") / "recipes"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load_recipe(name: str | Path | None, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a shipped name or a YAML file, with overrides; None is the defaults.

    Raises `RecipeError` for an unknown name or key, a wrong value, or when model, data or out are missing.
    """
    recipe = load(Recipe, *([] if name is None else [_find(str(name))]), overrides=overrides)
    for key, value, example in (
        ("model", recipe.model, "model=sentence-transformers/all-MiniLM-L6-v2"),
        ("data.train", recipe.data.train, "data.train=my_pairs.jsonl"),
        ("out", recipe.out, "out=runs/mine"),
    ):
        if not value:
            raise RecipeError(f"'{key}' is not set; add for example {example}")
    return recipe


def _find(name: str) -> Path:
    known = shipped()
    if name in known:
        return known[name]
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        return path
    raise RecipeError(f"'{name}' is neither a shipped recipe ({', '.join(known)}) nor a YAML file")
