# shellcheck shell=bash disable=SC2154 # python, package, sum and files are set before
# Makes ~/fope/venv with Python 3.11 or newer, and installs the package (`package`) or the archive
# whose sha256 is `sum`, in place of the files of an archive before it (`files`). Images of TPU hosts
# have Python 3.10 or older, often without venv.

is_new() { # is_new COMMAND
  "$1" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

make_venv() {
  for one in ${python:-python3.13 python3.12 python3.11 python3}; do
    if is_new "$one"; then
      "$one" -m venv venv
      return
    fi
  done
  if [ -n "$python" ]; then
    echo "$(hostname): --python $python is not Python 3.11 or newer with venv" >&2
    return 1
  fi
  PATH=$HOME/.local/bin:$PATH
  if { command -v uv || python3 -m pip install --quiet --user uv; } >/dev/null 2>&1 &&
    uv venv --quiet --seed --python 3.12 venv; then return; fi
  apt="sudo -n apt-get -qq -o DPkg::Lock::Timeout=600" # a host updates itself after its start
  if $apt update >/dev/null && $apt install -y python3.11 python3.11-venv >/dev/null &&
    python3.11 -m venv venv; then return; fi
  echo "$(hostname): has only $(python3 --version 2>&1); neither uv nor apt-get could bring 3.11" \
    "or newer (without external addresses hosts need Cloud NAT); install it there and give --python" >&2
  return 1
}

if is_running; then
  echo "$(hostname): a run is under way; end it by stop.sh before its code changes" >&2
  exit 1
fi
if [ -z "$package" ]; then
  echo "$sum  $HOME/fope-source.tar.gz" | sha256sum --check --status || {
    echo "$(hostname): fope-source.tar.gz has not arrived whole" >&2
    exit 1
  }
fi
if ! is_new venv/bin/python; then
  rm -rf venv
  make_venv
fi
venv/bin/pip install --quiet --upgrade pip
# A token cache that a run has put beside the code stays.
for one in $files; do rm -rf "source/$one"; done
if [ -n "$package" ]; then
  venv/bin/pip install --quiet "$package"
  # Another commit has the same version, for which pip keeps what is there.
  venv/bin/pip install --quiet --force-reinstall --no-deps "$package"
else
  mkdir -p source
  tar -xzf ~/fope-source.tar.gz -C source
  (
    cd source || exit
    ../venv/bin/pip install --quiet --constraint constraints.txt --editable '.[tpu,buckets]'
  )
fi
venv/bin/fope methods >/dev/null
commit=$(cat source/COMMIT 2>/dev/null || sed -n 's/.*"commit_id": *"\([^"]*\)".*/\1/p' \
  venv/lib/python3*/site-packages/fope_jax-*.dist-info/direct_url.json 2>/dev/null || true)
echo "$(hostname): $(venv/bin/python --version), commit ${commit:-unknown}"
