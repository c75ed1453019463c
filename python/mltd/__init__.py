"""Meta-learning the difference: train a start for a small adapter, from which a few steps fit a new task."""

from mltd.baselines import METHODS, Comparison, Method, MethodResult, run_method
from mltd.controller import Controller, Temperature, entropy, straight_through, support_embeddings, task_embedding
from mltd.distributed import LostProcessError
from mltd.evaluation import Curve, evaluate
from mltd.genotypes import draw_genotype, genotype
from mltd.inner_loop import DivergedError, InnerConfig, adapt
from mltd.kinds import KINDS, Example, Kind, collate
from mltd.learner import choose, installed
from mltd.meta_config import MetaConfig
from mltd.meta_trainer import MetaResult, MetaTrainer
from mltd.selection import Selection, select
from mltd.tasks import Leak, Task, TaskSampler, TaskSet
from mltd.termination import Terminated

__all__ = [
    "KINDS",
    "METHODS",
    "Comparison",
    "Controller",
    "Curve",
    "DivergedError",
    "Example",
    "InnerConfig",
    "Kind",
    "Leak",
    "LostProcessError",
    "MetaConfig",
    "MetaResult",
    "MetaTrainer",
    "Method",
    "MethodResult",
    "Selection",
    "Task",
    "TaskSampler",
    "TaskSet",
    "Temperature",
    "Terminated",
    "adapt",
    "choose",
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
