"""Position embeddings as pure functions of positions; needs jax and numpy only."""

from fope_jax.position.absolute import Learned, Sinusoidal, sinusoidal_table
from fope_jax.position.alibi import ALiBi, alibi_bias, alibi_slopes
from fope_jax.position.base import (
    Layer,
    Limits,
    ModelShape,
    NoPE,
    PositionEmbedding,
    PositionVariables,
    bias_of_heads,
    has_hook,
)
from fope_jax.position.contextual import CoPE, cope_bias
from fope_jax.position.dape import DAPE, dape_network
from fope_jax.position.drope import DroPE, drope_scale
from fope_jax.position.fingerprints import Fingerprint, fingerprint
from fope_jax.position.fope import FoPE
from fope_jax.position.forgetting import Cable, FoX, log_forget_gate
from fope_jax.position.fourier import (
    coefficient_std,
    fourier_coefficients,
    fourier_tables,
    mix_tables,
    normalise_columns,
)
from fope_jax.position.layer_patterns import LAYER_PATTERNS, fill_layers
from fope_jax.position.logit_scaling import LogitScaling, llama4_scale, log_n_scale
from fope_jax.position.mixing import ByLayer, ByShare
from fope_jax.position.pope import PoPE, polar
from fope_jax.position.registry import (
    METHODS,
    PRESETS,
    SCALINGS,
    find_class,
    from_spec,
    import_module,
    import_modules,
    make,
    make_scaling,
    name_of,
    preset_knobs,
    register,
    split_spec,
    to_spec,
)
from fope_jax.position.relative_bias import (
    FIRE,
    Kerple,
    T5Bias,
    fire_bias,
    kerple_log_bias,
    kerple_power_bias,
    t5_bias,
    t5_buckets,
)
from fope_jax.position.rope import RoPE
from fope_jax.position.rotation import angles, inverse_frequencies, rotate
from fope_jax.position.sandwich import Sandwich, sandwich_bias, sandwich_ratios
from fope_jax.position.scaling import (
    AdjustedBase,
    ClipFloor,
    DynamicNTK,
    Llama3,
    LongRoPE,
    NTKAware,
    PositionInterpolation,
    PRoPE,
    Proportional,
    RotaryFrequencies,
    Scaling,
    SnapToCycles,
    YaRN,
    clip_floor,
    floor_frequency,
    scaled_frequencies,
    yarn_temperature,
)
from fope_jax.position.self_extend import ReRoPE, SelfExtend
from fope_jax.position.windows import LocalChunks, SlidingWindow
from fope_jax.position.xpos import XPos, xpos_decay
