"""Metrics beyond the first table of a report: what is memorised, who can tell, and aggregates."""

from __future__ import annotations

from .metric_words import Goal, Metric

_MIA = {
    "loss": "mean loss",
    "zlib": "loss over compressed length",
    "min_k": "least likely 40% of tokens (min-k)",
    "min_k_plus_plus": "min-k++",
}
_GENERAL = {"real_authors": "Real authors", "world_facts": "World facts"}


def further_metrics() -> tuple[Metric, ...]:
    """The metrics that the evaluation of a benchmark adds."""
    return (
        _metric(
            "forget_extraction_strength",
            "Extraction strength",
            "1 - k/n with k the first position from which every next token of the forget answer is predicted right; 0 "
            "where there is none.",
            "reference",
        ),
        _metric(
            "forget_exact_memorization",
            "Exact memorisation",
            "Share of the forget answers' tokens that the model predicts right, given those before.",
            "reference",
        ),
        _metric(
            "forget_truth_share",
            "Truth share",
            "Share of the right answer, paraphrased, among right and wrong ones; 1/2 where both are equally likely.",
            "reference",
        ),
        _metric(
            "forget_paraphrased_answer_probability",
            "Forget probability, answers reworded",
            "Mean probability of the right answer in other words.",
            "reference",
        ),
        _metric(
            "forget_quality_log10",
            "Forget quality, log10",
            "The p-value's power of ten, for values below the smallest float.",
            "",
            unit_interval=False,
        ),
        _metric("forget_fluency", "Fluency of forget answers", "Share of the answers that are no gibberish.", "high"),
        *(
            _metric(
                f"mia_{name}_auc",
                f"Membership AUC, {how}",
                "How well this score tells forget rows from rows that no model was trained on; 0.5 is a guess.",
                "reference",
            )
            for name, how in _MIA.items()
        ),
        *(
            _metric(
                f"mia_{name}_closeness",
                f"Closeness of the AUC, {how}",
                "How near the membership AUC is to that of the retain-only model; 1 is equal.",
                "high",
            )
            for name, how in _MIA.items()
        ),
        _metric(
            "privleak",
            "PrivLeak",
            "Relative distance of the min-k AUC from the retain-only model's, times 100 (MUSE, arXiv 2407.06460). 0 "
            "is ideal; below it the rows are still known, above it over-forgotten.",
            "",
            unit_interval=False,
        ),
        *(
            _metric(f"{part}_rouge", f"{title} ROUGE", "ROUGE-L recall of the greedy answers.", "target")
            for part, title in _GENERAL.items()
        ),
        *(
            _metric(f"{part}_truth_ratio", f"{title} truth ratio", "Mean of max(0, 1 - TR).", "target")
            for part, title in _GENERAL.items()
        ),
        *(
            _metric(
                f"{part}_plain_probability",
                f"{title} probability, not normalised",
                "Probability of the right answer, not set against wrong ones.",
                "target",
            )
            for part, title in _GENERAL.items()
        ),
        *(
            _metric(f"{name}_score", f"{title} score", meaning, "high")
            for name, title, meaning in (
                ("memorization", "Memorisation", "Harmonic mean of what is not memorised; high is forgotten."),
                ("privacy", "Privacy", "Harmonic mean of the closeness of the membership AUCs."),
                ("utility", "Utility", "Harmonic mean of model utility and fluency."),
                ("aggregate", "Aggregate", "Harmonic mean of memorisation, privacy and utility scores."),
            )
        ),
    )


def _metric(name: str, label: str, meaning: str, goal: Goal, unit_interval: bool = True) -> Metric:
    return Metric(name=name, label=label, meaning=meaning, goal=goal, unit_interval=unit_interval, headline=False)
