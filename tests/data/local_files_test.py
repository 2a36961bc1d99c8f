"""Files of a directory stay readable while the cache of open ones drops them."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from fope_jax.data import local_files


@pytest.mark.parametrize("open_files", [0, 1, 3])
def test_a_file_is_read_while_it_is_dropped(tmp_path, monkeypatch, open_files):
    # With no place at all every file is dropped before its first byte is read.
    monkeypatch.setattr(local_files, "_OPEN_FILES", open_files)
    contents = [bytes([number]) * 64 for number in range(8)]
    for number, content in enumerate(contents):
        (tmp_path / str(number)).write_bytes(content)
    files = local_files.LocalFiles(tmp_path)
    asked = np.random.default_rng(0).integers(0, len(contents), 2000).tolist()
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda number: files.read(str(number), 8, 80), asked))
    assert found == [contents[number][8:80] for number in asked]
