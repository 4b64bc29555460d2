"""The edit at the end of training on two processes: one plan, the weights of a single process, all or nobody."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import make_trainer, make_workspace, quiet
from datasets import load_from_disk
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from trajectories import engine_arguments, forget_engine, load_sharded
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from hf_unlearn.data import pad_rows, prepare_dataset
from hf_unlearn.editing import callback as module
from hf_unlearn.editing import merge as merging
from hf_unlearn.editing.agreement import EditError
from hf_unlearn.editing.callback import ConstrainedEditCallback
from hf_unlearn.editing.config import EditConfig
from hf_unlearn.editing.plan import EditPlan
from hf_unlearn.geometry import fsdp2_units

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]
HERE = Path(__file__).parent
WORDS = ["Tufwick", "Eskezar"]
MERGED = ("ddp", "zero3_sharded", "zero2", "fsdp2", "fsdp2_accelerate")
ADAPTED = ("ddp", "zero2", "fsdp2_accelerate")
EDITED = "model.layers.1.mlp.down_proj.weight"
TRAINING: dict[str, Any] = {"max_steps": 3, "optim": "sgd", "learning_rate": 1e-4, "forget_weight": 1e-3}


def make(folder: Path, case: str, output: Path, *others: Any, **changes: Any) -> tuple[Any, ConstrainedEditCallback]:
    callback = ConstrainedEditCallback(
        load_from_disk(str(folder / "forget")),
        EditConfig(words=WORDS, probability=1e-4, variants=0, generation_rounds=1, max_new_tokens=24),
        retain_dataset=load_from_disk(str(folder / "people")),
        every_n_steps=2,
    )

    class Lower(TrainerCallback):
        """At the end more is asked for, so that there is something left to edit."""

        def on_train_end(self, args, state, control, **kwargs):
            callback.config = replace(callback.config, probability=1e-5)

    trainer = make_trainer(folder, case, output, callbacks=[*others, Lower(), callback], **{**TRAINING, **changes})
    callback.trainer = trainer
    return trainer, callback


def whole(trainer: Any) -> dict[str, Tensor]:
    """All weights in full, and the float32 masters of the edited matrix; collective on sharded ones."""
    for unit in fsdp2_units(trainer.model):
        unit.reshard()
    full: dict[str, Tensor] = {}
    for name, parameter in trainer.model.named_parameters():
        if hasattr(parameter, "ds_id"):
            import deepspeed

            with deepspeed.zero.GatheredParameters([parameter]):
                full[name] = parameter.detach().clone()
        else:
            value = parameter.detach()
            full[name] = (value.full_tensor() if hasattr(value, "full_tensor") else value).clone().contiguous()
        if name == EDITED and (hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")):
            from deepspeed.utils import safe_get_full_fp32_param

            full["master"] = safe_get_full_fp32_param(parameter).clone()
    return full


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def broken(*args: Any, **kwargs: Any) -> Any:
    raise OSError("it is broken")


@contextmanager
def broken_merge() -> Iterator[None]:
    """Process 1 cannot write its share of the matrix."""
    hold = merging.hold

    def one(matrix: Any) -> Any:
        held = hold(matrix)
        tries = [0]

        def write(values: Tensor) -> None:
            tries[0] += 1
            if tries[0] == 1:
                raise OSError("it is broken")
            held.parts[0].write(values)

        return replace(held, parts=(replace(held.parts[0], write=write), *held.parts[1:]))

    if os.environ["RANK"] == "1":
        merging.hold = one
    try:
        yield
    finally:
        merging.hold = hold


@contextmanager
def replaced(owner: Any, name: str, rank: str) -> Iterator[None]:
    before = getattr(owner, name)
    if os.environ["RANK"] == rank:
        setattr(owner, name, broken)
    try:
        yield
    finally:
        setattr(owner, name, before)


class Watch(TrainerCallback):
    """Comes before the edit: the model as it is when training has ended."""

    def __init__(self) -> None:
        self.trainer: Any = None
        self.weights: dict[str, Tensor] = {}

    def on_train_end(self, args, state, control, **kwargs):
        self.weights = whole(self.trainer)


def run_merged(folder: Path, engine: str) -> None:
    """An edit in between, three failures at the end, and the edit after all."""
    output, rank, watch = folder / f"merged-{engine}", os.environ["RANK"], Watch()
    saves, save = [0], EditPlan.save

    def counted(self: EditPlan, where: Any) -> Any:
        saves[0] += 1
        return save(self, where)

    trainer, _ = make(
        folder,
        "lmf",
        output,
        watch,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        **engine_arguments(engine),
        **({"load": load_sharded} if engine == "fsdp2" else {}),
    )
    watch.trainer = trainer
    found: dict[str, Any] = {"errors": {}, "unchanged": {}}

    def end() -> None:
        trainer.callback_handler.on_train_end(trainer.args, trainer.state, trainer.control)

    def fails(name: str, doing: Any) -> None:
        try:
            doing()
            found["errors"][name] = "no error"
        except EditError as error:
            found["errors"][name] = str(error)
        found["unchanged"][name] = same(whole(trainer), watch.weights)

    setattr(EditPlan, "save", counted)  # noqa: B010

    def train() -> None:
        class Break(TrainerCallback):
            def on_train_end(self, args, state, control, **kwargs):
                stack.enter_context(broken_merge())

        trainer.callback_handler.callbacks.insert(0, Break())
        try:
            with ExitStack() as stack:
                trainer.train()
        finally:
            trainer.callback_handler.callbacks.pop(0)

    fails("applying", train)
    if engine in ("ddp", "zero2"):
        with replaced(module, "plan_edit", "1"):
            fails("planning", end)
    with replaced(EditPlan, "save", "0"):
        fails("saving", end)
    found["files"] = sorted(str(path.relative_to(output)) for path in output.rglob("edit_*"))
    end()
    setattr(EditPlan, "save", save)  # noqa: B010
    found["saves"] = saves[0]
    found["logged"] = [entry for entry in trainer.state.log_history if "edit/rank" in entry]
    save_file(whole(trainer), folder / f"merged-{engine}-{rank}.safetensors")
    trainer.save_model()
    (folder / f"merged-{engine}-{rank}.json").write_text(json.dumps(found), encoding="utf-8")
    forget_engine()


def run_adapted(folder: Path, engine: str) -> None:
    output, rank = folder / f"adapted-{engine}", os.environ["RANK"]
    arguments = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, **engine_arguments(engine)}
    trainer, _ = make(folder, "lora", output, **arguments)
    try:
        trainer.train()
        trainer.save_model()
        message = "no error"
    except ValueError as error:
        message = str(error)
    (folder / f"adapted-{engine}-{rank}.txt").write_text(message, encoding="utf-8")
    forget_engine()


def guarded(folder: Path, kind: str, engine: str) -> None:
    """What fails alike on both processes fails the tests of its engine only."""
    try:
        (run_merged if kind == "merged" else run_adapted)(folder, engine)
    except Exception:  # told by check_ran, which every test of the engine begins with
        (folder / f"{kind}-{engine}-{os.environ['RANK']}.failed").write_text(traceback.format_exc(), encoding="utf-8")
        forget_engine()


def check_ran(folder: Path, kind: str, engine: str) -> None:
    for path in folder.glob(f"{kind}-{engine}-?.failed"):
        pytest.fail(path.read_text(encoding="utf-8")[-4000:])


def make_learned(where: Path) -> Path:
    """The workspace of the other tests, with a model that knows its rows."""
    make_workspace(where)
    tokenizer = AutoTokenizer.from_pretrained(where / "model")
    model = AutoModelForCausalLM.from_pretrained(where / "model")
    rows = [row for name in ("forget", "people") for row in load_from_disk(str(where / name))]
    batch = pad_rows(list(prepare_dataset(rows, tokenizer, name="lab")), pad_token_id=tokenizer.pad_token_id)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(50):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(where / "model")
    return where


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes made of the model in one launch, and meanwhile what one did."""
    where = make_learned(tmp_path_factory.mktemp("edits"))
    environment = {
        **os.environ,
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]),
    }
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    process = subprocess.Popen(
        [*launcher, str(HERE / "test_edit_callback.py"), str(where)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        for case in ("lmf", "lora"):
            trainer, _ = make(where, case, where / f"{case}-one", per_device_train_batch_size=8)
            trainer.train()
            trainer.save_model()
            save_file(whole(trainer), where / f"{case}-one.safetensors")
        output, _ = process.communicate(timeout=540)
    finally:
        process.kill()
    assert process.returncode == 0, output[-8000:]
    return where


def ends(folder: Path, engine: str) -> list[tuple[dict[str, Any], dict[str, Tensor]]]:
    check_ran(folder, "merged", engine)
    return [
        (
            json.loads((folder / f"merged-{engine}-{rank}.json").read_text(encoding="utf-8")),
            load_file(folder / f"merged-{engine}-{rank}.safetensors"),
        )
        for rank in "01"
    ]


@pytest.mark.parametrize("engine", MERGED)
def test_all_processes_have_the_weights_of_a_single_one(folder: Path, engine: str) -> None:
    expected = load_file(folder / "lmf-one.safetensors")
    (_, first), (_, second) = ends(folder, engine)
    assert same(first, second)
    master = first.pop("master", None)
    assert (master is not None) == engine.startswith("zero")
    assert master is None or torch.equal(master, first[EDITED])
    assert first.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(first[name], value, rtol=0, atol=1e-5, msg=name)
    start = AutoModelForCausalLM.from_pretrained(folder / "model").get_parameter(EDITED)
    assert float((expected[EDITED] - start).norm()) > 0.1, "the edit is far above the tolerance"


@pytest.mark.parametrize("engine", MERGED)
def test_what_is_saved_is_edited(folder: Path, engine: str) -> None:
    _, weights = ends(folder, engine)[0]
    saved = AutoModelForCausalLM.from_pretrained(folder / f"merged-{engine}")
    for name, value in saved.named_parameters():
        if name in weights:
            assert torch.equal(value, weights[name]), name


@pytest.mark.parametrize("engine", MERGED)
def test_a_failure_on_one_process_leaves_none_edited_and_ends_all_alike(folder: Path, engine: str) -> None:
    (first, _), (second, _) = ends(folder, engine)
    assert first["errors"] == second["errors"]
    for found in (first, second):
        assert set(found["unchanged"].values()) == {True}
        for name, text in found["errors"].items():
            assert f"failed while {name}" in text
            rank = "0" if name == "saving" else "1"
            assert f"on process {rank} of 2: OSError: it is broken" in text
        assert found["files"] == [], "no plan claims an edit that is not there"


@pytest.mark.parametrize("engine", MERGED)
def test_files_are_written_by_one_process_and_logs_are_the_same(folder: Path, engine: str) -> None:
    (first, _), (second, _) = ends(folder, engine)
    assert (first["saves"], second["saves"]) == (1, 0)
    assert [entry["step"] for entry in first["logged"]] == [2, 3]
    for one, other in zip(first["logged"], second["logged"], strict=True):
        for entry in (one, other):
            entry.pop("edit/seconds")
        assert one == other
    plan = EditPlan.load(folder / f"merged-{engine}" / "edit")
    assert plan.measures["step"] == 3
    assert plan.measures["constrained"]["after"] <= 1.05e-5
    assert plan.measures["said"]["after"] == 0
    assert "## Constrained edit" in (folder / f"merged-{engine}" / "README.md").read_text(encoding="utf-8")


def edited(folder: Path, saved: Path) -> dict[str, Tensor]:
    model: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "model"), saved)
    model.load_adapter(f"{saved}/edit", adapter_name="edit")
    model.base_model.set_adapter([*model.active_adapters, "edit"])
    return dict(model.merge_and_unload().named_parameters())


@pytest.mark.parametrize("engine", ADAPTED)
def test_a_saved_adapter_comes_with_the_edit(folder: Path, engine: str) -> None:
    check_ran(folder, "adapted", engine)
    assert [(folder / f"adapted-{engine}-{rank}.txt").read_text() for rank in "01"] == ["no error"] * 2
    expected = edited(folder, folder / "lora-one")
    found = edited(folder, folder / f"adapted-{engine}")
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-5, msg=name)


def test_an_adapter_that_zero_3_could_not_save_is_refused(folder: Path) -> None:
    check_ran(folder, "adapted", "zero3_sharded")
    for rank in "01":
        assert "ZeRO-3 cannot save an adapter" in (folder / f"adapted-zero3_sharded-{rank}.txt").read_text()


if __name__ == "__main__":
    where = Path(sys.argv[1])
    torch.set_num_threads(1)
    quiet()
    for name in MERGED:
        guarded(where, "merged", name)
    for name in (*ADAPTED, "zero3_sharded"):
        guarded(where, "adapted", name)
