"""What two processes see of an ascent that ends in every way, on every engine that shards; started by torchrun."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hf_unlearn.geometry import Fsdp2Space, ParameterSpace, ZeroSpace, ascended

ZERO: dict[str, dict[str, Any]] = {
    "zero1": {"stage": 1},
    "zero2": {"stage": 2},
    "zero3": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero3_persistent": {"stage": 3},  # by default parameters as small as these stay whole on every rank
}
ENGINES = ("fsdp2", *ZERO)
RHO = 0.3


class Boom(Exception):
    pass


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 7), nn.Linear(7, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Net(nn.Module):
    """Odd sizes, so that shards are unequal and padded; the head and a frozen layer belong to no block."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(3, 5).requires_grad_(False)
        self.first = nn.Linear(5, 5)
        self.blocks = nn.ModuleList(Block(5) for _ in range(3))
        self.head = nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self.frozen(x))
        for block in self.blocks:
            x = block(x)
        return self.head(x).square().mean()


def make(engine: str) -> tuple[Any, Net, ParameterSpace]:
    """The model as it is called on this engine, the model inside, and its space."""
    torch.manual_seed(0)
    model = Net()
    if engine == "fsdp2":
        from torch.distributed.fsdp import fully_shard

        for block in model.blocks:
            fully_shard(block)
        fully_shard(model)
        return model, model, Fsdp2Space(model)
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": ZERO[engine],
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": 0.0,
    }
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    made, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.SGD(trained, lr=0.1), config=config)
    return made, model, ZeroSpace(made)


def whole(model: nn.Module) -> dict[str, Tensor]:
    """All weights in full, collective on sharded ones, and DeepSpeed's float32 masters."""
    found = {}
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "ds_id"):
            import deepspeed

            with deepspeed.zero.GatheredParameters([parameter]):
                found[name] = parameter.detach().clone()
        else:
            value: Any = parameter.detach()
            found[name] = (value.full_tensor() if hasattr(value, "full_tensor") else value).clone()
        if parameter.requires_grad and (hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")):
            from deepspeed.utils import safe_get_full_fp32_param

            found[f"{name} (master)"] = safe_get_full_fp32_param(parameter).clone()
    return found


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    """The names of what differs in at least one bit."""
    assert one.keys() == other.keys()
    return [name for name, value in one.items() if not torch.equal(value, other[name])]


def fail(error: type[BaseException], *_: Any) -> None:
    raise error("in the middle")


def broken(space: ParameterSpace, loss: Callable[[], Tensor], model: Net) -> None:
    """A gradient whose forward pass is broken in the second block, on all ranks."""
    handle = model.blocks[1].register_forward_hook(partial(fail, Boom))
    try:
        space.gradient([loss])
    finally:
        handle.remove()


# How the context ends, and the error that comes out of it; in this order on one engine.
ENDS: dict[str, type[BaseException] | None] = {
    "normal": None,
    "error": RuntimeError,
    "interrupt": KeyboardInterrupt,
    "forward": Boom,
}


def run(engine: str) -> dict[str, dict[str, Any]]:
    """What this rank has seen, for each end."""
    wrapped, model, space = make(engine)
    generator = torch.Generator().manual_seed(10 + dist.get_rank())
    batch = torch.randn(4, 3, generator=generator)

    def loss() -> Tensor:
        return wrapped(batch)

    def value() -> float:
        with torch.no_grad():
            return float(loss())

    direction: list[Any] = space.gradient([loss])  # every parameter has one
    space.weights()  # FSDP2 shards again what a pass without gradient leaves gathered; so it does below
    before = whole(model)
    seen: dict[str, dict[str, Any]] = {}
    for end, error in ENDS.items():
        now = seen[end] = {"before": value(), "raised": None}
        try:
            with ascended(space, direction, RHO):
                now["inside"] = value()
                space.gradient([loss])  # SAM's, after which something happens
                if end == "forward":
                    broken(space, loss, model)
                elif error is not None:
                    fail(error)
        except BaseException as raised:
            if type(raised) is not error:
                raise
            now["raised"] = type(raised).__name__
        now["after"] = value()
        space.weights()
        now["changed"] = differing(before, whole(model))
        again: list[Any] = space.gradient([loss])
        now["same_gradient"] = all(map(torch.equal, direction, again))
    return seen


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    for engine in ENGINES:
        try:
            result: dict[str, Any] = run(engine)
        except Exception:  # whatever it is: the test shows it, and the other engines are run all the same
            result = {"failed": traceback.format_exc()}
        where = Path(sys.argv[1]) / f"{engine}-{os.environ['RANK']}.json"
        where.write_text(json.dumps(result), encoding="utf-8")
    dist.destroy_process_group()
