"""The shipped accelerate configurations, launched for real: several processes, gloo, no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from safetensors.torch import load_file

from hf_unlearn.lab.models import tiny_config, tiny_model
from hf_unlearn.lab.tokenizer import train_tokenizer
from hf_unlearn.lab.world import make_world, world_data

pytestmark = pytest.mark.distributed
ENGINES = ("single", "ddp", "zero1", "zero2", "zero3")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("launch")
    data = world_data(make_world(0, num_authors=10, questions_per_author=4))
    tokenizer = train_tokenizer(data.texts(), 600)
    tokenizer.save_pretrained(folder / "model")
    tiny_model(tiny_config(tokenizer, hidden_size=32, num_layers=2, num_heads=2)).save_pretrained(folder / "model")
    for name, rows in (("forget", data.forget), ("retain", data.retain)):
        lines = [json.dumps({"question": row["question"], "answer": row["answer"]}) for row in rows]
        (folder / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


def launch(
    workspace: Path, engine: str, *, rows_a_process: int = 2, folder: str = "out"
) -> tuple[subprocess.CompletedProcess[str], Path]:
    output = workspace / f"{folder}-{engine}"
    options = {
        "accelerate_config": engine,
        "num_processes": 1 if engine == "single" else 2,
        "model_name_or_path": workspace / "model",
        "forget_dataset": workspace / "forget.jsonl",
        "retain_dataset": workspace / "retain.jsonl",
        "output_dir": output,
        "use_cpu": True,
        **({} if engine == "single" else {"ddp_backend": "gloo"}),
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "per_device_train_batch_size": rows_a_process,
        "max_steps": 3,
        "learning_rate": 1e-3,
        "forget_target": 6.6,
        "dual_warmup_steps": 1,
        "retain_margin": 1.0,
        "eval_strategy": "steps",
        "save_strategy": "steps",
        "eval_steps": 3,
        "save_steps": 3,
        "optim": "adamw_torch",
    }
    arguments = [part for key, value in options.items() for part in (f"--{key}", str(value))]
    result = subprocess.run(
        [sys.executable, "-m", "hf_unlearn.cli.main", "primal-dual", *arguments],
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
    )
    return result, output


def test_every_engine_launches_and_ends_at_the_same_weights(workspace: Path) -> None:
    if find_spec("deepspeed") is None:
        pytest.fail("deepspeed is not installed; it belongs to the development set-up: pip install -e .[dev]")
    weights, states = {}, {}
    for engine in ENGINES:
        result, output = launch(workspace, engine, rows_a_process=4 if engine == "single" else 2)
        assert result.returncode == 0, f"{engine}: {result.stderr[-3000:]}"
        assert result.stdout.count("Model, card and state:") == 1, "only the first process reports"
        weights[engine] = load_file(output / "model.safetensors")
        states[engine] = json.loads((output / "unlearning_state.json").read_text())
        assert states[engine]["duals"]["updates"] == 3
    for engine in ENGINES[1:]:
        extra = weights[engine].keys() - weights["single"].keys()
        assert extra <= {"lm_head.weight"}, "ZeRO-3 gathers tied weights by both of their names"
        worst = max(float((weights[engine][key] - value).abs().max()) for key, value in weights["single"].items())
        assert worst < 1e-5, f"{engine} differs from one process by {worst}"
        assert states[engine]["duals"]["multipliers"] == pytest.approx(
            states["single"]["duals"]["multipliers"], abs=1e-5
        )


def test_a_failing_launch_says_why_and_has_no_success_code(workspace: Path) -> None:
    result, output = launch(workspace, "ddp", rows_a_process=0, folder="failed")
    assert result.returncode != 0
    assert "rank 0 failed first" in result.stderr or "rank 1 failed first" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (output / "model.safetensors").exists()
