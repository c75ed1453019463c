"""Settings are chosen by their validation curves, once each, and the record says what was tried."""

import json

import pytest

from mltd import Curve, DivergedError, InnerConfig, MetaConfig, select
from mltd.checkpoint import CheckpointError

CURVES = {
    1e-1: {0: 9.0, 1: 3.0, 10: 90.0},  # best at one step, ruined later
    1e-2: {0: 9.0, 1: 4.0, 10: 8.0},
    1e-3: {0: 9.0, 1: 8.0, 10: 5.0},
}


def curve(values):
    return Curve(dict(values), {"t": dict(values)}, {"t": 5}, 2.0)


@pytest.mark.parametrize(("criterion", "chosen", "stop"), [("best", 1e-1, 1), ("mean", 1e-2, 1), ("last", 1e-3, 10)])
def test_the_criterion_decides(criterion, chosen, stop):
    candidates = [InnerConfig(lr=lr) for lr in CURVES]
    result = select(candidates, lambda c: curve(CURVES[c.lr]), criterion)
    assert result.candidate == InnerConfig(lr=chosen) == candidates[result.index] and result.stop_step == stop
    assert result.curve.perplexity_by_step == CURVES[chosen] and result.seconds == 6.0
    assert min(result.scores) == result.scores[result.index]


def test_divergence_loses_and_is_recorded(tmp_path):
    def validate(candidate):
        if candidate.inner.lr > 0.05:
            raise DivergedError("task 'x': nan")
        return curve(CURVES[candidate.inner.lr])

    candidates = [MetaConfig(InnerConfig(lr=lr)) for lr in CURVES]
    result = select(candidates, validate, record=tmp_path / "tried.json")
    assert result.candidate.inner.lr == 1e-2 and result.scores[0] == float("inf")
    assert json.loads((tmp_path / "tried.json").read_text())[0]["trouble"] == "task 'x': nan"
    with pytest.raises(DivergedError, match="all 1 diverge"):
        select(candidates[:1], validate)


def test_a_recorded_candidate_is_not_validated_again(tmp_path):
    asked = []

    def validate(candidate):
        asked.append(candidate.lr)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return curve(CURVES[candidate.lr])

    candidates, record = [InnerConfig(lr=lr) for lr in CURVES], tmp_path / "tried.json"
    with pytest.raises(KeyboardInterrupt):
        select(candidates, validate, record=record)
    result = select(candidates, validate, "last", record=record)
    assert asked == [1e-1, 1e-2, 1e-2, 1e-3] and result.candidate.lr == 1e-3
    assert select(candidates, validate, "last", record=record) == result and len(asked) == 4
    record.write_text('{"something": "else"}')
    with pytest.raises(CheckpointError, match="not a record of `select`"):
        select(candidates, validate, record=record)
    record.write_text('[{"cand')
    with pytest.raises(CheckpointError, match="is not JSON"):
        select(candidates, validate, record=record)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="candidates: got none"):
        select([], lambda c: curve(CURVES[1e-1]))
    with pytest.raises(ValueError, match="criterion: got 'first'"):
        select([InnerConfig()], lambda c: curve(CURVES[1e-1]), "first")
