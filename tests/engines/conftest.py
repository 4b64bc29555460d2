"""One launch of two processes for all tests of this folder, and the runs of one process they are compared with."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import CASES, make_trainer, make_workspace, quiet, report
from restarts import ARGUMENTS, Terminate
from safetensors.torch import load_file

from hf_unlearn.trainers.preemption import Preempted

HERE = Path(__file__).parent


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Sums of matrices this small then always run in one order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    quiet()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workspace(tmp_path_factory.mktemp("engines"))


def start(folder: Path, *what: str) -> subprocess.Popen[str]:
    """Two gloo processes under torchrun."""
    environment = {
        **os.environ,
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]),
    }
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return subprocess.Popen(
        [*launcher, str(HERE / "worker.py"), str(folder), *what],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


class Ends:
    """What the runs ended with, read from the files they wrote."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def result(self, name: str) -> dict[str, Any]:
        return json.loads((self.folder / f"{name}.json").read_text(encoding="utf-8"))

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        return load_file(self.folder / f"{name}.safetensors")

    def text(self, name: str) -> str:
        return (self.folder / name).read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def ends(workspace: Path) -> Ends:
    """Everything has run: two processes in one launch, and meanwhile the runs of one process."""
    begun = make_trainer(workspace, "lmf", workspace / "begun-by-one", callbacks=[Terminate(3)], **ARGUMENTS)
    with pytest.raises(Preempted):
        begun.train()
    shutil.copytree(workspace / "begun-by-one", workspace / "stopped-one")
    process = start(workspace, "all")
    try:
        layouts = {"plain": {}, "accumulated": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}}
        for case in CASES:
            for layout, arguments in layouts.items():
                trainer = make_trainer(workspace, case, workspace / "out-of-one", **arguments)
                trainer.train()
                report(trainer, workspace / f"{case}-{layout}-0")
        whole = make_trainer(workspace, "lmf", workspace / "whole-one", **ARGUMENTS)
        whole.train()
        report(whole, workspace / "whole-one-0")
        output, _ = process.communicate(timeout=540)
    finally:
        process.kill()
    assert process.returncode == 0, output[-6000:]
    return Ends(workspace)
