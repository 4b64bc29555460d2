"""What two processes do to a weight edit on every engine; started by torchrun, and imported by the test beside it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from hf_unlearn.editing import merge as merging
from hf_unlearn.editing.apply import apply_edit
from hf_unlearn.editing.mlp import mlp_output
from hf_unlearn.editing.plan import EditPlan, base_matrix

ZERO: dict[str, dict[str, Any]] = {
    "zero1": {"stage": 1},
    "zero2": {"stage": 2},
    "zero2_offload": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
    "zero3": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero3_persistent": {"stage": 3},
    "zero3_offload": {"stage": 3, "offload_optimizer": {"device": "cpu"}, "stage3_param_persistence_threshold": 0},
}
ENGINES = ("ddp", "fsdp2", *ZERO)
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PLANS = ("large", "small")  # the small one is lost in bfloat16
LAYERS = (1, 3)
EDITED = tuple(f"model.layers.{layer - 1}.mlp.down_proj.weight" for layer in LAYERS)
RATE = 1e-2


def batch() -> dict[str, Tensor]:
    ids = torch.randint(3, 61, (2, 9), generator=torch.Generator().manual_seed(4))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def load(folder: Path, dtype: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder / "model", dtype=TYPES[dtype]).eval()


def make(folder: Path, engine: str, dtype: str) -> tuple[Any, Callable[[], None]]:
    """The model as it is called on this engine, and a step of SGD."""
    model = load(folder, dtype)
    if engine in ZERO or engine == "stage0":
        import deepspeed

        config = {
            "train_micro_batch_size_per_gpu": 2,
            "zero_optimization": ZERO.get(engine, {"stage": 0}),
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "gradient_clipping": 0.0,  # by default DeepSpeed clips at 1.0
            "bf16": {"enabled": dtype == "bfloat16"},
        }
        made, *_ = deepspeed.initialize(
            model=model, optimizer=torch.optim.SGD(model.parameters(), lr=RATE), config=config
        )

        def step() -> None:
            made.backward(made(**batch(), use_cache=False).loss)
            made.step()

        return made, step
    made = shard(model) if engine == "fsdp2" else nn.parallel.DistributedDataParallel(model)
    return made, step_of(made)


def shard(model: Any) -> Any:
    from torch.distributed.fsdp import fully_shard

    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def step_of(model: Any) -> Callable[[], None]:
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)

    def step() -> None:
        model(**batch(), use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def whole(parameter: Any) -> Tensor:
    """A parameter in full; collective on sharded ones."""
    if hasattr(parameter, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()
    value = parameter.detach()
    return (value.full_tensor() if hasattr(value, "full_tensor") else value).clone()


def snapshot(model: Any) -> dict[str, Tensor]:
    """All weights in full, and the float32 masters of the edited ones."""
    merging.settle(model)
    inner = getattr(model, "module", model)
    found = {name: whole(value) for name, value in inner.named_parameters()}
    for layer in LAYERS:
        weight = base_matrix(mlp_output(model, layer).module).weight
        if hasattr(weight, "ds_id") or hasattr(weight, "_hp_mapping"):
            from deepspeed.utils import safe_get_full_fp32_param

            found[f"master.{layer}"] = safe_get_full_fp32_param(weight).clone()
    return found


@torch.no_grad()
def scores(model: Any) -> Tensor:
    return model(**{key: value for key, value in batch().items() if key != "labels"}, use_cache=False).logits.float()


def fail_on_one_rank(model: Any, plan: EditPlan) -> str:
    """Rank 1 cannot write its share of the second matrix."""
    hold, count = merging.hold, [0]

    def broken(matrix: Any) -> Any:
        held = hold(matrix)
        count[0] += 1
        if count[0] != 2 or os.environ["RANK"] != "1":
            return held
        tries = [0]

        def write(values: Tensor) -> None:
            tries[0] += 1
            if tries[0] == 1:
                raise OSError("rank 1 is broken")
            held.parts[0].write(values)

        return replace(held, parts=(replace(held.parts[0], write=write), *held.parts[1:]))

    merging.hold = broken
    try:
        apply_edit(model, plan, merge=True)
    except (OSError, RuntimeError) as error:
        return str(error)
    finally:
        merging.hold = hold
    return "no error"


def run(folder: Path, engine: str, dtype: str) -> None:
    """Everything on one engine; what was found goes to `<engine>-<dtype>-<rank>`."""
    model, step = make(folder, engine, dtype)
    result: dict[str, Any] = {"realised": {}}
    tensors: dict[str, Tensor] = {}

    def keep(name: str, found: dict[str, Tensor]) -> None:
        tensors.update({f"{name}/{key}": value.contiguous() for key, value in found.items()})

    before = snapshot(model)
    keep("before", before)
    plain = scores(model)  # FSDP2 leaves its root gathered, ZeRO-3 its persistent parameters
    plans = {name: EditPlan.load(folder / name) for name in PLANS}
    large = plans["large"]

    def unchanged() -> bool:
        now = snapshot(model)
        return now.keys() == before.keys() and all(torch.equal(now[key], value) for key, value in before.items())

    for name, plan in plans.items():
        applied = apply_edit(model, plan, merge=True)
        assert applied.model is model
        result["realised"][name] = [applied.realised[layer] for layer in LAYERS]
        keep(name, snapshot(model))
        tensors[f"{name}-scores"] = scores(model)  # after it whole copies are resident again, which undo has to see
        assert applied.undo() is model
        result[f"{name}-undone"] = torch.equal(scores(model), plain) and unchanged()
    if engine != "ddp":  # whose processes each have a model of their own
        result["failure"] = fail_on_one_rank(model, large)
        result["failure-undone"] = unchanged() and torch.equal(scores(model), plain)
    result["adapter"] = adapter_inside(model, large, tensors)
    result["adapter-undone"] = unchanged() and torch.equal(scores(model), plain)
    for name in PLANS:
        applied = apply_edit(model, plans[name], merge=True)
        step()
        keep(f"{name}-stepped", snapshot(model))
        applied.undo()
        now = snapshot(model)
        result[f"{name}-undone-after-a-step"] = all(
            torch.equal(now[key], before[key]) for key in before if key.startswith("master.") or key in EDITED
        )
    where = folder / f"{engine}-{dtype}-{os.environ['RANK']}"
    save_file(tensors, where.with_suffix(".safetensors"))
    where.with_suffix(".json").write_text(json.dumps(result), encoding="utf-8")


def adapter_inside(model: Any, plan: EditPlan, tensors: dict[str, Tensor]) -> str:
    """The adapter on the model inside of the engine, which is then called through it; what the engine itself says."""
    inner = getattr(model, "module", model)
    refused = "none"
    if model is not inner:
        try:
            apply_edit(model, plan)
        except ValueError as error:
            refused = str(error)
    applied = apply_edit(inner, plan)
    tensors["adapter-scores"] = scores(applied.model if model is inner else model)
    assert applied.undo() is inner
    return refused


def refuse_stage_0(folder: Path, dtype: str) -> None:
    """DeepSpeed without ZeRO, whose masters nothing leads to: what it says, and whether anything has moved."""
    model, step = make(folder, "stage0", dtype)
    before = snapshot(model)
    try:
        apply_edit(model, EditPlan.load(folder / "large"), merge=True)
        message = "no error"
    except ValueError as error:
        message = str(error)
    kept = all(torch.equal(value, before[name]) for name, value in snapshot(model).items())
    step()
    now = snapshot(model)
    moved = [float((now[name].float() - before[name].float()).norm()) for name in EDITED]
    found = {"message": message, "unchanged": kept, "moved": moved}
    (folder / f"stage0-{dtype}-{os.environ['RANK']}.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    where = Path(sys.argv[1])
    torch.set_num_threads(1)
    import deepspeed.comm

    deepspeed.init_distributed(dist_backend="gloo")
    for name in ENGINES:
        for kind in TYPES:
            run(where, name, kind)
            dist.barrier()
    for kind in TYPES:
        refuse_stage_0(where, kind)
    dist.destroy_process_group()
