"""Every recipe parses without unknown keys, names its source, and holds the values of that source."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from trl import ModelConfig, ScriptArguments, SFTConfig, TrlParser

from hf_unlearn.cli.data_arguments import DataArguments
from hf_unlearn.cli.edit_arguments import EditArguments
from hf_unlearn.data import TOFU_SPLITS
from hf_unlearn.editing import EditConfig
from hf_unlearn.trainers import PrimalDualConfig, PrismConfig, UnlearningConfig
from hf_unlearn.trainers.objective import ForgetObjective

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
FILES = sorted(path for path in RECIPES.glob("*/*.yaml") if path.parent.name != "accelerate")
PAPER = [path for path in FILES if path.parent.name == "primal_dual" and not path.stem.endswith("_lora")]
UNLEARNING = [path for path in FILES if path.parent.name in ("primal_dual", "prism", "unlearning")]
EDIT = [path for path in FILES if path.parent.name == "edit"]
PRISM = [path for path in FILES if path.parent.name == "prism"]

# probe layer, gamma, rho, lambda_r, epochs
PRISM_VALUES = {
    "muse_news_llama-2-7b": (24, 0.085, 0.011, 1.0, 10),
    "muse_books_llama-2-7b": (32, 0.05, 0.008, 2.5, 1),
    "wmdp_ministral-8b": (28, 0.05, 0.008, 1.0, 10),
    "wmdp_llama-2-7b": (28, 0.05, 0.008, 1.0, 10),
}
EDIT_MODELS = {
    "pcr_llama-3.1-8b-instruct": "meta-llama/Llama-3.1-8B-Instruct",
    "pcr_mistral-7b-instruct-v0.2": "mistralai/Mistral-7B-Instruct-v0.2",
    "pcr_gemma-2b-it": "google/gemma-2b-it",
}
TOFU_EPOCHS = {"llama-3.2-1b": 10, "llama-3.2-3b": 10, "llama-3.1-8b": 30, "gemma-7b-it": 20}
TOFU_RETAIN = {"forget01": "retain99", "forget05": "retain95", "forget10": "retain90"}
MUSE_EPS = {
    ("news", "llama-2-7b"): 1.5,
    ("books", "llama-2-7b"): 0.1,
    ("news", "llama-2-13b"): 0.8,
    ("books", "llama-2-13b"): 0.6,
}


def stem(path: Path) -> str:
    return path.stem


def keys(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def parse(path: Path) -> tuple[Any, ...]:
    configs = {
        "primal_dual": PrimalDualConfig,
        "prism": PrismConfig,
        "unlearning": UnlearningConfig,
        "sft": SFTConfig,
    }
    if path.parent.name == "edit":
        return TrlParser((EditArguments, EditConfig, ModelConfig)).parse_args_and_config(args=["--config", str(path)])
    config = configs[path.parent.name]
    data = ScriptArguments if config is SFTConfig else DataArguments
    # TRL turns bf16 on unless told otherwise, and Transformers refuses that on a machine without an accelerator
    off = ["--bf16", "false"] if config is SFTConfig else []
    return TrlParser((data, config, ModelConfig)).parse_args_and_config(args=["--config", str(path), *off])


def test_every_promised_recipe_is_there() -> None:
    tofu = {f"tofu_{forget}_{model}" for forget in TOFU_RETAIN for model in TOFU_EPOCHS}
    muse = {f"muse_{corpus}_{model}" for corpus, model in MUSE_EPS}
    assert {path.stem for path in PAPER} == tofu | muse
    assert {path.stem.split("_")[0] for path in FILES if path.parent.name == "unlearning"} == {
        "npo",
        "simnpo",
        "graddiff",
    }


@pytest.mark.parametrize("path", FILES, ids=stem)
def test_recipe_parses_without_unknown_keys(path: Path) -> None:
    data, args, model = parse(path)
    assert model.model_name_or_path
    if isinstance(data, EditArguments):
        assert data.output_dir.startswith("outputs/")
        assert data.dataset
        assert data.retain_dataset
        return
    assert args.output_dir.startswith("outputs/")
    assert data.dataset_name if isinstance(data, ScriptArguments) else data.forget_dataset and data.retain_dataset


@pytest.mark.parametrize("path", FILES, ids=stem)
def test_every_value_of_the_file_reaches_its_dataclass(path: Path) -> None:
    parsed = {name: value for part in parse(path) for name, value in vars(part).items()}
    for key, value in keys(path).items():
        if key == "lora_target_modules" and value == ["all-linear"]:
            value = "all-linear"  # TRL unpacks a list of one
        if key == "forget_target" and value == "none":
            value = None
        assert parsed[key] == value, f"{path.name}: {key} is {value!r} in the file and {parsed[key]!r} when parsed"


@pytest.mark.parametrize("path", FILES, ids=stem)
def test_recipe_names_its_source_and_what_is_unknown_in_its_first_comment(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    head = lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]
    text = " ".join(line.removeprefix("#").strip() for line in head)
    assert re.search(r"\barXiv \d{4}\.\d{5}\b", text), "no paper in the first comment"
    assert "Source" in text, "no source in the first comment"
    assert "Unknown" in text, "the first comment does not say what is unknown"
    assert max(len(line) for line in lines) <= 119


@pytest.mark.parametrize("path", FILES, ids=stem)
def test_every_key_belongs_to_exactly_one_dataclass(path: Path) -> None:
    parts = parse(path)
    for key in keys(path):
        owners = [type(part).__name__ for part in parts if key in {f.name for f in dataclasses.fields(part)}]
        assert len(owners) == 1, f"{key} belongs to {owners or 'nothing'}"
    assert len(re.findall(r"^\w+:", path.read_text(encoding="utf-8"), re.MULTILINE)) == len(keys(path)), "repeated key"


@pytest.mark.parametrize("path", UNLEARNING, ids=stem)
def test_forget_loss_takes_the_parameters_of_the_recipe(path: Path) -> None:
    _, args, _ = parse(path)
    ForgetObjective(name=args.forget_loss, kwargs=args.forget_loss_kwargs or {})


@pytest.mark.parametrize("path", PAPER, ids=stem)
def test_recipe_of_the_paper_is_the_papers_method(path: Path) -> None:
    _, args, model = parse(path)
    assert args.forget_loss == "lmf"
    assert args.forget_target is None
    assert args.normalize_forget_loss is False
    assert args.retain_loss == "nll"
    assert args.retain_margin is None
    assert args.retain_tolerance is None
    assert args.dual_update == "step"
    assert args.learning_rate == 1e-5
    assert not model.use_peft


@pytest.mark.parametrize("path", [path for path in PAPER if path.stem.startswith("tofu")], ids=stem)
def test_tofu_recipe_has_the_authors_values(path: Path) -> None:
    _, forget, name = path.stem.split("_", 2)
    data, args, model = parse(path)
    assert (args.dual_init, args.dual_lr, args.retain_eps, args.dual_warmup_epochs) == (100, 5, 0.3, 5)
    assert args.num_train_epochs == TOFU_EPOCHS[name]
    assert (data.forget_dataset, data.forget_config, data.forget_split) == ("locuslab/TOFU", forget, "train")
    assert (data.retain_dataset, data.retain_config, data.retain_split) == (
        "locuslab/TOFU",
        TOFU_RETAIN[forget],
        "train",
    )
    assert {data.forget_config, data.retain_config} <= set(TOFU_SPLITS)
    assert name in model.model_name_or_path.lower()
    one_epoch = 1 / args.num_train_epochs
    assert args.warmup_steps == pytest.approx(one_epoch, abs=1e-4)


@pytest.mark.parametrize("path", [path for path in PAPER if path.stem.startswith("muse")], ids=stem)
def test_muse_recipe_has_the_authors_values(path: Path) -> None:
    _, corpus, name = path.stem.split("_", 2)
    data, args, model = parse(path)
    assert (args.dual_init, args.dual_lr, args.dual_warmup_epochs, args.num_train_epochs) == (50, 1, 3, 10)
    assert args.retain_eps == MUSE_EPS[corpus, name]
    assert data.forget_dataset == data.retain_dataset == f"muse-bench/MUSE-{corpus.capitalize()}"
    assert (data.forget_config, data.forget_split) == ("raw", "forget")
    assert (data.retain_config, data.retain_split) == ("raw", "retain1")
    assert corpus.capitalize() in model.model_name_or_path
    assert ("13b" in model.model_name_or_path) == ("13b" in name)


def test_every_promised_prism_recipe_is_there() -> None:
    assert {path.stem for path in PRISM} == set(PRISM_VALUES)


@pytest.mark.parametrize("path", PRISM, ids=stem)
def test_prism_recipe_has_the_authors_values(path: Path) -> None:
    _, args, model = parse(path)
    layer, gamma, rho, weight, epochs = PRISM_VALUES[path.stem]
    assert (args.probe_layers, args.probe_weight, args.sam_rho) == ([layer], gamma, rho)
    assert (args.retain_weight, args.num_train_epochs) == (weight, epochs)
    assert not args.is_constrained, "the paper's lambda_r is fixed"
    assert (args.learning_rate, args.lr_scheduler_type, args.per_device_train_batch_size) == (1e-5, "constant", 4)
    assert (args.forget_loss, args.forget_loss_kwargs) == ("npo", {"beta": 0.1})
    probe = args.probe_config()
    assert (probe.radius, probe.adversarial_weight, probe.l1, probe.epochs, probe.learning_rate) == (
        *(1e-2, 0.4, 1e-4, 10),
        1e-4,
    )
    assert model.dtype == "float32", "bf16 weights round the move of SAM away"


def test_every_promised_edit_recipe_is_there_with_its_model() -> None:
    assert {path.stem: keys(path)["model_name_or_path"] for path in EDIT} == EDIT_MODELS


@pytest.mark.parametrize("path", EDIT, ids=stem)
def test_edit_recipe_names_what_the_paper_leaves_open_and_holds_no_word_list(path: Path) -> None:
    _, config, _ = parse(path)
    unknown = next(line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("# Unknown"))
    for name in ("eps", "layers", "token positions", "judge", "sample"):
        assert name in unknown
    assert (config.method, config.words, config.eps) == ("pcr", None, None)
    assert config.searches
    assert config.words_file, "users bring their own list"


def test_lora_recipe_uses_the_defaults_of_this_library() -> None:
    path = RECIPES / "primal_dual" / "tofu_forget10_llama-3.2-1b_lora.yaml"
    _, args, model = parse(path)
    default = PrimalDualConfig(output_dir=args.output_dir)
    assert model.use_peft
    for name in ("forget_loss", "forget_target", "normalize_forget_loss", "retain_margin", "dual_init", "dual_lr"):
        assert getattr(args, name) == getattr(default, name), f"{name} differs from the default"


def test_unknown_key_in_a_recipe_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("output_dir: out\nforget_dataset: rows.jsonl\nretain_epsilon: 0.3\n", encoding="utf-8")
    with pytest.raises(ValueError, match="retain_epsilon"):
        TrlParser((DataArguments, PrimalDualConfig, ModelConfig)).parse_args_and_config(args=["--config", str(file)])
