"""The fused head of every family under FSDP2, sharded as Transformers does it (one unit) and as accelerate does."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from test_head import FAMILIES, build, parts, step
from torch import Tensor, nn

from hf_unlearn.trainers.forward import ModelForward

LAYOUTS = ["whole", "tail", "put away"]


@pytest.fixture(autouse=True)
def one_process(tmp_path: Any) -> Any:
    if dist.is_initialized():
        pytest.skip("another test's process group is there")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def shard(model: Any, layout: str) -> None:
    """
    `"whole"`: layers and the root; `"tail"`: the last norm, the head and a tied embedding are a unit as well;
    `"put away"`: the same, and its weights are put away after its forward pass.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (1,))
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    body = base.base_model
    for block in body.h if hasattr(body, "h") else body.layers:
        fully_shard(block, mesh=mesh)
    if layout != "whole":
        norm = body.ln_f if hasattr(body, "ln_f") else body.norm
        embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
        tied = embedding.weight is getattr(head, "weight", None)
        if not tied:
            fully_shard(embedding, mesh=mesh)
        fully_shard(
            [norm, embedding, head] if tied else [norm, head], mesh=mesh, reshard_after_forward=layout == "put away"
        )
    fully_shard(model, mesh=mesh)


def whole(values: dict[str, Tensor]) -> dict[str, Any]:
    return {name: value.full_tensor() if hasattr(value, "full_tensor") else value for name, value in values.items()}


def compare(model: Any, layout: str, loss: str) -> Any:
    batches, reference = parts(), copy.deepcopy(model)
    want, wanted = step(model, ModelForward(copy.deepcopy(model), fused=False), batches, loss, reference)
    sharded = copy.deepcopy(model)
    forward = ModelForward(sharded)
    shard(sharded, layout)
    with torch.no_grad():  # an evaluation before the step leaves the root's weights gathered
        forward(sharded, batches)[0].log_probs()
    for _ in range(2):  # and a step leaves every unit as the next one expects it
        got, found = step(sharded, forward, batches, loss, reference)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        assert found.keys() == wanted.keys()
        scale = max(float(value.abs().max()) for value in wanted.values())
        for name, value in whole(found).items():
            torch.testing.assert_close(value, wanted[name], rtol=1e-4, atol=1e-5 * max(scale, 1.0), msg=name)
    return forward


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("loss", ["lmf", "npo"])
def test_loss_and_gradients_are_those_of_whole_logits(family: str, tied: bool, layout: str, loss: str) -> None:
    forward = compare(build(family, tied), layout, loss)
    assert type(forward.head.module) is not nn.Linear or layout == "whole"
    assert forward.head.linear is forward.head.module, "a linear head stays one when it is a unit of its own"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("loss", ["lmf", "npo", "undial"])
def test_an_adapter_on_the_head(layout: str, loss: str) -> None:
    model = get_peft_model(build("llama", False), LoraConfig(r=4, target_modules=["q_proj", "lm_head"]))
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_B" in name:
                value.normal_(0.0, 0.1)
    compare(model.eval(), layout, loss)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_unit_is_at_rest_after_a_head_that_is_called(layout: str) -> None:
    """A head that is no plain linear layer is called once more; a unit left in its forward pass is never sharded again."""

    class Doubled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2.0 * super().forward(input)

    model = build("llama", False)
    head = Doubled(32, 97, bias=False)
    head.weight = model.lm_head.weight
    model.lm_head = head
    compare(copy.deepcopy(model), layout, "lmf")
    forward = ModelForward(model)
    shard(model, layout)
    with torch.no_grad():
        forward(model, parts())[0].log_probs()
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()
    assert all(hasattr(parameter, "full_tensor") for parameter in model.parameters())
