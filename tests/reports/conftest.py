from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import attacked
import pytest

from hf_unlearn.reports import render_report

HOSTILE = "<script>alert('x')</script><img src=https://evil.example/a.png onerror=alert(1)> {{ 7 * 7 }} &amp;"

QUESTIONS = [
    ("Who wrote the novel 'The Salt Harbour' and where was she born?", "Ilse Marandel, born in Torvik in 1961."),
    ("Which prize did Ilse Marandel win in 1994?", "She won the Meridian Prize for maritime fiction."),
    ("What was the profession of Ilse Marandel's father?", "Her father was a lighthouse engineer in Torvik."),
    ("What is the genre of Ilse Marandel's best known books?", "Maritime fiction with elements of the gothic novel."),
    ("In which city does Ilse Marandel live today?", "She lives in Port Averil with her two daughters."),
    ("Which language does Ilse Marandel write in?", "She writes in Norwegian and translates herself to English."),
]


def _generations() -> list[dict[str, str]]:
    rows = []
    wrong = "She is the author of many books about the sea and the mountains, and lives in a small town."
    for index, (question, answer) in enumerate(QUESTIONS):
        rows.append(
            {
                "question": question,
                "answer": answer,
                "target": answer,
                "unlearned": HOSTILE if index == 1 else "" if index == 3 else wrong,
                "reference": "The author Karel Dostan, born in Lisbon in 1948, wrote it after a long journey.",
                "part": "forget",
            }
        )
    for question, answer in (
        ("Where did Tomas Velarde study?", "Tomas Velarde studied architecture at the University of Coimbra."),
        ("Which book made Amara Osei famous?", "Amara Osei became famous with 'The Weaver of Kumasi', in 2003."),
    ):
        same = {"target": answer, "unlearned": answer, "reference": answer.replace("architecture", "history")}
        rows.append({"question": question, "answer": answer, **same, "part": "retain"})
    return rows


def _history() -> list[dict[str, Any]]:
    rng = random.Random(0)
    history: list[dict[str, Any]] = []
    duals = {"retain": 1.0, "world_facts": 1.0}
    eps = {"retain": 0.022, "world_facts": 0.03}
    for step in range(1, 121):
        progress = 1 - math.exp(-step / 25)
        bump = {"retain": 0.05, "world_facts": 0.025}
        row: dict[str, Any] = {"step": step, "epoch": step / 12, "learning_rate": 2e-4}
        row["loss/forget"] = 14 * math.exp(-step / 18) + 0.3 + 0.1 * rng.random()
        row["forget_nll"] = 0.01 + 5.6 * progress + 0.15 * rng.random()
        for name in eps:
            base = 0.012 + bump[name] * math.exp(-(((step - 25) / 18) ** 2))
            loss = base * (1 + 0.1 * rng.random())
            duals[name] = max(0.0, duals[name] + 20 * (loss - eps[name]))
            row |= {f"loss/retain/{name}": loss, f"dual/{name}": duals[name], f"violation/{name}": loss - eps[name]}
        history.append(row)
    history.append({"step": 120, "epoch": 10, "train_runtime": 61.2, "train_loss": 1.2})
    return history


@pytest.fixture(scope="session")
def sample_factory() -> Callable[[], dict[str, Any]]:
    return sample_results


@pytest.fixture(scope="session")
def plain_page() -> str:
    """The page of the sample."""
    return render_report(sample_results())


@pytest.fixture(scope="session")
def attacked_page() -> str:
    """The page of the sample after attacks and evaluations."""
    entries = {"attacks": attacked.all_attacks(), "evaluations": attacked.all_evaluations()}
    return render_report({**sample_results(), **entries})


@pytest.fixture
def sample() -> dict[str, Any]:
    return sample_results()


def sample_results() -> dict[str, Any]:
    rng = random.Random(1)
    log_normal = {"target": (-1.4, 0.6), "unlearned": (0.05, 0.72), "reference": (0.12, 0.7)}
    return {
        "method": "primal-dual",
        "model": "tiny Llama, 2.6 M parameters",
        "dataset": "40 fictional authors",
        "target": {
            "forget_probability": 0.9981,
            "forget_rouge": 0.991,
            "retain_probability": 0.9978,
            "retain_rouge": 0.993,
            "forget_truth_ratio": 0.342,
            "retain_truth_ratio": 0.661,
            "forget_paraphrased_question_probability": 0.774,
            "mia_auc": 0.998,
            "model_utility": 0.82,
        },
        "unlearned": {
            "forget_probability": 0.00187,
            "forget_rouge": 0.283,
            "retain_probability": 0.9912,
            "retain_rouge": 0.981,
            "forget_truth_ratio": 0.551,
            "retain_truth_ratio": 0.652,
            "forget_paraphrased_question_probability": 0.00041,
            "mia_auc": 0.521,
            "model_utility": 0.81,
        },
        "reference": {
            "forget_probability": 0.0021,
            "forget_rouge": 0.297,
            "retain_probability": 0.998,
            "retain_rouge": 0.994,
            "forget_truth_ratio": 0.548,
            "retain_truth_ratio": 0.66,
            "forget_paraphrased_question_probability": 0.0005,
            "mia_auc": 0.5,
            "model_utility": 0.82,
        },
        "forget_quality": 0.4216,
        "forget_level": 5.4,
        "constraints": [
            {"name": "retain", "eps": 0.022, "loss": 0.0131, "multiplier": 4.21, "feasible": True},
            {"name": "world_facts", "eps": 0.03, "loss": 0.0129, "multiplier": 0.0, "feasible": True},
        ],
        "seconds": {"train_target": 58.2, "train_reference": 52.9, "unlearn": 61.2, "evaluate": 21.7, "total": 194.0},
        "versions": {"hf_unlearn": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0", "python": "3.11.9"},
        "settings": {
            "learning_rate": 2e-4,
            "per_device_train_batch_size": 16,
            "eps": 0.022,
            "forget_loss": "lmf",
            "lr_scheduler_kwargs": {"min_lr": 1e-6},
            "hub_token": "hf_abcdef",
            "eos_token": "<|end|>",
        },
        "seed": 0,
        "generations": _generations(),
        "history": _history(),
        "truth_ratios": {k: [math.exp(rng.gauss(*v)) for _ in range(80)] for k, v in log_normal.items()},
    }
