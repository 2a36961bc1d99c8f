"""The scripts: dry runs by gcloud's published flags, errors, and runs against a false gcloud."""

import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from tests.tpu_scripts.gcloud_reference import COMMANDS, UsageError, parse

SCRIPTS = Path(__file__).parents[2] / "tpu_scripts"
ROOT = SCRIPTS.parent
PROGRAMS = ["create", "delete", "install", "jobset", "launch", "local", "logs", "resume"]
PROGRAMS += ["status", "stop", "xpk"]
PLACE = ["--name", "run1", "--zone", "us-east5-a"]
COMPLETE = {  # what else a script that starts a run must be given
    "launch": PLACE,
    "resume": [*PLACE, "--accelerator", "v4-8"],
    "jobset": ["--name=x", "--image=i", "--slice=v5e:4x4", "--service-account=a"],
    "xpk": [*PLACE, "--cluster=c", "--accelerator=v4-8"],
}
FALSE_GCLOUD = Path(__file__).with_name("false_gcloud.py")
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


# ---------------------------------------------------------------------------- every script


def test_there_is_no_other_script():
    assert sorted(p.stem for p in SCRIPTS.glob("*.sh")) == sorted([*PROGRAMS, "lib"])


@pytest.mark.parametrize("name", PROGRAMS)
def test_scripts_can_be_called_by_their_name(name):
    """As the documentation calls them, ``tpu_scripts/NAME.sh``."""
    assert os.access(SCRIPTS / f"{name}.sh", os.X_OK)


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
        ("create", [*PLACE, "--accelerator=v4-8", "--data-disk=d"], "accepted: source=projects/"),
        ("create", [*PLACE, "--accelerator=v4-8", "--startup-script=no"], "'no' is no file"),
        ("launch", PLACE, "nothing to run"),
        ("logs", [*PLACE, "--node", "x"], "--node 'x'; accepted: 0 or more, or all"),
        ("launch", [*PLACE, "--env", "A=1 B=2", *RUN], "has two variables; give --env once"),
        ("launch", [*PLACE, "--env", "A", *RUN], "--env 'A'; accepted: NAME=VALUE"),
        *[
            (name, [*given, "--", "train", f"--workdir={path}"], f"--workdir '{path}'; accepted:")
            for name, given in COMPLETE.items()
            for path in ("runs/x", "~/x", "gs:/b/x")
        ],
        ("launch", [*PLACE, "--", "train", "--workdir", "x"], "or /PATH on a disk that all hosts"),
        ("jobset", ["--name", "x", "--image", "i", *RUN], "--slice is missing"),
        ("jobset", ["--name", "x", "--image=i", "--slice=v5e:3x3", *RUN], "no whole hosts of"),
        ("jobset", ["--name", "x", "--image=i", "--slice=v9:4x4", *RUN], "v4, v5e, v5p, v6e or"),
        ("jobset", ["--name", "X", "--image=i", "--slice=v5e:4x4", *RUN], "lower-case letters"),
        (
            "jobset",
            ["--name", "x", "--image=i", "--slice=v5e:2x2", "--slices=2", *RUN],
            "--slices 2: --slice v5e:2x2 is one host; GKE joins only slices of several hosts",
        ),
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


def gcloud_commands(name, *arguments):
    """What a dry run would give to gcloud: command, positionals and flags, by published names."""
    words = shlex.split("\n".join(dry_run(name, *arguments)))
    starts = [i for i, word in enumerate(words) if word == "gcloud"]
    ends = [i for i, word in enumerate(words) if word in ("gcloud", "tar")][1:] + [len(words)]
    return [parse(words[i + 1 : min(e for e in ends if e > i)]) for i in starts]


CREATE = ["--accelerator", "v5litepod-16"]
ALL_OF_CREATE = [
    *("--slices", "2", "--valid-for", "6h", "--project", "p", "--runtime", "r", "--internal-ips"),
    *("--service-account", "me@p.iam.gserviceaccount.com", "--network", "n", "--subnetwork", "s"),
    *("--data-disk", "source=projects/p/zones/z/disks/d,mode=read-only"),
    *("--data-disk", "mode=read-only,source=projects/p/zones/z/disks/e"),
    *("--startup-script", __file__),
]


@pytest.mark.parametrize(
    ("name", "arguments", "commands"),
    [
        ("create", [*CREATE, "--spot"], ["create", "describe"]),
        ("create", [*CREATE, "--reserved", *ALL_OF_CREATE], ["create", "describe"]),
        ("install", ["--tunnel-through-iap"], ["scp", "ssh"]),
        ("install", ["--source", "fope-jax @ git+https://host/x", "--internal-ip"], ["ssh"]),
        ("launch", ["--env", "LIBTPU_INIT_ARGS=--a=1 --b='2'", *RUN], ["ssh"]),
        ("stop", ["--grace", "5"], ["ssh"]),
        ("status", [], ["describe", "ssh", "ssh"]),
        ("logs", ["--worker", "all"], ["ssh"]),
        ("logs", ["--save", "x", "--node", "1"], ["ssh"]),
        ("delete", [], ["ssh", "delete"]),
        ("delete", ["--at-once"], ["delete"]),
        (
            "resume",
            [*CREATE, "--spot", *ALL_OF_CREATE, "--env", "A=b c", "--internal-ip", *RUN],
            ["ssh", "delete", "create", "describe", "scp", "ssh", "ssh"],
        ),
    ],
)
def test_gcloud_gets_published_flags_alone(name, arguments, commands):
    """A flag that gcloud does not know, or misses, fails in ``parse``."""
    found = gcloud_commands(name, *PLACE, *arguments)
    assert [command.split()[1] for command, _, _ in found] == commands
    for command, _, flags in found:
        assert flags["zone"] == ["us-east5-a"] and "quiet" in flags
        if command.split()[1] == "create" and "--internal-ips" in arguments:
            assert flags["node-count"] == ["2"] and flags["internal-ips"] == [""]
            assert flags["service-account"] == ["me@p.iam.gserviceaccount.com"]
            assert [flags[key] for key in ("network", "subnetwork")] == [["n"], ["s"]]
            assert len(flags["data-disk"]) == 2 and flags["valid-until-duration"] == ["6h"]
            assert flags["metadata-from-file"] == [f"startup-script={__file__}"]
        if command.split()[1] in ("ssh", "scp"):
            assert [key in flags for key in ("internal-ip", "tunnel-through-iap")] == [
                f"--{key}" in arguments for key in ("internal-ip", "tunnel-through-iap")
            ]


def test_the_parser_of_published_flags_refuses_what_gcloud_refuses():
    base = "compute tpus queued-resources create q --zone=z --accelerator-type=v4-8"
    for words in (
        f"{base} --node-id=q",
        f"{base} --runtime-version=r",
        f"{base} --node-id=q --runtime-version=r --node-count=2",
        f"{base} --node-count=1 --runtime-version=r",
        f"{base} --node-id=q --runtime-version=r --topology=2x2",
        f"{base} --node-id=q --runtime-version=r --data-disk=mode=read-only",
        f"{base} --node-id=q --runtime-version=r --best-effort",
        "compute tpus queued-resources ssh q --zone=z --output-directory=x",
        "compute tpus queued-resources ssh q --zone=z --internal-ip --tunnel-through-iap",
        "compute tpus queued-resources describe q --format=x",
        "compute tpus queued-resources start q --zone=z",
    ):
        with pytest.raises(UsageError):
            parse(words.split())
    parse(f"{base} --node-id=q --runtime-version=r".split())
    assert {"ssh", "scp", "create"} <= {name.split()[1] for name in COMMANDS}


def make_source(directory):
    """A checkout as install.sh packs it, with nothing in its files."""
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "constraints.txt"):
        assert (ROOT / name).exists()  # tar would stop at one that is missing
        directory.mkdir(exist_ok=True)
        (directory / name).write_text("x")
    for name in ("fope_jax", "configs", "experiments"):
        assert (ROOT / name).is_dir()
        (directory / name).mkdir()
    return directory


def test_the_commit_goes_along(tmp_path):
    """The archive has what pip needs, and the commit of a checkout, which .git would tell."""
    source, packed = make_source(tmp_path / "source"), tmp_path / "packed"
    stand_in = tmp_path / "bin" / "gcloud"
    stand_in.parent.mkdir()
    stand_in.write_text(f'#!/bin/bash\n[[ $4 != scp ]] || cp "$5" {packed}\n')
    stand_in.chmod(0o755)

    def commit(**environment):
        path = {"PATH": f"{stand_in.parent}:{os.environ['PATH']}"}
        run("install", *PLACE, "--source", str(source), **path, **environment)
        listed = subprocess.run(
            ["tar", "-xzOf", packed, "COMMIT"], capture_output=True, text=True, check=True
        )
        return listed.stdout.strip()

    def git(*words):
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        command = ["git", "-C", source, *who, *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    assert commit(GIT_CEILING_DIRECTORIES=str(tmp_path)) == "unknown"
    (source / "COMMIT").write_text("1234\n")
    assert commit(GIT_CEILING_DIRECTORIES=str(tmp_path)) == "1234"
    git("init", "--quiet")
    git("add", "setup.py")
    git("commit", "--quiet", "-m", "x")
    head = git("rev-parse", "HEAD")
    assert commit() == head
    (source / "setup.py").write_text("y")
    assert commit() == f"{head}-dirty"


def test_xpk():
    place = [*PLACE, "--cluster", "c"]
    common = "xpk workload create --workload=run1 --cluster=c --zone=us-east5-a --tpu-type=v4-8"
    train = "exec fope train --config configs/paper/c4_books.py --workdir gs://my-bucket/run1"
    assert dry_run("xpk", *place, "--accelerator", "v4-8", "--image", "i:1", *RUN) == [
        f"{common} --num-slices=1 --max-restarts=20 --termination-grace-period-seconds=300"
        f" --docker-image=i:1 '--command={train}'"
    ]
    more = ["--slices", "2", "--grace", "30", "--env", "A=1", "--env", "B=x y"]
    assert dry_run("xpk", *place, "--accelerator", "v4-8", *more, *RUN) == [
        f"{common} --num-slices=2 --max-restarts=20 --termination-grace-period-seconds=30"
        f" --env=A=1 '--env=B=x y' --base-docker-image=python:3.11 --script-dir={ROOT}"
        " '--command=pip install --quiet -c constraints.txt"
        rf" -e '\''.[tpu,buckets]'\'' && {train}'"
    ]
    assert dry_run("xpk", *place, "--delete") == [
        "xpk workload delete --workload=run1 --cluster=c --zone=us-east5-a"
    ]
    assert dry_run("xpk", *place, "--logs")[0].startswith("kubectl logs --selector=")


# Of the CustomResourceDefinition of JobSet (2026-08-18): the fields that jobset.yaml
# uses, with their types; "[]" is an array, "{}" takes any keys.
STRINGS = {"{}": str}
CONTAINER = {
    "name": str,
    "image": str,
    "command": [str],
    "env": [{"name": str, "value": str}],
    "securityContext": {"privileged": bool},
    "resources": {"requests": {"{}": int}, "limits": {"{}": int}},
}
POD = {
    "restartPolicy": str,
    "serviceAccountName": str,
    "hostNetwork": bool,
    "dnsPolicy": str,
    "terminationGracePeriodSeconds": int,
    "nodeSelector": STRINGS,
    "tolerations": [{"key": str, "operator": str}],
    "containers": [CONTAINER],
}
EXIT_CODES = {"containerName": str, "operator": str, "values": [int]}
JOB = {
    "parallelism": int,
    "completions": int,
    "completionMode": str,
    "backoffLimit": int,
    "podFailurePolicy": {"rules": [{"action": str, "onExitCodes": EXIT_CODES}]},
    "template": {"spec": POD},
}
JOBSET = {
    "apiVersion": str,
    "kind": str,
    "metadata": {"name": str, "namespace": str, "annotations": STRINGS},
    "spec": {
        "failurePolicy": {
            "maxRestarts": int,
            "rules": [{"name": str, "action": str, "onJobFailureReasons": [str]}],
        },
        "replicatedJobs": [{"name": str, "replicas": int, "template": {"spec": JOB}}],
    },
}


def check_fields(value, schema, place="jobset"):
    if isinstance(schema, type):
        assert type(value) is schema, place
    elif isinstance(schema, list):
        assert isinstance(value, list), place
        for one in value:
            check_fields(one, schema[0], f"{place}[]")
    else:
        for key, one in value.items():
            known = schema.get(key, schema.get("{}"))
            assert known is not None, f"{place} has no field {key}"
            check_fields(one, known, f"{place}.{key}")


@pytest.mark.parametrize(
    ("arguments", "accelerator", "topology", "hosts", "chips"),
    [
        (["--slice", "v5e:4x4"], "tpu-v5-lite-podslice", "4x4", 4, 4),
        (["--slice", "v5e:2x4", "--chips-per-host", "8"], "tpu-v5-lite-podslice", "2x4", 1, 8),
        (["--slice", "v6e:1x1"], "tpu-v6e-slice", "1x1", 1, 1),
        (["--slice", "v5p:4x4x4", "--slices", "2", "--spot"], "tpu-v5p-slice", "4x4x4", 16, 4),
    ],
)
def test_jobset(arguments, accelerator, topology, hosts, chips):
    env = ["--env", 'A=x "y" \\z & {{name}}: #w', "--env", "B="]
    words = ["--", "train", "--workdir", "gs://b/it's {{grace}}\t&"]
    text = "\n".join(
        dry_run("jobset", "--name", "run1", "--image", "i/f:1", *arguments, *env, *words)
    )
    manifest = yaml.safe_load(text)
    check_fields(manifest, JOBSET)
    (replicated,) = manifest["spec"]["replicatedJobs"]
    job, pod = replicated["template"]["spec"], replicated["template"]["spec"]["template"]["spec"]
    assert job["parallelism"] == job["completions"] == hosts
    assert replicated["replicas"] == (2 if "--slices" in arguments else 1)
    spot = {"cloud.google.com/gke-spot": "true"} if "--spot" in arguments else {}
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": accelerator,
        "cloud.google.com/gke-tpu-topology": topology,
        **spot,
    }
    (container,) = pod["containers"]
    assert container["name"] == job["podFailurePolicy"]["rules"][0]["onExitCodes"]["containerName"]
    assert container["resources"]["limits"] == {"google.com/tpu": chips}
    assert container["command"] == ["fope", *words[1:]]
    assert container["env"][0]["value"].startswith('x "y" \\z & ')


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
                    "slices": 1,
                    "states": {},
                    "begun": state == "ACTIVE",
                    "runs": list(runs),
                    "hosts": None,
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


MADE = {"create": 1, "install": 1, "scp": 1, "launch": 1}  # a slice with a run on it


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
    "one slice left out",
    "all slices left out",
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
    """One fault of each kind; all of them are tried alone in the two tests above."""
    looks, asks = ["auth", "project", "half a word", "killed"], ["auth", "one slice left out"]
    gcloud.has(describe=[None, *looks], ask=asks)
    result = gcloud.resume("--limit", "1")
    assert (result.code, result.state, result.did) == (0, "ACTIVE", {}), result.said
    said = [line for line in result.said.splitlines() if line.endswith("trying again")]
    assert len(said) == len(looks) + len(asks)
    assert "(ERROR: (gcloud.compute.tpus.queued-resources.describe) There was a problem" in said[1]


@pytest.mark.slow
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
                {"install": ["all slices left out"], "launch": ["one slice left out"]},
                {"nodes": ["auth", "nothing"], "endpoints": ["unavailable"]},
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
    gcloud.has(state, ["none,none"], **{verb: ["auth", "ever"]})
    result = gcloud.resume("--patience", "1", "--limit", "1")
    assert result.code == 1, result.said
    assert "nothing has worked for" in result.said and "auth tokens" in result.said
    assert result.state == (None if verb == "create" else state), "as it was"


@pytest.mark.parametrize(
    ("state", "runs", "code", "message"),
    [
        ("ACTIVE", "0,2", 2, "the run has ended with code 2"),
        ("ACTIVE", "134,137", 1, "ended by a signal (codes 134 137)"),
        ("ACTIVE", "other,running", 2, "run1 runs another command; wait for it, or end it"),
    ],
)
def test_resume_gives_up(gcloud, state, runs, code, message):
    gcloud.has(state, [runs])
    result = gcloud.resume("--limit", "1")
    assert result.code == code and message in result.said, result.said
    assert "delete" not in result.did and result.state == "ACTIVE"


@pytest.mark.slow
def test_a_slice_that_is_taken_away_from_several_is_a_loss_of_all(gcloud):
    """Its request may be ACTIVE still; the hosts of the others alone are not asked for long."""
    gcloud.has(ask=["one slice left out", "one slice left out"], delete=["unavailable"])
    world = json.loads(gcloud.world.read_text())
    world |= {"slices": 2, "states": {"run1-1": "PREEMPTED"}, "runs": ["running", "0,0,0,0"]}
    gcloud.world.write_text(json.dumps(world))
    result = gcloud.resume("--limit", "1", "--slices", "2")
    assert (result.code, result.state, result.did) == (0, "ACTIVE", MADE | {"delete": 1})
    assert "run1-1 is PREEMPTED; starting it again (1 of 1)" in result.said


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


# ---------------------------------------------------------------------------- on the hosts

TOOLS = "bash cat chmod cp flock grep gzip mkdir mv rm sed setsid sha256sum sleep tail tar true"
# A Python as the images of TPU hosts have it, what brings a newer one, and the `fope` of a venv.
VENV = r"""
mkdir -p "$1/bin"
printf '#!/bin/bash\n[[ $1 != --version ]] || echo Python 3.12.1\n' >"$1/bin/python"
printf '#!/bin/bash\necho "$*" >>~/pip.log\n' >"$1/bin/pip"
cat >"$1/bin/fope" <<'FOPE'
#!/bin/bash
[[ $2 != --help || $1 != trian ]] || { echo "'trian' is no verb" >&2; exit 2; }
[[ $2 != --help ]] || exit 0
case $1 in
  methods) ;;
  doctor) echo "$2: step 5 of 10" ;;
  *)
    trap 'sleep 0.3; echo saved; exit 143' TERM
    echo "begins $* with [$LIBTPU_INIT_ARGS] in ${PWD##*/}"
    [[ $1 != fails ]] || exit 3
    [[ $1 != deaf ]] || trap '' TERM
    while true; do sleep 0.05; done ;;
esac
FOPE
chmod +x "$1"/bin/*
"""
STAND_INS = {
    "hostname": "echo $HOST",
    "python3": """
case "$*" in
  --version) echo Python 3.10.12 ;;
  *'-m pip install'*uv) [[ -f ~/has_pip ]] && mkdir -p ~/.local/bin && cp "$0" ~/.local/bin/uv ;;
  venv*) exec make-venv "${!#}" ;;
  *) exit 1 ;;
esac""",
    "sudo": """
[[ -f ~/has_apt ]] || exit 1
[[ "$*" != *install* ]] || {
  mkdir -p ~/.local/bin
  cp "${0%/*}/new-python" ~/.local/bin/python3.11
}
""",
    "new-python": 'if [[ "$*" == "-m venv"* ]]; then exec make-venv "$3"; fi',
    "make-venv": VENV,
}


def make_hosts(directory, number_of_slices=1):
    """The homes of two hosts a slice, and the programs that they have."""
    programs = directory / "bin"
    programs.mkdir(parents=True)
    for name in TOOLS.split():
        (programs / name).symlink_to(shutil.which(name))
    for name, body in STAND_INS.items():
        (programs / name).write_text(f"#!/bin/bash\n{body}\n")
        (programs / name).chmod(0o755)
    homes = [directory / f"{i}-{j}" for i in range(number_of_slices) for j in range(2)]
    for home in homes:
        home.mkdir()
    return homes


def install_on(home, **variables):
    """Runs the commands of install.sh on one host."""
    variables = {"python": "", "package": "fope-jax", "sum": "", "files": ""} | variables
    text = "".join(f"{name}={shlex.quote(value)}\n" for name, value in variables.items())
    for name in ("run", "install"):
        text += (SCRIPTS / "on_host" / f"{name}.sh").read_text()
    environment = {"HOME": str(home), "HOST": "h", "PATH": f"{home.parent / 'bin'}"}
    return subprocess.run(
        ["bash", "-c", text], env=environment, capture_output=True, text=True, check=False
    )


def test_an_image_with_an_old_python_gets_a_newer_one(tmp_path):
    homes = make_hosts(tmp_path, 2)
    (homes[0] / "has_pip").touch()
    result = install_on(homes[0])
    assert result.returncode == 0, result.stderr
    assert result.stdout == "h: Python 3.12.1, commit unknown\n"
    assert "install --quiet fope-jax" in (homes[0] / "pip.log").read_text().splitlines()

    (homes[1] / "has_apt").touch()  # where it has no pip
    assert install_on(homes[1]).returncode == 0

    result = install_on(homes[2])  # where nothing helps
    assert result.returncode == 1
    assert "h: has only Python 3.10.12; neither uv nor apt-get could bring" in result.stderr
    result = install_on(homes[2], python="python3")
    assert "h: --python python3 is not Python 3.11 or newer" in result.stderr
    result = install_on(homes[2], python=f"{tmp_path}/bin/new-python")
    assert result.returncode == 0, result.stderr
    result = install_on(homes[3], package="", sum="0" * 64)
    assert result.returncode == 1 and "has not arrived whole" in result.stderr


def test_another_package_takes_the_place_of_the_code_before(tmp_path):
    """pip passes over another commit of the same version; caches of runs are not code."""
    home, _ = make_hosts(tmp_path)
    (home / "has_pip").touch()
    source = home / "fope" / "source"
    for directory in ("fope_jax", "configs", "data_cache"):
        (source / directory).mkdir(parents=True)
    (source / "COMMIT").write_text("aaaa\n")
    package = "fope-jax[tpu] @ git+https://host/x"
    said = install_on(home, package=package, files="COMMIT fope_jax configs").stdout
    assert said.endswith("commit unknown\n")
    assert [path.name for path in source.iterdir()] == ["data_cache"]
    installed = (home / "pip.log").read_text().splitlines()[-1]
    assert installed == f"install --quiet --force-reinstall --no-deps {package}"
    packages = home / "fope" / "venv" / "lib" / "python3.12" / "site-packages"
    origin = packages / "fope_jax-0.1.0.dist-info" / "direct_url.json"
    origin.parent.mkdir(parents=True)
    origin.write_text(json.dumps({"url": "x", "vcs_info": {"vcs": "git", "commit_id": "12ab"}}))
    assert install_on(home, package=package).stdout == "h: Python 3.12.1, commit 12ab\n"


def wait_for(text, path):
    deadline = time.monotonic() + 20
    while text not in (path.read_text() if path.exists() else ""):
        assert time.monotonic() < deadline, text
        time.sleep(0.02)


@pytest.mark.slow
def test_launch_lets_the_earlier_run_end_before_the_next_begins(tmp_path):
    """On one host, without gcloud: what runs gets SIGTERM and is waited for, its code is kept."""
    home, _ = make_hosts(tmp_path)
    subprocess.run([home.parent / "bin" / "make-venv", home / "fope" / "venv"], check=True)
    log, killed = home / "fope" / "run.log", ["kill", "-KILL"]

    def on_host(name, verb="", keep_going="", grace="20", of_this=False):
        body = f"exec ~/fope/venv/bin/fope {verb}" if name == "launch" or of_this else ""
        text = f"keep_going={keep_going}\ngrace={grace}\nworkdir=x\nbody={shlex.quote(body)}\n"
        text += f"verb={verb}\n"
        for part in ("run", name):
            text += (SCRIPTS / "on_host" / f"{part}.sh").read_text()
        environment = {"HOME": str(home), "HOST": "h", "PATH": f"{home.parent / 'bin'}"}
        command = ["bash", "-c", text]
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, check=True
        ).stdout

    try:
        assert on_host("state") == "FOPE h none\n"
        for verb in ("first", "second"):
            assert on_host("launch", verb) == "h: begun\n"
            wait_for(f"begins {verb}", log)
        words = [line.split()[:2] for line in log.read_text().splitlines()]
        assert words == [["begins", "first"], ["saved"], ["begins", "second"]]
        assert on_host("state") == "FOPE h running\n"
        assert on_host("state", "second", of_this=True) == "FOPE h running\n"
        assert on_host("state", "other", of_this=True) == "FOPE h other\n"
        assert on_host("launch", "third", keep_going="1") == "h: goes on\n"
        assert on_host("stop") == "h: ended with 143\n" and "third" not in log.read_text()
        on_host("launch", "fails")
        wait_for("3", home / "fope" / "run.exit")
        assert on_host("state") == on_host("state", "fails", of_this=True) == "FOPE h 3\n"
        assert on_host("state", "other", of_this=True) == "FOPE h none\n"
        on_host("launch", "deaf")  # it does not end at SIGTERM
        wait_for("begins deaf", log)
        assert on_host("stop", grace="1") == "h: ended with 137\n"
    finally:
        pid = (home / "fope" / "run.pid").read_text().strip()
        subprocess.run([*killed, pid], capture_output=True, check=False)


@pytest.mark.slow
def test_two_slices_from_the_request_to_the_end(gcloud, tmp_path):
    """Every script in turn, on four hosts that run what they are given."""
    gcloud.has(None)
    source = ["--source", str(make_source(tmp_path / "source"))]
    hosts = make_hosts(tmp_path / "hosts", 2)
    for home in hosts:
        (home / "has_pip").touch()
    world = json.loads(gcloud.world.read_text())
    gcloud.world.write_text(json.dumps(world | {"hosts": str(tmp_path / "hosts")}))

    def does(name, *arguments, code=0):
        result = run(name, *PLACE, *arguments, **gcloud.environment())
        assert result.returncode == code, result.stderr
        return result.stdout + result.stderr

    logs = [home / "fope" / "run.log" for home in hosts]
    try:
        assert "run1: NONE" in does("status", code=1)
        does("create", "--accelerator", "v4-8", "--slices", "2")
        assert does("install", *source).count("Python 3.12.1, commit ") == 4
        assert "4 of 4 hosts: no run has begun" in does("status", code=1)
        libtpu = ["--env", "LIBTPU_INIT_ARGS=--a=1 --b='2 3'"]
        assert does("launch", *libtpu, *RUN).count("begun") == 4
        for log in logs:
            wait_for(f"begins {' '.join(RUN[1:])} with [--a=1 --b='2 3'] in source", log)
        said = does("status")
        assert "ACTIVE\n  4 of 4 hosts: running\n  gs://my-bucket/run1: step 5 of 10" in said
        assert "a run is under way; end it by stop.sh" in does("install", *source, code=1)
        assert does("launch", "--keep-going", *RUN).count("goes on") == 4

        does("launch", *RUN)  # the earlier one ends first
        for log in logs:
            wait_for("with []", log)
            first, saved, second = log.read_text().splitlines()
            assert (saved, "[]" in second, "--a=1" in first) == ("saved", True, True)

        said = does("launch", "--", "trian", "--workdir=/x", code=1)
        assert said.count("the run goes on; of the command that is to follow it: 'trian' is") == 4
        assert "4 of 4 hosts: running" in does("status")

        assert "4 of 4 logs are in" in does("logs", "--save", str(tmp_path / "logs"))
        saved_logs = sorted((tmp_path / "logs").iterdir())
        assert [path.name for path in saved_logs] == ["0-0.log", "0-1.log", "1-0.log", "1-1.log"]
        assert [path.read_text() for path in saved_logs] == [log.read_text() for log in logs]

        assert does("stop").count("ended with 143") == 4
        assert "4 of 4 hosts: ended with code 143" in does("status", code=1)
        does("launch", "--", "fails")
        for home in hosts:
            wait_for("3", home / "fope" / "run.exit")
        assert "4 of 4 hosts: ended with code 3 (0-0 0-1 1-0 1-1)" in does("status", code=1)
        does("launch", *RUN)
        wait_for("saved", logs[0])
        assert does("delete").count("ended with 143") == 4
        assert "run1: NONE" in does("status", code=1)
    finally:
        for home in hosts:
            pid = home / "fope" / "run.pid"
            if pid.exists():
                command = ["kill", "-KILL", pid.read_text().strip()]
                subprocess.run(command, capture_output=True, check=False)


@pytest.mark.parametrize(
    ("name", "arguments", "faults", "message"),
    [
        ("launch", RUN, {"launch": ["all slices left out"]}, "0 of 2 hosts have done it"),
        ("launch", RUN, {"launch": ["one slice left out"]}, 'terminal state "PREEMPTED"'),
        ("stop", [], {"stop": ["no key in the agent"]}, "ssh-add ~/.ssh/google_compute_engine"),
        ("install", [], {"install": ["hosts away"]}, "installing has failed"),
        ("install", [], {"nodes": ["auth"]}, "There was a problem refreshing your current auth"),
        ("delete", [], {"stop": ["hosts away"]}, "--at-once deletes without it"),
        ("delete", [], {"describe": ["network"]}, "--at-once deletes all the same"),
        ("status", [], {"describe": ["auth"]}, "UNKNOWN (ERROR:"),
        ("status", [], {"ask": ["one slice left out"]}, "not all hosts have answered: 1 of 2"),
        ("status", [], {"ask": ["hosts away"], "slice": ["preempted"]}, "lost: run1 is PREEMPTED"),
        ("logs", ["--save", "logs"], {"logs": ["hosts away"]}, "slice 0, worker 0:"),
    ],
)
def test_a_host_that_has_not_done_it_is_a_failure(gcloud, name, arguments, faults, message):
    """Although gcloud ends with 0 where it leaves out a slice."""
    gcloud.has(**faults)
    arguments = [str(gcloud.folder / one) if one == "logs" else one for one in arguments]
    result = run(name, *PLACE, *arguments, **gcloud.environment())
    assert result.returncode in (1, 2, 3), result.stderr
    assert message in result.stdout + result.stderr
    assert json.loads(gcloud.world.read_text())["state"] == "ACTIVE"


def test_logs_are_saved_whole_or_named_as_missing(gcloud, tmp_path):
    """The progress bar of a run that goes on leaves its line without an end."""
    homes = make_hosts(tmp_path / "hosts")
    log = homes[0] / "fope" / "run.log"
    log.parent.mkdir()
    gcloud.has()
    log.write_text("begins\nFOPE done is no line of ours\n\r 50%|█████     | 5/10")
    gcloud.world.write_text(
        json.dumps(json.loads(gcloud.world.read_text()) | {"hosts": str(tmp_path / "hosts")})
    )
    saved = tmp_path / "logs" / "0-0.log"

    def save(*options):
        words = ["--save", str(saved.parent), *options]
        return run("logs", *PLACE, *words, **gcloud.environment())

    result = save()
    assert result.returncode == 1 and f"1 of 2 logs are in {saved.parent}" in result.stdout
    assert "slice 0, worker 1: " in result.stderr and "run.log" in result.stderr
    assert saved.read_bytes() == log.read_bytes() + b"\n"
    saved.unlink()
    assert save("--worker", "1").returncode == 1 and not saved.exists()
    assert save("--node=0", "--worker=0").returncode == 0 and saved.exists()
    result = save("--node", "3")
    assert result.returncode == 2 and "no host --node 3 --worker all of 2" in result.stderr
    for options, wanted in (["--node=1"], ("1", "all")), ([], ("all", "all")):
        ((_, _, flags),) = gcloud_commands("logs", *PLACE, "--save=x", *options)
        assert (*flags["node"], *flags["worker"]) == wanted


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
