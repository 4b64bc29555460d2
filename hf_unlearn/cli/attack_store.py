"""attacks.json while it is being written: what is finished stays, and is told from what has changed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..attacks.summary import joined
from ..reports.outcomes import AttackOutcome, Subject, read_attacks, write_attacks
from .eval_arguments import is_adapter

FILE = "attacks.json"
_MODELS = "models"  # the setting that differs between the models of one attack
# what a model and its tokenizer are made of, and nothing that a trainer, an evaluation or an attack writes beside them
_FILES = re.compile(
    r".*\.(safetensors|safetensors\.index\.json|bin|bin\.index\.json|model|jinja|py)"
    r"|(config|generation_config|adapter_config|tokenizer.*|special_tokens_map|added_tokens|vocab|chat_template)\.json"
    r"|(merges|vocab)\.txt"
)


class AttackStore:
    """
    Outcomes by attack, written as a whole after every change.

    Args:
        path (`Path`): of attacks.json.
        outcomes (`Iterable[AttackOutcome]`): what is there already.
    """

    def __init__(self, path: Path, outcomes: Iterable[AttackOutcome] = ()) -> None:
        self.path = path
        self.outcomes = {outcome.attack: outcome for outcome in outcomes}

    @classmethod
    def open(cls, folder: Path) -> AttackStore:
        """
        The store of a folder, with what an earlier run found.

        Raises:
            ValueError: the file is something else.
        """
        path = folder / FILE
        return cls(path, read_attacks(path) if path.is_file() else ())

    def finished(
        self, attack: str, subject: Subject, settings: Mapping[str, Any], identity: Mapping[str, Any]
    ) -> bool:
        """Whether this attack has been run on this model with these settings."""
        known = self.outcomes.get(attack)
        if known is None or _base(known.settings) != _plain(attack, settings):
            return False
        model = known.settings.get(_MODELS, {}).get(subject)
        return model is not None and _placed(model) == _placed(_plain(attack, identity))

    def put(self, outcome: AttackOutcome, subject: Subject, identity: Mapping[str, Any] | None) -> None:
        """
        Adds what was found about one model, in place of what was known of it, and writes. Findings on other models
        stay if they were made with the same settings; a failure under new settings leaves everything as it is.

        Args:
            outcome ([`AttackOutcome`]): of one model.
            subject (`Subject`): the model.
            identity (`Mapping[str, Any]`, *optional*): which model it is; None for an attack that failed.
        """
        if identity is not None:
            outcome = dataclasses.replace(outcome, settings={**outcome.settings, _MODELS: {subject: identity}})
        known = self.outcomes.get(outcome.attack)
        if known is not None and identity is None and _base(known.settings) != _base(outcome.settings):
            return  # a mistake in new settings does not cost what the old ones have found
        if known is not None and _base(known.settings) == _base(outcome.settings):
            outcome = joined(_without(known, subject), outcome)
        self.outcomes[outcome.attack] = outcome
        if identity is not None:
            self._drop_outdated(subject, outcome.settings[_MODELS][subject])
        names: dict[str, str] = {}
        for kept in self.outcomes.values():
            names.update({key: str(value["path"]) for key, value in kept.settings.get(_MODELS, {}).items()})
        write_attacks(self.path, list(self.outcomes.values()), models=names)

    def _drop_outdated(self, subject: Subject, identity: Mapping[str, Any]) -> None:
        """Findings of other attacks on a model whose files have been written again since: it is no more."""
        for name, kept in list(self.outcomes.items()):
            known = kept.settings.get(_MODELS, {}).get(subject)
            if known is not None and _weights(known) != _weights(identity):
                self.outcomes[name] = _without(kept, subject)
                if not self.outcomes[name].settings[_MODELS]:
                    del self.outcomes[name]

    def check_model(self, subject: Subject, identity: Mapping[str, Any]) -> None:
        """
        One file is about one model of each kind.

        Raises:
            ValueError: what is there is about another one, under another name.
        """
        for kept in self.outcomes.values():
            known = kept.settings.get(_MODELS, {}).get(subject)
            wanted = _plain(kept.attack, identity)
            if known is not None and _names(known) != _names(wanted):
                raise ValueError(
                    f"{self.path} holds {kept.attack} on another {subject} model, {' with '.join(_names(known))}. "
                    f"Give another output_dir for {' with '.join(_names(wanted))}, or move the file away."
                )

    def chosen(self, attacks: Iterable[str]) -> list[AttackOutcome]:
        """The outcomes of these attacks, where there are any."""
        return [self.outcomes[name] for name in attacks if name in self.outcomes]


def model_identity(
    name: str, adapter: str | None = None, revision: str | None = None, loading: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """
    What tells a model from another without loading it: its name, and of a folder the names, sizes and times of its
    files, and of the model under an adapter; of the hub the revision. And how it is loaded: type, quantisation,
    another tokenizer.
    """
    found: dict[str, Any] = {"path": name, "files": _files(name) or revision}
    if is_adapter(Path(name).expanduser()):
        settings = json.loads((Path(name).expanduser() / "adapter_config.json").read_text(encoding="utf-8"))
        found["base_files"] = _files(str(settings.get("base_model_name_or_path")))
    if adapter is not None:
        found |= {"adapter": adapter, "adapter_files": _files(adapter)}
    return {**found, "loading": dict(loading)} if loading else found


def _files(name: str) -> str | None:
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return None
    listed = []
    for file in sorted(folder.iterdir()):
        if _FILES.fullmatch(file.name):
            held = file.stat()
            listed.append(f"{file.name} {held.st_size} {held.st_mtime_ns}")
    return hashlib.sha256("\n".join(listed).encode()).hexdigest()[:16]


def _without(outcome: AttackOutcome, subject: Subject) -> AttackOutcome:
    """An outcome without what it says of one model."""
    models = {key: value for key, value in outcome.settings.get(_MODELS, {}).items() if key != subject}
    return dataclasses.replace(
        outcome,
        settings={**_base(outcome.settings), _MODELS: models},
        measures=tuple(part for part in outcome.measures if part.subject != subject),
        curves=tuple(part for part in outcome.curves if part.subject != subject),
        judges=tuple(part for part in outcome.judges if part.subject != subject),
        examples=tuple(part for part in outcome.examples if part.subject != subject),
        absent={key: value for key, value in outcome.absent.items() if subject not in key.split(", ")},
    )


def _placed(identity: Mapping[str, Any]) -> dict[str, Any]:
    """With folders under one name, however they were given."""
    found = dict(identity)
    for key in ("path", "adapter"):
        folder = Path(str(found.get(key))).expanduser()
        if key in found and folder.is_dir():
            found[key] = str(folder.resolve())
    return found


def _names(identity: Mapping[str, Any]) -> list[str]:
    placed = _placed(identity)
    return [str(placed[key]) for key in ("path", "adapter") if key in placed]


def _weights(identity: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in _placed(identity).items() if key != "loading"}


def _base(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key != _MODELS}


def _plain(attack: str, settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """As an outcome keeps them: plain values, credentials masked."""
    return AttackOutcome(attack=attack, settings=settings).settings
