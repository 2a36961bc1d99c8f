"""The scripts: every command as it would be run, errors, and the loops against a false gcloud."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "tpu_scripts"
ROOT = SCRIPTS.parent
PROGRAMS = ["create", "delete", "install", "launch", "local", "logs", "resume", "xpk"]
PLACE = ["--name", "run1", "--zone", "us-east5-a"]
TPUS = "gcloud compute tpus queued-resources"
RUN = ["--", "train", "--config", "configs/paper/c4_books.py", "--workdir", "gs://my-bucket/run1"]

if not Path("/bin/bash").exists():
    pytest.skip("needs bash", allow_module_level=True)


def run(name, *arguments, **environment):
    return subprocess.run(
        ["bash", SCRIPTS / f"{name}.sh", *arguments],
        env={"PATH": os.environ["PATH"], "TMPDIR": "/tmp"} | environment,
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def dry_run(name, *arguments):
    result = run(name, "--dry-run", *arguments)
    assert result.returncode == 0 and result.stderr == "", result.stderr
    return result.stdout.splitlines()


def on_hosts(command):
    return f"{TPUS} ssh run1 --zone=us-east5-a --node=all --worker=all '--command={command}'"


# ---------------------------------------------------------------------------- every script


def test_there_is_no_other_script():
    assert sorted(p.stem for p in SCRIPTS.glob("*.sh")) == sorted([*PROGRAMS, "lib"])


def test_shellcheck():
    program = shutil.which("shellcheck") or shutil.which(
        "shellcheck", path=str(Path(sys.executable).parent)
    )
    if program is None:
        pytest.skip("shellcheck is not installed")
    files = sorted(SCRIPTS.glob("*.sh"))
    result = subprocess.run(
        [program, "-x", "-P", SCRIPTS, *files], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("name", PROGRAMS)
def test_help_is_the_comment_at_the_top(name):
    result = run(name, "--help")
    assert result.returncode == 0
    assert "--dry-run" in result.stdout and "--help" in result.stdout
    assert "source" not in result.stdout.splitlines()[-1] and len(result.stdout) < 3000


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        *[(name, ["--zne", "x"], "unknown option '--zne'; see --help") for name in PROGRAMS],
        *[(name, ["x"], "unknown argument 'x'; see --help") for name in PROGRAMS],
        ("delete", ["--name", "x"], "--zone is missing; see --help"),
        ("delete", ["--name"], "--name needs a value"),
        ("create", [*PLACE, "--accelerator", "v9-8"], "no runtime version is known for"),
        ("create", [*PLACE, "--accelerator", "v4-8", "--slices", "0"], "--slices = '0'; accepted"),
        ("create", [*PLACE, "--accelerator", "v4-8", "--spot", "--reserved"], "exclude each"),
        ("launch", PLACE, "nothing to run"),
        ("resume", [*PLACE, "--accelerator", "v4-8"], "nothing to run"),
        ("xpk", [*PLACE, "--cluster", "c"], "--accelerator is missing"),
        ("local", ["--processes", "2"], "nothing to run; give -- COMMAND"),
        ("local", ["--processes", "two", "--", "x"], "--processes = 'two'; accepted: 1 or more"),
    ],
)
def test_errors(name, arguments, message):
    result = run(name, *arguments)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith(f"{name}.sh: ") and message in result.stderr


# ---------------------------------------------------------------------------- dry runs


def test_create():
    describe = f"{TPUS} describe run1 --zone=us-east5-a '--format=value(state.state)'"
    assert dry_run("create", *PLACE, "--accelerator", "v5litepod-16", "--spot") == [
        f"{TPUS} create run1 --zone=us-east5-a --accelerator-type=v5litepod-16"
        " --runtime-version=v2-alpha-tpuv5-lite --node-id=run1 --spot",
        describe,
    ]
    assert dry_run(
        "create", *PLACE, "--accelerator=v4-32", "--slices=2", "--reserved", "--valid-for", "6h",
        "--project", "p", "--runtime", "r",
    ) == [
        f"{TPUS} create run1 --zone=us-east5-a --project=p --accelerator-type=v4-32"
        " --runtime-version=r --node-count=2 --node-prefix=run1 --reserved"
        " --valid-until-duration=6h",
        describe.replace("us-east5-a", "us-east5-a --project=p"),
    ]  # fmt: skip


INSTALL = [
    on_hosts(
        "python3 -m venv fope/venv && fope/venv/bin/pip install --quiet --upgrade pip"
    ),
    f"tar -czf /tmp/fope-source.tar.gz --exclude=__pycache__ -C {ROOT} pyproject.toml README.md"
    " LICENSE constraints.txt fope_jax configs experiments",
    f"{TPUS} scp /tmp/fope-source.tar.gz run1: --zone=us-east5-a --node=all --worker=all",
    on_hosts(
        "mkdir -p fope/source && tar -xzf fope-source.tar.gz -C fope/source && cd fope/source"
        r" && ../venv/bin/pip install --quiet -c constraints.txt -e '\''.[tpu,buckets]'\''"
    ),
    on_hosts("fope/venv/bin/fope methods > /dev/null && hostname"),
]  # fmt: skip


def test_install():
    assert dry_run("install", *PLACE) == INSTALL
    package = dry_run(
        "install", *PLACE, "--source", "fope-jax[tpu,buckets]==0.1.0", "--python", "py"
    )
    assert package == [
        INSTALL[0].replace("python3", "py"),
        on_hosts(r"fope/venv/bin/pip install --quiet '\''fope-jax[tpu,buckets]==0.1.0'\''"),
        INSTALL[-1],
    ]
    for path in ("pyproject.toml", "README.md", "LICENSE", "constraints.txt", "experiments"):
        assert (ROOT / path).exists()  # tar would stop at one that is missing


LAUNCH = on_hosts(
    r"tmux kill-session -t fope 2>/dev/null; tmux new-session -d -s fope"
    r" '\''cd ~/fope/source 2>/dev/null || cd ~/fope; rm -f ~/fope/run.exit;"
    r" ~/fope/venv/bin/fope train --config configs/paper/c4_books.py --workdir gs://my-bucket/run1"
    r" >> ~/fope/run.log 2>&1; echo $? > ~/fope/run.exit'\''"
)
STOP, KEEP = "kill-session -t fope 2>/dev/null;", "has-session -t fope 2>/dev/null && exit 0;"


def test_launch():
    assert dry_run("launch", *PLACE, *RUN) == [LAUNCH]
    assert dry_run("launch", *PLACE, "--keep-going", *RUN) == [LAUNCH.replace(STOP, KEEP)]
    (line,) = dry_run("launch", *PLACE, "--env", "A=1 B=2", *RUN)
    assert line == LAUNCH.replace("run.exit; ~", "run.exit; export A=1 B=2; ~")


def test_logs_and_delete():
    tail = f"{TPUS} ssh run1 --zone=us-east5-a --node=0 --worker=0"
    assert dry_run("logs", *PLACE) == [f"{tail} '--command=tail -F -n 100 ~/fope/run.log'"]
    once = dry_run("logs", *PLACE, "--once", "--lines", "5", "--worker", "all", "--node", "1")
    assert once == [
        f"{TPUS} ssh run1 --zone=us-east5-a --node=1 --worker=all"
        " '--command=tail -n 5 ~/fope/run.log'"
    ]
    assert dry_run("delete", *PLACE) == [f"{TPUS} delete run1 --zone=us-east5-a --force --quiet"]


def test_resume_is_the_other_scripts_in_turn():
    lines = dry_run("resume", *PLACE, "--accelerator", "v6e-64", "--spot", *RUN)
    assert "tmux has-session -t fope" in lines.pop(0)
    created = dry_run("create", *PLACE, "--accelerator", "v6e-64", "--spot")
    assert lines == [
        *dry_run("delete", *PLACE), *created, *INSTALL, LAUNCH.replace(STOP, KEEP)
    ]  # fmt: skip


def test_xpk():
    place = [*PLACE, "--cluster", "c"]
    common = "xpk workload create --workload=run1 --cluster=c --zone=us-east5-a --tpu-type=v4-8"
    train = "fope train --config configs/paper/c4_books.py --workdir gs://my-bucket/run1"
    assert dry_run("xpk", *place, "--accelerator", "v4-8", "--image", "i:1", *RUN) == [
        f"{common} --num-slices=1 --max-restarts=20 --docker-image=i:1 '--command={train}'"
    ]
    assert dry_run("xpk", *place, "--accelerator", "v4-8", "--slices", "2", *RUN) == [
        f"{common} --num-slices=2 --max-restarts=20 --base-docker-image=python:3.11"
        f" --script-dir={ROOT} '--command=pip install --quiet -c constraints.txt"
        rf" -e '\''.[tpu,buckets]'\'' && {train}'"
    ]
    assert dry_run("xpk", *place, "--delete") == [
        "xpk workload delete --workload=run1 --cluster=c --zone=us-east5-a"
    ]
    assert dry_run("xpk", *place, "--logs")[0].startswith("kubectl logs --selector=")


def test_local():
    lines = dry_run(
        "local", "--processes", "2", "--devices", "4", "--port", "999", "--", "fope", "a b", "it's"
    )
    assert lines == [
        f"env FOPE_COORDINATOR=127.0.0.1:999 FOPE_NUM_PROCESSES=2 FOPE_PROCESS_ID={i}"
        " FOPE_DISTRIBUTED_TIMEOUT=120 JAX_PLATFORMS=cpu"
        r" XLA_FLAGS=--xla_force_host_platform_device_count=4 fope 'a b' 'it'\''s'"
        for i in (0, 1)
    ]


# ---------------------------------------------------------------------------- a false gcloud


@pytest.fixture
def gcloud(tmp_path):
    """A gcloud that notes its arguments; its answers come from files `state` and `hosts`, a line
    a question, the last again and again."""
    program = tmp_path / "bin" / "gcloud"
    program.parent.mkdir()
    program.write_text(f"""#!/bin/bash
cd {tmp_path}
answer() {{ head -n 1 "$1"; [[ $(wc -l < "$1") == 1 ]] || sed -i 1d "$1"; }}
echo "$4" >> calls
case "$*" in
  *describe*) answer state ;;
  *has-session*echo*) answer hosts | tr , '\\n' | sed 's/^/FOPE /' ;;
esac
""")
    program.chmod(0o755)

    def resume(state, hosts, *options):
        (tmp_path / "state").write_text("".join(f"{x}\n" for x in state))
        (tmp_path / "hosts").write_text("".join(f"{x}\n" for x in hosts))
        result = run(
            "resume", *PLACE, "--accelerator", "v4-8", "--poll", "1", *options, *RUN,
            PATH=f"{program.parent}:{os.environ['PATH']}", TMPDIR=str(tmp_path),
        )  # fmt: skip
        return result, (tmp_path / "calls").read_text().split()

    return resume


def test_resume_brings_a_lost_slice_back(gcloud):
    # Lost, asked for again, there on the second look, nothing on it, launched, done.
    states = ["SUSPENDED", "PROVISIONING", "ACTIVE"]
    result, calls = gcloud(states, ["none,none", "running,running", "0,0"])
    assert result.returncode == 0, result.stderr
    assert "the slice is SUSPENDED; starting it again (1 of 20)" in result.stderr
    assert calls[:5] == ["describe", "delete", "create", "describe", "describe"]
    assert calls.count("create") == 1 and calls.count("scp") == 1


@pytest.mark.parametrize(
    ("states", "hosts", "code", "message"),
    [
        (["ACTIVE"], ["0,2"], 2, "the run has ended with code 2"),
        (["FAILED"], ["0"], 1, "was lost 2 times; giving up"),
        (["ACTIVE"], ["134,137"], 1, "ended by a signal (codes 134 137)"),
    ],
)
def test_resume_gives_up(gcloud, states, hosts, code, message):
    result, _ = gcloud(states, hosts, "--limit", "1")
    assert result.returncode == code and message in result.stderr, result.stderr


# ---------------------------------------------------------------------------- local.sh


def test_local_names_the_lines_and_succeeds():
    result = run("local", "--processes", "3", "--", "bash", "-c", "echo I am $FOPE_PROCESS_ID")
    assert result.returncode == 0
    assert sorted(result.stdout.splitlines()) == ["I am 0", "[1] I am 1", "[2] I am 2"]


def test_local_stops_the_others_after_a_failure():
    began = time.monotonic()
    body = "if [[ $FOPE_PROCESS_ID == 1 ]]; then echo no >&2; exit 7; fi; exec sleep 50"
    result = run("local", "--processes", "3", "--", "bash", "-c", body)
    assert result.returncode == 7 and time.monotonic() - began < 20
    assert "[1] no" in result.stdout and "stopping the others" in result.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_local_passes_signals_on(number, code):
    process = subprocess.Popen(
        ["bash", SCRIPTS / "local.sh", "--", "bash", "-c",
         "trap 'echo got INT; exit 1' INT; trap 'echo got TERM; exit 1' TERM; echo ready;"
         "for i in {1..200}; do sleep 0.1; done"],
        stdout=subprocess.PIPE, text=True,
        # Where the tests themselves run in the background, Ctrl-C is ignored, and would be here.
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
    )  # fmt: skip
    lines = [process.stdout.readline() for _ in range(2)]
    assert sorted(lines) == ["[1] ready\n", "ready\n"]
    process.send_signal(number)
    rest = process.communicate(timeout=30)[0]
    assert process.returncode == code
    assert rest.count(f"got {number.name[3:]}") == 2


def test_local_starts_jax_processes_that_meet(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    program = tmp_path / "program.py"
    program.write_text(
        "import jax\n"
        "from fope_jax.distributed import initialize\n"
        "initialize()\n"
        "print(jax.process_index(), jax.process_count(), jax.device_count())\n"
    )
    result = run(
        "local", "--processes", "2", "--devices", "3", "--port", str(port), "--",
        sys.executable, str(program),
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert sorted(result.stdout.split("\n")) == ["", "0 2 6", "[1] 1 2 6"], result.stdout
