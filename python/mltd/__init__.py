"""Meta-learning the difference: train a start for a small adapter, from which a few steps fit a new task."""

from mltd.baselines import METHODS, Comparison, MethodResult, run_method
from mltd.controller import Controller, Temperature, entropy, straight_through, support_embeddings, task_embedding
from mltd.evaluation import Curve, evaluate
from mltd.genotypes import draw_genotype, genotype
from mltd.inner_loop import DivergedError, InnerConfig, adapt, installed
from mltd.meta_trainer import MetaConfig, MetaResult, MetaTrainer
from mltd.selection import Selection, select
from mltd.tasks import Example, Leak, Task, TaskSampler, TaskSet, collate

__all__ = [
    "METHODS",
    "Comparison",
    "Controller",
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
    "Temperature",
    "adapt",
    "collate",
    "draw_genotype",
    "entropy",
    "evaluate",
    "genotype",
    "installed",
    "run_method",
    "select",
    "straight_through",
    "support_embeddings",
    "task_embedding",
]
