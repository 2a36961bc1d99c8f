"""`fope import` and `export`: weights of Hugging Face and GGUF files, and back."""

from __future__ import annotations

import argparse

from fope_jax.command_line.common import (
    STEP,
    local_path,
    option,
    out,
    run_and_step,
    run_argument,
    verb,
)
from fope_jax.train.options import add_accept_position, add_positional, directory


@verb(
    lambda parser: parser.set_defaults(config=None),  # accepts --config.SECTION.KEY=VALUE
    lambda parser: add_positional(
        parser,
        "source",
        "--from",
        type=local_path,
        metavar="DIR|FILE.gguf|hf:ORG/NAME[@REVISION]",
        help="directory with config.json and *.safetensors, a GGUF file, or a name on the Hugging "
        "Face Hub",
    ),
    option("--workdir", type=directory, required=True, help="directory of the run"),
    name="import",
)
def import_(arguments: argparse.Namespace) -> None:
    """make a run of a Hugging Face checkpoint or a GGUF file

    examples:
      fope import hf:HuggingFaceTB/SmolLM2-135M --workdir runs/smollm2
      fope import models/SmolLM2-135M --workdir runs/smollm2 --config.train.length=2048
      fope import models/SmolLM2-135M-Instruct.Q4_1.gguf --workdir runs/smollm2
      fope data build --config runs/smollm2/config.json
      fope evaluate runs/smollm2

    A name is downloaded once, into the cache of huggingface_hub ($HF_HOME); with HF_HUB_OFFLINE=1
    only what is there is read.

    A GGUF file, the extra [gguf], is dequantised to float32, and its tokenizer rebuilt; it is of
    Llama, Qwen 2 and 3, OLMo 2 or SmolLM 3, with byte-level BPE.

    train.length is the length that evaluation counts in multiples of; without it the checkpoint's
    max_position_embeddings. Any value but the model's own can be given as
    --config.SECTION.KEY=VALUE.
    """
    from fope_jax.interop.hub import local_checkpoint
    from fope_jax.interop.run_import import import_run

    source = local_checkpoint(arguments.source)
    print(import_run(source, arguments.workdir, arguments.overrides))
    print(f"run in {arguments.workdir}")


@verb(
    run_argument(),
    STEP,
    option(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="type of the tensors (that of the imported weights, else of the parameters)",
    ),
    option(
        "--license",
        default="unknown",
        metavar="ID",
        help="license of the weights, for the model card, such as apache-2.0 (unknown)",
    ),
    out("directory that is made"),
    add_accept_position,
)
def export(arguments: argparse.Namespace) -> None:
    """write a run as a Hugging Face checkpoint

    examples:
      fope export runs/rope -o models/rope
      fope export runs/rope/500 -o models/rope_500 --dtype bfloat16 --license apache-2.0
      fope import models/rope --workdir runs/again      the same model, every bit of float32

    It has the weights, the tokenizer as tokenizer.json, generation_config.json, and README.md: what
    the model is, how it was trained, and what was measured at this step.
    """
    from fope_jax.interop.run_export import export_run

    run, step = run_and_step(arguments)
    accept, license = arguments.accept_position, arguments.license
    print(export_run(run, arguments.out, step, arguments.dtype, accept, license))
    print(f"checkpoint in {arguments.out}")
