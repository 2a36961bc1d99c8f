"""Small tokenizers of every kind that people have, made without a download.

``TOKENIZERS`` maps a name to a function that makes the tokenizer. ``UNCHANGED`` says of which texts
it must give every one back, whatever else it changes.
"""

import json
import string
import tempfile
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from fope_jax.data.tokenizers import BytesTokenizer, JsonTokenizer, train_sentencepiece

MARK = "\u2581"
EOS, PAD, BOS, UNK = "</s>", "<pad>", "<s>", "<unk>"
LETTERS = string.ascii_letters + string.digits + string.punctuation
WORDS = ["the", "key", "is", "sky", "blue", "grass"]
BYTE_PIECES = [f"<0x{byte:02X}>" for byte in range(256)]


def added(index, name, special=False, **options):
    """An entry of ``added_tokens``."""
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": index, "content": name, **plain, "special": special} | options


def load(content, beside=None):
    """What a user gets who names the file."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "tokenizer.json"
        path.write_text(json.dumps(content), encoding="utf-8")
        if beside is not None:
            path.with_name("tokenizer_config.json").write_text(json.dumps(beside))
        return JsonTokenizer.load(path)


def chain(word):
    """Merges that build a word from its characters, and the pieces on the way."""
    pieces = [word[:end] for end in range(2, len(word) + 1)]
    return [(word[: end - 1], word[end - 1]) for end in range(2, len(word) + 1)], pieces


def bpe(byte_fallback=True, words=tuple(MARK + word for word in WORDS), **rules):
    """A BPE as converted from SentencePiece: Llama 2, Gemma, Mistral."""
    pieces = [PAD, EOS, UNK, BOS, *(BYTE_PIECES if byte_fallback else ()), MARK, *LETTERS]
    merges = []
    for word in (MARK * 2, MARK * 4, *words):
        halves = word[: len(word) // 2]
        steps, made = ([(halves, halves)], [word]) if word == halves * 2 else chain(word)
        merges += steps
        pieces += made
    pieces = list(dict.fromkeys(pieces))
    tokenizer = Tokenizer(
        models.BPE(
            vocab={piece: index for index, piece in enumerate(pieces)},
            merges=list(dict.fromkeys(merges)),
            unk_token=UNK,
            fuse_unk=True,
            byte_fallback=byte_fallback,
        )
    )
    return finish(tokenizer, **rules)


def unigram(byte_fallback=True, controls=(PAD, EOS, UNK, BOS), **rules):
    """A unigram model as converted from SentencePiece; control tokens are pieces like others."""
    pieces = [*controls, *(BYTE_PIECES if byte_fallback else ()), MARK, *LETTERS]
    pieces = list(dict.fromkeys([*pieces, *WORDS, *(MARK + word for word in WORDS)]))
    scores = [0.0 if index < len(controls) else -1 - 1 / len(p) for index, p in enumerate(pieces)]
    tokenizer = Tokenizer(
        models.Unigram(list(zip(pieces, scores, strict=True)), 2, byte_fallback=byte_fallback)
    )
    return finish(tokenizer, **rules)


def byte_level(add_prefix_space=False, **rules):
    """A byte-level BPE as GPT-NeoX's."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    steps, made = zip(*(chain("\u0120" + word) for word in WORDS), strict=True)
    pieces = dict.fromkeys([PAD, EOS, UNK, BOS, *alphabet, *sum(made, [])])
    tokenizer = Tokenizer(
        models.BPE(
            vocab={piece: index for index, piece in enumerate(pieces)},
            merges=list(dict.fromkeys(sum(steps, []))),
        )
    )
    rules = {
        "pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space),
        "decoder": decoders.ByteLevel(),
    } | rules
    return finish(tokenizer, **rules)


def finish(tokenizer, more=(), special=(PAD, EOS, UNK, BOS), beside=None, **rules):
    """Sets the rules, and adds tokens: ``more`` as (name, options)."""
    for name, rule in rules.items():
        setattr(tokenizer, name, rule)
    content = json.loads(tokenizer.to_str())
    vocab = tokenizer.get_vocab()
    tokens = [added(vocab[name], name, special=True) for name in special]
    for number, (name, options) in enumerate(more):
        tokens.append(added(vocab.get(name, len(vocab) + number), name, **options))
    content["added_tokens"] = sorted(tokens, key=lambda token: token["id"])
    return load(content, beside)


def spaces(*before):
    """Spaces are written as marks."""
    replace = normalizers.Replace(" ", MARK)
    return normalizers.Sequence([*before, replace]) if before else replace


def llama_decoder(*after):
    return decoders.Sequence(
        [decoders.Replace(MARK, " "), decoders.ByteFallback(), decoders.Fuse(), *after]
    )


def metaspace(scheme, **more):
    return {
        "pre_tokenizer": pre_tokenizers.Metaspace(prepend_scheme=scheme),
        "decoder": decoders.Sequence(
            [decoders.ByteFallback(), decoders.Fuse(), decoders.Metaspace(prepend_scheme=scheme)]
        ),
    } | more


STRIP = decoders.Strip(" ", 1, 0)
PREPEND = {"normalizer": spaces(normalizers.Prepend(MARK)), "decoder": llama_decoder(STRIP)}
CHINESE = "\u543e\u8f29\u306f\u732b\u3067\u3042\u308b\u3002\n"

# Lossless for any text.
LOSSLESS = {
    "bytes": BytesTokenizer,
    "sentencepiece": lambda: train_sentencepiece(["The key is blue. The sky.\n" * 40], 300),
    "sentencepiece, no spaces": lambda: train_sentencepiece([CHINESE * 200], 289),
    "sentencepiece, one space": lambda: train_sentencepiece([CHINESE * 3000 + "a b"], 289),
    "byte-level": byte_level,
    "byte-level, prefix": lambda: byte_level(add_prefix_space=True),
    "byte-level, added tokens": lambda: byte_level(
        more=[
            ("    ", {}),
            ("caf\xe9", {}),
            ("\u0120x", {}),
            ("ab", {"normalized": True}),
            ("<c>", {"single_word": True}),
        ]
    ),
    "byte-level, Strip": lambda: byte_level(normalizer=normalizers.Strip()),
    "byte-level, pads with a character": lambda: byte_level(
        special=[EOS, UNK, BOS, "a"], beside={"pad_token": "b", "eos_token": EOS}
    ),
}
# So are these, although they write a mark for a space.
MARKED = {
    "bpe, Replace": lambda: bpe(normalizer=spaces(), decoder=llama_decoder()),
    "bpe, runs of spaces added": lambda: bpe(
        normalizer=spaces(),
        decoder=llama_decoder(),
        more=[(MARK * 2, {}), (MARK * 4, {}), ("\n\n", {}), ("a b", {"normalized": True})],
    ),
    "bpe, Prepend": lambda: bpe(**PREPEND),
    "bpe, Prepend and added tokens": lambda: bpe(**PREPEND, more=[("<c>", {}), ("xx", {})]),
    "bpe, Metaspace always": lambda: bpe(**metaspace("always")),
    "bpe, Metaspace first": lambda: bpe(**metaspace("first")),
    "bpe, Metaspace never": lambda: bpe(**metaspace("never")),
    "bpe, end token not special": lambda: bpe(**PREPEND, special=[PAD, UNK, BOS], more=[(EOS, {})]),
    "bpe, control tokens named beside": lambda: bpe(
        **PREPEND,
        special=[EOS],
        more=[(BOS, {}), ("<|im_start|>", {}), ("<|u|>", {})],
        beside={
            "bos_token": {"content": BOS},
            "eos_token": EOS,
            "pad_token": PAD,
            "additional_special_tokens": ["<|im_start|>"],
            "added_tokens_decoder": {"9": {"content": "<|u|>", "special": True}},
        },
    ),
    "unigram, Metaspace always": lambda: unigram(**metaspace("always")),
    "unigram, Metaspace never": lambda: unigram(**metaspace("never")),
    "unigram, no token special": lambda: unigram(
        **metaspace("first"),
        special=[],
        more=[(EOS, {})],
        beside={"eos_token": EOS, "bos_token": BOS},
    ),
}
# These change some texts, and must say which.
LOSSY = {
    "bpe, no byte fallback": lambda: bpe(byte_fallback=False, **PREPEND),
    "unigram, no byte fallback": lambda: unigram(byte_fallback=False, **metaspace("always")),
    "unigram, words": lambda: unigram(
        **metaspace(
            "always",
            pre_tokenizer=pre_tokenizers.Sequence(
                [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
            ),
        )
    ),
    "unigram, NFKC": lambda: unigram(
        **metaspace("always"),
        normalizer=normalizers.Sequence(
            [normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]
        ),
    ),
    "byte-level, lower case": lambda: byte_level(normalizer=normalizers.Lowercase()),
    "byte-level, no accents": lambda: byte_level(
        normalizer=normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])
    ),
    "byte-level, NFC": lambda: byte_level(normalizer=normalizers.NFC()),
    "byte-level, tokens that take spaces": lambda: byte_level(
        more=[("<c>", {"rstrip": True}), ("ab", {"lstrip": True})]
    ),
}
TOKENIZERS = LOSSLESS | MARKED | LOSSY
