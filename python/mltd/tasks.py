"""Tasks: a few examples to adapt on (support), others to judge by (query), and how a meta-batch of them is drawn."""

import hashlib
import random
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, overload

from mltd.kinds import IGNORED, KINDS, Example, Kind


class Task:
    """A named task: support examples to adapt on and query examples to judge the adapted model by.

    kind  a name of `mltd.kinds.KINDS` ("causal", "seq2seq", "classification", "regression"), or a Kind of one's own

    Raises ValueError that names the task when a set is empty, an example is empty or not one of its kind (causal: as
    many labels as tokens), or a set has nothing that is scored.
    """

    __slots__ = ("kind", "name", "query", "support")

    def __init__(self, name: str, support: Iterable[Any], query: Iterable[Any], kind: str | Kind = "causal") -> None:
        if isinstance(kind, str) and kind not in KINDS:
            raise ValueError(f"task {name!r}: kind: got {kind!r}, expected one of {', '.join(KINDS)}")
        self.name = name
        self.kind = KINDS[kind] if isinstance(kind, str) else kind
        self.support = tuple(Example(tuple(ids), tuple(labels)) for ids, labels in support)
        self.query = tuple(Example(tuple(ids), tuple(labels)) for ids, labels in query)
        for part, examples in (("support", self.support), ("query", self.query)):
            where = f"task {name!r}: {part}"
            if not examples:
                raise ValueError(f"{where}: got no example, expected at least one; leave the task out")
            for i, example in enumerate(examples):
                self.kind.check(f"{where}[{i}]", example)
            if not any(self.kind.scored(example) for example in examples):
                raise ValueError(
                    f"{where}: got no scored token, expected a label other than {IGNORED} after the first position; "
                    "label the tokens that the model is to predict with their own ids"
                )

    def __repr__(self) -> str:
        return f"Task({self.name!r}, {len(self.support)} support, {len(self.query)} query)"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Task):
            return NotImplemented
        mine = (self.name, self.kind.name, self.support, self.query)
        return mine == (other.name, other.kind.name, other.support, other.query)

    def __hash__(self) -> int:
        return hash((self.name, self.support, self.query))


class Leak(NamedTuple):
    """One example, or one task name, in two places that should not share it; `str(leak)` says it in words."""

    kind: str
    """"support/query" inside one task, "example" across two task sets, "name" for a task name in both sets."""
    first: str
    second: str

    def __str__(self) -> str:
        what = "the task name" if self.kind == "name" else "the same tokens"
        return f"{what} in {self.first} and in {self.second}"


class TaskSet(Sequence[Task]):
    """Tasks under distinct names, in a fixed order; `name` says what the set is for ("train", "validation", "test")."""

    def __init__(self, tasks: Iterable[Task], name: str = "tasks") -> None:
        self.tasks = tuple(tasks)
        self.name = name
        seen: set[str] = set()
        for task in self.tasks:
            if task.name in seen:
                raise ValueError(
                    f"tasks: got two tasks named {task.name!r} in {name!r}, expected distinct names; rename one"
                )
            seen.add(task.name)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(task.name for task in self.tasks)

    @overload
    def __getitem__(self, index: int) -> Task: ...
    @overload
    def __getitem__(self, index: slice) -> "TaskSet": ...
    def __getitem__(self, index):
        if isinstance(index, slice):
            return TaskSet(self.tasks[index], self.name)
        return self.tasks[index]

    def __len__(self) -> int:
        return len(self.tasks)

    def __iter__(self) -> Iterator[Task]:
        return iter(self.tasks)

    def __repr__(self) -> str:
        return f"TaskSet({self.name!r}, {len(self)} tasks)"

    def select(self, names: Iterable[str], name: str | None = None) -> "TaskSet":
        """The tasks with these names, in the order of `names`; `name` for the new set, default this one's."""
        by_name = {task.name: task for task in self.tasks}
        names = tuple(names)
        missing = [wanted for wanted in names if wanted not in by_name]
        if missing:
            raise ValueError(
                f"names: got {missing} which {self.name!r} does not have, expected some of {list(by_name)}"
            )
        return TaskSet((by_name[wanted] for wanted in names), self.name if name is None else name)

    def check_leaks(self, other: "TaskSet | None" = None) -> list[Leak]:
        """Token sequences found on both sides of a split that must keep them apart; an empty list when there are none.

        Without `other`: between support and query of each task. With `other` (say, train against test): task names and
        examples, support or query, that both sets have. Equal means equal input_ids, whatever the labels.
        """
        if other is None:
            return [leak for task in self.tasks for leak in _within(self.name, task)]
        leaks = [
            Leak("name", f"{self.name}/{name}", f"{other.name}/{name}")
            for name in self.names
            if name in set(other.names)
        ]
        places: dict[tuple[int, ...], list[str]] = {}
        for place, example in self._placed():
            places.setdefault(example.input_ids, []).append(place)
        for place, example in other._placed():
            leaks += [Leak("example", mine, place) for mine in places.get(example.input_ids, ())]
        return leaks

    def fingerprint(self) -> str:
        """A digest of names and tokens: equal for equal task sets, whatever the sets are called."""
        digest = hashlib.sha256()
        for task in self.tasks:
            digest.update(repr((task.name, task.kind.name, task.support, task.query)).encode())
        return digest.hexdigest()

    def _placed(self) -> Iterator[tuple[str, Example]]:
        for task in self.tasks:
            yield from _places(self.name, task)


def _places(set_name: str, task: Task) -> Iterator[tuple[str, Example]]:
    for part, examples in (("support", task.support), ("query", task.query)):
        for i, example in enumerate(examples):
            yield f"{set_name}/{task.name}/{part}[{i}]", example


def _within(set_name: str, task: Task) -> Iterator[Leak]:
    placed = list(_places(set_name, task))
    support, query = placed[: len(task.support)], placed[len(task.support) :]
    for mine, example in support:
        for other, candidate in query:
            if example.input_ids == candidate.input_ids:
                yield Leak("support/query", mine, other)


class TaskSampler:
    """Draws meta-batches without replacement: every task once before any comes again, and none twice in a batch.

    Iterating never ends. `state_dict` is plain JSON; a sampler that loads it draws what this one would have drawn.
    """

    def __init__(self, taskset: Sequence[Task], tasks_per_batch: int, seed: int) -> None:
        if not 1 <= tasks_per_batch <= len(taskset):
            raise ValueError(
                f"tasks_per_batch: got {tasks_per_batch} for {len(taskset)} tasks, expected 1 ≤ tasks_per_batch ≤ "
                f"{len(taskset)}; lower it or add tasks"
            )
        self.taskset = taskset
        self.tasks_per_batch = tasks_per_batch
        self.seed = seed
        self.epoch = 0
        self.waiting: list[int] = []

    def __iter__(self) -> "TaskSampler":
        return self

    def __next__(self) -> list[Task]:
        batch, self.waiting = self.waiting[: self.tasks_per_batch], self.waiting[self.tasks_per_batch :]
        if len(batch) < self.tasks_per_batch:
            order = list(range(len(self.taskset)))
            random.Random(f"{self.seed}/{self.epoch}").shuffle(order)
            self.epoch += 1
            fresh = [index for index in order if index not in batch]
            missing = self.tasks_per_batch - len(batch)
            # the tasks that the batch already had go last, so each still comes once in this epoch
            self.waiting = fresh[missing:] + [index for index in order if index in batch]
            batch = batch + fresh[:missing]
        return [self.taskset[index] for index in batch]

    def state_dict(self) -> dict[str, Any]:
        return {"seed": self.seed, "epoch": self.epoch, "waiting": list(self.waiting), "tasks": len(self.taskset)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["tasks"] != len(self.taskset):
            raise ValueError(
                f"sampler state: made for {state['tasks']} tasks, expected {len(self.taskset)}; resume with the "
                "same task set"
            )
        self.seed, self.epoch, self.waiting = state["seed"], state["epoch"], list(state["waiting"])


def check_fits(tasks: Iterable[Task], model: Any) -> None:
    """Raise ValueError that names the first task that is not of the model's kind, or has an example too long for it or
    a token that it lacks."""
    for task in tasks:
        task.kind.check_model(model)
        for place, example in _places("", task):
            task.kind.check_fits(f"task {task.name!r}: {place.rsplit('/', 1)[1]}", example, model)
