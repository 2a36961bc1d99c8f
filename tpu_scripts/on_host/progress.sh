# shellcheck shell=bash
# Step, loss, speed and the last checkpoint, from the files of the run.
if [ -s run.workdir ]; then
  venv/bin/fope doctor "$(cat run.workdir)" --progress || true
fi
