"""The files that start several processes: what accelerate reads of them, and what the scripts for SLURM do."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from torch.distributed.run import get_args_parser
from trl import ModelConfig, TrlParser

from hf_unlearn.cli.data_arguments import DataArguments
from hf_unlearn.cli.main import _LAUNCHER_OPTIONS, COMMANDS, accelerate_config
from hf_unlearn.trainers import PrimalDualConfig

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / "recipes" / "accelerate").glob("*.yaml"))
SCRIPTS = sorted((ROOT / "recipes" / "slurm").glob("*.sh"))
TYPES = {"ddp": "MULTI_GPU", "zero3": "DEEPSPEED", "fsdp2": "FSDP"}
OF_A_NODE = {"num_machines", "num_processes", "main_process_port"}


def stem(path: Path) -> str:
    return path.stem


def keys(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


# ---- configurations of accelerate ----------------------------------------------------------------------------------------


def test_every_engine_has_a_file_for_one_node_and_for_two() -> None:
    assert {path.stem for path in CONFIGS} == {f"{engine}_{nodes}x8" for engine in TYPES for nodes in (1, 2)}


@pytest.mark.parametrize("path", CONFIGS, ids=stem)
def test_accelerate_reads_the_engine_and_the_number_of_processes(path: Path) -> None:
    engine, nodes = path.stem.split("_")
    config = load_config_from_file(str(path))
    assert str(config.distributed_type).split(".")[-1] == TYPES[engine]
    assert (config.num_machines, config.num_processes) == (int(nodes[0]), 8 * int(nodes[0]))
    assert max(map(len, path.read_text(encoding="utf-8").splitlines())) <= 119


@pytest.mark.parametrize("path", CONFIGS, ids=stem)
def test_files_differ_from_the_shipped_ones_only_in_the_number_of_nodes(path: Path) -> None:
    engine, nodes = path.stem.split("_")
    ours, shipped = keys(path), keys(accelerate_config(engine))
    assert ours.keys() - shipped.keys() <= OF_A_NODE
    changed = {key for key in shipped if ours[key] != shipped[key]}
    assert changed == (set() if nodes == "1x8" else OF_A_NODE - {"main_process_port"})


@pytest.mark.parametrize("path", CONFIGS, ids=stem)
def test_what_a_node_adds_on_its_command_line_wins_over_the_file(path: Path) -> None:
    added = {"--num_machines": "4", "--num_processes": "32", "--machine_rank": "3", "--main_process_ip": "head"}
    assert added.keys() <= set(_LAUNCHER_OPTIONS), "hf-unlearn passes them on"
    options = [part for pair in added.items() for part in pair]
    arguments = launch_command_parser().parse_args(["--config_file", str(path), *options, "--module", "some.module"])
    arguments, _, _ = _validate_launch_command(arguments)
    assert (arguments.num_machines, arguments.num_processes, arguments.machine_rank) == (4, 32, 3)
    assert arguments.main_process_ip == "head"
    engine = path.stem.split("_")[0]
    chosen = {"ddp": arguments.multi_gpu, "zero3": arguments.use_deepspeed, "fsdp2": arguments.use_fsdp}
    assert [name for name, on in chosen.items() if on] == [engine]


# ---- scripts for SLURM -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS, ids=stem)
def test_bash_accepts_the_script_and_the_command_that_it_runs_on_each_node(script: Path) -> None:
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", str(script)], check=True)
    inner = re.search(r"^on_each_node='$(.+?)^'$", script.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert inner is not None
    subprocess.run(["bash", "-n", "-c", inner[1]], check=True)


def test_the_scripts_differ_in_their_launcher_only() -> None:
    """SLURM runs a copy of a script, and users copy one, so what they share stands in both instead of a third file."""
    shared = []
    for script in SCRIPTS:
        head, rest = script.read_text(encoding="utf-8").split("    setsid ")
        lines = [line for line in head.splitlines() if "ENGINE" not in line and script.name not in line]
        shared.append(
            (lines[lines.index("#SBATCH --job-name=primal-dual") :], rest[rest.index(" &\n    launcher=$!") :])
        )
    assert len(shared) == 2
    assert shared[0] == shared[1]


def known_options(parser: Any) -> set[str]:
    return {option for action in parser._actions for option in action.option_strings}


@pytest.mark.parametrize("script", SCRIPTS, ids=stem)
def test_every_option_in_the_script_is_one_that_its_program_has(script: Path) -> None:
    text = re.sub(r"^#.*$", "", script.read_text(encoding="utf-8"), flags=re.MULTILINE)
    launcher = get_args_parser() if script.stem.endswith("torchrun") else launch_command_parser()
    fields = known_options(TrlParser((DataArguments, PrimalDualConfig, ModelConfig))) | {"--config"}
    launch, ours = text.split(" primal-dual ", 1)
    launch, ours = launch[launch.index("setsid") :], ours + text[: text.index("on_each_node")]
    found = {"launcher": re.findall(r"(?<!\S)--?[a-z]\w*", launch), "ours": re.findall(r"--[a-z_]+", ours)}
    assert set(found["launcher"]) <= known_options(launcher) | {"--module"}
    assert len(found["launcher"]) >= 5
    srun = {"--kill"}  # of --kill-on-bad-exit
    assert {"--config", "--output_dir", "--resume_from_checkpoint"} <= set(found["ours"]) <= fields | srun
    assert "hf_unlearn.cli.main primal-dual" in text
    assert "primal-dual" in COMMANDS
    for name in re.findall(r"recipes/[\w./-]+", script.read_text(encoding="utf-8")):
        assert (ROOT / name).is_file(), f"{script.name} names {name}, which is not there"


# Stands for torchrun and for accelerate: a launcher that ignores SIGTERM and a worker that saves when it gets it.
LAUNCHER = r"""#!/bin/bash
echo "$*" >> "$CALLS/launched"
worker() {
    trap 'mkdir -p "$OUTPUT/checkpoint-3"; touch "$OUTPUT/checkpoint-3/unlearning_state.json"; exit 0' TERM
    case "$ROLE" in
        finish) mkdir -p "$OUTPUT"; touch "$OUTPUT/unlearning_state.json" ;;
        fail) exit 1 ;;
        wait) touch "$CALLS/ready"; for _ in $(seq 1000); do sleep 0.02; done; exit 2 ;;
    esac
}
trap '' TERM
(trap - TERM; worker) &
wait $!
"""
# Stands for srun: one node; the signal goes to the task, as SLURM sends it.
SRUN = r"""#!/bin/bash
shift
"$@" &
task=$!
if [[ $ROLE == wait ]]; then
    for _ in $(seq 1000); do [[ -e $CALLS/ready ]] && break; sleep 0.02; done
    kill -TERM "$task"
fi
wait "$task"
"""
SCONTROL = r"""#!/bin/bash
echo "$*" >> "$CALLS/scontrol"
[[ $1 == show ]] && echo node-a && echo node-b
exit 0
"""


@pytest.fixture
def cluster(tmp_path: Path) -> Any:
    """Runs a script with stand-ins for the programs of a cluster: `(exit code, calls by program)`."""
    programs = {"torchrun": LAUNCHER, "accelerate": LAUNCHER, "srun": SRUN, "scontrol": SCONTROL}
    (tmp_path / "bin").mkdir()
    for name, text in programs.items():
        (tmp_path / "bin" / name).write_text(text, encoding="utf-8")
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "calls").mkdir()
    output = tmp_path / "out"

    def run(script: Path, role: str) -> tuple[int, dict[str, str]]:
        for file in (tmp_path / "calls").iterdir():
            file.unlink()
        environment = {
            "PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "CALLS": str(tmp_path / "calls"),
            "ROLE": role,
            "OUTPUT": str(output),
            "SLURM_JOB_ID": "123456",
            "SLURM_JOB_NODELIST": "node-[a-b]",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_GPUS_ON_NODE": "8",
            "SLURM_NODEID": "1",
        }
        command = ["bash", str(script), "recipe.yaml", "--learning_rate", "1e-5"]
        result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60)
        calls = {file.name: file.read_text(encoding="utf-8") for file in (tmp_path / "calls").iterdir()}
        return result.returncode, calls

    return run, output


@pytest.mark.parametrize("script", SCRIPTS, ids=stem)
def test_a_stopped_job_queues_itself_again_resumes_and_ends(cluster: Any, script: Path) -> None:
    run, output = cluster
    code, calls = run(script, "wait")
    assert code == 0, "the workers got the signal, saved and ended with 0, and the launcher with them"
    assert calls["scontrol"].splitlines()[-1] == "requeue 123456"
    assert "--resume_from_checkpoint" not in calls["launched"]
    for part in ("node-a", "23456", f"primal-dual --config recipe.yaml --output_dir {output}", "--learning_rate 1e-5"):
        assert part in calls["launched"]
    code, calls = run(script, "finish")
    assert code == 0
    assert "--resume_from_checkpoint true --learning_rate 1e-5" in calls["launched"]
    assert "requeue" not in calls["scontrol"]
    code, calls = run(script, "finish")
    assert (code, calls) == (0, {}), "a finished run is not begun again"


@pytest.mark.parametrize("script", SCRIPTS, ids=stem)
def test_a_job_that_fails_is_not_queued_again(cluster: Any, script: Path) -> None:
    run, output = cluster
    (output / "checkpoint-2").mkdir(parents=True)  # half-written: not one to resume from
    code, calls = run(script, "fail")
    assert code != 0
    assert "requeue" not in calls["scontrol"]
    assert "--resume_from_checkpoint" not in calls["launched"]
