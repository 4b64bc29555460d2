"""Attacks on unlearned models: what brings back what was forgotten; judges of answers; and defences to compare with.

Each attack's module has `run(model, tokenizer, rows, config)`, and `outcome(result, subject)` for attacks.json.
"""

from .defences import SmoothLLMConfig, self_reminder, smooth_llm
from .degeneracy import Degeneracy, DegeneracyConfig, degeneracy
from .gcg import GCGConfig, GCGResult, gcg
from .gcg_rows import GCGRowsResult, gcg_rows
from .judges import Judge, Judgement, RefusalJudge, TargetJudge, Verdict, judge_answers, topic_words
from .model_judge import ModelJudge, answer_perplexities, load_model_judge
from .multi_turn import MultiTurnConfig, multi_turn
from .over_refusal import OverRefusalResult, over_refusal
from .paraphrase import ParaphraseConfig, ParaphraseResult, paraphrase
from .prefill import PrefillConfig, PrefillLevel, PrefillResult, prefill
from .prompts import JudgedAnswers, PromptConfig, answer_prompts, usual_judges
from .quantise import QuantiseConfig, QuantiseResult, RoundingConfig, RoundingResult, quantise
from .refusal import attack_succeeds, is_refusal
from .relearn import RelearnConfig, RelearnResult, RelearnRuns, relearn
from .soft_prompt import SoftPromptConfig, SoftPromptResult, soft_prompt
from .static import load_prompts, static
from .transcripts import Transcript, load_transcripts

__all__ = [
    "Degeneracy",
    "DegeneracyConfig",
    "GCGConfig",
    "GCGResult",
    "GCGRowsResult",
    "Judge",
    "JudgedAnswers",
    "Judgement",
    "ModelJudge",
    "MultiTurnConfig",
    "OverRefusalResult",
    "ParaphraseConfig",
    "ParaphraseResult",
    "PrefillConfig",
    "PrefillLevel",
    "PrefillResult",
    "PromptConfig",
    "QuantiseConfig",
    "QuantiseResult",
    "RefusalJudge",
    "RelearnConfig",
    "RelearnResult",
    "RelearnRuns",
    "RoundingConfig",
    "RoundingResult",
    "SmoothLLMConfig",
    "SoftPromptConfig",
    "SoftPromptResult",
    "TargetJudge",
    "Transcript",
    "Verdict",
    "answer_perplexities",
    "answer_prompts",
    "attack_succeeds",
    "degeneracy",
    "gcg",
    "gcg_rows",
    "is_refusal",
    "judge_answers",
    "load_model_judge",
    "load_prompts",
    "load_transcripts",
    "multi_turn",
    "over_refusal",
    "paraphrase",
    "prefill",
    "quantise",
    "relearn",
    "self_reminder",
    "smooth_llm",
    "soft_prompt",
    "static",
    "topic_words",
    "usual_judges",
]
