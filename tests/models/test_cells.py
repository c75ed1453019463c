"""Search cells in whole models: places, start, causality, padding, tasks, files, checkpointing, copies."""

import concurrent.futures
import copy
import io
import re

import pytest
import torch
import torch.nn.functional as F

from tarp_kernels import (
    SearchCellConfig,
    TarpConfig,
    apply_tarp,
    architecture,
    disable_tarp,
    load_tarp,
    save_tarp,
    set_architecture,
    tarp_parameters,
    tarp_report,
    task_parallel,
)
from tarp_kernels.models_cells import search_cells
from tarp_kernels.nn.task_parallel import Offsets
from tests.models.cell_models import MIXED, PUBLISHED, cell_model, logits_of_checked_cells, one_hot
from tests.models.test_training import NO_DROPOUT
from tests.models.tiny import BLOCKS, FAMILIES, WIDTH, base_model, inputs, logits, move

PLACES = {
    "gpt2": [(f"transformer.h.{i}", True) for i in range(BLOCKS)],
    "llama": [(f"model.layers.{i}", True) for i in range(BLOCKS)],
    "bart": [(f"model.{side}.layers.{i}", side == "decoder") for side in ("encoder", "decoder") for i in range(BLOCKS)],
    "roberta": [(f"roberta.encoder.layer.{i}", False) for i in range(BLOCKS)],
    "t5": [(f"encoder.block.{i}.layer.1", False) for i in range(BLOCKS)]
    + [(f"decoder.block.{i}.layer.2", True) for i in range(BLOCKS)],
}


def run(model, batch, alpha):
    with architecture(model, alpha):
        return logits(model, batch)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_cell_beside_each_feed_forward_block(family):
    found = search_cells(cell_model(family))
    assert [(name, cell.causal) for name, cell in found.items()] == [(p + ".search_cell", c) for p, c in PLACES[family]]
    assert all(cell.hidden_size == WIDTH for cell in found.values())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("stem", ["layernorm", "identity"])
def test_starts_as_exactly_the_model_without_cells(family, stem):
    batch, model, plain = inputs(family), cell_model(family, moved=False, stem=stem), base_model(family)
    base = logits(plain, batch)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        apply_tarp(plain, TarpConfig(r=2))
    expected = logits(plain, batch)
    alphas = (torch.rand(9, 6), one_hot())
    for alpha in alphas:
        assert torch.equal(run(model, batch, alpha), expected) and torch.equal(logits(model, batch), expected)
    with torch.no_grad():
        for cell in search_cells(model).values():
            cell.output.normal_()
    for alpha in alphas:
        moved = logits_of_checked_cells(model, batch, alpha)
        assert (moved - expected).abs().max() > 1e-2, "what the cells add would not reach the logits"
        with disable_tarp(model):
            assert torch.equal(run(model, batch, alpha), base)


@pytest.mark.parametrize("family", ["gpt2", "llama", "bart", "t5"])
def test_no_decoder_sees_the_future(family):
    """The logits before t stay, bit by bit for these shapes or to rounding, whatever the tokens from t on become."""
    model, t = cell_model(family), 3
    batch = inputs(family, length=8)
    batch.pop("labels")
    key = "decoder_input_ids" if family in ("bart", "t5") else "input_ids"
    batch[key] = batch["input_ids"].flip(1) if key != "input_ids" else batch[key]
    other = dict(batch) | {key: torch.cat([batch[key][:, :t], batch[key][:, t:].flip(1) % 50 + 3], 1)}
    alphas = torch.stack([one_hot(PUBLISHED), one_hot(MIXED), torch.rand(9, 6)])
    for alpha in alphas:
        before, after = run(model, batch, alpha), run(model, other, alpha)
        torch.testing.assert_close(after[:, :t], before[:, :t], rtol=1e-5, atol=1e-5)
        assert (after[:, t:] - before[:, t:]).abs().max() > 1e-2
    for cell in search_cells(model).values():
        cell.causal = False
    for alpha in alphas:
        change = run(model, other, alpha)[:, :t] - run(model, batch, alpha)[:, :t]
        assert change.abs().max() > 1e-3, "a cell that looks ahead would go unnoticed"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(family, side):
    if family == "roberta" and side == "left":
        pytest.skip("its positions are counted from the token ids, padding included")
    model, alpha, batch, padding = cell_model(family), one_hot(MIXED), inputs(family, length=7), 3
    ids, mask = batch["input_ids"], batch["attention_mask"]
    width = (padding, 0) if side == "left" else (0, padding)
    padded = batch | {"input_ids": F.pad(ids, width), "attention_mask": F.pad(mask, width)}
    single = family in ("gpt2", "llama", "roberta")
    if single:
        batch.pop("labels"), padded.pop("labels")
    if family == "gpt2":  # positions are counted with the padding otherwise
        padded["position_ids"] = (padded["attention_mask"].cumsum(1) - 1).clamp(min=0)
    if family == "bart" and side == "left":
        pytest.skip("its encoder counts positions with the padding")
    tokens = slice(padding, None) if side == "left" else slice(None, 7)

    def results(model, given):
        with architecture(model, alpha):
            found = logits(model, given)
        return found[:, tokens] if single and found.shape[1] > 7 else found

    expected = results(model, batch)
    torch.testing.assert_close(results(model, padded), expected, rtol=1e-4, atol=2e-5)
    for cell in search_cells(model).values():  # the cell as it would be without the mask
        cell.calls.open, cell._beside = {}, forgetful(cell)
    blind = results(model, padded)
    if side == "left" or family in ("bart", "roberta", "t5"):  # causal cells do not see padding on the right
        assert (blind - expected).abs().max() > 1e-3, "padding that flows would go unnoticed"


def forgetful(cell):
    proper = cell._beside
    return lambda h, call: proper(h, call._replace(mask=None))


def stacked(model, tasks, seed=7):
    draw = torch.Generator().manual_seed(seed)
    return {
        name: (p.detach() + 0.2 * torch.randn((tasks, *p.shape), generator=draw, dtype=torch.float64)).requires_grad_()
        for name, p in tarp_parameters(model).items()
    }


def gradients(loss, wanted):
    found = torch.autograd.grad(loss, list(wanted), allow_unused=True)
    return [torch.zeros_like(tensor) if g is None else g for g, tensor in zip(found, wanted, strict=True)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("per_layer", [False, True])
def test_tasks_at_once_equal_tasks_one_by_one(family, per_layer):
    model = cell_model(family, dtype=torch.float64, per_layer=per_layer, changes=NO_DROPOUT[family])
    batch, offsets = inputs(family, 5), [0, 1, 3, 5]
    batch["attention_mask"][1, -2:] = 0
    cells = len(search_cells(model))
    lead = (cells,) if per_layer else ()
    alpha = torch.rand(*lead, 3, 9, 6, dtype=torch.float64).softmax(-1).requires_grad_()
    stack = stacked(model, 3)
    probe = torch.randn(logits(model, batch).shape, dtype=torch.float64)
    with task_parallel(model, stack, torch.tensor(offsets)), architecture(model, alpha):
        together = model(**batch).logits
        found = gradients((together * probe).sum(), [*stack.values(), alpha])
    parameters = tarp_parameters(model)
    for task, (start, end) in enumerate(zip(offsets[:-1], offsets[1:], strict=True)):
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(stack[name][task])
        own = alpha.select(len(lead), task).detach().requires_grad_()
        with architecture(model, own):
            alone = model(**{name: tensor[start:end] for name, tensor in batch.items()}).logits
        torch.testing.assert_close(together[start:end], alone)
        wanted = gradients((alone * probe[start:end]).sum(), [*parameters.values(), own])
        for name, gradient, expected in zip([*stack, "alpha"], found, wanted, strict=True):
            got = gradient.select(len(lead), task) if name == "alpha" else gradient[task]
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-9)
            assert expected.any() or name.endswith(("k_proj.V", "k_proj.U", "k_proj.w1")), name
    with task_parallel(model, stack, torch.tensor(offsets)), architecture(model, alpha.flip(len(lead))):
        assert (model(**batch).logits - together).abs().max() > 1e-3, "another task's alpha would go unnoticed"
    names = [name for name in stack if "search_cell" in name]
    swapped = stack | {name: stack[name].flip(0) for name in names}
    with task_parallel(model, swapped, torch.tensor(offsets)), architecture(model, alpha):
        assert (model(**batch).logits - together).abs().max() > 1e-3, "another task's cells would go unnoticed"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("change", ["another", "in place"])
def test_offsets_remember_a_mask_only_while_it_stays_the_same(family, change):
    model, batch = cell_model(family, changes=NO_DROPOUT[family]), inputs(family, 5)
    batch["attention_mask"][1, -2:] = 0
    alpha, stack, offsets = torch.rand(3, 9, 6), stacked(model, 3), Offsets(torch.tensor([0, 1, 3, 5]))
    stack = {name: tensor.detach().float() for name, tensor in stack.items()}

    def found(offsets):
        with task_parallel(model, stack, offsets), architecture(model, alpha):
            return logits(model, batch)

    first = found(offsets)
    assert torch.equal(found(offsets), first) and torch.equal(found(Offsets(offsets.offsets)), first)
    if change == "another":
        batch["attention_mask"] = batch["attention_mask"].clone()  # which was written to as often
    batch["attention_mask"][3, -3:] = 0
    second = found(offsets)
    assert torch.equal(second, found(Offsets(offsets.offsets)))
    for cell in search_cells(model).values():
        cell._beside = forgetful(cell)
    blind = found(Offsets(offsets.offsets))
    assert (blind - second).abs().max() > 1e-4, "cells without the new mask would go unnoticed"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_remembers_the_call(family, reentrant):
    """Two calls with other masks and architectures, and both go back only after both blocks are closed."""
    model = cell_model(family, dtype=torch.float64, changes=NO_DROPOUT[family]).train()
    batch = inputs(family)
    other = {name: tensor.clone() for name, tensor in batch.items()}
    other["attention_mask"][:, 2:4] = 0
    alphas = [torch.rand(9, 6, dtype=torch.float64).requires_grad_() for _ in range(2)]
    wanted = [*tarp_parameters(model).values(), *alphas]
    if reentrant:  # which needs an input with a gradient, and does not serve autograd.grad
        model.get_input_embeddings().register_forward_hook(lambda _, __, output: output.requires_grad_())

    def found():
        losses = []
        for given, alpha in zip((batch, other), alphas, strict=True):
            with architecture(model, alpha):
                losses.append(model(**given).loss)
        for tensor in wanted:
            tensor.grad = None
        (losses[0] + 3 * losses[1]).backward()
        return [torch.zeros_like(tensor) if tensor.grad is None else tensor.grad.clone() for tensor in wanted]

    plain = found()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    calls, cell = [0], next(iter(search_cells(model).values()))
    proper = cell._beside
    cell._beside = lambda h, call: (calls.__setitem__(0, calls[0] + 1), proper(h, call))[1]
    recomputed = found()
    assert calls[0] == 4
    for gradient, expected in zip(recomputed, plain, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-8, atol=1e-10)
    assert alphas[0].grad.any() and alphas[1].grad.any()
    assert not any(c.calls.open or c.calls.inputs for c in search_cells(model).values())
    other["attention_mask"].fill_(1)
    assert (found()[-1] - plain[-1]).abs().max() > 1e-6, "the other call's mask would go unnoticed"


def test_reentrant_checkpointing_through_a_controller_is_refused():
    model = cell_model("llama").train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    alpha = torch.rand(9, 6, requires_grad=True).softmax(-1)
    with architecture(model, alpha), pytest.raises(ValueError, match="alpha: .*use_reentrant"):
        model(**inputs("llama"))
    with architecture(model, alpha.detach()):
        found = model(**inputs("llama")).logits
    model.gradient_checkpointing_disable()
    assert torch.equal(found, run(model, inputs("llama"), alpha.detach()))


@pytest.mark.parametrize("family", FAMILIES)
def test_copies_have_cells_of_their_own(family):
    model, batch, alpha = cell_model(family), inputs(family), one_hot(MIXED)
    expected = run(model, batch, alpha)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert torch.equal(run(twin, batch, alpha), expected)
        move(twin, seed=3)
        assert not torch.allclose(run(twin, batch, alpha), expected, atol=1e-3)
        assert torch.equal(run(model, batch, alpha), expected)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("per_layer", [False, True])
def test_files(family, per_layer, tmp_path):
    model, batch = cell_model(family, per_layer=per_layer, operations=("identity", "glu", "conv5")), inputs(family)
    cells = len(search_cells(model))
    alpha = F.one_hot(torch.arange(9 * cells).view(cells, 9) % 3, 3).float()
    set_architecture(model, alpha if per_layer else alpha[0])
    expected = logits(model, batch)
    save_tarp(model, tmp_path)
    fresh = load_tarp(base_model(family), tmp_path)
    assert torch.equal(logits(fresh, batch), expected) and fresh.tarp_config == model.tarp_config
    again = cell_model(family, per_layer=per_layer, operations=("identity", "glu", "conv5"))
    assert not torch.equal(logits(again, batch), expected)
    assert torch.equal(logits(load_tarp(again, tmp_path), batch), expected)
    with pytest.raises(ValueError, match="config: the saved adapter has search_cell"):
        load_tarp(cell_model(family), tmp_path)
    state = base_model(family)
    apply_tarp(state, model.tarp_config)
    state.load_state_dict(model.state_dict())
    assert torch.equal(logits(state, batch), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_counts(family):
    model, plain = cell_model(family), apply_tarp(base_model(family), TarpConfig(r=2))
    cells = search_cells(model)
    each = sum(parameter.numel() for parameter in next(iter(cells.values())).parameters())
    report, without = tarp_report(model), tarp_report(plain)
    assert report.trained == without.trained + each * len(cells) and report.base == without.base
    assert report.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert [cell.name for cell in report.cells] == list(cells)
    kinds = {False: "both sides", True: "causal"}
    for causal in {cell.causal for cell in cells.values()}:
        assert re.search(rf"search_cell +2 +16 → 5 +search cell, {kinds[causal]} +{2 * each:,}\n", str(report))


def test_default_is_none_everywhere():
    model, batch = cell_model("gpt2"), inputs("gpt2")
    assert torch.equal(logits(model, batch), run(model, batch, one_hot((0,) * 9)))
    with architecture(model, one_hot(MIXED)):
        with architecture(model, one_hot(PUBLISHED)):
            inner = logits(model, batch)
        outer = logits(model, batch)
    assert torch.equal(inner, run(model, batch, one_hot())) and torch.equal(outer, run(model, batch, one_hot(MIXED)))
    assert not torch.equal(inner, outer)


def test_layers_and_the_meta_device():
    assert list(search_cells(cell_model("llama", layers=[1]))) == ["model.layers.1.search_cell"]
    with torch.device("meta"):
        model = base_model("llama")
    apply_tarp(model, TarpConfig(search_cell=SearchCellConfig(width=4)))
    assert all(tensor.is_meta for cell in search_cells(model).values() for tensor in cell.state_dict().values())


@pytest.mark.parametrize("how", ["bfloat16", "autocast"])
@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision(family, how):
    model, batch, alpha = cell_model(family), inputs(family), one_hot(MIXED)
    exact, without = run(model, batch, alpha), run(model, batch, one_hot((0,) * 9))
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        found = run(model.to(torch.bfloat16) if how == "bfloat16" else model, batch, alpha)
    error, effect = (found.float() - exact).norm(), (without - exact).norm()
    assert error < 0.15 * effect, "what cells change must stand out from rounding"


def test_threads_do_not_see_each_others_calls():
    model, batch = cell_model("bart"), inputs("bart")
    masks = [batch["attention_mask"].clone() for _ in range(4)]
    for i, mask in enumerate(masks):
        mask[:, i : i + 2] = 0
    batches = [batch | {"attention_mask": mask} for mask in masks]
    with architecture(model, one_hot(MIXED)):
        expected = [logits(model, one) for one in batches]
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            for _ in range(10):
                for one, wanted in zip(pool.map(lambda given: logits(model, given), batches), expected, strict=True):
                    assert torch.equal(one, wanted)
    assert not torch.equal(expected[0], expected[1])
    assert not any(cell.calls.open or cell.calls.inputs for cell in search_cells(model).values())


def test_an_error_inside_a_call_leaves_nothing_behind():
    model, batch = cell_model("llama").train(), inputs("llama")
    before = gradients(model(**batch).loss, tarp_parameters(model).values())
    model.gradient_checkpointing_enable()
    own = model.model.layers[0]._gradient_checkpointing_func
    hook = model.model.layers[1].self_attn.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(**batch)
    hook.remove()
    calls = next(iter(search_cells(model).values())).calls
    assert not calls.open and not calls.inputs and model.model.layers[0]._gradient_checkpointing_func is own
    after = gradients(model(**batch).loss, tarp_parameters(model).values())
    assert all(torch.equal(one, other) for one, other in zip(after, before, strict=True))
    assert not calls.open and not calls.inputs


@pytest.mark.parametrize(
    ("alpha", "error", "words"),
    [
        (torch.rand(9, 5), ValueError, r"alpha: got shape \[9, 5\], expected \[9, 6\] or \[tasks, 9, 6\]|'tasks'"),
        (torch.rand(2, 2, 9, 6), ValueError, r"alpha: got shape \[2, 2, 9, 6\]"),
        (torch.ones(9, 6, dtype=torch.int64), TypeError, "alpha: got torch.int64, expected a float tensor"),
        (None, TypeError, "alpha: got NoneType"),
    ],
)
def test_bad_architectures(alpha, error, words):
    with pytest.raises(error, match=words), architecture(cell_model("gpt2"), alpha):
        pass
    with pytest.raises(error, match="alpha: got"):
        set_architecture(cell_model("gpt2"), alpha)


def test_what_cells_cannot_serve_is_refused():
    batch = inputs("llama")
    model, ids = cell_model("llama"), batch["input_ids"]
    before = logits(model, batch)
    with architecture(model, torch.rand(3, 9, 6)), pytest.raises(ValueError, match="alpha: .*needs segments"):
        model(**batch)
    with pytest.raises(ValueError, match=r"attention_mask: got shape \[3, 1, 7, 7\]"):
        model(input_ids=ids, attention_mask=torch.zeros(3, 1, 7, 7))
    with pytest.raises(ValueError, match="position_ids: .*one sequence in each row"):
        model(input_ids=ids, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2, 3]] * 3))
    assert torch.equal(logits(model, batch), before) and not next(iter(search_cells(model).values())).calls.open
    with pytest.raises(ValueError, match="model: has no search cell"), architecture(base_model("llama"), one_hot()):
        pass
    other = base_model("llama")
    other.config.model_type = "opt"
    config = TarpConfig(target_modules=["q_proj"], search_cell=SearchCellConfig())
    with pytest.raises(ValueError, match="search_cell: no place .* model type opt, expected one of gpt2"):
        apply_tarp(other, config)
    chunked = base_model("roberta")
    chunked.config.chunk_size_feed_forward = 2
    with pytest.raises(ValueError, match="search_cell: .*chunk_size_feed_forward = 0"):
        apply_tarp(chunked, TarpConfig(search_cell=SearchCellConfig()))
    assert not hasattr(chunked, "tarp_config")


def test_a_foreign_checkpoint_is_an_error_and_never_another_answer():
    model, batch = cell_model("llama").train(), inputs("llama")
    block = model.model.layers[0]
    forward = block.forward
    block.forward = lambda *a, **k: torch.utils.checkpoint.checkpoint(forward, *a, use_reentrant=False, **k)
    with architecture(model, one_hot()), pytest.raises(RuntimeError, match="checkpoint that does not remember"):
        model(**batch).loss.backward()
