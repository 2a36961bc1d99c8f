"""What `fope --help` and the help of each verb say beside their options."""

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
TRAIN_EXAMPLES = """\
examples:
  fope train --config configs/quickstart.py --workdir runs/fope
  fope train --config configs/quickstart.py:position=rope,seed=1 --workdir runs/rope_1
  fope train --config configs/quickstart.py --workdir runs/long --config.train.length=256

The same command again goes on from the newest checkpoint. Any value of the configuration can be
given as --config.SECTION.KEY=VALUE.
"""
EXIT_CODES = """\
exit codes:
  0     done
  2     an error that is told in one message; what was trained up to the newest checkpoint is kept
  143   SIGTERM, and likewise 130 Ctrl-C and 129 SIGHUP: the step under way was ended and saved; a
        second Ctrl-C ends at once
  137   SIGKILL, -9: what came after the newest checkpoint is trained again

In each case the same command goes on, with the bits of a run that was never interrupted.
"""
EXTEND_EXAMPLES = """\
examples:
  fope extend --from runs/rope --method yarn --length 256 --workdir runs/rope_yarn
  fope extend --from runs/rope/500 --method fope --length 256 --workdir runs/rope_fope
  fope extend --from runs/fope --method yarn --length 256 --workdir runs/fope_yarn \\
      --config.position.scaling_order=after_clip --config.position.factor=16
  fope extend --from runs/alibi --method same --length 256 --workdir runs/alibi_256 \\
      --config.train.steps=100
  fope extend --from hf:models/SmolLM-1.7B --method fope --length 4096 --workdir runs/smollm \\
      --config configs/paper/smollm_4096.py:weights=models/SmolLM-1.7B

METHOD is "same", the name of a method (`fope methods`), or that of a scaling (yarn, pi, ntk,
llama3, longrope, clip, ...) for a model with frequencies. The same command again goes on from the
newest checkpoint.
"""
SWEEP_EXAMPLES = """\
examples:
  fope sweep experiments/extrapolation/sweep.py --workdir runs/extrapolation
  fope sweep experiments/extrapolation/sweep.py:seeds=1 --workdir runs/one_seed --jobs 2

The same command again leaves out what is done and goes on with the rest. Each run writes a log,
DIR/NAME.log; the report of all of them is DIR/report/index.html.
"""
EVALUATE_EXAMPLES = """\
examples:
  fope evaluate --run runs/fope
  fope evaluate --run runs/fope --protocols all --report runs/fope/report
  fope evaluate --run runs/fope --protocols sliding-window,chunks
  fope evaluate --run runs/fope --config.evaluate.texts=web,news
  fope evaluate --run runs/fope --config.evaluate.texts=mails=letters/*.txt

protocols (without --protocols: same-tokens, long-window, passkey, about half the time of all):
  same-tokens      the same tokens at every length, with ever more text before them
  sliding-window   every token of a stretch, by a window that moves by evaluate.stride
  chunks           joined documents cut every so many tokens, as the paper's code does
  document-resets  joined documents whose positions begin anew at each document
  no-resets        the same tokens without
  long-window      loss by position in the longest window
  from-start       loss by distance since the document's start
  passkey          a key hidden in filler
  retrieval        the tasks of evaluate.retrieval_tasks; all that fit where it names none

Rows that exist for the same checkpoint and settings are kept; --force scores them again. Any value
of the run's evaluate section can be changed for one call, as above; config.json stays as it is.
"""
IMPORT_EXAMPLES = """\
examples:
  fope import --from models/SmolLM2-135M --workdir runs/smollm2 --config.train.length=2048
  fope data build --config runs/smollm2/config.json
  fope evaluate --run runs/smollm2

train.length is the length that evaluation counts in multiples of; without it the checkpoint's
max_position_embeddings. Any value but the model's own can be given as --config.SECTION.KEY=VALUE.
"""
SPECTRUM_EXAMPLES = """\
examples:
  fope spectrum runs/fope --untrained        before training
  fope spectrum runs/fope                    and after: both on one page, runs/fope/spectrum
  fope report runs/* -o runs/report          what they say about generalization, over all runs
  fope spectrum --demo -o runs/theory
"""
