"""Persona-Chat in three formats: dialogue lines as for ConvAI2, a table of personas and chats, and its synthetic kin.

Give what these read to `by_persona`, which makes tasks of them.
"""

from __future__ import annotations

import re
from pathlib import Path

from mltd.data.dialogue import Dialogue, Turn
from mltd.data.files import DataError, lines, read_text
from mltd.data.tables import csv_rows, one_text

_PERSONA = "your persona: "
_SPEAKER = re.compile(r"[*\s]*User ([12]):")


def read_convai2(path: Path | str) -> list[Dialogue]:
    """Dialogue lines: "N your persona: …", then "N partner's utterance<TAB>own utterance"; N = 1 begins a dialogue.

    Only the speaker's own persona is read. Raises DataError that names the line.
    """
    path = Path(path)
    found: list[Dialogue] = []
    for number, line in enumerate(lines(read_text(path)), 1):
        where = f"{path}, line {number}"
        counted = re.fullmatch(r"(\d+) (.*\S.*)", line)
        if counted is None or (counted[1] != "1" and not found):
            raise DataError(f"{where}: got {line[:40]!r}, expected a number, from 1 in each dialogue, and text")
        if counted[1] == "1":
            found.append(Dialogue(str(len(found) + 1), (), ()))
        last, text = found[-1], counted[2]
        if text.startswith(_PERSONA):
            found[-1] = last._replace(persona=(*last.persona, text.removeprefix(_PERSONA).strip()))
        elif not text.startswith("partner's persona: "):
            said = [part.strip() for part in text.split("\t")[:2]]  # what may follow are candidates for a reply
            if len(said) < 2 or not all(said):
                raise DataError(f"{where}: got {text[:40]!r}, expected two utterances with a tab between them")
            found[-1] = last._replace(turns=(*last.turns, Turn(False, said[0]), Turn(True, said[1])))
    for dialogue in found:
        if not dialogue.persona or not dialogue.turns:
            raise DataError(f"{path}, dialogue {dialogue.id}: expected lines of a persona and lines of utterances")
    return _some(found, path)


def read_personachat_csv(path: Path | str) -> list[Dialogue]:
    """A table with Persona (its sentences) and chat, a line an utterance, of which every second is the persona's."""
    path = Path(path)
    found = []
    for number, (place, row) in enumerate(csv_rows(path), 1):
        where = f"{path.parent / place}"
        sentences = re.split(r"(?<=[.!?])\s+", one_text(row, "Persona", where))
        said = [line.strip() for line in one_text(row, "chat", where).split("\n") if line.strip()]
        turns = tuple(Turn(i % 2 == 1, text) for i, text in enumerate(said))
        found.append(Dialogue(str(number), tuple(sentences), turns))
    return _some(found, path)


def read_synthetic_persona_chat(path: Path | str) -> list[Dialogue]:
    """A table with both users' personas and their conversation: two dialogues a row, one from the side of each user.

    An utterance begins with "User 1:" or "User 2:" and may go on over several lines. A conversation without such
    marks, of which the published test file has two, does not tell who speaks and is left out. The personas of one
    conversation hear each other: what one says stands in what the other reads.
    """
    path = Path(path)
    found = []
    for number, (place, row) in enumerate(csv_rows(path), 1):
        where = f"{path.parent / place}"
        personas = [one_text(row, f"user {user} personas", where).split("\n") for user in (1, 2)]
        said = _utterances(row.get("Best Generated Conversation", ""))
        if said:
            for user, persona in enumerate(personas, 1):
                turns = tuple(Turn(speaker == user, text) for speaker, text in said)
                found.append(Dialogue(f"{number}.{user}", tuple(persona), turns))
    return _some(found, path)


def _some(found: list[Dialogue], path: Path) -> list[Dialogue]:
    if not found:
        raise DataError(f"{path}: has no dialogue, expected at least one; is it another file?")
    return found


def _utterances(conversation: str) -> list[tuple[int, str]]:
    """(user, what was said), in turn."""
    said: list[tuple[int, str]] = []
    for line in conversation.split("\n"):
        mark = _SPEAKER.match(line)
        if mark is not None:
            said.append((int(mark[1]), line[mark.end() :]))
        elif said:
            said[-1] = (said[-1][0], f"{said[-1][1]}\n{line}")
    # stars are what is left of bold type
    return [(user, text.strip("* \n")) for user, text in said if text.strip("* \n")]
