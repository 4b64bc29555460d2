"""The command line: dispatch, errors in one line, datasets from files, training from YAML, launch configurations."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from hf_unlearn.cli.data_arguments import DataArguments, load_rows
from hf_unlearn.cli.main import ACCELERATE_CONFIGS, _launch_arguments, accelerate_config, main
from hf_unlearn.lab.models import tiny_config, tiny_model
from hf_unlearn.lab.tokenizer import train_tokenizer
from hf_unlearn.lab.world import make_world, world_data


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, and forget and retain rows as JSON lines in TOFU's folder layout."""
    folder = tmp_path_factory.mktemp("cli")
    data = world_data(make_world(0, num_authors=10, questions_per_author=4))
    tokenizer = train_tokenizer(data.texts(), 600)
    tokenizer.save_pretrained(folder / "model")
    tiny_model(tiny_config(tokenizer, hidden_size=32, num_layers=2, num_heads=2)).save_pretrained(folder / "model")
    (folder / "data").mkdir()
    for name, rows in (("forget", data.forget), ("retain", data.retain), ("other", data.retain.select(range(8)))):
        lines = [json.dumps({"question": row["question"], "answer": row["answer"]}) for row in rows]
        (folder / "data" / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


def common(workspace: Path, output: Path) -> list[str]:
    options = {
        "model_name_or_path": workspace / "model",
        "forget_dataset": workspace / "data",
        "forget_config": "forget",
        "output_dir": output,
        "use_cpu": True,
        "report_to": "none",
        "max_length": 64,
        "per_device_train_batch_size": 4,
        "gradient_checkpointing": False,
        "learning_rate": 1e-3,
        "disable_tqdm": True,
    }
    return [part for key, value in options.items() for part in (f"--{key}", str(value))]


def test_usage_lists_the_commands_and_unknown_ones_are_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "primal-dual" in capsys.readouterr().out
    assert main([]) == 2
    assert main(["primaldual"]) == 2
    assert "unknown command 'primaldual'; expected one of" in capsys.readouterr().err
    assert main(["--version"]) == 0


def test_env_names_versions_and_no_host(capsys: pytest.CaptureFixture[str]) -> None:
    import platform

    assert main(["env"]) == 0
    shown = capsys.readouterr().out
    assert "transformers" in shown
    assert "deepspeed" in shown
    assert platform.node() not in shown or not platform.node()


def test_a_process_of_a_group_leaves_it_at_the_end_and_not_where_others_may_wait(tmp_path: Path) -> None:
    """With the group's threads alive a process is now and then aborted while it ends."""
    from torch import distributed

    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    try:
        assert main(["report", str(tmp_path / "gone")]) != 0
        assert distributed.is_initialized()
        assert main(["env"]) == 0
        assert not distributed.is_initialized()
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()


def test_primal_dual_from_yaml_and_command_line(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    sets = {
        "retain": {"path": str(workspace / "data"), "config": "retain"},
        "other": {"path": str(workspace / "data" / "other.jsonl")},
    }
    recipe.write_text(
        yaml.safe_dump({"retain_datasets": sets, "retain_margin": {"retain": 5.0, "other": 4.0}, "max_steps": 100}),
        encoding="utf-8",
    )
    output = tmp_path / "out"
    arguments = ["primal-dual", "--config", str(recipe), *common(workspace, output), "--max_steps", "2"]
    assert (
        main(
            [
                *arguments,
                "--eval_strategy",
                "steps",
                "--save_strategy",
                "steps",
                "--save_steps",
                "2",
                "--eval_steps",
                "2",
            ]
        )
        == 0
    )
    state = json.loads((output / "unlearning_state.json").read_text())
    assert state["duals"]["names"] == ["other", "retain"]
    assert state["duals"]["updates"] == 2, "the command line's max_steps wins over the file's"
    assert (output / "model.safetensors").is_file()
    assert "satisfied" in capsys.readouterr().out
    card = (output / "README.md").read_text()
    assert "PrimalDualTrainer" in card
    assert str(tmp_path) not in card.replace(str(workspace), "")


def test_unlearn_with_lora_saves_an_adapter(workspace: Path, tmp_path: Path) -> None:
    retain = ["--retain_dataset", str(workspace / "data"), "--retain_config", "retain"]
    lora = ["--use_peft", "true", "--lora_r", "2", "--lora_target_modules", "q_proj", "v_proj"]
    arguments = ["unlearn", *common(workspace, tmp_path / "out"), *retain, *lora, "--max_steps", "1"]
    assert main([*arguments, "--forget_loss", "npo", "--save_strategy", "no"]) == 0
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_a_probe_of_its_own_serves_prism_with_lora(workspace: Path, tmp_path: Path) -> None:
    retain = ["--retain_dataset", str(workspace / "data"), "--retain_config", "retain", "--probe_min_accuracy", "0"]
    folder = tmp_path / "probe"
    probing = ["probe", *common(workspace, folder), *retain, "--probe_layers", "1", "--max_steps", "1"]
    assert main([*probing, "--save_strategy", "no"]) == 0
    names = {path.name for path in folder.iterdir()}
    assert {"probe.safetensors", "probe.json", "layers.md", "layers.png"} <= names
    assert "model.safetensors" not in names, "a probe unlearns nothing"
    lora = ["--use_peft", "true", "--lora_r", "2", "--lora_target_modules", "q_proj", "v_proj"]
    arguments = ["prism", *common(workspace, tmp_path / "out"), *retain, *lora, "--max_steps", "1"]
    assert main([*arguments, "--probe", str(folder), "--eval_strategy", "no", "--save_strategy", "no"]) == 0
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "out" / "probe" / "probe.json").is_file()
    assert main([*probing, "--probe", str(folder)]) == 1, "the probe command trains one"


def test_sft_trains_on_question_answer_rows(workspace: Path, tmp_path: Path) -> None:
    arguments = ["sft", "--model_name_or_path", str(workspace / "model"), "--output_dir", str(tmp_path / "out")]
    arguments += ["--dataset_name", str(workspace / "data"), "--dataset_config", "retain", "--max_steps", "1"]
    arguments += ["--use_cpu", "true", "--bf16", "false", "--report_to", "none", "--max_length", "64"]
    assert main([*arguments, "--save_strategy", "no", "--disable_tqdm", "true"]) == 0
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--retain_dataset", "./nowhere.jsonl"], "nowhere.jsonl does not exist"),
        (["--dual_lr", "-1"], "dual_lr is -1.0; expected a finite number above 0"),
        (["--forget_loss", "magic"], "invalid choice: 'magic'"),
        (["--forget_wheight", "2"], "forget_wheight"),
        (["--retain_datasets", "{broken"], "retain_datasets is not JSON"),
    ],
)
def test_user_errors_are_one_clear_line(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], extra: list[str], message: str
) -> None:
    arguments = ["primal-dual", *common(workspace, tmp_path / "out"), *extra]
    try:
        code = main(arguments)
    except SystemExit as stop:  # argparse's own way out
        code = int(stop.code or 0)
    assert code != 0
    shown = capsys.readouterr().err
    assert message in shown
    assert "Traceback" not in shown


def test_unknown_key_in_yaml_is_an_error(workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("dual_learning_rate: 1.0\n", encoding="utf-8")
    assert main(["primal-dual", "--config", str(recipe), *common(workspace, tmp_path / "out")]) == 1
    assert "dual_learning_rate" in capsys.readouterr().err


@pytest.mark.parametrize("name", ACCELERATE_CONFIGS)
def test_shipped_accelerate_configs_are_what_accelerate_reads(name: str) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(accelerate_config(name)))
    expected = {"single": "NO", "ddp": "MULTI_GPU", "fsdp2": "FSDP"}.get(name, "DEEPSPEED")
    assert str(config.distributed_type).split(".")[-1] == expected
    if name.startswith("zero"):
        assert config.deepspeed_config["zero_stage"] == int(name[-1])


def test_launcher_arguments_are_split_from_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert _launch_arguments(["--learning_rate", "1"]) is None
    split = _launch_arguments(["--a", "1", "--accelerate_config=zero2", "--num_processes", "4", "--b"])
    assert split is not None
    launcher, ours = split
    assert ours == ["--a", "1", "--b"]
    assert launcher[0] == "--config_file"
    assert launcher[1].endswith("zero2.yaml")
    assert launcher[2:] == ["--num_processes", "4"]
    with pytest.raises(ValueError, match="expected a file, or one of: single"):
        accelerate_config("zero9")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(ValueError, match="outer launcher"):
        _launch_arguments(["--accelerate_config", "ddp"])


def test_rows_from_files_and_folders(workspace: Path, tmp_path: Path) -> None:
    from datasets import Dataset

    assert len(load_rows(str(workspace / "data"), "forget")) == len(
        load_rows(str(workspace / "data" / "forget.jsonl"))
    )
    Dataset.from_dict({"text": ["a"]}).save_to_disk(str(tmp_path / "saved"))
    assert load_rows(str(tmp_path / "saved"))[0] == {"text": "a"}
    (tmp_path / "rows.xlsx").write_text("")
    with pytest.raises(ValueError, match="expected one of"):
        load_rows(str(tmp_path / "rows.xlsx"))
    with pytest.raises(ValueError, match=r"expected nothing\.json"):
        load_rows(str(workspace / "data"), "nothing")
    with pytest.raises(ValueError, match="both given"):
        DataArguments(forget_dataset="x", retain_dataset="y", retain_datasets={"z": {"path": "z"}})
    with pytest.raises(ValueError, match="expected"):
        DataArguments(forget_dataset="x", retain_datasets={"z": {"file": "z"}})


def test_chunks_cover_the_text_once(workspace: Path) -> None:
    from transformers import AutoTokenizer

    from hf_unlearn.data import chunk_text

    tokenizer = AutoTokenizer.from_pretrained(workspace / "model")
    texts = ["one two three four five six seven", "eight nine"]
    rows = chunk_text([{"text": text} for text in texts], tokenizer, 4)
    joined = [token for text in texts for token in (*tokenizer(text)["input_ids"], tokenizer.eos_token_id)]
    flat = [token for row in rows for token in row["input_ids"]]
    assert flat == joined[: len(flat)]
    assert len(joined) - len(flat) <= 1
    assert all(len(row["input_ids"]) <= 4 and row["labels"] == row["input_ids"] for row in rows)
    with pytest.raises(ValueError, match="needs the column 'text'"):
        chunk_text([{"words": "a"}], tokenizer, 4)


def test_a_signal_to_the_launcher_is_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import signal

    from accelerate.commands import launch
    from torch.distributed.elastic.multiprocessing.api import SignalException

    def stopped(arguments: object) -> None:
        raise SignalException("Process got signal: 15", signal.SIGTERM)

    monkeypatch.setattr(launch, "launch_command", stopped)
    assert main(["primal-dual", "--accelerate_config", "ddp"]) == 143
    assert "stopped by signal SIGTERM" in capsys.readouterr().err
