"""The parser of `fope`, in the order of its help."""

from __future__ import annotations

import argparse

from fope_jax.command_line import evaluate, plan, report, train, weights

DESCRIPTION = """\
Train one transformer with any position embedding, and measure it beyond its training length.

  fope data build --config configs/quickstart.py
  fope train --config configs/quickstart.py:position=fope --workdir runs/fope
  fope evaluate --run runs/fope
  fope spectrum runs/fope          which frequencies attention uses, inside and beyond training
  fope report runs/fope runs/rope -o runs/report
  fope extend --from runs/rope --method yarn --length 256 --workdir runs/rope_yarn

  fope import --from DIR --workdir runs/x    weights of Llama, Qwen 3, OLMo 2, SmolLM
  fope export --run runs/fope -o DIR         and back

  fope plan --config configs/paper/c4_books.py --topology v5e:4x4 --method rope,fope

  fope sweep experiments/extrapolation/sweep.py --workdir runs/extrapolation
  fope doctor runs/fope            is a run sound, and what is to be done if not

  fope methods                     every position embedding, its knobs and its source
  fope gallery -o runs/gallery     a picture of each
"""


def build_parser() -> argparse.ArgumentParser:
    """The parser of all verbs; each sets ``verb`` to the function that runs it, and ``needs`` to
    the libraries without which it does not begin."""
    parser = argparse.ArgumentParser(
        prog="fope",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(traceback=False)
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB")
    for add in (
        train.add_data,
        train.add_train,
        train.add_extend,
        evaluate.add_evaluate,
        train.add_sweep,
        evaluate.add_spectrum,
        plan.add_plan,
        weights.add_import,
        weights.add_export,
        report.add_report,
        report.add_doctor,
        report.add_methods,
        report.add_gallery,
    ):
        add(verbs)
    return parser
