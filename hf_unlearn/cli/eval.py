"""`hf-unlearn eval`: a benchmark on a model, on one process or many; writes the record, and for TOFU a report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .eval_arguments import CHOICES, EvalArguments, check_request, is_adapter, model_label, prepare_output
from .eval_data import EvalData, load_data

if TYPE_CHECKING:
    from ..evaluation.record import Evaluation
    from ..evaluation.tofu_files import TofuEvaluation


def run(command: str, arguments: list[str]) -> int:
    """Parses, checks, loads, evaluates, writes, and prints what was found; returns the exit code."""
    from trl import ModelConfig, TrlParser

    parser = TrlParser((EvalArguments, ModelConfig), prog="hf-unlearn eval")
    given, model_args = parser.parse_args_and_config(args=arguments)
    check_request(given, model_args)
    from ..progress import quiet_libraries

    quiet_libraries()
    data = load_data(given)
    label = model_label(given, model_args.model_name_or_path)
    folder = prepare_output(given, label)
    import torch
    import transformers
    from accelerate import PartialState

    processes = PartialState(cpu=not torch.accelerator.is_available())
    if not processes.is_main_process:
        transformers.logging.disable_progress_bar()
    model, tokenizer = load_model(given, model_args, processes.device)
    evaluation, tofu = _evaluate(given, data, model, tokenizer, label)
    if processes.is_main_process:
        from .eval_output import print_evaluation, write_report_files, write_table

        written = write_table(folder, evaluation) if tofu is None else write_report_files(given, data, tofu)
        print_evaluation(evaluation, others(data), folder, written)
    return 0


def _evaluate(
    given: EvalArguments, data: EvalData, model: Any, tokenizer: Any, label: str
) -> tuple[Evaluation, TofuEvaluation | None]:
    """What the benchmark says of the model; for TOFU, and rows with its parts, with the scores of single rows."""
    common: dict[str, Any] = {
        "model_name": label,
        "batch_size": given.batch_size,
        "output_dir": Path(given.output_dir).expanduser(),
    }
    shared: dict[str, Any] = {**common, "description": given.benchmark}
    lengths: dict[str, Any] = {
        name: getattr(given, name) for name in ("max_length", "max_new_tokens") if getattr(given, name) is not None
    }
    settings: dict[str, Any] = {"dataset": given.data or ""}
    if given.benchmark == "muse":
        from ..evaluation.muse import run_muse

        assert data.muse is not None
        reference: Any = data.reference_evaluation
        how = {**lengths, **shared, "limit": given.limit, "settings": settings}
        return run_muse(model, tokenizer, data.muse, reference=reference, **how), None
    if given.benchmark in CHOICES:
        return _choices(given, data, model, tokenizer, common, {**shared, "settings": settings}), None
    if given.benchmark == "tofu":
        from ..data.tofu import TOFU_HUB_ID
        from ..evaluation.tofu import run_tofu

        found = run_tofu(
            model,
            tokenizer,
            forget=data.parts["forget"],
            retain=data.parts["retain"],
            general={name: part for name, part in data.parts.items() if name not in ("forget", "retain")},
            holdout=data.holdout,
            reference=data.reference,
            limits=given.limit,
            generate=given.generate,
            settings={**settings, "dataset": given.data or TOFU_HUB_ID, "forget_split": given.forget_split},
            **lengths,
            **shared,
        )
        return found.evaluation, found
    from ..evaluation.own_rows import run_rows

    own = run_rows(
        model,
        tokenizer,
        data.parts,
        holdout=data.holdout,
        reference=data.reference,
        limit=given.limit,
        generate=given.generate,
        settings=settings,
        **lengths,
        **shared,
    )
    return own.evaluation, own.tofu


def _choices(
    given: EvalArguments, data: EvalData, model: Any, tokenizer: Any, common: dict[str, Any], shared: dict[str, Any]
) -> Evaluation:
    from ..evaluation.choices import run_choices, run_harness

    how: dict[str, Any] = {
        "benchmark": given.benchmark,
        "chat_template": given.chat_template,
        "limit": given.limit,
    }
    if data.choices is None:
        return run_harness(model, tokenizer, given.harness_tasks or [given.benchmark], **how, **common)
    return run_choices(model, tokenizer, data.choices, max_length=given.max_length, **how, **shared)


def others(data: EvalData) -> dict[str, Evaluation]:
    """The evaluations of other models to print beside this one's, by what they are."""
    from ..evaluation.record import Evaluation

    found = {"target": data.target, "reference": data.reference_evaluation}
    return {
        name: one if isinstance(one, Evaluation) else one.evaluation for name, one in found.items() if one is not None
    }


def load_model(given: EvalArguments, model_args: Any, device: Any) -> tuple[Any, Any]:
    """
    The model on a device, ready to be read, with its adapter; and its tokenizer.

    Raises:
        ValueError: an adapter that names no model.
        OSError: what the hub or the folder says.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import get_quantization_config

    from .train import _model_kwargs

    name, adapter = model_args.model_name_or_path, given.adapter
    place = Path(name).expanduser()
    kwargs = _model_kwargs(model_args)
    # a folder's tokenizer is used where it has one: trainers save it beside an adapter, too
    tokenizers = [given.tokenizer_name_or_path, adapter, str(place) if place.is_dir() else name]
    if is_adapter(place):
        from peft import PeftConfig

        adapter, name = str(place), PeftConfig.from_pretrained(str(place)).base_model_name_or_path
        if not name:
            raise ValueError(
                f"{place} is an adapter that names no model under it (base_model_name_or_path). Give the model as "
                "model_name_or_path, and this folder as adapter."
            )
        kwargs.pop("revision", None)  # of the adapter, not of the model under it
        tokenizers.append(name)
    elif place.is_dir():
        name = str(place)
    quantization = get_quantization_config(model_args)
    if quantization is not None:
        kwargs |= {"quantization_config": quantization, "device_map": {"": device}}
    source = _tokenizer(tokenizers)
    tokenizer = AutoTokenizer.from_pretrained(
        source,
        trust_remote_code=given.trust_remote_code,
        **({"revision": kwargs["revision"]} if source == name and "revision" in kwargs else {}),
    )
    model: Any = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=given.trust_remote_code, **kwargs)
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(Path(adapter).expanduser()) if _local(adapter) else adapter)
    return (model if quantization is not None else model.to(device)).eval(), tokenizer


def _tokenizer(places: list[str | None]) -> str:
    """The first place that has a tokenizer; of a hub id only loading tells."""
    given, *rest = places
    if given is not None:
        return given
    named = [place for place in rest if place is not None]
    for place in named:
        if _local(place) and (Path(place).expanduser() / "tokenizer_config.json").is_file():
            return str(Path(place).expanduser())
    return named[-1]


def _local(place: str) -> bool:
    return Path(place).expanduser().is_dir()
