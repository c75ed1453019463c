"""Meta-learning the difference: train a start for a small adapter, from which a few steps fit a new task."""

from mltd.baselines import METHODS, Comparison, MethodResult, run_method
from mltd.evaluation import Curve, evaluate
from mltd.inner_loop import DivergedError, InnerConfig, adapt, installed
from mltd.meta_trainer import MetaConfig, MetaResult, MetaTrainer
from mltd.selection import Selection, select
from mltd.tasks import Example, Leak, Task, TaskSampler, TaskSet, collate

__all__ = [
    "METHODS",
    "Comparison",
    "Curve",
    "DivergedError",
    "Example",
    "InnerConfig",
    "Leak",
    "MetaConfig",
    "MetaResult",
    "MetaTrainer",
    "MethodResult",
    "Selection",
    "Task",
    "TaskSampler",
    "TaskSet",
    "adapt",
    "collate",
    "evaluate",
    "installed",
    "run_method",
    "select",
]
