"""A gcloud with one queued resource, its hosts, and all the ways in which the real one fails.

It accepts the published flags alone (gcloud_reference.py). Its world is a JSON file, named in
FALSE_GCLOUD:

    state     of the queued resource; None where there is none
    becomes   states that the next looks find, one a look
    slices    slices of the queued resource; each has two hosts
    states    of those that are not READY, by name
    begun     whether a run has been launched on this slice; until then its hosts say "none"
    runs      what they say of it then, an answer a question, the last again and again: each
              "running", "none" or an exit code a host, with commas between them
    hosts     a directory with the home of each host, SLICE-WORKER, in which commands are run; None
              answers by `runs` and runs nothing
    faults    {verb: [FAULT or None, ...]}: how its next calls fail, one a call; [FAULT, "ever"]
              repeats the last
    counts    {verb: calls that did what they say}, of "create", "delete", "launch", ...

The texts are those of Google Cloud SDK 578.0.0; `{verb}` stands for the command.
"""

import fcntl
import json
import os
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from gcloud_reference import UsageError, parse  # noqa: E402

NAME, PLACE = "run1", "projects/p/locations/us-east5-a"
COMMAND = "(gcloud.compute.tpus.queued-resources.{verb})"
AS = "This command is authenticated as me@example.com"
LOGIN = (
    "Please run:\n\n  $ gcloud auth login\n\nto obtain new credentials.\n\nIf you have already "
    "logged in with a different account, run:\n\n  $ gcloud config set account ACCOUNT\n\nto "
    "select an already authenticated account to use."
)
# What it prints on both streams, and its exit code. Of a NOT_FOUND only the first is one of the
# queued resource.
FAULTS = {
    "absent": (
        "",
        f"ERROR: {COMMAND} NOT_FOUND: Resource '{PLACE}/queuedResources/{NAME}' was not found. "
        f"{AS}",
        1,
    ),
    "absent without a name": (
        "",
        f"ERROR: {COMMAND} NOT_FOUND: Requested entity was not found.",
        1,
    ),
    "auth": (
        "",
        f"ERROR: {COMMAND} There was a problem refreshing your current auth tokens: "
        f"Reauthentication failed. cannot prompt during non-interactive execution.\n{LOGIN}",
        1,
    ),
    "no account": (
        "",
        f"ERROR: {COMMAND} You do not currently have an active account selected.\n{LOGIN}",
        1,
    ),
    "unauthenticated": (
        "",
        f"ERROR: {COMMAND} UNAUTHENTICATED: Request had invalid authentication credentials. "
        "Expected OAuth 2 access token, login cookie or other valid authentication credential.",
        1,
    ),
    "permission": (
        "",
        f"ERROR: {COMMAND} PERMISSION_DENIED: Permission denied on 'locations/us-east5-a' (or "
        f"it may not exist). {AS}",
        1,
    ),
    "project": ("", f"ERROR: {COMMAND} NOT_FOUND: Resource 'projects/p' was not found. {AS}", 1),
    "location": ("", f"ERROR: {COMMAND} NOT_FOUND: Resource '{PLACE}' was not found. {AS}", 1),
    "no project": ("", f"ERROR: {COMMAND} NOT_FOUND: Project 'p' not found or deleted.", 1),
    "no zone": (
        "",
        f"ERROR: {COMMAND} NOT_FOUND: Location us-east5-q is not found or access is unauthorized.",
        1,
    ),
    "no such account": (
        "",
        f"ERROR: {COMMAND} NOT_FOUND: Failed to impersonate [me@p.iam.gserviceaccount.com]. "
        "Gaia id not found for email me@p.iam.gserviceaccount.com",
        1,
    ),
    "certificate": (
        "",
        f"ERROR: {COMMAND} There was a problem refreshing your current auth tokens: "
        "HTTPSConnectionPool(host='oauth2.googleapis.com', port=443): Max retries exceeded (Caused "
        "by SSLError(SSLCertVerificationError(1, 'CERTIFICATE_VERIFY_FAILED')))",
        1,
    ),
    "other": (
        "",
        f"ERROR: {COMMAND} NOT_FOUND: Resource '{PLACE}/queuedResources/{NAME}0' was not "
        f"found. {AS}",
        1,
    ),
    "quota": (
        "",
        f"ERROR: {COMMAND} RESOURCE_EXHAUSTED: Quota exceeded for quota metric 'Requests' and "
        "limit 'Requests per minute' of service 'tpu.googleapis.com' for consumer "
        "'project_number:1'.",
        1,
    ),
    "network": (
        "",
        "ERROR: gcloud crashed (ConnectionError): HTTPSConnectionPool(host='tpu.googleapis.com'"
        f", port=443): Max retries exceeded with url: /v2/{PLACE}/queuedResources/{NAME}?alt=json "
        "(Caused by NewConnectionError('Temporary failure in name resolution NOT_FOUND'))",
        1,
    ),
    "connection": (
        "",
        "ERROR: gcloud crashed (ConnectionError): ('Connection aborted.', "
        "RemoteDisconnected('Remote end closed connection without response'))",
        1,
    ),
    "unavailable": ("", f"ERROR: {COMMAND} UNAVAILABLE: The service is currently unavailable.", 1),
    "internal": ("", f"ERROR: {COMMAND} INTERNAL: Internal error encountered.", 1),
    "502": (
        "",
        f"ERROR: {COMMAND} HTTPError 502: <html><title>Error 502 (Server Error)!!1</title>",
        1,
    ),
    "half a word": ("SUSP\n", "", 0),
    "nothing": ("", "", 0),
    "a word too many": ("SUSPENDED\nFAILED\n", "", 0),
    "a state and an error": ("FAILED\n", "ERROR: gcloud crashed (BrokenPipeError): Broken pipe", 1),
    "killed": ("", "", 137),
    "hosts away": (
        "",
        "ssh: connect to host 10.0.0.2 port 22: Connection timed out\n"
        "##### Command execution on worker 1 failed with exit status 255. Continuing.",
        255,
    ),
    "one of two hosts": (
        "FOPE a 0\nFOPE done\n",
        "##### Command execution on worker 1 failed with exit status 255. Continuing.",
        255,
    ),
    "one not begun": (
        "FOPE a none\nFOPE done\n",
        "##### Command execution on worker 1 failed with exit status 255. Continuing.",
        255,
    ),
    # A slice that is being taken away, or whose state the service does not give: its thread ends
    # with a traceback, gcloud goes on with the other slices, and ends with 0.
    "one slice left out": (
        "FOPE a 0\nFOPE done\n",
        "Exception in thread Thread-2 (PrepareNodeForSSH):\nTPUInUnusableTerminalState: This TPU "
        'has terminal state "PREEMPTED", so it cannot be used anymore.\nWARNING: Could not prepare '
        "all 2 nodes, attempting to ssh into the rest.",
        0,
    ),
    "all slices left out": (
        "",
        "WARNING: Could not prepare all 1 nodes, attempting to ssh into the rest.\nUsing ssh batch "
        "size of 64. Attempting to SSH into 0 nodes with a total of 0 workers.",
        0,
    ),
    "no key in the agent": (
        "",
        'SSHKeyNotInAgent: SSH Key is not present in the SSH agent. Please run "ssh-add '
        '.ssh/google_compute_engine" to add it, and try again.\nWARNING: Could not prepare all 1 '
        "nodes, attempting to ssh into the rest.",
        0,
    ),
    "a code not written yet": ("FOPE a 0\nFOPE done\nFOPE b \nFOPE done\n", "", 0),
    "hosts say nothing": ("", "", 0),
    "preempted": ("PREEMPTED\n", "", 0),
    "no capacity": (
        "",
        f'ERROR: {COMMAND} {{\n  "code": 8,\n  "message": "There is no more capacity in '
        'the zone \\"us-east5-a\\""\n}',
        1,
    ),
}


FORMATS = {
    "value(state.state)": "describe",
    "value(tpu.nodeSpec[].nodeId)": "nodes",
    "value(networkEndpoints[].ipAddress)": "endpoints",
    "value(state)": "slice",
}
# What a command on the hosts is, by a word of it.
ON_HOSTS = {"make_venv": "install", "run.pid.new": "launch", "FOPE $(hostname)": "ask"}
ON_HOSTS |= {"--progress": "progress", "run.log": "logs", "end_run": "stop"}


def main(arguments):
    try:
        command, names, given = parse(arguments)
    except UsageError as error:
        print(f"ERROR: (gcloud.{'.'.join(arguments[:4])}) {error}", file=sys.stderr)
        return 2
    verb = command.split()[1]
    if verb == "describe":
        verb = FORMATS[given["format"][0]]
    if verb == "ssh":
        text = given["command"][0]
        verb = next(name for word, name in ON_HOSTS.items() if word in text)
    place = os.environ["FALSE_GCLOUD"]
    with open(place + ".lock", "w") as lock, open(place) as stream:
        fcntl.flock(lock, fcntl.LOCK_EX)
        world = json.load(stream)
        left = world["faults"].get(verb, [])
        fault = left[0] if left else None
        if left and left[1:] != ["ever"]:
            left.pop(0)
        code = answer(world, verb, fault, names, given)
        with open(place, "w") as stream:
            json.dump(world, stream)
    if fault == "hang":
        time.sleep(300)
    if fault == "prompt":
        # As gcloud does: --quiet takes the default, and without a terminal it cannot ask.
        print(
            "API [tpu.googleapis.com] not enabled on project [p]. Would you like to enable and "
            "retry (this will take a few minutes)? (y/N)?",
            file=sys.stderr,
        )
        if "quiet" not in given and not sys.stdin.readline():
            time.sleep(300)
        return 1
    return code


def answer(world, verb, fault, names, given):
    if fault in FAULTS:
        out, said, code = FAULTS[fault]
        sys.stdout.write(out)
        print(said.replace("{verb}", verb), file=sys.stderr)
        return code
    if fault == "done, but cut off":  # the service has done it; the answer is lost
        do(world, verb, names, given)
        return fail("connection", verb)
    if fault:
        return 1  # hang or prompt, see main
    return do(world, verb, names, given)


def fail(fault, verb):
    print(FAULTS[fault][1].replace("{verb}", verb), file=sys.stderr)
    return 1


def do(world, verb, names, given):
    slices = world["slices"]
    if verb == "describe":
        if world["becomes"]:
            world["state"] = world["becomes"].pop(0)
        if world["state"] is None:
            return fail("absent", verb)
        print(world["state"])
        return 0
    if verb == "create":
        if world["state"] is not None:
            print(f"ERROR: {COMMAND} ALREADY_EXISTS: Resource already exists", file=sys.stderr)
            return 1
        world["state"], world["becomes"], world["begun"] = "PROVISIONING", world["then"], False
        world["states"] = {}
        world["slices"] = int(given.get("node-count", ["1"])[0])
    elif world["state"] is None:
        return fail("absent", verb)
    elif verb == "nodes":
        print(NAME if slices == 1 else ";".join(f"{NAME}-{i}" for i in range(slices)))
        return 0
    elif verb == "slice":
        print(world["states"].get(names[0], "READY"))
        return 0
    elif verb == "endpoints":
        print("10.0.0.2;10.0.0.3")
        return 0
    elif verb == "delete":
        world["state"], world["becomes"] = None, []
    elif world["state"] != "ACTIVE":
        return fail("all slices left out", verb) and 0
    elif world["hosts"]:
        chosen = [
            (node, worker)
            for node in _indices(given.get("node", ["0"])[0], slices)
            for worker in _indices(given.get("worker", ["0"])[0], 2)
        ]
        if code := _on_hosts(world["hosts"], chosen, verb, names, given):
            return code
    elif verb == "ask":
        said = world["runs"][0] if world["begun"] else ",".join(["none"] * 2 * slices)
        if world["begun"] and len(world["runs"]) > 1:
            world["runs"].pop(0)
        lines = (f"FOPE host{i} {one}\nFOPE done\n" for i, one in enumerate(said.split(",")))
        print("".join(lines), end="")
        return 0
    elif verb != "scp":
        print("FOPE done\n" * 2 * slices, end="")
    world["begun"] = world["begun"] or verb == "launch"
    world["counts"][verb] = world["counts"].get(verb, 0) + 1
    return 0


def _indices(flag, count):
    return range(count) if flag == "all" else [int(flag)]


def _on_hosts(homes, chosen, verb, names, given):
    """Copies the file, or runs the command, on each host; the first exit code that is not 0."""
    import shutil  # here: most calls are over sooner without these two
    import subprocess

    first = 0
    for node, worker in chosen:
        home = f"{homes}/{node}-{worker}"
        if verb == "scp":
            shutil.copy(names[0], home)
            continue
        environment = {"HOME": home, "HOST": f"{node}-{worker}", "PATH": f"{homes}/bin"}
        code = subprocess.run(
            ["bash", "-c", given["command"][0]], cwd=home, env=environment, check=False
        ).returncode
        if code and len(chosen) > 1:
            said = f"##### Command execution on worker {worker} failed with exit status {code}. "
            print(said + "Continuing.", file=sys.stderr)
        first = first or code
    return first


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
