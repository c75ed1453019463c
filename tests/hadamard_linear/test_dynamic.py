"""`hadamard_linear` with a factor made for each row: against the equation with every row's Φ written out."""

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

from tarp_kernels import Generator, hadamard_linear
from tarp_kernels.ops import task_products
from tarp_kernels.ops.hadamard_linear import dynamic
from tests.hadamard_linear.test_derivatives import allocations
from tests.lowrank_linear.backends import each_backend
from tests.threads import one_thread

HIDDEN = {"relu": torch.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh}
OUTPUT = {"none": lambda g: g, "sigmoid": torch.sigmoid, "tanh": torch.tanh, "softplus": F.softplus}


@dataclasses.dataclass(frozen=True)
class Case:
    """x [T, K], W [N, K], a factor of rank R, an additive half of rank r (0: none)."""

    shape: tuple[int, int, int] = (9, 12, 10)
    R: int = 3
    r: int = 2
    sigma: str = "diag"
    hidden: str | None = None  # hidden activation of an MLP generator
    output: str = "one_plus"
    raw: bool = False  # the published form, without the 1
    segments: tuple[int, ...] | None = None  # rows per task, whose sum replaces T
    dropout: float = 0.0
    dtype: torch.dtype = torch.float64

    def __str__(self) -> str:
        changed = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return ",".join(f"{n}={v}" for n, v in changed.items() if v != getattr(Case, n)) or "default"


def build(case: Case) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    draw = torch.Generator().manual_seed(0)
    T, K, N = case.shape
    lead: tuple[int, ...] = ()
    if case.segments is not None:
        T, lead = sum(case.segments), (len(case.segments),)
    S, s = (case.R, case.r) if case.sigma == "diag" else (case.R**2, case.r**2)
    shapes = {"x": (T, K), "weight": (N, K), "bias": (N,), "P": (*lead, N, case.R), "Q": (*lead, case.R, K)}
    shapes |= {"f1": (*lead, 5 if case.hidden else S, K), "fb": (*lead, 5 if case.hidden else S)}
    if case.hidden:
        shapes |= {"f2": (*lead, S, 5), "fc": (*lead, S)}
    if case.r:
        shapes |= {"V": (*lead, case.r, K), "U": (*lead, N, case.r), "w1": (*lead, s, K)}
    tensors = {
        name: torch.randn(shape, generator=draw, dtype=torch.float64).mul(0.5).to(case.dtype)
        for name, shape in shapes.items()
    }
    options: dict[str, Any] = {"activation": "none" if case.raw else "one_plus", "sigma": case.sigma, "scaling": -1.5}
    if case.segments is not None:
        options["segments"] = torch.tensor([0, *case.segments]).cumsum(0)
    if case.dropout:
        options["dropout"] = (case.dropout, 5)
    return tensors, options


def run(case: Case, tensors, backend=None, options=None) -> torch.Tensor:
    options = build(case)[1] if options is None else options
    additive = Generator(tensors["w1"], activation="one_plus") if case.r else None
    factor = Generator(
        *(tensors.get(name) for name in ("f1", "fb", "f2", "fc")), case.hidden or "silu", activation=case.output
    )
    arguments = (tensors.get(name) for name in ("x", "weight", "bias", "P", "Q", "V", "U"))
    return hadamard_linear(*arguments, additive, factor_generator=factor, **options, backend=backend)


def middle(case: Case, tensors, task) -> torch.Tensor:
    """Σ1 of every row, [T, R, R], as if all rows were those of one task."""
    g = F.linear(tensors["x"], tensors["f1"][task], tensors["fb"][task])
    if case.hidden:
        g = F.linear(HIDDEN[case.hidden](g), tensors["f2"][task], tensors["fc"][task])
    raw = torch.diag_embed(g) if case.sigma == "diag" else g.unflatten(-1, (case.R, case.R))
    if case.output == "one_plus":
        return torch.eye(case.R, dtype=g.dtype) + raw
    s = OUTPUT[case.output](g)
    return torch.diag_embed(s) if case.sigma == "diag" else s.unflatten(-1, (case.R, case.R))


def oracle(case: Case, tensors, mistake: str = "") -> torch.Tensor:
    """y with Φ [T, N, K] written out."""
    _, options = build(case)
    x, weight = tensors["x"], tensors["weight"]
    rows = []
    ends = options["segments"].tolist() if case.segments is not None else [0, x.shape[0]]
    for i, (start, end) in enumerate(zip(ends[:-1], ends[1:], strict=True)):
        task: Any = ... if case.segments is None else (i + 1) % (len(ends) - 1) if mistake == "neighbour" else i
        sigma = middle(case, tensors, task)[start:end]
        if mistake == "transposed":
            sigma = sigma.mT
        if mistake == "static":
            sigma = torch.eye(case.R, dtype=x.dtype).expand_as(sigma)
        if mistake == "last term dropped":
            sigma = torch.cat((sigma[..., :-1], torch.zeros_like(sigma[..., -1:])), -1)
        if mistake == "constant middle":
            sigma = sigma.detach()
        phi = torch.einsum("na,tab,bk->tnk", tensors["P"][task], sigma, tensors["Q"][task])
        if case.raw == (mistake == "the other form"):
            phi = phi + 1
        rows.append(torch.einsum("tnk,nk,tk->tn", phi, weight, x[start:end]))
    y = torch.cat(rows) + tensors["bias"]
    if case.r and mistake != "no additive half":
        additive = Generator(tensors["w1"], activation="one_plus")
        kept = {name: options[name] for name in ("sigma", "scaling", "segments", "dropout") if name in options}
        from tarp_kernels.ops.lowrank_linear.reference import lowrank_term

        y = y + lowrank_term(x, tensors["V"], tensors["U"], additive, **kept)
    return y


CASES = [
    Case(),
    Case(sigma="full", hidden="gelu"),
    Case(sigma="full", segments=(4, 0, 1, 6), dropout=0.4),
    Case(segments=(2, 9), hidden="silu", output="tanh", raw=True),
    Case(raw=True, sigma="full", output="softplus", r=0),
    Case(segments=(0, 3), output="sigmoid", r=0, hidden="relu"),
    Case(shape=(1, 1, 1), R=1, r=1, hidden="tanh"),
]


def results(case: Case, tensors, function) -> dict[str, torch.Tensor]:
    """y, and every gradient along a fixed direction."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    y = function(case, leaves)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y.dtype)
    found = torch.autograd.grad(y, list(leaves.values()), dy, allow_unused=True)
    zeros = (torch.zeros_like(t) if g is None else g for g, t in zip(found, leaves.values(), strict=True))
    return {"y": y.detach()} | dict(zip(leaves, zeros, strict=True))


def errors(found, wanted) -> dict[str, float]:
    """Norm of each error in units of the result's norm."""
    return {
        name: float((found[name].double() - want).norm() / want.norm()) for name, want in wanted.items() if want.any()
    }


TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_values_and_gradients(case, dtype):
    tensors, _ = build(dataclasses.replace(case, dtype=dtype))
    found = results(case, tensors, run)
    assert {name: value.dtype for name, value in found.items()} == dict.fromkeys(found, dtype)
    wanted = results(case, {name: tensor.double() for name, tensor in tensors.items()}, oracle)
    assert all(error <= TOLERANCES[dtype] for error in errors(found, wanted).values())


@pytest.mark.parametrize("case", CASES[:6], ids=str)
def test_the_widest_tolerance_lets_no_mistake_pass(case):
    tensors, _ = build(case)
    wanted = results(case, tensors, oracle)
    mistakes = {"static": ("y", "x", "P", "f1"), "last term dropped": ("y", "x", "P", "Q"), "the other form": ("y",)}
    mistakes["constant middle"] = ("x", "f1")
    if case.sigma == "full":
        mistakes["transposed"] = ("y", "P", "Q")
    if case.segments and min(case.segments):
        mistakes["neighbour"] = ("y", "P", "f1")
    if case.r:
        mistakes["no additive half"] = ("y", "V", "w1")
    for mistake, names in mistakes.items():
        seen = errors(results(case, tensors, lambda c, t, m=mistake: oracle(c, t, m)), wanted)
        assert all(seen[name] > TOLERANCES[torch.bfloat16] for name in names), (mistake, seen)


@pytest.mark.parametrize("case", CASES[:6], ids=str)
def test_first_and_second_derivatives(case):
    tensors, _ = build(dataclasses.replace(case, shape=(2, 3, 2), R=2, r=min(case.r, 1)))
    if case.segments:
        case = dataclasses.replace(case, segments=(1, 0, 2))
    case = dataclasses.replace(case, shape=(2, 3, 2), R=2, r=min(case.r, 1))
    tensors, _ = build(case)
    names = list(tensors)

    def function(*values):
        return run(case, dict(zip(names, values, strict=True)))

    leaves = tuple(tensor.requires_grad_() for tensor in tensors.values())
    with one_thread():
        assert gradcheck(function, leaves) and gradgradcheck(function, leaves)


@each_backend
def test_every_backend_does_the_rest(backend):
    case = dataclasses.replace(CASES[2], dtype=torch.float32)
    tensors, _ = build(case)
    wanted = results(case, {name: tensor.double() for name, tensor in tensors.items()}, oracle)
    found = results(case, tensors, lambda c, t: run(c, t, backend))
    assert all(error <= TOLERANCES[torch.float32] for error in errors(found, wanted).values())


@pytest.mark.parametrize("case", [CASES[0], CASES[2]], ids=str)
def test_compiled_without_a_break(case):
    tensors, options = build(case)
    torch._dynamo.reset()
    compiled = torch.compile(lambda given: run(case, given, options=options), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(tensors), run(case, tensors))
    wanted = results(case, tensors, run)
    found = results(case, tensors, lambda _, given: compiled(given))
    assert all(error <= TOLERANCES[torch.float64] for error in errors(found, wanted).values())
    torch._dynamo.reset()


@pytest.mark.parametrize("kept_whole", [False, True])
def test_neither_a_factor_nor_all_terms_are_kept(kept_whole, monkeypatch):
    if kept_whole:  # autograd's own backward of the same sum
        monkeypatch.setattr(dynamic._Terms, "apply", lambda *arguments: dynamic._Terms.forward(None, *arguments))
    T, K, N, R = 64, 96, 128, 16
    tensors, _ = build(Case(shape=(T, K, N), R=R, dtype=torch.float32))
    weight = tensors.pop("weight")
    kept: list[int] = []

    def pack(tensor):
        kept.append(tensor.numel())
        return tensor

    def forward_and_backward():
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = run(Case(shape=(T, K, N), R=R), leaves | {"weight": weight})
        torch.autograd.grad(y.sum(), list(leaves.values()))

    most = allocations(forward_and_backward)
    # x thrice at most (in its own dtype and for the generators), W, adapters, Σ; not y's size for each b
    few = 4 * T * K + 3 * N * K + 10 * R * (N + K)
    assert few < R * T * N / 1.3 and (sum(kept) <= few) != kept_whole
    assert most <= T * N * R, "bytes: a quarter of R tensors of y's size, where a factor for each row has T N K numbers"


def isolates_tasks() -> bool:
    """Whether what is not finite in the last task's tensors leaves the results of the others as they were."""
    case = dataclasses.replace(CASES[2], dtype=torch.float32, dropout=0.0)
    tensors, options = build(case)
    before = results(case, tensors, run)
    start, same = options["segments"][3], []
    for name, value in (("P", "nan"), ("Q", "inf"), ("f1", "nan"), ("P", "-inf")):
        broken = dict(tensors) | {name: tensors[name].clone()}
        broken[name][3].fill_(float(value))
        after = results(case, broken, run)
        assert not after["y"][start:].isfinite().all()
        same += [torch.allclose(after[n][:start], before[n][:start], rtol=1e-4, atol=1e-5) for n in ("y", "x")]
        adapters = ("P", "Q", "f1", "V", "U")
        same += [torch.allclose(after[n][:3], before[n][:3], rtol=1e-4, atol=1e-5) for n in adapters]
    return all(same)


def test_a_task_that_diverges_leaves_the_others_alone(monkeypatch):
    assert isolates_tasks()
    monkeypatch.setattr(task_products, "_finite", lambda tensor: tensor)
    assert not isolates_tasks()


@pytest.mark.parametrize("segments", [None, (30, 0, 90)])
def test_the_same_bits_on_every_call(segments):
    case = Case(shape=(120, 64, 48), segments=segments, sigma="full", dtype=torch.float32)
    tensors, _ = build(case)
    first, second = results(case, tensors, run), results(case, tensors, run)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_under_autocast_the_adapter_keeps_its_precision():
    case = dataclasses.replace(CASES[1], dtype=torch.float32)
    tensors, _ = build(case)
    wanted = results(case, {name: tensor.double() for name, tensor in tensors.items()}, oracle)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = results(case, tensors, run)
    assert found["y"].dtype == torch.bfloat16 and found["P"].dtype == torch.float32
    assert all(error <= TOLERANCES[torch.bfloat16] for error in errors(found, wanted).values())


def test_rows_find_their_tasks():
    tasks = task_products.tasks_of_rows(torch.zeros(6, 1), torch.tensor([0, 0, 2, 2, 5, 6, 6], dtype=torch.int32))
    assert tasks.tolist() == [1, 1, 3, 3, 3, 4]
    short = task_products.tasks_of_rows(torch.zeros(3, 1), torch.tensor([0, 1, 2]))
    assert short.tolist() == [0, 1, 1], "offsets that end early are clamped"


BAD = [
    ({"activation": "centred_softplus"}, "activation: got 'centred_softplus' with a factor_generator"),
    ({"P": torch.zeros(2, 10, 3), "Q": torch.zeros(3, 6)}, r"P: got shape \[2, 10, 3\] with a factor_generator"),
    ({"f1": torch.zeros(4, 12)}, r"factor_generator.w1: got shape \[4, 12\], expected \[3, 12\]"),
    ({"f1": torch.zeros(3, 12, dtype=torch.float64)}, "factor_generator.w1: got dtype torch.float64"),
    ({"Q": torch.zeros(4, 12)}, "Q: got shape"),
    ({"bias": torch.zeros(3)}, "bias: got shape"),
    ({"backend": "fast"}, "fast"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_input_is_named(change, message):
    tensors, _ = build(Case(dtype=torch.float32, r=0))
    given = tensors | {"activation": "one_plus", "backend": None} | change
    arguments = (given[name] for name in ("x", "weight", "bias", "P", "Q"))
    with pytest.raises((TypeError, ValueError), match=message):
        hadamard_linear(
            *arguments,
            activation=given["activation"],
            backend=given["backend"],
            factor_generator=Generator(given["f1"], activation="one_plus"),
        )
    with pytest.raises(TypeError, match="factor_generator: got int"):
        hadamard_linear(*(tensors[n] for n in ("x", "weight", "bias", "P", "Q")), activation="none", factor_generator=3)
