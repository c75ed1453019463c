"""The part of benchmarks/gpu_check.py about captured inner steps, without a GPU."""

import torch

from benchmarks import inner_check, measuring
from mltd import captured
from mltd.bench import cells, models
from mltd.bench.contenders import stir, stir_cells
from tarp_kernels import SearchCellConfig, TarpConfig, apply_tarp, set_architecture

CPU = torch.device("cpu")


def test_replayed_inner_steps_are_measured_where_they_end_as_launched_ones(monkeypatch):
    """There is no GPU: what stands for the graph takes the step again, or takes one too many."""

    def recording(times: int):
        def record(stream, step):
            losses = torch.zeros(models.TASKS)

            def replay() -> None:
                for _ in range(times):
                    losses.copy_(step())

            return replay, losses

        return record

    monkeypatch.setattr(captured, "DEVICES", ("cpu",))
    monkeypatch.setattr(captured, "side_stream", lambda device: None)
    monkeypatch.setattr(captured, "run_beside", lambda stream, step: step())
    config = TarpConfig(r=2, search_cell=SearchCellConfig(width=8))
    model = apply_tarp(models.smollm2_shaped(layers=1, vocabulary=8192), config)
    stir(model)
    stir_cells(model)
    set_architecture(model, cells.architecture())
    monkeypatch.setattr(inner_check, "STEPS", 3)
    monkeypatch.setattr(inner_check, "timed", lambda calls, device: dict.fromkeys(calls, 1.0))
    monkeypatch.setattr(captured, "record", recording(1))
    row = inner_check.of_model(model, True, CPU)
    assert row["ok"] and row["error"] < 1e-4 and row["launched ms"] == row["recorded and replayed ms"] == 1
    monkeypatch.setattr(captured, "record", recording(2))
    row = inner_check.of_model(model, True, CPU)
    assert not row["ok"] and "replayed steps" in row["error"] and measuring.wrong([row])

    def refusing(stream, step):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(captured, "record", refusing)
    row = inner_check.of_model(model, True, CPU)
    assert not row["ok"] and "not permitted" in row["error"]
