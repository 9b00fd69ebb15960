"""The whole recipe: what each part declares beside its own code, composed."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from kinvec.backbone import LoraSettings
from kinvec.config import Settings, load, read_mapping
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
    return _complete([] if name is None else [_find(str(name))], overrides)


def load_stages(name: str | Path | None, overrides: Sequence[str] = ()) -> list[Recipe]:
    """The recipes of a chain, in order; a recipe without `stages` is a chain of one.

    A stage is a mapping with a `name` of its own, perhaps the `recipe` it is based on, and settings over those of the
    whole chain. It has the folder of its name in `out`, and starts from the model of the stage before. An override
    goes to all stages, or with a stage's name in front (`mntp.trainer.max_steps=9`) to that one. Raises as
    `load_recipe`, and for stages that are no such mappings.
    """
    common = {} if name is None else read_mapping(_find(str(name)))
    stages = common.pop("stages", None)
    if stages is None:
        return [load_recipe(name, overrides)]
    names = [str(stage.get("name")) if isinstance(stage, dict) else "" for stage in stages]
    fit = [re.fullmatch(r"[\w-]+", word) and word not in Recipe.model_fields for word in names]
    if len(set(names)) < len(names) or not all(fit):
        raise RecipeError(f"{name}: every stage is a mapping with a name of its own, no recipe key (they are {names})")
    recipes: list[Recipe] = []
    for word, stage in zip(names, stages, strict=True):
        own = [item.removeprefix(f"{word}.") for item in overrides if item.startswith(f"{word}.")]
        every = [item for item in overrides if item.split(".")[0] not in names]
        settings = {key: value for key, value in stage.items() if key not in ("name", "recipe")}
        layers: list[Path | Mapping[str, Any]] = [
            common,
            *([_find(stage["recipe"])] if "recipe" in stage else []),
            settings,
        ]
        before = [f"model={recipes[-1].out}/model"] if recipes else []
        out = next((item[4:] for item in reversed(every) if item.startswith("out=")), common.get("out", ""))
        place = [f"out={out}/{word}"] if out else []
        recipes.append(_complete(layers, [*every, *before, *place, *own]))
    return recipes


def _complete(layers: Sequence[Path | Mapping[str, Any]], overrides: Sequence[str]) -> Recipe:
    recipe = load(Recipe, *layers, overrides=overrides)
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
