"""What all tokenizers share: the texts of tokens, and whether tokens say the same as a text."""

import numpy as np
import pytest

from fope_jax.data.tokenizers import BytesTokenizer, base, encode_documents


@pytest.mark.parametrize("at_once", [1, 3, 2**20])
def test_ids_that_there_are_not_have_no_text(monkeypatch, at_once):
    monkeypatch.setattr(base, "_IDS_AT_ONCE", at_once)
    texts = base.TokenTexts(["é".encode(), b"", b"key "])
    ids = np.array([2, 0, 1, -1, 3, 2**31 - 1, -(2**31), 2], np.int32)
    assert texts.join(ids) == texts.join(ids.tolist()) == "key ékey ".encode()
    assert texts.join([]) == b""


def test_each_text_is_compared_with_its_own_tokens():
    """The tokens of all texts together may be right where those of two are not."""

    class Shifted(BytesTokenizer):
        def encode_batch(self, texts):
            one, other, *rest = super().encode_batch(texts)
            return [one[:-1], np.append(one[-1:], other), *rest]

    tokens, changed = encode_documents(Shifted(), ["one", "other", "third", ""])
    assert len(tokens) == 4 and changed == [True, True, False, False]
