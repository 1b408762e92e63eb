"""The adaptor from text vectors to item representations: a mixture of whitening experts (paper, section 2.1).

U items, E experts, D text width, H hidden size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PWLayer(nn.Module):
    """The parametric whitening layers of all experts, summed with their gates (paper, section 2.1).

    Args:
        n_experts, input_size, output_size: E, D, H.
        dropout: probability of dropout on the text vector. Each expert draws its own dropout.
        start: `normal` draws the weights from N(0, 0.02), as published. `cosine` adds half of this noise to one
            orthogonal projection, which all experts share and which keeps cosines, exactly if H >= D.
    """

    def __init__(self, n_experts: int, input_size: int, output_size: int, dropout: float, start: str = "normal"):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(n_experts, input_size))
        self.weight = nn.Parameter(torch.empty(n_experts, output_size, input_size).normal_(0.0, 0.02))
        if start == "cosine":
            with torch.no_grad():
                self.weight.mul_(0.5).add_(nn.init.orthogonal_(torch.empty(output_size, input_size)))
        self.dropout = dropout

    def forward(self, x: Tensor, gates: Tensor) -> Tensor:
        """sum_e g_e W_e (dropout(x) - b_e): x [U, D] and gates [U, E] -> [U, H]."""
        seen = F.dropout(x.expand(len(self.bias), -1, -1), self.dropout, self.training)  # [E, U, D]
        whitened = (seen - self.bias[:, None]) @ self.weight.mT  # [E, U, H]
        return torch.einsum("ue,euh->uh", gates.to(whitened.dtype), whitened)


class MoEAdaptor(nn.Module):
    """Mixture of whitening experts (paper, section 2.1). All experts are used for every item.

    Args:
        n_experts, input_size, output_size: E, D, H.
        dropout: probability of dropout on the text vector, before the whitening.
        noise: whether noise is added to the gate logits in training.
        start: the initial weights, see `PWLayer`.
    """

    def __init__(
        self,
        n_experts: int,
        input_size: int,
        output_size: int,
        dropout: float,
        noise: bool = True,
        start: str = "normal",
    ):
        super().__init__()
        self.noise = noise
        self.experts = PWLayer(n_experts, input_size, output_size, dropout, start)
        self.w_gate = nn.Parameter(torch.zeros(input_size, n_experts))
        self.w_noise = nn.Parameter(torch.zeros(input_size, n_experts))

    def gates(self, x: Tensor) -> Tensor:
        """softmax(x W_gate + noise): [U, D] -> [U, E].

        In training, noise = e (softplus(x W_noise) + 0.01) with e ~ N(0, 1).
        """
        logits = x @ self.w_gate
        if self.noise and self.training:
            logits = logits + torch.randn_like(logits) * (F.softplus(x @ self.w_noise) + 0.01)
        return logits.softmax(-1)

    def forward(self, x: Tensor) -> Tensor:
        """[U, D] -> [U, H]."""
        return self.experts(x, self.gates(x))
