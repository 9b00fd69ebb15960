"""The whole recipe: what each part declares beside its own code, composed."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from kinvec.adapters import LoraSettings
from kinvec.config import Settings, load, read_mapping
from kinvec.contracts import RecipeError
from kinvec.merging import GuardSettings
from kinvec.mixing import MixtureSettings, SetSettings
from kinvec.objectives import ObjectiveSettings
from kinvec.sampling import DataSettings
from kinvec.tasks.further import TaskSettings
from kinvec.trainer import TrainerSettings


def spread(data: Any) -> Any:
    """A list under `data` as the mapping that it stands for: every data set under its `name`, or that of its file."""
    if isinstance(data, Mapping) and isinstance(data.get("sets"), list):
        return {**data, **spread(data["sets"])}
    return {"sets": by_name("data", data, "train")} if isinstance(data, list) else data


def by_name(key: str, entries: Any, place: str) -> Any:
    """A list under a recipe's key as a mapping: every entry under its `name`, or that of the file at its `place`.

    Raises `RecipeError` for an entry that is no mapping, and for two of one name.
    """
    if not isinstance(entries, list):
        return entries
    named: dict[str, Any] = {}
    for entry in entries:
        if not isinstance(entry, Mapping):
            raise RecipeError(
                f"{key}: every entry of the list is a mapping, such as '{place}: my.jsonl'; '{entry}' is none"
            )
        name = str(entry.get("name") or Path(str(entry.get(place, ""))).stem)
        if not re.fullmatch(r"[\w-]+", name):
            raise RecipeError(f"{key}: an entry cannot be named '{name}'; give it a name of letters, digits, _ and -")
        if name in named:
            raise RecipeError(f"{key}: two entries are named '{name}'; give each a name of its own")
        named[name] = {word: value for word, value in entry.items() if word != "name"}
    return named


class Recipe(Settings):
    """Everything a run depends on. `kinvec train RECIPE key=value …` sets any of it."""

    model: str = ""
    """The model to start from: a folder, a hub name, or `pkg:NAME` for one inside an installed package."""
    out: str = ""
    """The run folder."""
    seed: int = 42
    """Seed of the data order, dropout and adapters."""
    seeds: list[int] = []
    """Train under each of these instead, in `out/seed-N`, and say how far the gain depends on them: `[1, 2, 3]`."""
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
    data: Annotated[
        MixtureSettings, BeforeValidator(spread, json_schema_input_type=MixtureSettings | list[SetSettings])
    ] = Field(default_factory=MixtureSettings)
    """The data."""
    objective: ObjectiveSettings = Field(default_factory=ObjectiveSettings)
    """The objective."""
    trainer: TrainerSettings = Field(default_factory=TrainerSettings)
    """The loop."""
    lora: LoraSettings = Field(default_factory=LoraSettings)
    """Adapters."""
    tasks: dict[str, TaskSettings] = {}
    """Further tasks."""
    guard: dict[str, GuardSettings] = {}
    """The forgetting guard."""

    @field_validator("precision", mode="before")
    @classmethod
    def _trains(cls, value: Any) -> Any:
        if value == "int8":
            raise ValueError("int8 is for encoding (embed, evaluate, mine, search); train in bf16 or fp32")
        return value

    @model_validator(mode="after")
    def _inherit(self) -> Recipe:
        """What a data set leaves unset is as for all of them; where it lies and what judges it are its own."""
        shared = set(DataSettings.model_fields) - {"train", "dev", "test"}
        self.data.sets = {name: self._filled(entry, shared) for name, entry in self.data.sets.items()}
        return self

    def _filled(self, entry: SetSettings, shared: set[str]) -> SetSettings:
        given = entry.objective.model_dump(exclude_unset=True)
        whole: dict[str, Any] = {key: getattr(self.data, key) for key in shared - entry.model_fields_set}
        whole["objective"] = ObjectiveSettings(**self.objective.model_dump() | given)
        whole["prompts"] = self.prompts | entry.prompts
        return entry.model_copy(update=whole)

    @property
    def sets(self) -> dict[str, SetSettings]:
        """The data sets by name; a single one has none."""
        alone = SetSettings(**{key: getattr(self.data, key) for key in DataSettings.model_fields})
        return self.data.sets or {"": self._filled(alone, set())}


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
    if not isinstance(stages, list):
        raise RecipeError(f"{name}: stages is a list of mappings, each with a name of its own")
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


def load_seeds(name: str | Path | None, overrides: Sequence[str] = ()) -> tuple[list[list[Recipe]], Path | None]:
    """The chain of stages for each of the recipe's `seeds`, and the folder of all; the chain alone where it has none.

    Raises as `load_stages`, and for seeds that are no list of two or more different ones of the whole chain.
    """
    stages = load_stages(name, overrides)
    seeds = stages[0].seeds
    if any(stage.seeds != seeds for stage in stages):
        raise RecipeError("seeds: they are those of all stages; set them beside `stages`")
    if not seeds:
        return [stages], None
    if len(set(seeds)) < max(2, len(seeds)):
        raise RecipeError(f"seeds: {seeds} are not two or more different ones; for a single one set seed")
    in_stages = name is not None and "stages" in read_mapping(_find(str(name)))
    out = Path(stages[0].out).parent if in_stages else Path(stages[0].out)
    own = [[f"seed={seed}", "seeds=[]", f"out={out / f'seed-{seed}'}"] for seed in seeds]
    return [load_stages(name, [*overrides, *these]) for these in own], out


def _complete(layers: Sequence[Path | Mapping[str, Any]], overrides: Sequence[str]) -> Recipe:
    recipe = load(Recipe, *map(_with_lists_spread, layers), overrides=overrides)
    if recipe.data.sets:
        _check_sets(recipe)
    if recipe.guard:
        _check_guard(recipe)
    for key, value, example in (
        ("model", recipe.model, "model=sentence-transformers/all-MiniLM-L6-v2"),
        ("data.train", recipe.data.train or recipe.data.sets, "data.train=my_pairs.jsonl"),
        ("out", recipe.out, "out=runs/mine"),
    ):
        if not value:
            raise RecipeError(f"'{key}' is not set; add for example {example}")
    return recipe


def _with_lists_spread(layer: Path | Mapping[str, Any]) -> Mapping[str, Any]:
    """The layer with lists of data sets and tasks spread out, so that later layers and overrides reach into it."""
    mapping = dict(read_mapping(layer) if isinstance(layer, Path) else layer)
    if mapping.get("data"):
        mapping["data"] = spread(mapping["data"])
    return mapping | {key: by_name(key, mapping[key], "data") for key in ("tasks", "guard") if mapping.get(key)}


def _check_sets(recipe: Recipe) -> None:
    """Raises `RecipeError` where several data sets do not go together."""
    sets, mixed = recipe.data.sets, recipe.data.batches == "mixed"
    for key in ("train", "dev", "test"):
        if value := getattr(recipe.data, key):
            raise RecipeError(
                f"data.{key} is '{value}', and there are several data sets; name it in one, as data.sets.NAME.{key}"
            )
    first = next(iter(sets.values()))
    for name, entry in sets.items():
        if not entry.train:
            raise RecipeError(f"data.sets.{name}.train is not set")
        if entry.weight is None and any(other.weight for other in sets.values()):
            raise RecipeError(f"data.sets.{name}.weight is not set, and others are; give every data set one, or none")
        if mixed and entry.objective != first.objective:
            raise RecipeError(
                f"data.sets.{name}.objective differs from another's; a mixed batch has one loss: "
                "use data.batches=homogeneous"
            )
    if mixed and recipe.trainer.batch_size < len(sets):
        raise RecipeError(
            f"trainer.batch_size: {recipe.trainer.batch_size} rows are no mixture of {len(sets)} data sets"
        )


def _check_guard(recipe: Recipe) -> None:
    """Raises `RecipeError` where a broken guard could not be mended."""
    name = next(iter(recipe.guard))
    if not recipe.evaluate or recipe.trainer.eval_every == 0:
        key = "trainer.eval_every=0" if recipe.evaluate else "evaluate=false"
        raise RecipeError(f"guard.{name}: nothing is measured with {key}; leave it out, or leave out the guard")
    if language := {"mlm", "mntp", "clm"} & {entry.objective.name for entry in recipe.sets.values()}:
        raise RecipeError(
            f"guard.{name}: {language.pop()} teaches tokens and trains no embeddings yet; put the guard under the "
            "stage that does"
        )


def _find(name: str) -> Path:
    known = shipped()
    if name in known:
        return known[name]
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        return path
    raise RecipeError(f"'{name}' is neither a shipped recipe ({', '.join(known)}) nor a YAML file")
