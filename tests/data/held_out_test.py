"""Text for evaluation alone is cut as a token cache would cut it, and nothing of it is lost."""

import io
import json
import zipfile

import numpy as np
import pytest

from fope_jax.data import DataConfig, held_out, text_packages
from fope_jax.data.corpora import CorpusError, Document
from fope_jax.data.held_out import read_held_out, text_name, tokenize_texts
from fope_jax.data.tokenizers import BytesTokenizer

BYTES = BytesTokenizer()
CONFIG = DataConfig(tokenizer="bytes")


def test_documents_stand_one_after_the_other_each_with_its_end():
    texts = ["naïve", "", "x\n\ny"]
    own = tokenize_texts("mine", [Document(f"d{i}", text) for i, text in enumerate(texts)], BYTES)
    assert own.documents["name"].tolist() == ["d0", "d2"]  # the empty one has no tokens
    assert own.documents["bytes"].tolist() == [6, 4]
    assert own.documents["length"].tolist() == [7, 5]
    for (_, start, length, size), text in zip(own.documents, ["naïve", "x\n\ny"], strict=True):
        ids = own.tokens(start, start + length)
        assert BYTES.decode(ids[:-1]) == text
        assert ids[-1] == BYTES.eos_id
        assert BYTES.token_bytes[ids].sum() == size
    assert own.num_tokens == 12
    with pytest.raises(IndexError, match=r"tokens \[3, 13\) of mine; accepted: within \[0, 12\]"):
        own.tokens(3, 13)


def test_the_fingerprint_is_that_of_text_boundaries_and_tokenizer():
    def fingerprint(*texts):
        return tokenize_texts("n", [Document("d", text) for text in texts], BYTES).fingerprint

    assert fingerprint("ab", "c") == fingerprint("ab", "c")
    assert len({fingerprint("ab", "c"), fingerprint("a", "bc"), fingerprint("abc")}) == 3


def test_files_of_the_user(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "two"}) + "\n")
    own = read_held_out(f"mine={tmp_path}/*", BYTES, CONFIG)
    assert own.split == "mine"
    assert BYTES.decode(t for t in own.stream if t != BYTES.eos_id) == "onetwo"
    (tmp_path / "b.jsonl").write_text(json.dumps({"content": "three"}) + "\n")
    own = read_held_out(f"mine={tmp_path}/b.jsonl", BYTES, CONFIG, field="content")
    assert BYTES.decode(t for t in own.stream if t != BYTES.eos_id) == "three"
    with pytest.raises(CorpusError, match="no string field 'text'.*evaluate.text_field=NAME"):
        read_held_out(f"mine={tmp_path}/b.jsonl", BYTES, CONFIG)
    with pytest.raises(CorpusError, match=r"evaluate\.texts: '.*/\*\.md' matches no file"):
        read_held_out(f"mine={tmp_path}/*.md", BYTES, CONFIG)
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(CorpusError, match="text 'none' is empty: no document has text"):
        read_held_out(f"none={tmp_path}/empty.txt", BYTES, CONFIG)


def test_packages_are_read_as_they_are(tmp_path, monkeypatch):
    news = io.BytesIO()
    with zipfile.ZipFile(news, "w") as archive:
        archive.writestr("NewsArticles.csv", 'article_id,title,text\n7,T,"a ""b""\r\nc"\n8,U,d\n')
    wheel = tmp_path / "any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"{text_packages.WEB.folder}c4.utf8", "page é\n\nother")
        archive.writestr(f"{text_packages.NEWS.folder}NewsArticles.zip", news.getvalue())
    monkeypatch.setattr(held_out, "download_package", lambda directory, package: wheel)
    web = read_held_out("web", BYTES, CONFIG)
    assert web.documents["name"].tolist() == ["web:1", "web:3"]
    assert BYTES.decode(web.tokens(0, 7)) == "page é"
    articles = read_held_out("news", BYTES, CONFIG)
    assert articles.documents["name"].tolist() == ["news:7", "news:8"]
    assert BYTES.decode(articles.tokens(0, 8)) == 'a "b"\r\nc'
    assert not np.array_equal(web.stream, articles.stream)


@pytest.mark.parametrize("source", ["c4", "web=x.txt", "validation=x.txt", "a b=x.txt", "a="])
def test_what_is_no_text_is_refused(source):
    with pytest.raises(ValueError, match=r"text '.*'; accepted: web, news, or NAME=GLOB"):
        text_name(source)
