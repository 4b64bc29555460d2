"""Options of an edit: what is refused, words from a file, and what a plan keeps of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hf_unlearn.editing import EditConfig


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *(
            ({name: "best"}, f"{name} is 'best'; expected one of ")
            for name in ("method", "positions", "source", "solver", "radius_unit")
        ),
        ({"words": "Paris"}, "words is the string 'Paris'; expected a list"),
        *(({"probability": value}, f"probability is {value}; expected a number between") for value in (0, 1, -0.5, 2)),
        ({"probability": float("nan")}, "probability is nan"),
        ({"eps": 1.0, "eps_percentile": 5.0}, "two ways to say the same"),
        *(({"eps_percentile": value}, f"eps_percentile is {value}; expected") for value in (0, 100, -1.0)),
        ({"soft_margin": 1.0}, "soft_margin needs eps or eps_percentile"),
        *(
            ({"tokens_per_word": 2, **other}, "tokens_per_word is 2, which is about tokens within words; it needs")
            for other in (
                *({"token": "first"}, {"positions": "last_prompt"}, {"eps": 1.0}),
                *({"source": "embedding"}, {"method": "tsr"}),
            )
        ),
        *(
            ({"weigh_retain": True, **other}, "weigh_retain weighs what an edit for a probability costs; it needs")
            for other in ({"eps": 1.0}, {"eps_percentile": 1.0}, {"source": "activation"}, {"method": "arr"})
        ),
        *(({name: -1}, f"{name} is -1; expected at least 0") for name in ("variants", "generation_rounds")),
        *(
            ({name: 0}, f"{name} is 0; expected at least 1")
            for name in (
                "tokens_per_word",
                "max_new_tokens",
                "retain_examples",
                "retain_positions",
                "steps",
                "free_positions",
                "batch_size",
            )
        ),
        ({"max_length": 1}, "max_length is 1; expected at least 2"),
    ],
)
def test_an_option_out_of_range_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EditConfig(**changes)


def test_words_come_from_the_list_and_the_lines_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    path.write_text("  New York \n\n\u00c5rhus\n", encoding="utf-8")
    config = EditConfig(words=["a"], words_file=str(path))
    assert config.all_words() == ["a", "New York", "\u00c5rhus"]
    kept = config.as_settings()
    assert (kept["words"], kept["words_file"], kept["number_of_words"]) == (None, None, 3)
    assert EditConfig().all_words() == []
    with pytest.raises(ValueError, match=r"words_file is '.*gone', which is not a file"):
        EditConfig(words_file=str(tmp_path / "gone")).all_words()


def test_what_is_searched_and_what_is_given() -> None:
    assert EditConfig().searches
    assert not EditConfig(eps=0.0).searches
    assert EditConfig(eps=0.0).has_level
    assert EditConfig(eps_percentile=1.0, soft_margin=1.0).has_level
    assert not EditConfig(method="tsr").searches


def test_a_function_for_positions_is_kept_as_a_word() -> None:
    positions: Any = lambda batch: batch["labels"] > 0  # noqa: E731
    assert EditConfig(positions=positions).as_settings()["positions"] == "callable"
    assert EditConfig().as_settings()["positions"] == "occurrence"
