"""RADD's training step in PyTorch, as its published code has it: an eager loop (arXiv:2406.03736).

The parameters have the names of RADD's code, so that a published state dict fits. Four parts take
less time here than in that code, which makes the comparison harder for this package: queries and
keys are rotated without the values, the scale and bias of a norm are part of ``layer_norm``, the
embedding has the gradient of ``functional.embedding``, and the loss is one ``cross_entropy``.

RADD's code has no Muon. ``Muon`` is here for recipes that learn with it. The parameters beside it,
such as the embedding, have AdamW here and Adam with Nesterov's momentum in optax: as much work.
"""

import math
from collections import OrderedDict

import torch  # pyright: ignore[reportMissingImports]
from torch import nn  # pyright: ignore[reportMissingImports]
from torch.nn import functional  # pyright: ignore[reportMissingImports]

from sedd.networks import rotary
from sedd.networks.ddit import DDiT
from sedd.training.optimizer import OptimizerOptions


class Block(nn.Module):
    """Attention and an MLP, each added to the residual stream; no dropout."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.attn_qkv = nn.Linear(width, 3 * width, bias=False)
        self.attn_out = nn.Linear(width, width, bias=False)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width)
        )

    def forward(self, x_BLD, cos_LK, sin_LK):
        """Apply the block to the residual stream."""
        qkv_BLCHK = self.attn_qkv(self.norm1(x_BLD)).unflatten(-1, (3, self.heads, -1))
        q_BHLK, k_BHLK, v_BHLK = qkv_BLCHK.permute(2, 0, 3, 1, 4)
        q_BHLK, k_BHLK = rotate(q_BHLK, cos_LK, sin_LK), rotate(k_BHLK, cos_LK, sin_LK)
        h_BHLK = functional.scaled_dot_product_attention(q_BHLK, k_BHLK, v_BHLK)
        x_BLD = x_BLD + self.attn_out(h_BHLK.transpose(1, 2).flatten(2))
        return x_BLD + self.mlp(self.norm2(x_BLD))


def rotate(x_BHLK, cos_LK, sin_LK):
    """Rotate queries or keys by the phases of their positions."""
    first, second = x_BHLK.chunk(2, -1)
    return x_BHLK * cos_LK + torch.cat([-second, first], -1) * sin_LK


class RADD(nn.Module):
    """The diffusion transformer without a time input, of the sizes that ``network`` has.

    Args:
        network: the network of this package to imitate.
        length: tokens in a sequence.
    """

    def __init__(self, network: DDiT, length: int):
        super().__init__()
        width, states = network.hidden_dim, network.num_states
        embedding = nn.Parameter(torch.empty(states, width))
        nn.init.kaiming_uniform_(embedding, a=math.sqrt(5))
        self.vocab_embed = nn.ParameterDict({"embedding": embedding})
        self.blocks = nn.ModuleList(
            Block(width, network.num_heads) for _ in range(network.num_layers)
        )
        linear = nn.Linear(width, states)
        self.output_layer = nn.Sequential(
            OrderedDict(norm_final=nn.LayerNorm(width), linear=linear)
        )
        with torch.no_grad():
            for module in self.modules():
                if isinstance(module, nn.LayerNorm):
                    module.bias.fill_(1.0)
            linear.weight.zero_()
            linear.bias.zero_()
        frequency_F = rotary.BASE ** -(torch.arange(0, network.head_dim, 2) / network.head_dim)
        phase_LK = torch.outer(torch.arange(length).float(), frequency_F).repeat(1, 2)
        self.register_buffer("cos_LK", phase_LK.cos(), persistent=False)
        self.register_buffer("sin_LK", phase_LK.sin(), persistent=False)

    def forward(self, tokens_BL):
        """The logits of every position, [B, L, V]; the last state is the mask."""
        x_BLD = functional.embedding(tokens_BL, self.vocab_embed["embedding"])
        for block in self.blocks:
            x_BLD = block(x_BLD, self.cos_LK, self.sin_LK)
        return self.output_layer(x_BLD)


def lambda_dce(network, x0_BL, xt_BL, lambda_B):
    """The loss of each sequence in nats: -(1/λ)·Σ log p(x0 | xt) over the masked positions."""
    logits_BLV = network(xt_BL)
    mask = logits_BLV.shape[-1] - 1
    logits_MN = logits_BLV[..., :mask].flatten(0, 1)
    nats_BL = functional.cross_entropy(logits_MN, x0_BL.flatten(), reduction="none").view_as(x0_BL)
    return torch.where(xt_BL == mask, nats_BL, 0.0).sum(-1) / lambda_B


class Muon(torch.optim.Optimizer):
    """The update of ``torch.optim.Muon``, scaled to Adam's root mean square, in float32.

    PyTorch's own rounds the matrices to bfloat16. A CPU without arithmetic of this type then takes
    four times as long.
    """

    MOMENTUM, STEPS, COEFFICIENTS = 0.95, 5, (3.4445, -4.7750, 2.0315)

    def __init__(self, matrices, lr: float):
        super().__init__(matrices, {"lr": lr})

    @torch.no_grad()
    def step(self):
        """Update the matrices by their gradients."""
        for group in self.param_groups:
            for matrix in group["params"]:
                state = self.state[matrix]
                if not state:
                    state["momentum"] = torch.zeros_like(matrix)
                momentum = state["momentum"].lerp_(matrix.grad, 1 - self.MOMENTUM)
                update = self.orthogonal(matrix.grad.lerp(momentum, self.MOMENTUM))
                scale = 0.2 * math.sqrt(max(matrix.shape))
                matrix.add_(update, alpha=-scale * group["lr"])

    def orthogonal(self, x):
        """The nearest orthogonal matrix, roughly, by Newton-Schulz iterations."""
        a, b, c = self.COEFFICIENTS
        tall = x.shape[0] > x.shape[1]
        x = x.T if tall else x
        x = x / x.norm()
        for _ in range(self.STEPS):
            gram = x @ x.T
            x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        return x.T if tall else x


class Loop:
    """The state of the training loop and its step.

    Args:
        network: the network, which is trained in place.
        options: AdamW's or Muon's settings; the learning rate is constant after the warm-up.
    """

    def __init__(self, network: RADD, options: OptimizerOptions):
        self.network, self.options, self.updates = network, options, 0
        self.parameters = list(network.parameters())
        matrices = []
        if options.name == "muon":
            matrices = [p for p in network.blocks.parameters() if p.ndim == 2]
        chosen = {id(p) for p in matrices}
        rest = [p for p in self.parameters if id(p) not in chosen]
        adamw = torch.optim.AdamW(
            rest,
            lr=options.learning_rate,
            betas=(options.beta1, options.beta2),
            eps=options.eps,
            weight_decay=options.weight_decay,
        )
        self.optimizers = [adamw]
        if matrices:
            self.optimizers.append(Muon(matrices, options.learning_rate))
        self.ema_parameters = [p.detach().clone() for p in self.parameters]

    def step(self, x0_BL) -> float:
        """Train on a batch of clean tokens; returns the mean loss of its sequences."""
        batch = len(x0_BL)
        lambda_B = (torch.rand(batch) + torch.arange(batch)) / batch  # one in each stratum
        mask = self.network.output_layer.linear.out_features - 1
        xt_BL = torch.where(torch.rand(x0_BL.shape) < lambda_B[:, None], mask, x0_BL)
        loss = lambda_dce(self.network, x0_BL, xt_BL, lambda_B).mean()
        loss.backward()
        self.update()
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        return loss.item()

    def update(self) -> None:
        """Update the parameters by their gradients, and the average of the parameters."""
        self.updates += 1
        warmup = min(self.updates / max(self.options.warmup_steps, 1), 1.0)
        if self.options.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.parameters, self.options.clip_norm)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = warmup * self.options.learning_rate
            optimizer.step()
        decay = min(self.options.ema_decay, (1 + self.updates) / (10 + self.updates))
        with torch.no_grad():
            for average, parameter in zip(self.ema_parameters, self.parameters, strict=True):
                average.sub_((1 - decay) * (average - parameter))
