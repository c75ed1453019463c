"""Adapters on disk: every bit comes back, a crash never mixes two of them, and what does not fit is refused."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tarp_kernels import TarpConfig, apply_tarp, load_tarp, save_tarp, tarp_parameters
from tests.models.tiny import FAMILIES, base_model, inputs, logits, move, tarp_model

RICH = {
    "sigma": "full",
    "generator": "mlp",
    "generator_bias": True,
    "train_layernorm": True,
    "target_modules": ["v_proj", "down_proj"],
    "layers": (0, 1),
    "rank_pattern": {r"layers\.0\..*": 5, "down_proj": 2},
    "scaling": 1.5,
}


def values(model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in tarp_parameters(model).items()}


def same(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]) for name in first
    )


def snapshot(model):
    """Everything about a model that a failed load must leave alone."""
    modules = [(name, id(module)) for name, module in model.named_modules()]
    parameters = [(name, id(p), p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()]
    return modules, parameters, vars(model).get("tarp_config")


def unchanged(before, after) -> bool:
    tensors = zip(before[1], after[1], strict=True)
    return before[::2] == after[::2] and all(a[:3] == b[:3] and torch.equal(a[3], b[3]) for a, b in tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip_bit_for_bit(family, dtype, tmp_path):
    model = tarp_model(family, dtype=dtype, train_layernorm=True)
    save_tarp(model, tmp_path / "new" / "folder")
    other = load_tarp(base_model(family).to(dtype), tmp_path / "new" / "folder")
    assert same(values(other), values(model)) and other.tarp_config == model.tarp_config
    assert torch.equal(logits(other, inputs(family)), logits(model, inputs(family)))
    assert {n for n, p in other.named_parameters() if p.requires_grad} == set(tarp_parameters(model))


def test_every_field_of_the_configuration_comes_back(tmp_path):
    model = tarp_model("llama", **RICH)
    save_tarp(model, tmp_path)
    other = load_tarp(base_model("llama"), tmp_path)
    assert same(values(other), values(model))
    assert other.tarp_config.rank_pattern == RICH["rank_pattern"] and other.tarp_config.layers == [0, 1]
    assert torch.equal(logits(other, inputs("llama")), logits(model, inputs("llama")))
    save_tarp(other, tmp_path / "again")
    assert same(values(load_tarp(base_model("llama"), tmp_path / "again")), values(model))


def test_an_adapted_model_is_filled_in_place(tmp_path):
    model, other = tarp_model("llama", **RICH), tarp_model("llama", **RICH, moved=False)
    save_tarp(model, tmp_path)
    parameters = {name: id(parameter) for name, parameter in tarp_parameters(other).items()}
    assert load_tarp(other, tmp_path) is other
    assert same(values(other), values(model))
    assert {name: id(parameter) for name, parameter in tarp_parameters(other).items()} == parameters


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_same_base_in_another_precision_is_the_same_base(dtype, tmp_path):
    save_tarp(tarp_model("llama", train_layernorm=True), tmp_path / "float32")
    low = load_tarp(base_model("llama").to(dtype), tmp_path / "float32")
    assert {parameter.dtype for parameter in tarp_parameters(low).values()} == {dtype}
    save_tarp(low, tmp_path / "low")
    load_tarp(base_model("llama"), tmp_path / "low")
    load_tarp(base_model("llama").to(dtype).float(), tmp_path / "low")


def test_the_folder_holds_one_pair_and_keeps_other_files(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / "model.safetensors").write_text("mine too")
    model = tarp_model("gpt2")
    for seed in range(3):
        save_tarp(move(model, seed), tmp_path)
    description = json.loads((tmp_path / "tarp.json").read_text())
    names = {"README.md", "model.safetensors", "tarp.json", description["tensors"]["file"]}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert description["format_version"] == 1 and description["library_version"]
    assert set(load_file(tmp_path / description["tensors"]["file"])) == set(tarp_parameters(model))


# --- crashes ----------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """From this moment on nothing reaches the disk, as after kill -9: clean-up code must not help."""


STEPS = ("open", "write", "fsync", "replace", "unlink")


def die_at(patch, step: int) -> list[str]:
    """The step-th operation on files does not happen, a write happens by half, and none after it happens either."""
    done: list[str] = []

    def guard(name, original):
        def operation(*arguments, **options):
            done.append(name)
            if len(done) > step:
                if name == "write" and len(done) == step + 1:
                    original(arguments[0][: len(arguments[0]) // 2])
                raise Killed
            return original(*arguments, **options)

        return operation

    def opening(path, mode, original=open):
        file = guard("open", original)(path, mode, buffering=0)
        shell = type("File", (), {"__enter__": lambda self: self, "__exit__": lambda self, *_: file.close()})()
        shell.write, shell.flush, shell.fileno = guard("write", file.write), file.flush, file.fileno
        return shell

    import tarp_kernels.files as files

    patch.setattr(files, "open", opening, raising=False)
    patch.setattr(files.os, "fsync", guard("fsync", os.fsync))
    patch.setattr(files.os, "replace", guard("replace", os.replace))
    patch.setattr(files.Path, "unlink", guard("unlink", files.Path.unlink))
    return done


def test_killed_at_any_step_the_old_or_the_new_adapter_is_there(tmp_path, monkeypatch):
    model = tarp_model("gpt2", layers=[0])
    old = values(model)
    new = values(move(model, seed=8))
    seen, operations = [], None
    for step in range(100):
        folder = tmp_path / str(step)
        for name, parameter in tarp_parameters(model).items():
            parameter.data.copy_(old[name])
        save_tarp(model, folder)
        for name, parameter in tarp_parameters(model).items():
            parameter.data.copy_(new[name])
        with monkeypatch.context() as patch:
            operations = die_at(patch, step)
            try:
                save_tarp(model, folder)
                finished = True
            except Killed:
                finished = False
        found = values(load_tarp(base_model("gpt2"), folder))
        assert same(found, old) or same(found, new), f"a mixture after step {step}: {operations}"
        seen.append(same(found, new))
        save_tarp(model, folder)  # the next save works and cleans up
        assert same(values(load_tarp(base_model("gpt2"), folder)), new)
        assert len(list(folder.iterdir())) == 2
        if finished:
            break
    assert set(operations) == set(STEPS) and len(seen) > 8
    assert seen == sorted(seen) and not seen[0] and seen[-1], "the new adapter counts from one step on"


def test_a_disk_that_fills_up_leaves_the_old_adapter(tmp_path, monkeypatch):
    model = tarp_model("gpt2")
    save_tarp(model, tmp_path)
    old = values(model)
    move(model, seed=8)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(os, "fsync", full)
        save_tarp(model, tmp_path)
    assert same(values(load_tarp(base_model("gpt2"), tmp_path)), old)


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    save_tarp(tarp_model("llama"), tmp_path)
    return tmp_path


def refused(folder, error, *words, model=None, **options):
    for target in [model] if model is not None else [base_model("llama"), tarp_model("llama", seed=0, moved=False)]:
        before = snapshot(target)
        with pytest.raises(error) as caught:
            load_tarp(target, folder, **options)
        for word in words:
            assert word in str(caught.value)
        assert unchanged(before, snapshot(target))


def edit(folder, **changes):
    path = folder / "tarp.json"
    description = json.loads(path.read_text())
    path.write_text(json.dumps(description | changes))


def tensor_file(folder):
    return folder / json.loads((folder / "tarp.json").read_text())["tensors"]["file"]


def rewrite_tensors(folder, change):
    """Other tensors with a valid hash, as a tool that edits adapters would leave them."""
    import hashlib

    path = tensor_file(folder)
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    data = path.read_bytes()
    edit(folder, tensors={"file": path.name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()})


def test_another_base_of_the_same_shape_is_noticed(saved):
    refused(saved, ValueError, "same shapes, other weights", "check_base=False", model=base_model("llama", seed=9))
    other = load_tarp(base_model("llama", seed=9), saved, check_base=False)
    assert same(values(other), values(tarp_model("llama")))


def test_a_base_with_one_other_matrix_is_noticed(saved):
    model = base_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1.01)
    refused(saved, ValueError, "1 of ", "model.layers.1.mlp.up_proj.weight", model=model)


def test_a_base_with_other_trained_norms_is_noticed(tmp_path):
    save_tarp(tarp_model("llama", train_layernorm=True), tmp_path)
    model = base_model("llama")
    with torch.no_grad():
        model.model.norm.weight.mul_(1.01)
    refused(tmp_path, ValueError, "model.norm.weight", model=model)


def test_another_kind_of_base_is_noticed(saved):
    refused(saved, ValueError, "'llama'", "'gpt2'", model=base_model("gpt2"))
    refused(saved, ValueError, "only the saved base", "model.layers.1.", model=base_model("llama", num_hidden_layers=1))
    refused(saved, ValueError, "mlp", "24x16", "40x16", model=base_model("llama", intermediate_size=40))
    refused(saved, ValueError, "saved from LlamaForCausalLM", "loaded into LlamaModel", model=base_model("llama").model)


def test_unchecked_base_must_still_have_the_layers(saved):
    off = {"check_base": False}
    narrower = base_model("llama", intermediate_size=40)
    refused(saved, ValueError, "has shape [24, 3]", "expected [40, 3]", model=narrower, **off)
    refused(saved, ValueError, "model.layers.1.", model=base_model("llama", num_hidden_layers=1), **off)
    refused(saved, ValueError, "model.layers.2.", "missing", model=base_model("llama", num_hidden_layers=3), **off)


def test_another_configuration_than_the_models_own(saved):
    refused(saved, ValueError, "r=3", "r=4", model=tarp_model("llama", r=4))
    refused(saved, ValueError, "sigma='diag'", model=tarp_model("llama", sigma="full"))


def test_missing_files(saved, tmp_path):
    refused(tmp_path / "nowhere", FileNotFoundError, "nowhere", "save_tarp")
    tensor_file(saved).unlink()
    refused(saved, FileNotFoundError, "safetensors", "tarp.json")


@pytest.mark.parametrize("keep", [0, 1, 100, -1])
def test_truncated_tensors(saved, keep):
    path = tensor_file(saved)
    path.write_bytes(path.read_bytes()[:keep])
    refused(saved, ValueError, "truncated", "bytes")


def test_one_flipped_bit(saved):
    path = tensor_file(saved)
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(data)
    refused(saved, ValueError, "hash")


@pytest.mark.parametrize("keep", [0, 50, -2])
def test_truncated_description(saved, keep):
    path = saved / "tarp.json"
    path.write_bytes(path.read_bytes()[:keep])
    refused(saved, ValueError, "tarp.json", "no whole JSON")


def test_foreign_and_future_descriptions(saved):
    edit(saved, format_version=2, library_version="9.0")
    refused(saved, ValueError, "format version 2", "reads 1", "tarp_kernels 9.0")
    edit(saved, format_version=1, format="something else")
    refused(saved, ValueError, "no TARP adapter")
    (saved / "tarp.json").write_text("[]")
    refused(saved, ValueError, "no TARP adapter")


def test_description_with_a_part_missing_or_unknown(saved):
    config = json.loads((saved / "tarp.json").read_text())["config"]
    edit(saved, config=config | {"warp": 9})
    refused(saved, ValueError, "'warp'")
    edit(saved, config=config | {"r": 0})
    refused(saved, ValueError, "r: got 0")
    edit(saved, config=None)
    refused(saved, ValueError, "lacks 'config'")


def test_tensors_that_do_not_fit(saved):
    name = "model.layers.0.mlp.up_proj.V"
    rewrite_tensors(saved, lambda tensors: tensors.pop(name))
    refused(saved, ValueError, repr(name), "missing")
    rewrite_tensors(saved, lambda tensors: tensors.update({name: torch.zeros(3, 17)}))
    refused(saved, ValueError, repr(name), "[3, 17]", "[3, 16]")
    rewrite_tensors(saved, lambda tensors: tensors.update({name: torch.zeros(3, 16), "more": torch.zeros(1)}))
    refused(saved, ValueError, "'more'", "does not have")


def test_the_tensor_file_is_looked_for_in_the_folder_only(saved, tmp_path):
    entry = json.loads((saved / "tarp.json").read_text())["tensors"]
    edit(saved, tensors=entry | {"file": "../" + entry["file"]})
    load_tarp(base_model("llama"), saved)
    edit(saved, tensors=entry | {"file": ".."})
    refused(saved, (FileNotFoundError, ValueError), "tarp.json")


def test_models_that_cannot_be_saved_or_loaded(saved, tmp_path):
    with pytest.raises(ValueError, match="tarp_config"):
        save_tarp(base_model("llama"), tmp_path)
    with pytest.raises(TypeError, match="model: got dict"):
        save_tarp({}, tmp_path)
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="meta device"):
        load_tarp(empty, saved)
    with pytest.raises(ValueError, match="meta device"):
        save_tarp(apply_tarp(empty, TarpConfig(target_modules="all-linear")), tmp_path)


def test_trained_base_parameters_are_not_lost_in_silence(tmp_path):
    model = tarp_model("roberta")
    model.lm_head.dense.requires_grad_(True)
    with pytest.warns(UserWarning, match=r"2 trainable parameters such as 'lm_head\.dense\.weight'"):
        save_tarp(model, tmp_path)
