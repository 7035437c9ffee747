"""lm_head's own forward: the plain layer without labels, token log-probabilities with them, and no adapter on it."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, Gemma3Config, Gemma3TextConfig

from mirage_dist.model import head
from mirage_dist.model.policy import HeadedModel, Request
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


TINY = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 23}
TINY |= {"num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
CURVES = {
    "llama": ({}, (1.0, None)),
    "phi": ({}, (1.0, None)),  # its LM head has a bias
    "granite": ({"logits_scaling": 8.0}, (0.125, None)),
    "cohere": ({"logit_scale": 0.0625}, (0.0625, None)),
    "cohere2": ({"logit_scale": 0.3}, (0.3, None)),
    "hyperclovax": ({"logits_scaling": 3.0}, (3.0, None)),
    "gemma2": ({"final_logit_softcapping": 2.0}, (1.0, 2.0)),
}


@pytest.mark.parametrize("name", CURVES)
def test_scaled_logits_and_their_gradients_are_the_models_own(name):
    """The curve is measured; the oracle is the family's own forward, in float64."""
    changes, (scale, softcap) = CURVES[name]
    config = AutoConfig.for_model(name, **TINY, **changes)
    torch.manual_seed(0)
    hf = AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()
    for parameter in hf.parameters():
        nn.init.normal_(parameter, std=0.5)
    ids = torch.randint(3, 23, (2, 7))
    index_N, labels = torch.tensor([2, 4, 8, 11]), torch.tensor([5, 22, 0, 9])
    logits = hf(input_ids=ids, use_cache=False).logits.flatten(0, 1)[index_N]
    oracle = logits.log_softmax(1).gather(1, labels[:, None]).squeeze(1)

    state = torch.get_rng_state()
    headed = HeadedModel(hf)
    assert torch.equal(torch.get_rng_state(), state)
    curve = hf.get_output_embeddings().curve
    assert curve == (scale, softcap)
    logps = headed({"input_ids": ids}, Request(index_N, labels)).logp_N
    torch.testing.assert_close(logps, oracle, rtol=1e-6, atol=1e-6)  # some families give logits in float32
    exact = headed({"input_ids": ids}, Request(kl_index_M=index_N)).logits_MV
    torch.testing.assert_close(exact, logits.to(exact.dtype), rtol=1e-6, atol=1e-6)
    kl = headed({"input_ids": ids}, Request(kl_index_M=index_N, ref_logits_MV=exact.detach())).kl_M
    assert float(kl.abs().max()) < 1e-9
    upstream = torch.randn(4, dtype=torch.float64)
    parameters = [p for p in hf.parameters() if p.requires_grad]
    gradients = [torch.autograd.grad(x, parameters, upstream.to(x.dtype)) for x in (logps, oracle)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


def test_a_head_without_weights_is_measured_too():
    """As under ZeRO-3, where a weight is whole only inside its module."""
    with torch.device("meta"):
        hf = AutoModelForCausalLM.from_config(AutoConfig.for_model("granite", **TINY, logits_scaling=4.0))
    assert head.curve(hf) == (0.25, None)


def test_logits_of_another_curve_leave_the_head_as_the_configuration_says(monkeypatch):
    """What else a family does to its logits is left to the comparison of `families.guard`."""
    hf = AutoModelForCausalLM.from_config(AutoConfig.for_model("gemma2", **TINY, final_logit_softcapping=None))
    own = type(hf).forward

    def squared(self, **inputs):
        outputs = own(self, **inputs)
        outputs.logits = outputs.logits.square()
        return outputs

    monkeypatch.setattr(type(hf), "forward", squared)
    assert head.curve(hf) == (1.0, None)
