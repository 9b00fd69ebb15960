"""A NeMo command becomes a recipe: the documented commands, every known key, and what cannot be carried."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from kinvec.contracts import KinvecError
from kinvec.formats.nemo_recipe import CARRIED, WITHOUT, collapses, read_overrides, recipe_of
from kinvec.recipe import load_recipe
from kinvec.verbs.init import init

BERT = """\
python megatron_bert_embedding_finetuning.py \\
    --config-path=${CONFIG_PATH} --config-name=${CONFIG_NAME} \\
    restore_from_path=intfloat/e5-large-unsupervised \\
    trainer.devices=1 trainer.max_steps=10000 trainer.val_check_interval=100 trainer.max_epochs=1 \\
    +trainer.num_sanity_val_steps=0 \\
    model.mcore_bert=True model.post_process=False model.global_batch_size=8 model.micro_batch_size=8 \\
    model.optim.lr=0.000005 model.optim.sched.min_lr=0.00000001 model.optim.sched.warmup_steps=100 \\
    model.encoder_seq_length=512 model.tokenizer.library="huggingface" \\
    model.tokenizer.type="intfloat/e5-large-unsupervised" \\
    model.data.data_train=train.json model.data.data_validation=val.json model.data.hard_negatives_to_train=4 \\
    exp_manager.explicit_log_dir=runs/bert exp_manager.create_wandb_logger=True exp_manager.resume_if_exists=True \\
    exp_manager.wandb_logger_kwargs.name=mine exp_manager.wandb_logger_kwargs.project=search
"""
GPT = """\
 python3 /NeMo/examples/nlp/information_retrieval/megatron_gpt_embedding_finetuning.py \\
    exp_manager.exp_dir="runs/gpt" \\
    model.global_batch_size=4 \\
    model.micro_batch_size=4 \\
    trainer.devices=1 \\
    trainer.num_nodes=1 \\
    trainer.max_steps=20 \\
    model.restore_from_path="my-decoder" \\
    model.peft.lora_tuning.adapter_dim=16 \\
    model.data.train_ds.file_names=["train.jsonl"]
"""


def test_the_documented_bert_command_is_the_shipped_recipe(tmp_path: Path) -> None:
    overrides = tmp_path / "overrides.txt"
    overrides.write_text(BERT)
    told = init(tmp_path / "mine.yaml", from_nemo=overrides)
    made = load_recipe(tmp_path / "mine.yaml").model_dump()
    shipped = load_recipe(
        "bert-retrieval",
        ["model=intfloat/e5-large-unsupervised", "data.train=train.json", "data.dev=val.json", "out=runs/bert",
         "trainer.trackers=[wandb]"],
    ).model_dump()  # fmt: skip
    assert made == shipped
    assert made["trainer"]["lr"] * made["trainer"]["min_lr"] == pytest.approx(1e-8)
    carried_or_told = set(told["left"]) | set(CARRIED)
    assert set(read_overrides(BERT)) <= carried_or_told
    text = (tmp_path / "mine.yaml").read_text()
    assert all(f"#   {key}: " in text for key in told["left"])
    assert told["left"]["model.micro_batch_size"].startswith("a batch need not fit into memory")
    assert told["left"]["trainer.max_steps"].startswith("NeMo stops at whichever comes first")
    collapse = "with constant_steps=50,000 NeMo's rate is at its minimum, 1e-08, from step 101 of 10,000 on"
    assert [text.partition(";")[0] for text in told["warnings"]] == [collapse] and f"# Warning: {collapse}" in text


def test_the_documented_gpt_command_is_the_shipped_recipe(tmp_path: Path) -> None:
    (tmp_path / "overrides.txt").write_text(GPT)
    told = init(tmp_path / "gpt.yaml", from_nemo=tmp_path / "overrides.txt")
    shipped = load_recipe(
        "gpt-embedding",
        ["model=my-decoder", "data.train=train.jsonl", "out=runs/gpt", "trainer.batch_size=4", "trainer.max_steps=20"],
    )
    assert load_recipe(tmp_path / "gpt.yaml") == shipped
    assert set(told["left"]) == {"model.micro_batch_size", "trainer.devices", "trainer.num_nodes"}
    peak = "warm-up takes 50 of 20 steps, so the peak rate is never reached; lower trainer.warmup"
    assert told["warnings"] == [peak]


@pytest.mark.parametrize(("overrides", "said"), [
    ("model.data.data_train=a.json trainer.max_steps=60000", ["from step 10,001 of 60,000 on"]),
    ("model.data.data_train=a.json model.optim.sched.constant_steps=0", []),
    ("model.data.data_train=a.json model.optim.sched.constant_steps=0 model.optim.lr=5e-6", ["is not below lr=5e-06"]),
    ("model.data.train_ds.file_names=a.jsonl", []),
    ("model.data.train_ds.file_names=a.jsonl model.optim.sched.constant_steps=100", ["from step 19,901 of 20,000 on"]),
])  # fmt: skip
def test_a_schedule_of_theirs_that_collapses_is_said(overrides: str, said: list[str]) -> None:
    found = collapses(read_overrides(overrides))
    assert len(found) == len(said) and all(part in text for part, text in zip(said, found, strict=True))
    settings, _ = recipe_of(read_overrides(overrides))
    assert 0 <= settings["trainer.min_lr"] <= 1


def test_what_saves_memory_and_which_checkpoints_are_kept_is_carried() -> None:
    more = "model.activations_checkpoint_granularity=full model.activations_checkpoint_method=uniform"
    kept = "exp_manager.checkpoint_callback_params.save_top_k"
    settings, left = recipe_of(read_overrides(f"{more} {kept}=5 model.megatron_amp_O2=True"))
    assert settings["trainer.gradient_checkpointing"] is True and settings["trainer.keep_best"] == 5
    assert "lora.base=bf16" in left["model.megatron_amp_O2"]
    assert left["model.activations_checkpoint_method"].startswith("all layers are checkpointed, or none")
    assert "trainer.keep_best" not in recipe_of(read_overrides(f"{kept}=-1"))[0]  # all of them, there


def test_other_settings_of_a_gpt_command_win_over_its_configurations(tmp_path: Path) -> None:
    more = "trainer.precision=bf16 model.use_all_possible_negatives=True model.optim.lr=2e-4 model.num_soft_negatives=3"
    (tmp_path / "overrides.txt").write_text(f"{GPT.rstrip()} {more} model.peft.lora_tuning.alpha=8 model.temperature=")
    told = init(tmp_path / "gpt.yaml", from_nemo=tmp_path / "overrides.txt")
    made = load_recipe(tmp_path / "gpt.yaml")
    assert (made.precision, made.trainer.lr, made.lora.rank, made.lora.alpha) == ("bf16", 2e-4, 16, 8)
    assert (made.objective.hard_negatives, made.objective.in_batch) == ("shared", True)
    assert made.objective.temperature == 0.02 and told["left"]["model.temperature"] == "it is empty"
    assert told["left"]["model.num_soft_negatives"] == "NeMo never reads it"


def test_every_embedding_key_of_nemos_configurations_is_carried_or_explained(shared_data: Path) -> None:
    """All keys of the two embedding configurations that concern training data, loss, optimiser and adapters."""
    facts = shared_data.parent / "facts" / "nemo-config-keys.md"
    if not facts.is_file():
        pytest.skip("the list of NeMo's keys is not at hand")
    known = set(re.findall(r"^\| `((?:model|trainer|exp_manager)\.[^`]+)` \|", facts.read_text("utf-8"), re.MULTILINE))
    assert set(CARRIED) - known <= {
        "restore_from_path", "model.label_smoothing", "model.data.data_prefix", "model.peft.lora_tuning.alpha",
    }  # fmt: skip
    settings, left = recipe_of(dict.fromkeys(sorted(known - set(CARRIED)), "x"))
    asked = [
        key for key in left if re.match(r"model\.(optim|softmax|temperature|global|data\.hard|num_soft|use_all)", key)
    ]
    assert asked and all(left[key] != "nothing here corresponds to it" for key in asked), asked


@pytest.mark.parametrize(("text", "said"), [
    ("python train.py --config-name=mine", "no key=value overrides"),
    ("model.data.train_ds.file_names=[a.jsonl,b.jsonl]", "2 files are named for data.train"),
])  # fmt: skip
def test_what_cannot_be_a_recipe_is_said(text: str, said: str) -> None:
    with pytest.raises(KinvecError, match=said):
        recipe_of(read_overrides(text))


def test_a_nemo_checkpoint_is_to_be_converted_first(tmp_path: Path, main: Callable[..., tuple[int, str]]) -> None:
    (tmp_path / "overrides.txt").write_text("restore_from_path=/models/e5.nemo model.optim.lr=1e-5 model.strange=7")
    code, told = main("init", str(tmp_path / "r.yaml"), "--from-nemo", str(tmp_path / "overrides.txt"))
    assert code == 0 and "kinvec convert /models/e5.nemo model" in told
    assert "not carried over: model.strange (nothing here corresponds to it)" in told
    assert WITHOUT["trainer.devices"]
