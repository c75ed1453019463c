"""Dialogues of personas: who a speaker is, what is said in turn, and which dialogues are by the same persona."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from mltd.data.records import Record, normalised


class Turn(NamedTuple):
    """One utterance; `own`: by the speaker whose persona it is, the one whose replies are learnt."""

    own: bool
    text: str


class Dialogue(NamedTuple):
    """One dialogue from the side of one speaker."""

    id: str
    persona: tuple[str, ...]
    turns: tuple[Turn, ...]


def by_persona(
    dialogues: Sequence[Dialogue],
    *,
    history: int | None = None,
    shared: int = 2,
    personas: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, tuple[Record, ...]]:
    """One persona is one task: its replies, each after what was said before, and each dialogue a unit.

    history   most utterances that are read; None: all from the beginning, a line each
    shared    a persona is described anew for each dialogue, so two dialogues are by the same one where they share this
              many sentences, or all that both have, directly or by way of others
    personas  name -> sentences, for a corpus that comes with its list of personas: a dialogue goes to the one that has
              most of its sentences, the first of those, and is left out where none has `shared`

    Without `personas` a task's name is the first `shared` sentences, in alphabetical order, of its first dialogue.
    """
    if shared < 1 or (history is not None and history < 1):
        raise ValueError(f"shared, history: got {shared} and {history}, expected at least 1")
    if personas is None:
        names = _same_personas(dialogues, shared)
    else:
        names = [_best(dialogue, personas, shared) for dialogue in dialogues]
    found: dict[str, list[Record]] = {}
    for dialogue, name in zip(dialogues, names, strict=True):
        if name is not None:
            found.setdefault(name, []).extend(replies(dialogue, history))
    return {name: tuple(records) for name, records in found.items() if records}


def replies(dialogue: Dialogue, history: int | None = None) -> list[Record]:
    """Every utterance of the speaker that answers another as a record; the opening of a dialogue answers nothing."""
    records = []
    for i, turn in enumerate(dialogue.turns):
        if turn.own and i > 0:
            before = dialogue.turns[0 if history is None else max(0, i - history) : i]
            source = "\n".join(said.text for said in before)
            records.append(Record(source, (turn.text,), f"{dialogue.id}.{i}", dialogue.id))
    return records


def _same_personas(dialogues: Sequence[Dialogue], shared: int) -> list[str | None]:
    """A name for each dialogue, the same where the persona is: connected components of shared sentences."""
    sentences = [_sentences(dialogue.persona) for dialogue in dialogues]
    first = list(range(len(dialogues)))  # the first dialogue of the same persona, as far as known

    def root(i: int) -> int:
        while first[i] != i:
            i = first[i]
        return i

    holders: dict[str, list[int]] = {}
    for i, own in enumerate(sentences):
        common: dict[int, int] = {}
        for j in (j for sentence in own for j in holders.get(sentence, ())):
            common[j] = common.get(j, 0) + 1
        for j, count in common.items():
            if count >= min(shared, max(len(own), len(sentences[j]))):
                a, b = sorted((root(i), root(j)))
                first[b] = a
        for sentence in own:
            holders.setdefault(sentence, []).append(i)
    return [" ".join(sorted(sentences[root(i)].values())[:shared]) for i in range(len(dialogues))]


def _best(dialogue: Dialogue, personas: Mapping[str, Sequence[str]], shared: int) -> str | None:
    own = _sentences(dialogue.persona)
    counts = {name: len(own.keys() & _sentences(sentences).keys()) for name, sentences in personas.items()}
    best = max(counts, key=lambda name: counts[name], default=None)
    return best if best is not None and counts[best] >= shared else None


def _sentences(persona: Iterable[str]) -> dict[str, str]:
    """Normalised sentence -> the sentence, each once."""
    return {normalised(sentence): " ".join(sentence.split()) for sentence in persona}
