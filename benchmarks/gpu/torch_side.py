"""PyTorch's side: the same model, its fused attention and AdamW, bfloat16 by autocast on a GPU.

Each layer is compiled by torch.compile where that works, which is PyTorch at its best here; where
it does not, layers run as they are, and the row says why.
"""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from benchmarks.gpu.units import Unit
from fope_jax.model.presets import PRESETS

MEASURED_SECONDS = 2.0
THETA = 10_000.0


class Attention(nn.Module):
    """Rotary causal self-attention by ``scaled_dot_product_attention``."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (
            nn.Linear(width, width, bias=False) for _ in range(4)
        )

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        rows, length, width = x.shape
        q, k, v = (
            project(x).view(rows, length, self.heads, -1).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )
        out = F.scaled_dot_product_attention(
            rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True
        )
        return self.out(out.transpose(1, 2).reshape(rows, length, width))


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turns the pairs ``m, m + H/2`` of ``x [B, N, T, H]`` by tables ``[T, H/2]``."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x.dtype)


class Layer(nn.Module):
    """Attention and SwiGLU, each after an RMS norm, with residuals."""

    def __init__(self, width: int, heads: int, mlp_dim: int) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = (nn.RMSNorm(width, eps=1e-6) for _ in range(2))
        self.attention = Attention(width, heads)
        self.gate, self.up = (nn.Linear(width, mlp_dim, bias=False) for _ in range(2))
        self.down = nn.Linear(mlp_dim, width, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin)
        y = self.mlp_norm(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Model(nn.Module):
    """The transformer of a preset with RoPE; ``remat`` "full" computes layers again backward."""

    def __init__(self, size: str, length: int, remat: str) -> None:
        super().__init__()
        shape = PRESETS[size]
        width, heads = shape["d_model"], shape["num_heads"]
        self.remat = remat
        self.embedding = nn.Embedding(shape["vocab_size"], width)
        self.layers = nn.ModuleList(
            Layer(width, heads, shape["mlp_dim"]) for _ in range(shape["num_layers"])
        )
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.unembedding = nn.Linear(width, shape["vocab_size"], bias=False)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02)
        pairs = width // heads // 2
        frequencies = THETA ** (-torch.arange(pairs) / pairs)
        phase = torch.arange(length)[:, None] * frequencies
        self.register_buffer("cos", phase.cos())
        self.register_buffer("sin", phase.sin())

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            if self.remat == "full":
                x = checkpoint(layer, x, self.cos, self.sin, use_reentrant=False)
            else:
                x = layer(x, self.cos, self.sin)
        return self.unembedding(self.norm(x))


def training_row(unit: Unit) -> dict[str, Any]:
    """Seconds of a step, run one after the other as in training, and its memory."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    reason = "" if device == "cuda" else "on a CPU layers are not compiled"
    step = _compiled_step(unit, device) if not reason else None
    if isinstance(step, str):
        reason, step = step, None
    if step is None:
        step = Step(unit, device, compiled=False)
        step()
    first, _ = step().item(), step().item()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    count, seconds, began = 0, 0.0, time.perf_counter()
    while seconds < MEASURED_SECONDS and count < 200:
        for _ in range(2):
            loss = step()
        last = loss.item()  # waits for the device
        count, seconds = count + 2, time.perf_counter() - began
    row = {
        "seconds": seconds / count,
        "steps": count,
        "attention": "scaled_dot_product_attention",
        "remat": unit.remat,
        "compiled": not reason,
        "reason": reason,
        "losses": [first, last],
        "torch": torch.__version__,
    }
    if device == "cuda":
        row |= {"bytes": torch.cuda.max_memory_allocated(), "cudnn": torch.backends.cudnn.version()}
    return row


def _compiled_step(unit: Unit, device: str) -> Step | str:
    """A step with compiled layers after its first call; what failed, where that is not possible."""
    try:
        step = Step(unit, device, compiled=True)
        step()
        return step
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:  # no C compiler or no Triton
        return " ".join(f"{type(error).__name__}: {error}".split())[:200]


class Step:
    """One update: forward, backward, clipping by the global norm, AdamW."""

    def __init__(self, unit: Unit, device: str, *, compiled: bool) -> None:
        torch.manual_seed(0)
        self.device = device
        with torch.device(device):
            self.model = Model(unit.size, unit.length, unit.remat)
        if compiled:
            for layer in self.model.layers:
                layer.compile()
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
        )
        vocabulary = PRESETS[unit.size]["vocab_size"]
        ids = torch.randint(0, vocabulary, (unit.batch, unit.length + 1), device=device)
        self.tokens, self.targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def __call__(self) -> torch.Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
            logits = self.model(self.tokens)
        loss = F.cross_entropy(logits.float().flatten(0, 1), self.targets.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return loss.detach()
