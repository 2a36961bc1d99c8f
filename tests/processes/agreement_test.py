"""What differs between processes, and who has failed: in words, with both sides."""

import json

import numpy as np
import pytest

from fope_jax.processes.agreement import (
    check_equal_across_processes,
    describe_differences,
    describe_failures,
    fail_together,
    software_versions,
)


def said(host, values):
    return json.dumps([host, values])


def test_what_differs_is_named_with_both_values_and_who_has_them():
    same = {"train.length": 64, "devices": "4 of 8", "jax": "0.10.2"}
    assert describe_differences([said("a", same), said("b", same)]) == ""
    other = same | {"train.length": 128, "jax": None}
    assert describe_differences([said("a", same), said("b", other)]) == (
        "the processes of one run must be started alike; different: "
        "train.length = 64 in process 0 (host a), 128 in process 1 (host b); "
        'jax = "0.10.2" in process 0 (host a), null in process 1 (host b)'
    )


def test_processes_that_say_the_same_are_told_together_and_many_are_counted():
    texts = [said(f"h{i}", {"seed": int(i == 7)}) for i in range(64)]
    assert describe_differences(texts).endswith(
        "seed = 0 in process 0 (host h0), process 1 (host h1), process 2 (host h2) and 60 more, "
        "1 in process 7 (host h7)"
    )
    many = [said("a", {f"k{i:02}": 0 for i in range(20)}), said("b", {})]
    text = describe_differences(many)
    assert "k00 = 0 in process 0 (host a), nothing in process 1 (host b); " in text
    assert text.endswith("; and 8 more") and "\n" not in text
    failed = [said("a", "")] + [said("b", "no file")] * 5
    assert describe_failures(failed).splitlines() == [
        *(f"process {i} (host b): no file" for i in (1, 2, 3)),
        "and 2 more processes",
    ]


def test_alone_a_process_agrees_with_itself():
    check_equal_across_processes({"seed": 1})
    with pytest.raises(ZeroDivisionError), fail_together():
        _ = 1 / 0


def test_software_is_told_by_its_content(monkeypatch):
    found = software_versions()
    assert found == software_versions() and len(found["source of fope_jax, sha256"]) == 16
    assert found["numpy"] == np.__version__
    flags = "--xla_cpu_enable_fast_math=true"
    monkeypatch.setenv(
        "XLA_FLAGS", f"--xla_dump_to=/tmp/3 {flags} --xla_force_host_platform_device_count=3"
    )
    assert software_versions()["XLA_FLAGS"] == flags
