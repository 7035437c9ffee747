"""An LM head whose forward computes the token log-probabilities of selected rows.

Under ZeRO-3 a weight is whole only inside its module's forward and backward, so the loss head has to be that
module's forward; the parameter keeps its Hugging Face name. Without labels it is the plain linear layer.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from mirage_dist.kernels.logprob import linear_logits, linear_token_kl, linear_token_logps
from mirage_dist.schema import ConfigError


class TokenLogProbHead(nn.Linear):
    """An output projection (V, D) that can also reduce its logits to what an objective needs."""

    softcap: Any  # float | None; nn.Module declares every other attribute a tensor

    def forward(  # type: ignore[override]
        self, hidden: Tensor, labels_N: Tensor | None = None, ref_logits_NV: Tensor | None = None, exact: bool = False
    ) -> Tensor:
        """For rows (N, D): log-probabilities of `labels_N` (N,), KL(reference ‖ policy) where `ref_logits_NV` is given
        (N,), or with `exact` the float32 logits (N, V). Otherwise the output of the plain linear layer.
        """
        options: dict[str, Any] = {"bias": self.bias, "softcap": self.softcap}
        if labels_N is not None:
            return linear_token_logps(hidden, self.weight, labels_N, **options)
        if ref_logits_NV is not None:
            return linear_token_kl(hidden, self.weight, ref_logits_NV, **options)
        if exact:
            return linear_logits(hidden, self.weight, **options)
        return super().forward(hidden)


def install(model: Any) -> TokenLogProbHead:
    """Turn the model's output embedding into a `TokenLogProbHead`, in place, and return it.

    Raises ConfigError when it is not a plain linear layer (for example with an adapter on lm_head).
    """
    head: Any = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        raise ConfigError(
            f"lm_head is a {type(head).__name__}; the loss head needs a plain linear layer. Leave lm_head out of "
            "model.lora.targets"
        )
    text = model.config.get_text_config()
    fused: Any = head
    fused.__class__ = TokenLogProbHead
    fused.softcap = getattr(text, "final_logit_softcapping", None)
    return fused
