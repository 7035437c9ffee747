"""lm_head's own forward: the plain layer without labels, token log-probabilities with them, and no adapter on it."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import Gemma3Config, Gemma3TextConfig

from mirage_dist.model import head
from mirage_dist.schema import ConfigError


def model(layer, softcap=None):
    text = Gemma3TextConfig(final_logit_softcapping=softcap)
    return SimpleNamespace(config=Gemma3Config(text_config=text), get_output_embeddings=lambda: layer)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("trains", [True, False])
def test_the_installed_head_is_the_same_layer_with_another_forward(softcap, trains):
    torch.manual_seed(0)
    layer = nn.Linear(6, 11).double().requires_grad_(trains)
    names, weight = list(layer.state_dict()), layer.weight
    hidden, labels = torch.randn(5, 6, dtype=torch.float64, requires_grad=True), torch.tensor([0, 3, 10, 3, 7])
    logits = layer(hidden)
    fused = head.install(model(layer, softcap))
    assert fused is layer
    assert fused.weight is weight
    assert list(fused.state_dict()) == names
    assert torch.equal(fused(hidden), logits)

    capped = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    oracle = capped.log_softmax(1).gather(1, labels[:, None]).squeeze(1)
    logps = fused(hidden, labels_N=labels)
    torch.testing.assert_close(logps, oracle)
    torch.testing.assert_close(fused(hidden, exact=True), capped)
    leaves = [hidden, *(fused.parameters() if trains else ())]
    upstream = torch.randn(5, dtype=torch.float64)
    torch.testing.assert_close(*(torch.autograd.grad(x, leaves, upstream) for x in (logps, oracle)))


def test_an_adapter_on_lm_head_is_refused():
    class LoraLinear(nn.Linear):
        pass

    with pytest.raises(ConfigError, match=r"LoraLinear.*model\.lora\.targets"):
        head.install(model(LoraLinear(6, 11)))
