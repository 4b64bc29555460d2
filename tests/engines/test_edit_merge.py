"""An edit that is merged on two processes is the one of a single process, outlives a step, and comes off exactly."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from edit_merge import EDITED, ENGINES, LAYERS, PLANS, RATE, TYPES, ZERO, batch, load, scores, snapshot
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from hf_unlearn.editing.added import edits_in_force
from hf_unlearn.editing.apply import apply_edit
from hf_unlearn.editing.mlp import mlp_output
from hf_unlearn.editing.plan import EditPlan, LayerEdit, matrix_digest

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]
HERE = Path(__file__).parent
RUNS = [(engine, dtype) for engine in ENGINES for dtype in TYPES]
SCALES = {"large": 0.05, "small": 1e-6}


def make_plan(model: Any, scale: float) -> EditPlan:
    generator = torch.Generator().manual_seed(7)
    edits = []
    for layer in LAYERS:
        at = mlp_output(model, layer)
        factors = (
            torch.randn(3, at.in_features, generator=generator),
            torch.randn(at.out_features, 3, generator=generator),
        )
        edits.append(
            LayerEdit(
                layer=layer,
                path=at.path,
                lora_a=scale * factors[0],
                lora_b=factors[1],
                transposed=at.transposed,
                digest=matrix_digest(at),
            )
        )
    return EditPlan(method="pcr", edits=tuple(edits))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model and plans, and everything that two processes have found with them."""
    where = tmp_path_factory.mktemp("edits")
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=61, hidden_size=15, intermediate_size=25, num_hidden_layers=3, num_attention_heads=1, head_dim=16
    )  # odd, so that shards are unequal and padded
    model = AutoModelForCausalLM.from_config(shape).to(torch.bfloat16)  # the same numbers in both types
    model.save_pretrained(where / "model")
    for name, scale in SCALES.items():
        make_plan(model, scale).save(where / name)
    environment = {
        **os.environ,
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]),
    }
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launcher, str(HERE / "edit_merge.py"), str(where)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=540,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return where


def read(folder: Path, engine: str, dtype: str, rank: str = "0") -> tuple[dict[str, Any], dict[str, Tensor]]:
    where = folder / f"{engine}-{dtype}-{rank}"
    return json.loads(where.with_suffix(".json").read_text(encoding="utf-8")), load_file(
        where.with_suffix(".safetensors")
    )


def part(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key.removeprefix(f"{name}/"): value for key, value in tensors.items() if key.startswith(f"{name}/")}


def deltas(folder: Path, name: str) -> dict[int, Tensor]:
    return {edit.layer: edit.delta().float() for edit in EditPlan.load(folder / name).edits}


def share(moved: Tensor, delta: Tensor) -> float:
    return float((moved.double() * delta.double()).sum() / delta.double().square().sum())


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize(("engine", "dtype"), RUNS)
def test_merged_weights_are_those_of_one_process_to_the_last_bit(folder, engine: str, dtype: str, plan: str) -> None:
    model = load(folder, dtype)
    applied = apply_edit(model, EditPlan.load(folder / plan), merge=True)
    expected, outputs = snapshot(model), scores(model)
    for rank in "01":
        result, tensors = read(folder, engine, dtype, rank)
        merged = part(tensors, plan)
        for name, value in expected.items():
            assert merged[name].dtype == value.dtype
            assert torch.equal(merged[name], value), name
        torch.testing.assert_close(tensors[f"{plan}-scores"], outputs, rtol=1e-5, atol=1e-5)
        assert result["realised"][plan] == pytest.approx([applied.realised[layer] for layer in LAYERS], rel=1e-9)
    assert (applied.realised[1] < 0.3) == (dtype == "bfloat16" and plan == "small")


@pytest.mark.parametrize(("engine", "dtype"), RUNS)
def test_undo_and_a_failure_on_one_process_leave_every_bit_as_it_was(folder, engine: str, dtype: str) -> None:
    for rank in "01":
        result, _ = read(folder, engine, dtype, rank)
        assert {key: value for key, value in result.items() if "undone" in key and value is not True} == {}
        if engine != "ddp":
            expected = "rank 1 is broken" if rank == "1" else "Another process could not write its part"
            assert expected in result["failure"]


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize(("engine", "dtype"), RUNS)
def test_the_next_step_keeps_the_edit(folder, engine: str, dtype: str, plan: str) -> None:
    """Masters in float32 hold even what a 16-bit weight could not take, and the step is that of the edited model."""
    _, tensors = read(folder, engine, dtype)
    before, merged, stepped = (part(tensors, name) for name in ("before", plan, f"{plan}-stepped"))
    masters = engine in ZERO
    assert any(name.startswith("master.") for name in before) == masters
    for layer, name in zip(LAYERS, EDITED, strict=True):
        delta = deltas(folder, plan)[layer]
        if masters:
            old, new = before[f"master.{layer}"], merged[f"master.{layer}"]
            assert torch.equal(new, old + delta)
            assert torch.equal(stepped[name], stepped[f"master.{layer}"].to(TYPES[dtype]))
        assert not torch.equal(stepped[name], merged[name]), "the step is felt"
        if plan == "large":
            assert share(stepped[name].float() - before[name].float(), delta) == pytest.approx(1.0, abs=0.05)
    if masters and plan == "large":  # against the same step of plain PyTorch in float32, from the same masters
        model = load(folder, "float32")
        apply_edit(model, EditPlan.load(folder / plan), merge=True)
        model(**batch(), use_cache=False).loss.backward()
        for layer in LAYERS:
            weight = mlp_output(model, layer).module.weight
            assert isinstance(weight, Tensor)
            assert weight.grad is not None
            expected = weight.detach() - RATE * weight.grad
            tolerance = 1e-6 if dtype == "float32" else 5e-2 * RATE * float(weight.grad.abs().max())
            torch.testing.assert_close(stepped[f"master.{layer}"], expected, rtol=1e-6, atol=tolerance)


@pytest.mark.parametrize(("engine", "dtype"), RUNS)
def test_an_adapter_goes_on_the_model_inside_of_the_engine(folder, engine: str, dtype: str) -> None:
    model = load(folder, dtype)
    with edits_in_force(model, EditPlan.load(folder / "large").edits):
        expected = scores(model)
    for rank in "01":
        result, tensors = read(folder, engine, dtype, rank)
        tolerance = 1e-5 if dtype == "float32" else 2e-2
        torch.testing.assert_close(tensors["adapter-scores"], expected, rtol=tolerance, atol=tolerance)
        assert (result["adapter"] == "none") == (engine == "fsdp2")
        assert engine == "fsdp2" or "to the model inside of it, or pass merge=True" in result["adapter"]


def test_masters_that_cannot_be_reached_are_a_refusal(folder) -> None:
    """DeepSpeed's stage 0: in float32 it has none, and a step keeps the edit; in bfloat16 it would wipe it out."""
    sizes = [edit.norm() for edit in EditPlan.load(folder / "large").edits]
    for rank in "01":
        plain, half = (json.loads((folder / f"stage0-{dtype}-{rank}.json").read_text()) for dtype in TYPES)
        assert plain["message"] == "no error"
        assert plain["moved"] == pytest.approx(sizes, rel=0.05)
        assert "by DeepSpeed's stage 0, whose float32 masters would overwrite the edit" in half["message"]
        assert half["unchanged"]
