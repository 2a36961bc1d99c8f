"""Model sizes as keyword arguments of TransformerConfig.

"60m", "180m" and "1200m" are the paper's; its MLP ratio of 8 counts both branches of the SwiGLU.
"tiny" is for tests, "demo" trains on a laptop in minutes.
"""

from __future__ import annotations

from typing import Any


def _paper(d_model: int, num_layers: int, num_heads: int) -> dict[str, Any]:
    return {
        # The 50,280 tokens of the GPT-NeoX tokenizer, rounded up for the hardware.
        "vocab_size": 50_304,
        "d_model": d_model,
        "num_layers": num_layers,
        "num_heads": num_heads,
        "mlp_dim": 4 * d_model,
    }


PRESETS: dict[str, dict[str, Any]] = {
    "60m": _paper(d_model=512, num_layers=8, num_heads=8),
    "180m": _paper(d_model=1024, num_layers=8, num_heads=8),
    "1200m": _paper(d_model=2048, num_layers=16, num_heads=16),
    "tiny": {"vocab_size": 256, "d_model": 32, "num_layers": 2, "num_heads": 4, "mlp_dim": 64},
    "demo": {"vocab_size": 2048, "d_model": 128, "num_layers": 3, "num_heads": 4, "mlp_dim": 384},
}
