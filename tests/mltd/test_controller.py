"""The controller: task embeddings without padding, one-hot forward and soft backward, gradients from a whole model."""

import itertools
import math
import random
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from matplotlib.backends.backend_agg import FigureCanvasAgg

import mltd.genotypes as pictures
from mltd import (
    Controller,
    InnerConfig,
    Temperature,
    adapt,
    draw_genotype,
    entropy,
    genotype,
    straight_through,
    support_embeddings,
    task_embedding,
)
from mltd.tasks import Task
from tarp_kernels import SearchCellConfig, architecture
from tests.mltd.conftest import VOCABULARY, random_example, random_tasks, tarp_model
from tests.models.tiny import base_model, inputs
from tests.models.tiny import tarp_model as family_model

PUBLISHED = torch.eye(6)[[5, 5, 0, 5, 1, 4, 5, 1, 1]]


def with_cells(family="llama", dtype=torch.float32, **cells):
    return tarp_model(family, dtype, search_cell=SearchCellConfig(width=4, **cells))


# --- the task embedding -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_embedding_is_the_mean_over_the_support_tokens(family):
    model, draw = with_cells(family), random.Random(0)
    query = [random_example(draw, 5, 1)]
    tasks = [Task(f"t{i}", [random_example(draw, n, 1) for n in (4, 9, 6)], query) for i in range(2)]
    found = support_embeddings(model, tasks)
    table = model.get_input_embeddings().weight
    for task, one in zip(tasks, found, strict=True):
        ids = torch.tensor([token for example in task.support for token in example.input_ids])
        torch.testing.assert_close(one, table[ids].mean(0), rtol=1e-5, atol=1e-6)
        with_padding = torch.cat([ids, torch.zeros(3 * 9 - len(ids), dtype=torch.int64)])
        assert (table[with_padding].mean(0) - one).abs().max() > 1e-2, "padding would go unnoticed"
    assert not found.requires_grad and not torch.allclose(found[0], found[1])


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_embedding_from_an_encoder_is_the_base_models(family):
    model, base = family_model(family, search_cell=SearchCellConfig(width=4)).train(), base_model(family)
    batch = inputs(family)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    mask[0, -3:] = 0
    found = task_embedding(model, ids, mask)
    states = base.get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(found, states[mask.bool()].mean(0), rtol=1e-4, atol=1e-5)
    assert (found - states.flatten(0, 1).mean(0)).abs().max() > 1e-2, "padding would go unnoticed"
    assert (found - model.eval().get_encoder()(ids, mask).last_hidden_state[mask.bool()].mean(0)).abs().max() > 1e-2
    torch.testing.assert_close(task_embedding(base, ids, mask), found, rtol=1e-4, atol=1e-5)


def test_embedding_of_nothing_is_an_error():
    ids = torch.ones(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="attention_mask: got padding alone"):
        task_embedding(with_cells(), ids, torch.zeros_like(ids))
    with pytest.raises(ValueError, match=r"attention_mask: got shape \[2, 2\], expected \[2, 3\]"):
        task_embedding(with_cells(), ids, ids[:, :2])


# --- from logits to an architecture -----------------------------------------------------------------------------------


@pytest.mark.parametrize("gumbel", [True, False])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_forward_is_one_hot_and_backward_is_soft(gumbel, temperature):
    logits = torch.randn(3, 9, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
    probe = torch.randn(3, 9, 6)
    seeded = [torch.Generator().manual_seed(1) for _ in range(2)]
    alpha = straight_through(logits, temperature, gumbel=gumbel, generator=seeded[0])
    assert set(alpha.unique().tolist()) == {0.0, 1.0} and (alpha.sum(-1) == 1).all()
    noise = -torch.empty_like(logits).exponential_(generator=seeded[1]).log() if gumbel else 0
    soft = ((logits + noise) / temperature).softmax(-1)
    assert torch.equal(alpha.argmax(-1), soft.argmax(-1))
    found, expected = (torch.autograd.grad((x * probe).sum(), logits)[0] for x in (alpha, soft))
    torch.testing.assert_close(found, expected)
    assert (found - torch.autograd.grad((logits.softmax(-1) * probe).sum(), logits)[0]).abs().max() > 1e-4 or (
        temperature == 1.0 and not gumbel
    )
    if not gumbel:
        assert torch.equal(alpha.argmax(-1), logits.argmax(-1))


def test_samples_follow_the_logits_and_seeds_reproduce_them():
    logits = torch.tensor([[0.0, 1.0, -1.0, 2.0, 0.5, -2.0]]).expand(20_000, 6)
    samples = straight_through(logits, 0.5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(samples.mean(0), logits[0].softmax(-1), rtol=0, atol=0.012)
    assert (samples.mean(0) - (logits[0] / 0.5).softmax(-1)).abs().max() > 0.1, "other odds would go unnoticed"
    again = straight_through(logits, 0.5, generator=torch.Generator().manual_seed(0))
    other = straight_through(logits, 0.5, generator=torch.Generator().manual_seed(1))
    assert torch.equal(samples, again) and not torch.equal(samples, other)
    torch.manual_seed(5)
    one = straight_through(logits)
    torch.manual_seed(5)
    assert torch.equal(one, straight_through(logits))


def test_entropy():
    assert entropy(torch.zeros(9, 6)).item() == pytest.approx(math.log(6))
    assert entropy(100 * torch.eye(6)).item() == pytest.approx(0, abs=1e-6)
    logits = torch.randn(9, 6, dtype=torch.float64)
    assert entropy(logits).item() == pytest.approx(torch.distributions.Categorical(logits=logits).entropy().mean())
    logits.requires_grad_()
    entropy(logits).backward()
    p = logits.detach().softmax(-1)
    rows = -(p * p.log()).sum(-1, keepdim=True)
    torch.testing.assert_close(logits.grad, -p * (p.log() + rows) / 9)


def test_temperature_falls_exponentially_and_stays():
    schedule = Temperature(4.0, 0.25, 4)
    assert [schedule.at(step) for step in (0, 1, 2, 4, 9)] == pytest.approx([4.0, 2.0, 1.0, 0.25, 0.25])
    for name in ("start", "end", "steps"):
        with pytest.raises(ValueError, match=f"{name}: got 0, expected more than 0"):
            Temperature(**{name: 0})
    with pytest.raises(ValueError, match="temperature: got 0"):
        straight_through(torch.zeros(9, 6), 0)


# --- with a model -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize("operations", [("none", "identity", "linear", "glu", "conv3", "conv5"), ("identity", "conv3")])
def test_the_gradient_of_a_loss_reaches_the_controller(per_layer, operations):
    """∂L/∂alpha is that of finite differences, and reaches the controller by the softmax's closed form."""
    model = with_cells("gpt2", torch.float64, per_layer=per_layer, operations=operations)  # llama's norm is float32
    torch.manual_seed(0)
    controller = Controller.for_model(model).double()
    controller.check_fits(model)
    ids = torch.randint(3, VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(0))
    logits = controller(task_embedding(model, ids))
    assert list(logits.shape) == [2] * per_layer + [9, len(operations)]
    alpha = straight_through(logits, 2.0, gumbel=False)
    parameters = list(controller.parameters())

    def loss(alpha):
        with architecture(model, alpha):  # transformers' own loss is float32, too coarse for differences
            return F.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    found = torch.autograd.grad(loss(alpha), parameters, retain_graph=True)
    by_operation = differences(loss, alpha.detach())
    probabilities = (logits / 2.0).softmax(-1).detach()
    by_logit = probabilities * (by_operation - (probabilities * by_operation).sum(-1, keepdim=True)) / 2.0
    expected = torch.autograd.grad(logits, parameters, by_logit)
    for gradient, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-8)
        assert wanted.abs().max() > 1e-5, "zeros would go unnoticed"
    leaf = alpha.detach().requires_grad_()
    (at_alpha,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(at_alpha, by_operation, rtol=1e-4, atol=1e-8)
    heard = by_operation[..., 1 if "none" in operations else 0 :].abs()  # every candidate, selected or not
    assert heard.min() > 1e-7


def differences(loss, alpha: torch.Tensor, step: float = 1e-5) -> torch.Tensor:
    """∂loss/∂alpha by central differences, one entry of alpha after the other."""
    found = torch.empty_like(alpha)
    with torch.no_grad():
        for entry in range(alpha.numel()):
            move = torch.zeros(alpha.numel(), dtype=alpha.dtype).index_fill_(0, torch.tensor(entry), step)
            move = move.view_as(alpha)
            found.view(-1)[entry] = (loss(alpha + move) - loss(alpha - move)) / (2 * step)
    return found


def test_tasks_adapt_at_once_with_an_architecture_each():
    model, tasks = with_cells(), list(random_tasks(3))
    alphas = torch.stack([PUBLISHED, PUBLISHED.roll(1, 1), torch.eye(6)[[1] * 9]])
    config = InnerConfig(steps=3, optimizer="sgd", lr=0.05)
    with architecture(model, alphas):
        together = adapt(model, tasks, config)
    with architecture(model, alphas.flip(0)):
        swapped = adapt(model, tasks, config)
    for i, task in enumerate(tasks):
        with architecture(model, alphas[i]):
            alone = adapt(model, [task], config)
        for name, tensor in alone.items():
            torch.testing.assert_close(together[name][i], tensor[0], rtol=1e-4, atol=1e-6)
    assert max((together[name] - swapped[name]).abs().max() for name in together) > 1e-3


def test_shapes_and_size():
    controller = Controller(768)
    assert sum(p.numel() for p in controller.parameters()) == 768 * 128 + 128 + 128 * 54 + 54
    assert controller(torch.randn(768)).shape == (9, 6) and controller(torch.randn(5, 768)).shape == (5, 9, 6)
    layered, embedding = Controller(8, layers=3), torch.randn(5, 8)
    assert layered(embedding).shape == (3, 5, 9, 6)
    torch.testing.assert_close(layered(embedding)[:, 2], layered(embedding[2]))
    with pytest.raises(ValueError, match=r"embedding: got shape \[4\], expected \[..., 8\]"):
        layered(torch.randn(4))


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (Controller(24, operations=("none", "conv3")), "controller: has operations=.'none', 'conv3'., expected"),
        (Controller(24, layers=2), "controller: has layers=2, expected None"),
        (Controller(16), "controller: has hidden_size=16, expected 24"),
    ],
)
def test_a_controller_of_other_cells_is_refused(other, words):
    with pytest.raises(ValueError, match=words):
        other.check_fits(with_cells())


# --- genotypes --------------------------------------------------------------------------------------------------------


def test_genotype_in_words():
    assert genotype(PUBLISHED).splitlines() == [
        "n0 = conv5(s0) + conv5(s1)",
        "n1 = conv5(s1) + n0",
        "n2 = conv3(s0) + conv5(s1) + n0 + n1",
        "out = h + Linear((n0 + n1 + n2) / 3)",
    ]
    assert genotype(torch.eye(6)[[0] * 9]).startswith("n0 = 0\nn1 = 0\nn2 = 0\n")
    two = genotype(torch.eye(2)[[0, 1, 0, 1, 0, 1, 0, 1, 1]], ("identity", "glu"))
    assert two.startswith("n0 = s0 + glu(s1)\nn1 = s0 + glu(s1) + n0\nn2 = glu(s0) + s1 + glu(n0) + glu(n1)\n")
    with pytest.raises(ValueError, match=r"alpha: got shape \[2, 9, 6\], expected \[9, 6\]"):
        genotype(torch.rand(2, 9, 6))


def test_picture_shows_every_edge_and_no_labels_overlap(tmp_path, monkeypatch):
    figures = []
    save = pictures._save
    monkeypatch.setattr(pictures, "_save", lambda figure, path: (figures.append(figure), save(figure, path)))
    for operation, ending in itertools.product(range(6), ("png", "svg")):
        draw_genotype(torch.eye(6)[[operation] * 9], tmp_path / f"cell{operation}.{ending}")
    draw_genotype(PUBLISHED, str(tmp_path / "published.png"))
    assert (tmp_path / "cell0.png").read_bytes()[:4] == b"\x89PNG" and "<svg" in (tmp_path / "cell5.svg").read_text()
    shown = Counter(text.get_text() for text in figures[-1].axes[0].texts)
    assert (shown["conv5"], shown["conv3"], shown["identity"], shown["none"]) == (4, 1, 3, 1)
    for figure in figures:
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        renderer = canvas.get_renderer()
        boxes = [
            (text.get_bbox_patch() or text).get_window_extent(renderer)
            for text in figure.axes[0].texts
            if text.get_text()
        ]
        assert len(boxes) == 6 + 9 + 1
        assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
        assert all(figure.bbox.containsx(box.x0) and figure.bbox.containsx(box.x1) for box in boxes)
