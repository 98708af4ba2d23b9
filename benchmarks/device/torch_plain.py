"""Training steps and a sampling loop in plain PyTorch, to compare with this package on a GPU.

The networks have the sizes of this package's: RADD's transformer, SEDD's with adaLN, and a causal
one. They use bfloat16 autocast, ``scaled_dot_product_attention``, ``torch.compile`` for network and
loss together, the fused AdamW, clipping, and an average of the parameters. The sampling loop is
RADD's with its cache: it calls the network only if the last step has changed a token.

    python benchmarks/device/torch_plain.py steps '{"width": 64, …}'

``campaign.py`` calls it, with the sizes as JSON, and reads the lines that begin with ``ROW``.
"""

import json
import math
import statistics
import sys
import time
import traceback

import torch  # pyright: ignore[reportMissingImports]
from torch import nn  # pyright: ignore[reportMissingImports]
from torch.nn import functional  # pyright: ignore[reportMissingImports]

CONDITION, FREQUENCIES, ROTARY_BASE = 128, 128, 1e4
EPS = 1e-3  # of the log-linear schedule, and the smallest time
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Block(nn.Module):
    """Attention and an MLP; with ``conditioned`` norms and gates depend on the noise level."""

    def __init__(self, width: int, heads: int, conditioned: bool, causal: bool):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width)
        )
        self.modulation = nn.Linear(CONDITION, 6 * width) if conditioned else None

    def forward(self, x_BLD, cos_LK, sin_LK, condition_BC):
        """Apply the block to the residual stream."""
        parts = [None] * 6
        if self.modulation is not None:
            parts = self.modulation(condition_BC)[:, None].chunk(6, -1)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = parts
        h_BLD = modulated(self.norm1(x_BLD), shift_a, scale_a)
        q_BHLK, k_BHLK, v_BHLK = (
            self.qkv(h_BLD).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        )
        q_BHLK, k_BHLK = (rotate(x, cos_LK, sin_LK).to(v_BHLK.dtype) for x in (q_BHLK, k_BHLK))
        h_BHLK = functional.scaled_dot_product_attention(
            q_BHLK, k_BHLK, v_BHLK, is_causal=self.causal
        )
        h_BLD = self.out(h_BHLK.transpose(1, 2).flatten(2))
        x_BLD = x_BLD + (h_BLD if gate_a is None else gate_a * h_BLD)
        h_BLD = self.mlp(modulated(self.norm2(x_BLD), shift_m, scale_m))
        return x_BLD + (h_BLD if gate_m is None else gate_m * h_BLD)


def modulated(x_BLD, shift_B1D, scale_B1D):
    """x·(1 + scale) + shift; x itself without a condition."""
    return x_BLD if shift_B1D is None else x_BLD * (1 + scale_B1D) + shift_B1D


def rotate(x_BHLK, cos_LK, sin_LK):
    """Rotate queries or keys by the phases of their positions."""
    first, second = x_BHLK.chunk(2, -1)
    return x_BHLK * cos_LK + torch.cat([-second, first], -1) * sin_LK


class Transformer(nn.Module):
    """The network of a kind of model: ``sedd``, ``radd`` or ``ar``; the last state is the mask."""

    def __init__(self, kind: str, *, width: int, layers: int, heads: int, tokens: int, length: int):
        super().__init__()
        conditioned = kind == "sedd"
        self.embed = nn.Embedding(tokens + 1, width)
        self.blocks = nn.ModuleList(
            Block(width, heads, conditioned, kind == "ar") for _ in range(layers)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, tokens + 1)
        self.condition = self.modulation = None
        zeroed = [self.head]
        if conditioned:
            self.condition = nn.Sequential(
                nn.Linear(2 * FREQUENCIES, CONDITION),
                nn.SiLU(),
                nn.Linear(CONDITION, CONDITION),
                nn.SiLU(),
            )
            self.modulation = nn.Linear(CONDITION, 2 * width)  # 0 at first, as in every block
            zeroed += [self.modulation, *(block.modulation for block in self.blocks)]
        with torch.no_grad():
            for layer in zeroed:
                layer.weight.zero_()
                layer.bias.zero_()
        channels = width // heads
        frequency_F = ROTARY_BASE ** -(torch.arange(0, channels, 2) / channels)
        phase_LK = torch.outer(torch.arange(length).float(), frequency_F).repeat(1, 2)
        self.register_buffer("cos_LK", phase_LK.cos())
        self.register_buffer("sin_LK", phase_LK.sin())
        frequency_F = torch.exp(-math.log(1e4) * torch.arange(FREQUENCIES) / FREQUENCIES)
        self.register_buffer("frequency_F", frequency_F)

    def forward(self, tokens_BL, sigma_B=None):
        """The raw output of every position, [B, L, V]."""
        x_BLD, condition_BC, shift, scale = self.embed(tokens_BL), None, None, None
        if self.condition is not None and self.modulation is not None and sigma_B is not None:
            phase_BF = sigma_B[:, None] * self.frequency_F
            condition_BC = self.condition(torch.cat([phase_BF.cos(), phase_BF.sin()], -1))
            shift, scale = self.modulation(condition_BC)[:, None].chunk(2, -1)
        for block in self.blocks:
            x_BLD = block(x_BLD, self.cos_LK, self.sin_LK, condition_BC)
        return self.head(modulated(self.norm(x_BLD), shift, scale))


def loss_of(kind: str, network: nn.Module, x0_BL, u_B, u_BL):
    """The mean loss of the sequences in nats; ``u_B`` and ``u_BL`` are uniform draws in [0, 1)."""
    tokens = network.head.out_features - 1
    if kind == "ar":
        start_B1 = torch.full_like(x0_BL[:, :1], tokens)
        logits_BLN = network(torch.cat([start_B1, x0_BL[:, :-1]], 1))[..., :tokens].float()
        nats = functional.cross_entropy(logits_BLN.flatten(0, 1), x0_BL.flatten(), reduction="sum")
        return nats / len(x0_BL)
    if kind == "radd":
        lambda_B = 1 - u_B
        masked_BL = u_BL < lambda_B[:, None]
        logits_BLN = network(torch.where(masked_BL, tokens, x0_BL))[..., :tokens].float()
        nats_M = functional.cross_entropy(
            logits_BLN.flatten(0, 1), x0_BL.flatten(), reduction="none"
        )
        nats_BL = torch.where(masked_BL, nats_M.view_as(x0_BL), 0.0)
        return (nats_BL.sum(-1) / lambda_B).mean()
    t_B = EPS + (1 - EPS) * u_B
    sigma_B, rate_B = -torch.log1p(-(1 - EPS) * t_B), (1 - EPS) / (1 - (1 - EPS) * t_B)
    masked_BL = u_BL < -torch.expm1(-sigma_B)[:, None]
    raw_BLN = network(torch.where(masked_BL, tokens, x0_BL), sigma_B)[..., :tokens].float()
    log_r_B11 = -torch.log(torch.expm1(sigma_B))[:, None, None]
    score_BLN = raw_BLN + log_r_B11 - math.log(tokens)
    of_x0_BL = score_BLN.gather(-1, x0_BL[..., None])[..., 0]
    log_r_B1 = log_r_B11[..., 0]
    entropy_BL = score_BLN.exp().sum(-1) + log_r_B1.exp() * (log_r_B1 - 1 - of_x0_BL)
    return (rate_B[:, None] * torch.where(masked_BL, entropy_BL, 0.0)).sum(-1).mean()


def synchronize() -> float:
    """Wait for the device; the time now."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def steps(kind: str, shape: dict) -> dict:
    """Time the training step of a kind of model."""
    sizes = {name: shape[name] for name in ("width", "layers", "heads", "tokens", "length")}
    batch, length = shape["batch"], shape["length"]
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    network = Transformer(kind, **sizes).to(DEVICE)
    parameters = list(network.parameters())
    average = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=3e-4, weight_decay=0.0, fused=DEVICE == "cuda")
    loss_of_compiled = torch.compile(loss_of, dynamic=False)
    x0_BL = torch.randint(shape["tokens"], (batch, length), device=DEVICE)

    def step() -> float:
        u_B = (torch.rand(batch, device=DEVICE) + torch.arange(batch, device=DEVICE)) / batch
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = loss_of_compiled(
                kind, network, x0_BL, u_B, torch.rand(batch, length, device=DEVICE)
            )
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(average, parameters, 1e-4)
        return loss.item() / length

    begin = synchronize()
    first = step()
    compiled = synchronize()
    step()
    times = []
    for _ in range(shape["steps"]):
        start = synchronize()
        step()
        times.append(synchronize() - start)
    seconds = statistics.median(times)
    return {
        "model": kind,
        "s/step": seconds,
        "tokens/s": batch * length / seconds,
        "compile and first step, s": compiled - begin,
        "memory, GB": torch.cuda.max_memory_allocated() / 1e9 if DEVICE == "cuda" else None,
        "first loss": first,
        "parameters": sum(p.numel() for p in parameters),
    }


@torch.no_grad()
def sampling(batch: int, shape: dict) -> dict:
    """Time RADD's cached loop over all steps, or as many as fit into ``shape["seconds"]``."""
    sizes = {name: shape[name] for name in ("width", "layers", "heads", "tokens", "length")}
    network = Transformer("radd", **sizes).to(DEVICE).eval()
    network.head.weight.normal_(std=0.2)
    forward = torch.compile(network, dynamic=False)
    mask, num_steps = shape["tokens"], shape["sampling_steps"]
    x_BL = torch.full((batch, shape["length"]), mask, device=DEVICE)

    def conditional(x_BL):
        with torch.autocast(DEVICE, torch.bfloat16):
            return forward(x_BL)[..., :mask].float().softmax(-1)

    begin = synchronize()
    probs_BLN = conditional(x_BL)
    start = synchronize()
    calls = done = 0
    changed = True
    while done < num_steps:
        if changed:
            probs_BLN = conditional(x_BL)
            calls += 1
        drawn_BL = (probs_BLN / torch.empty_like(probs_BLN).exponential_()).argmax(-1)
        reveals_BL = torch.rand(x_BL.shape, device=DEVICE) < 1 / (num_steps - done)
        reveals_BL &= x_BL == mask
        x_BL = torch.where(reveals_BL, drawn_BL, x_BL)
        changed = bool(reveals_BL.any())
        done += 1
        if synchronize() - start > shape["seconds"]:
            break
    seconds = synchronize() - start
    return {
        "batch": batch,
        "s/sample": seconds * num_steps / done / batch,
        "calls of the batch": calls * num_steps / done,
        "steps run": done,
        "compile and first call, s": start - begin,
    }


def main() -> None:
    """Print a row for each model, or for each batch size; an error is a row, too."""
    what, shape = sys.argv[1], json.loads(sys.argv[2])
    if DEVICE == "cuda":
        torch.set_float32_matmul_precision("high")
    key = "model" if what == "steps" else "batch"
    for case in shape["models" if what == "steps" else "batches"]:
        try:
            row = (steps if what == "steps" else sampling)(case, shape)
        except Exception as error:  # report it, and measure the next case
            traceback.print_exc()
            row = {key: case, "error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
        print("ROW " + json.dumps(row | {"torch": torch.__version__}), flush=True)


if __name__ == "__main__":
    main()
