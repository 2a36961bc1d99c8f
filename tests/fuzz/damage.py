"""What a stranger, a bad disk or a slip of the hand makes of the files that we read."""

from __future__ import annotations

import copy
import json

from hypothesis import strategies as st

# Numbers that break arithmetic, keys that ConfigDict reserves, and names that leave a directory.
STRANGE = [
    None,
    True,
    False,
    0,
    -1,
    1,
    2**63,
    10**400,
    -0.5,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x",
    "../../etc/passwd",
    "/etc/passwd",
    "rope",
    "none",
    "\ud800",
    [],
    {},
    [[]],
    [None],
    {"": 1},
    {"method": "rope"},
    {"scaling": []},
    {"a.b": 1},
    "9" * 50,
    [1, 2],
    ["1=2"],
    {"get": 0},
]

values = st.recursive(
    st.sampled_from(STRANGE).map(copy.deepcopy) | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=6,
)


def paths(value, prefix=()):
    """Every place in a JSON value."""
    found = [prefix] if prefix else []
    if isinstance(value, (dict, list)):
        entries = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in entries:
            found += paths(inner, (*prefix, key))
    return found


@st.composite
def changed(draw, good, most=2):
    """A good JSON value with one or two places changed, removed, added to or renamed."""
    result = copy.deepcopy(good)
    for _ in range(draw(st.integers(1, most))):
        places = paths(result)
        if not places:
            break
        *path, last = draw(st.sampled_from(places))
        parent = result
        for key in path:
            parent = parent[key]
        action = draw(st.sampled_from(["replace", "replace", "replace", "remove", "add"]))
        if action == "replace":
            parent[last] = draw(values)
        elif action == "remove":
            del parent[last]
        elif isinstance(parent, dict):
            parent[draw(st.text(max_size=8))] = draw(values)
        else:
            parent.append(draw(values))
    return result


@st.composite
def damaged(draw, content: bytes):
    """Bytes of a file cut off, with bits flipped, with a piece put in, or something else."""
    kind = draw(st.sampled_from(["cut", "flip", "insert", "other", "nested"]))
    at = draw(st.integers(0, max(0, len(content) - 1)))
    if kind == "cut":
        return content[:at]
    if kind == "flip":
        flipped = bytearray(content)
        for _ in range(draw(st.integers(1, 4))):
            flipped[draw(st.integers(0, len(content) - 1))] ^= 1 << draw(st.integers(0, 7))
        return bytes(flipped)
    if kind == "insert":
        return content[:at] + draw(st.binary(max_size=12)) + content[at:]
    if kind == "nested":
        return b"[" * 100_000
    return draw(st.binary(max_size=40) | values.map(lambda value: json.dumps(value).encode()))
