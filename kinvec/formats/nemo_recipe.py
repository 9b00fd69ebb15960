"""NeMo's command line → a recipe of ours: what each key becomes, or why it has no counterpart.

The keys are those of NeMo 2.0.0's `megatron_bert_embedding_config`, `megatron_gpt_embedder_tuning_config` and the
earlier `megatron_bert_config` for Sentence-BERT.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import yaml

from kinvec.config import parse_yaml
from kinvec.contracts import KinvecError

Carry = Callable[[Any], dict[str, Any]]


def _to(*keys: str) -> Carry:
    return lambda value: dict.fromkeys(keys, value)


def _first_file(key: str) -> Carry:
    """NeMo takes lists of files; one is carried."""

    def carry(value: Any) -> dict[str, Any]:
        files = value if isinstance(value, list) else [value]
        if len(files) != 1:
            raise KinvecError(f"{len(files)} files are named for {key}; join them, a recipe reads one source")
        return {key: files[0]}

    return carry


PRECISIONS = {"bf16": "bf16", "bf16-mixed": "bf16", "16": "bf16", "16-mixed": "bf16", "32": "fp32", "32-true": "fp32"}
CARRIED: dict[str, Carry] = {
    "restore_from_path": _to("model"),
    "model.restore_from_path": _to("model"),
    "trainer.max_steps": _to("trainer.max_steps"),
    "trainer.max_epochs": lambda value: {"trainer.epochs": value} if value > 0 else {},
    "trainer.val_check_interval": lambda value: (
        {"trainer.eval_every": value, "trainer.save_every": value} if isinstance(value, int) else {}
    ),
    "trainer.gradient_clip_val": lambda value: {"trainer.clip": value or 0.0},
    "trainer.precision": lambda value: {"precision": PRECISIONS.get(str(value), "auto")},
    "model.global_batch_size": _to("trainer.batch_size"),
    "model.encoder_seq_length": _to("data.max_length"),
    "model.data.train_ds.max_seq_length": _to("data.max_length"),
    "model.data.train_ds.add_eos": _to("append_eos"),
    "model.seed": _to("seed"),
    "model.softmax_temp": _to("objective.temperature"),
    "model.temperature": _to("objective.temperature"),
    "model.label_smoothing": _to("objective.label_smoothing"),
    "model.use_all_possible_negatives": lambda value: {
        "objective.hard_negatives": "shared" if value else "own",
        "objective.in_batch": bool(value),
    },
    "model.hidden_dropout": _to("trainer.dropout"),
    "model.data.data_train": _first_file("data.train"),
    "model.data.data_prefix": _first_file("data.train"),
    "model.data.train_ds.file_names": _first_file("data.train"),
    "model.data.data_validation": _first_file("data.dev"),
    "model.data.hard_negatives_to_train": _to("data.negatives_per_query"),
    "model.peft.lora_tuning.adapter_dim": _to("lora.rank"),
    "model.peft.lora_tuning.alpha": _to("lora.alpha"),
    "model.peft.lora_tuning.adapter_dropout": _to("lora.dropout"),
    "model.optim.lr": _to("trainer.lr"),
    "model.optim.weight_decay": _to("trainer.weight_decay"),
    "model.optim.sched.warmup_steps": _to("trainer.warmup"),
    "model.optim.sched.min_lr": _to("min_lr"),  # absolute there, a share of the peak here: made below
    "model.optim.sched.name": lambda value: {"trainer.schedule": "cosine" if value == "CosineAnnealing" else "linear"},
    "exp_manager.explicit_log_dir": _to("out"),
    "exp_manager.exp_dir": _to("out"),
    "exp_manager.create_wandb_logger": lambda value: {"trainer.trackers": ["wandb"]} if value else {},
    "exp_manager.checkpoint_callback_params.save_top_k": lambda value: (
        {"trainer.keep_best": value} if value > 0 else {}
    ),
    "model.activations_checkpoint_granularity": lambda value: {"trainer.gradient_checkpointing": True},
}
WITHOUT: dict[str, str] = {  # pattern → why it has no counterpart
    "model.optim.sched.constant_steps": "no stretch is constant: its default of 50,000 ends the decay after warm-up",
    "model.optim.sched.monitor": "the schedule follows steps, not a measure",
    "model.optim.sched.reduce_on_plateau": "the schedule follows steps, not a measure",
    "model.activations_checkpoint_*": "all layers are checkpointed, or none: trainer.gradient_checkpointing",
    "model.megatron_amp_O2": "the frozen base of adapters in half precision: lora.base=bf16",
    "exp_manager.checkpoint_callback_params.*": "checkpoints are named by step, and nDCG@10 on dev ranks them",
    "model.peft.peft_scheme": "adapters are LoRA's",
    "model.micro_batch_size": "a batch need not fit into memory; chunks are cut by the planner",
    "model.optim.name": "AdamW is the optimiser",
    "model.optim.betas": "AdamW has its usual betas, 0.9 and 0.999",
    "model.tokenizer.*": "the tokenizer comes with the model",
    "model.global_inbatch_negatives": "the negatives of the whole batch always count",
    "model.backprop_type": "gradients flow to every document of the batch",
    "model.num_soft_negatives": "NeMo never reads it",
    "model.do_mrl": "name the dimensions: objective.dimensions=[1024, 512, 256]",
    "model.min_mrl_dim": "name the dimensions: objective.dimensions=[1024, 512, 256]",
    "model.data.evaluation_*": "dev is evaluated whole, by trainer.eval_every",
    "model.data.validation_ds.*": "name dev data as data.dev: judged queries, or rows as those of training",
    "model.data.test_ds.*": "inference is kinvec embed --queries FILE --docs FILE --layout nemo",
    "model.data.data_test.*": "inference is kinvec embed --queries FILE --docs FILE --layout nemo",
    "model.mcore_bert": "of NeMo's own code",
    "model.*process": "of NeMo's own code",
    "exp_manager.resume*": "the same command always continues",
    "exp_manager.wandb_logger_kwargs.*": "set WANDB_PROJECT and WANDB_NAME",
    "trainer.devices": "start several by torchrun --nproc-per-node N -m kinvec train RECIPE",
    "trainer.num_nodes": "start several by torchrun --nnodes N -m kinvec train RECIPE, see docs/scaling.md",
    "*num_sanity_val_steps": "there is no trial evaluation",
}
PROMPTS = {"query": "query: ", "document": "passage: "}
BERT_CODE = {  # what NeMo's BERT embedding does whatever its keys say
    "prompts": PROMPTS,
    "pooling": "mean",
    "objective.hard_negatives": "own",
    "data.negatives": "random",
}
BERT_DEFAULTS = {  # what its configuration says where a command does not
    "model.softmax_temp": 0.02,
    "model.encoder_seq_length": 512,
    "model.global_batch_size": 8,
    "model.data.hard_negatives_to_train": 4,
    "model.optim.lr": 2e-4,
    "model.optim.weight_decay": 0.01,
    "model.optim.sched.name": "CosineAnnealing",
    "model.optim.sched.warmup_steps": 500,
    "model.optim.sched.min_lr": 2e-5,
    "trainer.max_steps": 100_000,
    "trainer.val_check_interval": 100,
    "trainer.gradient_clip_val": 1.0,
    "exp_manager.checkpoint_callback_params.save_top_k": 10,
}
GPT_CODE = {  # the same of NeMo's GPT embedding
    "prompts": PROMPTS,
    "attention": "causal",
    "pooling": "lasttoken",
    "data.negatives_per_query": 1,
}
GPT_DEFAULTS = {
    "model.temperature": 0.02,
    "model.use_all_possible_negatives": False,
    "model.data.train_ds.max_seq_length": 512,
    "model.data.train_ds.add_eos": True,
    "model.global_batch_size": 128,
    "model.peft.lora_tuning.adapter_dim": 32,
    "model.peft.lora_tuning.adapter_dropout": 0.0,
    "model.optim.lr": 1e-4,
    "model.optim.weight_decay": 0.01,
    "model.optim.sched.name": "CosineAnnealing",
    "model.optim.sched.warmup_steps": 50,
    "model.optim.sched.min_lr": 0.0,
    "trainer.max_steps": 20_000,
    "trainer.gradient_clip_val": 0.0,
    "exp_manager.checkpoint_callback_params.save_top_k": 1,
}
GPT_KEYS = ("model.data.train_ds.", "model.peft.")


def read_overrides(text: str) -> dict[str, Any]:
    """`key=value` pairs of a command line or of a file with one a line; `+` and `++` before a key are Hydra's.

    Raises `KinvecError` for text without any.
    """
    words = shlex.split(text.replace("\\\n", " "), comments=True)
    pairs = [word.lstrip("+").split("=", 1) for word in words if "=" in word and not word.startswith("-")]
    found = {key: parse_yaml(value) if value else None for key, value in pairs}
    if not found:
        raise KinvecError("there are no key=value overrides in it; give the arguments of a NeMo command")
    return {key: _number(value) for key, value in found.items()}


def _number(value: Any) -> Any:
    """YAML reads 1e-8 as text."""
    try:
        return float(value) if isinstance(value, str) and value[:1].isdigit() else value
    except ValueError:
        return value


def recipe_of(overrides: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """(settings of ours by dotted key, why each key that was not carried has no counterpart).

    What the overrides leave open is as NeMo's own configuration has it: that of the GPT embedding model where a key of
    its data or adapters is among them, else of the BERT embedding model.
    """
    settings: dict[str, Any] = dict(GPT_CODE if _is_gpt(overrides) else BERT_CODE)
    left = {key: "it is empty" for key, value in overrides.items() if value is None}
    for key, value in _resolved(overrides).items():
        if key in CARRIED:
            settings |= CARRIED[key](value)
        else:
            reasons = (why for pattern, why in WITHOUT.items() if fnmatchcase(key, pattern))
            left[key] = next(reasons, "nothing here corresponds to it")
    settings["trainer.min_lr"] = min(round(settings.pop("min_lr") / settings["trainer.lr"], 6), 1.0)
    if "lora.rank" in settings:
        settings.setdefault("lora.alpha", settings["lora.rank"])  # NeMo's default
    if "trainer.epochs" in settings:
        del settings["trainer.max_steps"]
        if "trainer.max_steps" in overrides:
            left["trainer.max_steps"] = "NeMo stops at whichever comes first; trainer.max_epochs is kept"
    if settings.get("model", "").endswith(".nemo"):
        left["restore_from_path"] = f"first: kinvec convert {settings['model']} model, then model=model"
    return settings, left


def _is_gpt(overrides: Mapping[str, Any]) -> bool:
    return any(key.startswith(GPT_KEYS) for key in overrides)


def _resolved(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The overrides that say something, over NeMo's own configuration."""
    given = {key: value for key, value in overrides.items() if value is not None}
    return (GPT_DEFAULTS if _is_gpt(overrides) else BERT_DEFAULTS) | given


def collapses(overrides: Mapping[str, Any]) -> list[str]:
    """Where the command's own learning rate does not do what it seems to: a sentence each.

    NeMo's cosine falls over max_steps − (warmup_steps + constant_steps) steps and is at its minimum from then on.
    """
    known, schedule = _resolved(overrides), "model.optim.sched."
    steps, warmup = int(known["trainer.max_steps"]), int(known[f"{schedule}warmup_steps"])
    constant = int(known.get(f"{schedule}constant_steps", 0 if _is_gpt(overrides) else 50_000))
    lowest, peak, found = known[f"{schedule}min_lr"], known["model.optim.lr"], []
    if warmup >= steps:
        found.append(
            f"warm-up takes {warmup:,} of {steps:,} steps, so the peak rate is never reached; lower trainer.warmup"
        )
    elif constant > 0 and lowest < peak:
        found.append(
            f"with constant_steps={constant:,} NeMo's rate is at its minimum, {lowest:g}, from step "
            f"{max(steps - constant, warmup) + 1:,} of {steps:,} on; here it falls over all steps"
        )
    if lowest >= peak:
        found.append(f"min_lr={lowest:g} is not below lr={peak:g}, so the rate does not fall; lower trainer.min_lr")
    return found


def write_recipe(
    settings: Mapping[str, Any], left: Mapping[str, str], warnings: Sequence[str], source: str, file: str
) -> str:
    """The recipe as YAML, with a comment for every warning and every key that was not carried."""
    needed = {"model": "path/to/model", "data.train": "path/to/train.json", "out": "runs/mine"}
    nested: dict[str, Any] = {}
    for key, value in (needed | dict(settings)).items():
        *path, last = key.split(".")
        place = nested
        for part in path:
            place = place.setdefault(part, {})
        place[last] = value
    head = [f"# From the NeMo overrides in {source}.", f"#   kinvec train {file}"]
    head += [f"# Warning: {text}" for text in warnings]
    notes = [f"#   {key}: {why}" for key, why in left.items()]
    notes = ["# Not carried over:", *notes] if notes else []
    comments = "".join(" ".join(line.splitlines()) + "\n" for line in (*head, *notes))  # none goes on as a setting
    return comments + yaml.safe_dump(nested, sort_keys=False, allow_unicode=True)
