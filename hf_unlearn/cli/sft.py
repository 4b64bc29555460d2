"""`hf-unlearn sft`: trains a target or a retain-only reference with TRL's SFTTrainer."""

from __future__ import annotations


def run(command: str, arguments: list[str]) -> int:
    """Parses, trains, saves; rows with `question` and `answer` become prompt and completion."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import (
        ModelConfig,
        ScriptArguments,
        SFTConfig,
        SFTTrainer,
        TrlParser,
        get_peft_config,
        get_quantization_config,
    )

    from .data_arguments import load_rows
    from .train import _model_kwargs

    parser = TrlParser((ScriptArguments, SFTConfig, ModelConfig), prog="hf-unlearn sft")
    script, args, model_args = parser.parse_args_and_config(args=arguments)
    if model_args.model_name_or_path is None or script.dataset_name is None:
        raise ValueError("model_name_or_path and dataset_name are needed: what to train, and on what.")
    rows = load_rows(script.dataset_name, script.dataset_config, script.dataset_train_split)
    tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path)
    if {"question", "answer"} <= set(rows.column_names):
        rows = rows.map(_conversation if tokenizer.chat_template else _plain, remove_columns=rows.column_names)
    kwargs = _model_kwargs(model_args)
    quantization = get_quantization_config(model_args)
    if quantization is not None:
        kwargs["quantization_config"] = quantization
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(model_args.model_name_or_path, **kwargs),
        args=args,
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=get_peft_config(model_args),
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model(args.output_dir)
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=script.dataset_name)
    return 0


def _conversation(row: dict[str, str]) -> dict[str, list[dict[str, str]]]:
    return {
        "prompt": [{"role": "user", "content": row["question"]}],
        "completion": [{"role": "assistant", "content": row["answer"]}],
    }


def _plain(row: dict[str, str]) -> dict[str, str]:
    # the same text as hf_unlearn.data gives a tokenizer without a chat template
    return {"prompt": f"Question: {row['question']}\nAnswer:", "completion": f" {row['answer']}"}
