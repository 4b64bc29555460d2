"""`hf-unlearn`: one command for the quickstart, the trainers, the lab, and a bug report's environment."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

COMMANDS = {
    "quickstart": ("quickstart", "train, unlearn, evaluate and report on the embedded world, in minutes, offline"),
    "primal-dual": ("train", "forget under hard limits on the retain losses (PrimalDualTrainer)"),
    "prism": (
        "train",
        "forget smoothly, so that it is harder to undo (PrismTrainer): probe, SAM, decoupled gradients",
    ),
    "probe": ("probe", "train and save PRISM's probe alone, with its accuracy by layer"),
    "unlearn": ("train", "forget by a weighted sum of losses (UnlearningTrainer): GradDiff, NPO, SimNPO, ..."),
    "edit": ("edit", "make words unreachable by the smallest change of a weight matrix; --inspect PLAN shows one"),
    "eval": ("eval", "score a model on TOFU, MUSE, WMDP, MMLU or your own rows: results.json, a table, a report"),
    "attack": ("attack", "try to bring back what was forgotten: relearning, rounding, prompts, GCG; attacks.json"),
    "sft": ("sft", "fine-tune a target or a retain-only reference with TRL's SFTTrainer"),
    "report": ("report", "write page, table and plots from results.json, attacks.json and folders of evaluations"),
    "compare": ("compare", "put runs side by side: a table, and a page with forgetting against utility"),
    "lab": ("lab", "compare methods on a small model: hf-unlearn lab tofu --data FOLDER"),
    "env": ("env", "print versions and devices for a bug report"),
}
# Commands that may run in several processes. `edit` is not one: a single process loads, edits and writes the model;
# for sharded engines there is `constrained_edit` in Python.
_LAUNCHED = ("primal-dual", "prism", "probe", "unlearn", "sft", "eval")
_LAUNCHER_OPTIONS = (
    *("--num_processes", "--num_machines", "--machine_rank", "--main_process_ip", "--main_process_port"),
    *("--gpu_ids", "--rdzv_backend"),
)
ACCELERATE_CONFIGS = ("single", "ddp", "zero1", "zero2", "zero3", "fsdp2")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code. User errors are printed in one line, without a traceback."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0 if arguments else 2
    if arguments[0] in ("-V", "--version"):
        from .._version import __version__

        print(f"hf-unlearn {__version__}")
        return 0
    command, rest = arguments[0], arguments[1:]
    if command not in COMMANDS:
        print(f"hf-unlearn: unknown command {command!r}; expected one of: {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    try:
        if command in _LAUNCHED and (launch := _launch_arguments(rest)) is not None:
            return _launch(command, *launch)
        run: Callable[[str, list[str]], int] = import_module(f".{COMMANDS[command][0]}", __package__).run
        code = run(command, rest)
        _leave()
        return code
    except BrokenPipeError:  # the reader (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("hf-unlearn: interrupted", file=sys.stderr)
        return 130
    except (ValueError, TypeError, FileNotFoundError, FloatingPointError, OSError, ImportError) as error:
        if os.environ.get("HF_UNLEARN_DEBUG"):
            raise
        print(f"hf-unlearn {command}: error: {error}", file=sys.stderr)
        print("(set HF_UNLEARN_DEBUG=1 for the traceback)", file=sys.stderr)
        return 1


def _leave() -> None:
    """
    Takes the process group down, where there is one. A process that ends with the group's threads alive is now and
    then aborted while it ends ("terminate called without an active exception"), and the whole run counts as failed.
    """
    if "torch" not in sys.modules:
        return
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = ["usage: hf-unlearn COMMAND [--config FILE.yaml] [--accelerate_config NAME] [--field value ...]", ""]
    lines += [f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    lines += ["", "hf-unlearn COMMAND --help lists the fields of a command."]
    return "\n".join(lines)


def _launch_arguments(rest: list[str]) -> tuple[list[str], list[str]] | None:
    """Splits off what belongs to the launcher: (accelerate's arguments, ours); None: run in this process."""
    ours, launcher = [], []
    config: str | None = None
    position = 0
    while position < len(rest):
        name, _, value = rest[position].partition("=")
        if name == "--accelerate_config" or name in _LAUNCHER_OPTIONS:
            if not value:
                position += 1
                if position >= len(rest):
                    raise ValueError(f"{name} needs a value.")
                value = rest[position]
            if name == "--accelerate_config":
                config = value
            else:
                launcher += [name, value]
        else:
            ours.append(rest[position])
        position += 1
    if config is None and not launcher:
        return None
    if "LOCAL_RANK" in os.environ:
        raise ValueError(
            "--accelerate_config starts processes, but this is one of several already (torchrun, accelerate launch). "
            "Give the configuration to the outer launcher."
        )
    return ["--config_file", str(accelerate_config(config or "ddp")), *launcher], ours


def accelerate_config(name: str) -> Path:
    """
    The file of a shipped configuration, or the file that is named.

    Raises:
        ValueError: neither.
    """
    if name in ACCELERATE_CONFIGS:
        return Path(__file__).parent / "accelerate_configs" / f"{name}.yaml"
    if Path(name).is_file():
        return Path(name)
    raise ValueError(f"accelerate_config is {name!r}; expected a file, or one of: {', '.join(ACCELERATE_CONFIGS)}.")


def _launch(command: str, launcher: list[str], ours: list[str]) -> int:
    import subprocess

    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    parser = launch_command_parser()
    try:
        launch_command(parser.parse_args([*launcher, "--module", "hf_unlearn.cli.main", command, *ours]))
    except subprocess.CalledProcessError as error:  # one process
        return error.returncode
    except ChildFailedError as error:  # several: the ranks have printed their own errors
        rank, failure = error.get_first_failure()
        print(f"hf-unlearn {command}: rank {rank} failed first (exit code {failure.exitcode})", file=sys.stderr)
        return 1
    except SignalException as error:  # a scheduler stops the launcher; the ranks have saved what they could
        print(f"hf-unlearn {command}: stopped by signal {error.sigval.name}", file=sys.stderr)
        return 128 + error.sigval.value
    return 0


if __name__ == "__main__":
    sys.exit(main())
