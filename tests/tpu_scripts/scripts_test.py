"""The scripts: every command as it would be run, errors, and the loops against a false gcloud."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

SCRIPTS = Path(__file__).parents[2] / "tpu_scripts"
ROOT = SCRIPTS.parent
PROGRAMS = ["create", "delete", "install", "launch", "local", "logs", "resume", "xpk"]
PLACE = ["--name", "run1", "--zone", "us-east5-a"]
FALSE_GCLOUD = Path(__file__).with_name("false_gcloud.py")
TPUS = "gcloud compute tpus queued-resources"
RUN = ["--", "train", "--config", "configs/paper/c4_books.py", "--workdir", "gs://my-bucket/run1"]

if not Path("/bin/bash").exists():
    pytest.skip("needs bash", allow_module_level=True)


def run(name, *arguments, **environment):
    return subprocess.run(
        ["bash", SCRIPTS / f"{name}.sh", *arguments],
        env={"PATH": os.environ["PATH"], "TMPDIR": "/tmp"} | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def dry_run(name, *arguments):
    result = run(name, "--dry-run", *arguments)
    assert result.returncode == 0 and result.stderr == "", result.stderr
    return result.stdout.splitlines()


def on_hosts(command):
    return (
        f"{TPUS} ssh run1 --zone=us-east5-a --node=all --worker=all --quiet '--command={command}'"
    )


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


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("delete", []), ("create", ["--accelerator", "v4-8"]), ("resume", ["--accelerator", "v4-8"])],
)
def test_a_missing_gcloud_is_named(tmp_path, name, arguments):
    for program in ("bash", "dirname", "basename", "timeout", "mktemp", "rm"):
        (tmp_path / program).symlink_to(shutil.which(program))
    result = run(name, *PLACE, *arguments, *RUN, PATH=str(tmp_path))
    assert result.returncode == 2
    assert result.stderr == f"{name}.sh: gcloud is not installed, or not in PATH\n"


# ---------------------------------------------------------------------------- dry runs


def test_create():
    describe = f"{TPUS} describe run1 --zone=us-east5-a --quiet '--format=value(state.state)'"
    assert dry_run("create", *PLACE, "--accelerator", "v5litepod-16", "--spot") == [
        f"{TPUS} create run1 --zone=us-east5-a --accelerator-type=v5litepod-16"
        " --runtime-version=v2-alpha-tpuv5-lite --quiet --node-id=run1 --spot",
        describe,
    ]
    assert dry_run(
        "create",
        *PLACE,
        "--accelerator=v4-32",
        "--slices=2",
        "--reserved",
        "--valid-for",
        "6h",
        "--project",
        "p",
        "--runtime",
        "r",
    ) == [
        f"{TPUS} create run1 --zone=us-east5-a --project=p --accelerator-type=v4-32"
        " --runtime-version=r --quiet --node-count=2 --node-prefix=run1 --reserved"
        " --valid-until-duration=6h",
        describe.replace("us-east5-a", "us-east5-a --project=p"),
    ]


INSTALL = [
    on_hosts("python3 -m venv fope/venv && fope/venv/bin/pip install --quiet --upgrade pip"),
    f"tar -czf /tmp/fope-source.tar.gz --exclude=__pycache__ -C {ROOT} pyproject.toml setup.py"
    " README.md LICENSE constraints.txt fope_jax configs experiments",
    f"{TPUS} scp /tmp/fope-source.tar.gz run1: --zone=us-east5-a --node=all --worker=all --quiet",
    on_hosts(
        "mkdir -p fope/source && tar -xzf fope-source.tar.gz -C fope/source && cd fope/source"
        r" && ../venv/bin/pip install --quiet -c constraints.txt -e '\''.[tpu,buckets]'\''"
    ),
    on_hosts("fope/venv/bin/fope methods > /dev/null && hostname"),
]


def test_install():
    assert dry_run("install", *PLACE) == INSTALL
    package = dry_run(
        "install",
        *PLACE,
        "--source",
        "fope-jax[tpu,buckets] @ git+https://host/repository",
        "--python",
        "py",
    )
    assert package == [
        INSTALL[0].replace("python3", "py"),
        on_hosts(
            r"fope/venv/bin/pip install --quiet '\''fope-jax[tpu,buckets] @ git+https://host/repository'\''"
        ),
        INSTALL[-1],
    ]
    for path in (
        "pyproject.toml",
        "setup.py",
        "README.md",
        "LICENSE",
        "constraints.txt",
        "experiments",
    ):
        assert (ROOT / path).exists()  # tar would stop at one that is missing


LAUNCH = on_hosts(
    r"tmux has-session -t fope 2>/dev/null && exit 0; tmux new-session -d -s fope"
    r" '\''cd ~/fope/source 2>/dev/null || cd ~/fope; rm -f ~/fope/run.exit;"
    r" ~/fope/venv/bin/fope train --config configs/paper/c4_books.py --workdir gs://my-bucket/run1"
    r" >> ~/fope/run.log 2>&1; echo $? > ~/fope/run.exit'\''"
)


def test_launch():
    assert dry_run("launch", *PLACE, "--keep-going", *RUN) == [LAUNCH]
    (line,) = dry_run("launch", *PLACE, "--keep-going", "--env", "A=1 B=2", *RUN)
    assert line == LAUNCH.replace("run.exit; ~", "run.exit; export A=1 B=2; ~")


def test_logs_and_delete():
    tail = f"{TPUS} ssh run1 --zone=us-east5-a --node=0 --worker=0 --quiet"
    assert dry_run("logs", *PLACE) == [f"{tail} '--command=tail -F -n 100 ~/fope/run.log'"]
    once = dry_run("logs", *PLACE, "--once", "--lines", "5", "--worker", "all", "--node", "1")
    assert once == [
        f"{TPUS} ssh run1 --zone=us-east5-a --node=1 --worker=all --quiet"
        " '--command=tail -n 5 ~/fope/run.log'"
    ]
    assert dry_run("delete", *PLACE) == [f"{TPUS} delete run1 --zone=us-east5-a --force --quiet"]


def test_resume_is_the_other_scripts_in_turn():
    lines = dry_run("resume", *PLACE, "--accelerator", "v6e-64", "--spot", *RUN)
    assert "tmux has-session -t fope" in lines.pop(0)
    created = dry_run("create", *PLACE, "--accelerator", "v6e-64", "--spot")
    assert lines == [*dry_run("delete", *PLACE), *created, *INSTALL, LAUNCH]


def test_xpk():
    place = [*PLACE, "--cluster", "c"]
    common = "xpk workload create --workload=run1 --cluster=c --zone=us-east5-a --tpu-type=v4-8"
    train = "exec fope train --config configs/paper/c4_books.py --workdir gs://my-bucket/run1"
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


class Gcloud:
    """The scripts beside the gcloud of false_gcloud.py, whose minute is a moment."""

    def __init__(self, folder):
        self.world, self.folder = folder / "world.json", folder
        for name, content in {
            "gcloud": f'#!/bin/bash\nexec {sys.executable} -SE {FALSE_GCLOUD} "$@"\n',
            "sleep": "#!/bin/bash\nexec /bin/sleep 0.05\n",
        }.items():
            program = folder / "bin" / name
            program.parent.mkdir(exist_ok=True)
            program.write_text(content)
            program.chmod(0o755)

    def has(self, state="ACTIVE", runs=("running", "0,0"), becomes=(), **faults):
        """Begins a world; a new request is there at the third look."""
        self.world.write_text(
            json.dumps(
                {
                    "state": state,
                    "becomes": list(becomes),
                    "then": ["PROVISIONING", "ACTIVE"],
                    "begun": state == "ACTIVE",
                    "runs": list(runs),
                    "faults": faults,
                    "counts": {},
                }
            )
        )

    def environment(self):
        return {
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            "TMPDIR": str(self.folder),
            "FALSE_GCLOUD": str(self.world),
        }

    def resume(self, *options):
        """Watches to the end; returns the code, what was said, the state and what was done."""
        options = ["--accelerator", "v4-8", *options]
        result = run("resume", *PLACE, *options, *RUN, **self.environment())
        world = json.loads(self.world.read_text())
        left = [path.name for path in self.folder.glob("tmp.*")]
        assert not left, "scratch files"
        return SimpleNamespace(
            code=result.returncode, said=result.stderr, state=world["state"], did=world["counts"]
        )


@pytest.fixture
def gcloud(tmp_path):
    return Gcloud(tmp_path)


MADE = {"create": 1, "install": 3, "scp": 1, "launch": 1}  # a slice with a run on it


@pytest.mark.fast("SUSPENDED-becomes0-did0")
@pytest.mark.parametrize(
    ("state", "becomes", "did"),
    [
        ("SUSPENDED", [], MADE | {"delete": 1}),
        pytest.param("FAILED", [], MADE | {"delete": 1}, marks=pytest.mark.slow),
        pytest.param(
            "ACTIVE", ["ACTIVE", "SUSPENDING"], MADE | {"delete": 1}, marks=pytest.mark.slow
        ),
        ("ACTIVE", ["ACTIVE", "DELETING", None], MADE),
    ],
)
def test_resume_brings_a_lost_slice_back(gcloud, state, becomes, did):
    gcloud.has(state, ["running", "running", "0,0"], becomes)
    result = gcloud.resume()
    assert (result.code, result.state, result.did) == (0, "ACTIVE", did), result.said
    assert "starting it again (1 of 20)" in result.said and "(2 of 20)" not in result.said


@pytest.mark.slow
def test_resume_begins_with_no_slice_at_all(gcloud):
    gcloud.has(None)
    result = gcloud.resume("--limit", "1")
    assert (result.code, result.did) == (0, MADE), result.said
    assert "starting it again" not in result.said


@pytest.mark.parametrize("fault", ["absent", "absent without a name"])
def test_a_slice_that_is_there_although_the_service_says_no_stays(gcloud, fault):
    gcloud.has(describe=[None, fault])
    result = gcloud.resume()
    assert (result.code, result.state, result.did) == (0, "ACTIVE", {}), result.said


NO_ANSWER = [
    "auth",
    "no account",
    "unauthenticated",
    "permission",
    "project",
    "location",
    "no project",
    "no zone",
    "no such account",
    "certificate",
    "other",
    "quota",
    "network",
    "connection",
    "unavailable",
    "internal",
    "502",
    "half a word",
    "nothing",
    "a word too many",
    "a state and an error",
    "killed",
]
HOSTS = [
    "auth",
    "hosts away",
    "one of two hosts",
    "one not begun",
    "a code not written yet",
    "hosts say nothing",
]


@pytest.mark.parametrize("fault", NO_ANSWER)
@pytest.mark.slow
def test_a_look_without_an_answer_changes_nothing(gcloud, fault):
    gcloud.has(describe=[None, fault, fault])
    result = gcloud.resume("--limit", "1")
    assert (result.code, result.state, result.did) == (0, "ACTIVE", {}), result.said
    assert result.said.count("its state is not known (") == 2


@pytest.mark.parametrize("fault", HOSTS)
@pytest.mark.slow
def test_hosts_that_do_not_all_answer_change_nothing(gcloud, fault):
    gcloud.has(ask=[fault])
    result = gcloud.resume("--limit", "1")
    assert (result.code, result.state, result.did) == (0, "ACTIVE", {}), result.said
    assert "the hosts could not be asked (" in result.said


@pytest.mark.slow
def test_no_number_of_such_looks_changes_anything(gcloud):
    gcloud.has(describe=[None, *NO_ANSWER], ask=HOSTS)
    result = gcloud.resume("--limit", "1")
    assert (result.code, result.state, result.did) == (0, "ACTIVE", {}), result.said
    looks = [line for line in result.said.splitlines() if line.endswith("trying again")]
    assert len(looks) == len(NO_ANSWER) + len(HOSTS)
    assert "(ERROR: (gcloud.compute.tpus.queued-resources.describe) There was a problem" in looks[1]


def test_a_gcloud_that_hangs_or_asks_is_left(gcloud):
    gcloud.has(describe=["hang", "prompt"], ask=["hang", "prompt"])
    result = gcloud.resume("--look", "1")
    assert (result.code, result.state, result.did) == (0, "ACTIVE", {}), result.said
    assert result.said.count("(no answer within 1 s)") == 2, result.said


@pytest.mark.parametrize(
    "faults",
    [
        {"delete": ["auth", "unavailable"], "create": ["quota", "network"], "launch": ["auth"]},
        *(
            pytest.param(faults, marks=pytest.mark.slow)
            for faults in (
                {"delete": ["done, but cut off"]},
                {"create": ["done, but cut off"]},
                {"create": ["no capacity"]},
                {"describe": [None, "auth", None, "unavailable"]},
                {"install": ["hosts away"]},
                {"scp": ["connection"]},
            )
        ),
    ],
    ids=str,
)
def test_what_cannot_be_done_now_is_done_later_and_once(gcloud, faults):
    gcloud.has("SUSPENDED", **faults)
    result = gcloud.resume("--limit", "1")
    assert (result.code, result.state) == (0, "ACTIVE"), result.said
    assert {result.did[name] for name in ("delete", "create", "launch")} == {1}
    assert result.said.count("starting it again") == 1


@pytest.mark.parametrize(
    "verb",
    [
        "describe",
        *(pytest.param(v, marks=pytest.mark.slow) for v in ["ask", "create", "delete", "launch"]),
    ],
)
def test_resume_has_a_patience(gcloud, verb):
    state = "SUSPENDED" if verb in ("create", "delete") else "ACTIVE"
    gcloud.has(state, ["none"], **{verb: ["auth", "ever"]})
    result = gcloud.resume("--patience", "1", "--limit", "1")
    assert result.code == 1, result.said
    assert "nothing has worked for" in result.said and "auth tokens" in result.said
    assert result.state == (None if verb == "create" else state), "as it was"


@pytest.mark.parametrize(
    ("state", "runs", "code", "message"),
    [
        ("ACTIVE", "0,2", 2, "the run has ended with code 2"),
        ("ACTIVE", "134,137", 1, "ended by a signal (codes 134 137)"),
    ],
)
def test_resume_gives_up(gcloud, state, runs, code, message):
    gcloud.has(state, [runs])
    result = gcloud.resume("--limit", "1")
    assert result.code == code and message in result.said, result.said
    assert "delete" not in result.did and result.state == "ACTIVE"


def test_requests_that_fail_again_and_again_are_losses(gcloud):
    gcloud.has("FAILED")
    world = json.loads(gcloud.world.read_text()) | {"then": ["FAILED"]}
    gcloud.world.write_text(json.dumps(world))
    result = gcloud.resume("--limit", "2")
    assert result.code == 1 and "was lost 3 times; giving up" in result.said, result.said
    assert result.did == {"delete": 2, "create": 2}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_ends_the_watch_and_leaves_the_slice(gcloud, number):
    gcloud.has(describe=["hang"])
    process = subprocess.Popen(
        ["bash", SCRIPTS / "resume.sh", *PLACE, "--accelerator", "v4-8", *RUN],
        env=gcloud.environment(),
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
    )
    while "hang" in gcloud.world.read_text():
        time.sleep(0.02)
    process.send_signal(number)
    process.communicate(timeout=10)
    world = json.loads(gcloud.world.read_text())
    assert process.returncode == 128 + number
    assert (world["state"], world["counts"]) == ("ACTIVE", {})


def test_create_waits_through_looks_without_an_answer(gcloud):
    gcloud.has(None, describe=["auth", None, "network"])
    arguments = [*PLACE, "--accelerator", "v4-8"]
    result = run("create", *arguments, **gcloud.environment())
    assert result.returncode == 0, result.stderr
    assert "UNKNOWN (" in result.stderr and "ACTIVE" in result.stderr.splitlines()[-1]
    gcloud.has(None, create=["quota"])
    assert run("create", *arguments, **gcloud.environment()).returncode == 3


def test_create_says_where_the_request_has_been_deleted(gcloud):
    gcloud.has(None)
    world = json.loads(gcloud.world.read_text()) | {"then": ["ACCEPTED", None, None, None]}
    gcloud.world.write_text(json.dumps(world))
    result = run("create", *PLACE, "--accelerator", "v4-8", **gcloud.environment())
    assert result.returncode == 1 and "run1 is NONE after" in result.stderr


# ---------------------------------------------------------------------------- launch.sh on a host


def test_launch_lets_the_earlier_run_end_before_the_next_begins(tmp_path):
    """Its command on hosts, run here: what tmux holds gets SIGTERM and is waited for."""
    if not shutil.which("tmux") or not shutil.which("pkill"):
        pytest.skip("needs tmux and pkill")
    fope, log = tmp_path / "fope/venv/bin/fope", tmp_path / "fope/run.log"
    fope.parent.mkdir(parents=True)
    fope.write_text(
        "#!/bin/bash\ntrap 'sleep 1; echo $1 saved; exit 143' TERM; echo $1 begins\n"
        "for i in {1..300}; do /bin/sleep 0.1; done\n"
    )
    fope.chmod(0o755)
    stand_in = tmp_path / "bin" / "gcloud"
    stand_in.parent.mkdir()
    stand_in.write_text('#!/bin/bash\nfor a; do [[ $a != --command=* ]] || bash -c "${a#*=}"; done')
    stand_in.chmod(0o755)
    environment = {
        "HOME": str(tmp_path),
        "TMUX_TMPDIR": str(tmp_path),
        "SHELL": "/bin/bash",
        "PATH": f"{stand_in.parent}:{os.environ['PATH']}",
    }

    def says(line):
        deadline = time.monotonic() + 20
        while line not in (log.read_text() if log.exists() else ""):
            assert time.monotonic() < deadline, line
            time.sleep(0.02)

    try:
        for name in ("first", "second"):
            assert run("launch", *PLACE, "--", name, **environment).returncode == 0
            says(f"{name} begins")
        assert log.read_text().splitlines() == ["first begins", "first saved", "second begins"]
        assert run("launch", *PLACE, "--keep-going", "--", "third", **environment).returncode == 0
        assert "third" not in log.read_text()
    finally:
        subprocess.run(["tmux", "kill-server"], env=os.environ | environment, check=False)


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


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_local_passes_signals_on(number, code):
    process = subprocess.Popen(
        [
            "bash",
            SCRIPTS / "local.sh",
            "--",
            "bash",
            "-c",
            "trap 'echo got INT; exit 1' INT; trap 'echo got TERM; exit 1' TERM;"
            "trap 'echo got HUP; exit 1' HUP; echo ready;"
            "for i in {1..200}; do sleep 0.1; done",
        ],
        stdout=subprocess.PIPE,
        text=True,
        # Where the tests themselves run in the background, Ctrl-C is ignored, and would be here.
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
    )
    lines = [process.stdout.readline() for _ in range(2)]
    assert sorted(lines) == ["[1] ready\n", "ready\n"]
    process.send_signal(number)
    rest = process.communicate(timeout=30)[0]
    assert process.returncode == code
    assert rest.count(f"got {number.name[3:]}") == 2


@pytest.mark.slow  # tests/processes has it without the script
def test_local_starts_jax_processes_that_meet(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    program = tmp_path / "program.py"
    program.write_text(
        "import jax\n"
        "from fope_jax.processes.start import initialize\n"
        "initialize()\n"
        "print(jax.process_index(), jax.process_count(), jax.device_count())\n"
    )
    result = run(
        "local",
        "--processes",
        "2",
        "--devices",
        "3",
        "--port",
        str(port),
        "--",
        sys.executable,
        str(program),
    )
    assert result.returncode == 0, result.stderr
    assert sorted(result.stdout.split("\n")) == ["", "0 2 6", "[1] 1 2 6"], result.stdout
