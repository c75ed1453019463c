"""lowrank_linear in a layer, against the frozen nn.Linear, unfused PyTorch and PEFT's LoRA."""

import pytest

from mltd.bench.layers import DECODE_SHAPES, SHAPES, layer_case

CONTENDERS = ("linear", "tarp", "unfused", "peft_lora")


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["forward", "forward+backward", "multiplicative", "multiplicative cached"])
def test_layer(run, kind, shape, contender):
    run((kind, shape), contender, lambda: layer_case(kind, shape, 15), 15)


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("shape", DECODE_SHAPES)
def test_decode(run, shape, contender):
    run(("decode", shape), contender, lambda: layer_case("decode", shape, 300), 300)
