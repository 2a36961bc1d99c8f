"""The flags of the gcloud commands that the scripts use, as published, and a parser of them.

Sources: the SYNOPSIS of each page below
https://cloud.google.com/sdk/gcloud/reference/compute/tpus/ (pages of 2025-05-07), and the
declarations of the same commands in Google Cloud SDK 578.0.0 (lib/surface/compute/tpus,
2026-08-04); the two agree. Both are of the general release, neither alpha nor beta.
"""

from __future__ import annotations

# Accepted by every command.
WIDE_VALUES = """access-token-file account billing-project configuration flags-file flatten format
    impersonate-service-account project trace-token user-output-enabled verbosity"""
WIDE_FLAGS = "help log-http quiet"
HOSTS = "force-key-file-overwrite plain dry-run internal-ip tunnel-through-iap"
KEYS = "ssh-key-file strict-host-key-checking ssh-key-expiration ssh-key-expire-after"


class Command:
    """One command: how many positionals, its flags with and without a value, what it requires.

    ``groups``: of each, exactly one alternative must be given, whole. ``needs``: a flag, and the
    one that must be given with it. ``exclusive``: at most one of each.
    """

    def __init__(
        self, positionals, values, flags="", required=(), groups=(), needs=(), exclusive=()
    ):
        self.positionals = positionals
        self.values = [*values.split(), *WIDE_VALUES.split()]
        self.flags = [*flags.split(), *WIDE_FLAGS.split()]
        self.required, self.groups, self.exclusive = required, groups, exclusive
        self.needs = dict(needs)


ONE = range(1, 2)
REACH = [["internal-ip", "tunnel-through-iap"], ["ssh-key-expiration", "ssh-key-expire-after"]]
COMMANDS = {
    "queued-resources create": Command(
        ONE,
        """zone accelerator-type topology type node-id node-count node-prefix runtime-version
            boot-disk data-disk description labels metadata metadata-from-file network range scopes
            service-account subnetwork tags valid-after-duration valid-after-time
            valid-until-duration valid-until-time reservation-host-folder
            reservation-host-organization reservation-host-project""",
        "async guaranteed internal-ips reserved shielded-secure-boot spot",
        ["runtime-version"],
        [[["accelerator-type"], ["topology", "type"]], [["node-id"], ["node-count"]]],
        {"node-prefix": "node-count"},
        [
            ["valid-after-duration", "valid-after-time"],
            ["valid-until-duration", "valid-until-time"],
        ],
    ),
    "queued-resources delete": Command(ONE, "zone", "async force"),
    "queued-resources describe": Command(ONE, "zone"),
    "queued-resources ssh": Command(
        ONE,
        f"batch-size node ssh-flag worker zone command output-directory {KEYS}",
        HOSTS,
        needs={"output-directory": "command"},
        exclusive=REACH,
    ),
    "queued-resources scp": Command(
        range(2, 100),
        f"batch-size node scp-flag worker zone {KEYS}",
        f"{HOSTS} compress recurse",
        exclusive=REACH,
    ),
    "tpu-vm describe": Command(ONE, "zone"),
}


class UsageError(ValueError):
    """What gcloud answers with code 2 before it asks the service."""


def parse(arguments: list[str]) -> tuple[str, list[str], dict[str, list[str]]]:
    """The command, its positionals, and the values of each flag ("" for those without one)."""
    if arguments[:2] != ["compute", "tpus"]:
        raise UsageError(f"Invalid choice: '{arguments[0]}'.")
    name = " ".join(arguments[2:4])
    if name not in COMMANDS:
        raise UsageError(f"Invalid choice: '{name}'.")
    command, positionals, given = COMMANDS[name], [], {}
    rest = list(arguments[4:])
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            positionals.append(word)
            continue
        flag, equals, value = word[2:].partition("=")
        if flag in command.values:
            if not equals:
                if not rest:
                    raise UsageError(f"argument --{flag}: expected one argument")
                value = rest.pop(0)
        elif flag not in command.flags or equals:
            raise UsageError(f"unrecognized arguments: {word}")
        given.setdefault(flag, []).append(value)
    _check(command, positionals, given)
    return name, positionals, given


def _check(command: Command, positionals: list[str], given: dict[str, list[str]]) -> None:
    if len(positionals) not in command.positionals:
        raise UsageError(f"unrecognized arguments: {' '.join(positionals)}")
    if missing := [flag for flag in command.required if flag not in given]:
        raise UsageError(f"argument --{missing[0]}: Must be specified.")
    for group in command.groups:
        begun = [way for way in group if any(flag in given for flag in way)]
        if len(begun) != 1 or any(flag not in given for flag in begun[0]):
            ways = " | ".join(" ".join(f"--{flag}" for flag in way) for way in group)
            raise UsageError(f"Exactly one of ({ways}) must be specified.")
    for flag, other in command.needs.items():
        if flag in given and other not in given:
            raise UsageError(f"argument --{other}: Must be specified with --{flag}.")
    for flags in command.exclusive:
        if sum(flag in given for flag in flags) > 1:
            raise UsageError(f"At most one of --{' | --'.join(flags)} can be specified.")
    if "zone" in command.values and not given.get("zone", [""])[0]:
        raise UsageError("argument --zone: Must be specified.")  # asked for without --quiet
    for count in given.get("node-count", []):
        if not count.isdecimal() or int(count) <= 1:
            raise UsageError("Invalid value for [--node-count]: Node count must be greater than 1")
    for disk in given.get("data-disk", []):
        keys = dict(part.partition("=")[::2] for part in disk.split(","))
        if "source" not in keys or keys.keys() - {"source", "mode"}:
            raise UsageError(
                "argument --data-disk: valid keys are [mode, source]; required: source"
            )
        if keys.get("mode", "read-write") not in ("read-write", "read-only"):
            raise UsageError(f"argument --data-disk: Invalid choice: '{keys['mode']}'.")
    for flag in ("node", "worker"):
        for index in given.get(flag, []):
            if index != "all" and not index.replace("-", "").replace(",", "").isdecimal():
                raise UsageError(f"Invalid value for [--{flag}]: unable to parse {index}.")
