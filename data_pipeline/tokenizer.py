"""The byte-level BPE that turns documents into tokens, and its special tokens."""

import base64
import binascii
import gzip
import itertools
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as BPE

from armillary.data_pipeline.document import Answer, Document, Encoded, Picture, Role, Text
from armillary.errors import DataError

IMAGE, ANSWER, END = "<|image|>", "<|answer|>", "<|end|>"
SPECIAL = [END, IMAGE, ANSWER]
# How published tables cut text before merging; each is a part of its encoding's definition.
GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PATTERNS = {"gpt2": GPT2, "r50k_base": GPT2, "p50k_base": GPT2, "cl100k_base": CL100K}


class Tokenizer:
    """Byte-level BPE: any text has tokens, and they decode to exactly that text.

    `<|end|>` ends an answer or a document, `<|image|>` stands for an image, `<|answer|>` asks for an answer. What
    looks like a special token in a text is encoded as ordinary characters.
    """

    def __init__(self, bpe: BPE):
        bpe.encode_special_tokens = True
        self._bpe = bpe
        self.image, self.answer, self.end = (bpe.token_to_id(token) for token in (IMAGE, ANSWER, END))
        self.size = bpe.get_vocab_size()

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Train on `texts` up to `vocab_size` entries (256 bytes and 3 special tokens always among them)."""
        bpe = BPE(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=SPECIAL,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        bpe.train_from_iterator(texts, trainer)
        return cls(bpe)

    @classmethod
    def from_file(cls, path: Path) -> "Tokenizer":
        """A tokenizer.json, or tiktoken's table of a known encoding; special tokens are added where it lacks ours."""
        try:
            raw = path.read_bytes()
            raw = gzip.decompress(raw) if path.suffix == ".gz" else raw
            name = path.name.removesuffix(".gz")
            if name.endswith(".tiktoken"):
                bpe = _from_ranks(raw, name.removesuffix(".tiktoken"))
            else:
                bpe = BPE.from_str(raw.decode())
            bpe.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
        except DataError as error:
            raise DataError(error.what, path, error.fix) from None
        except Exception as error:  # tokenizers raises bare Exception for every malformed input
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            raise DataError(f"the tokenizer cannot be read: {reason}", path, "correct data.tokenizer") from None
        return cls(bpe)

    @classmethod
    def from_json(cls, text: str) -> "Tokenizer":
        """The tokenizer that `to_json` wrote; DataError where the text is none."""
        try:
            tokenizer = cls(BPE.from_str(text))
        except Exception as error:  # as above
            raise DataError(f"the tokenizer cannot be read: {error}", "manifest", "build the shards again") from None
        if None in (tokenizer.image, tokenizer.answer, tokenizer.end):
            raise DataError("the tokenizer lacks a special token", "manifest", "build the shards again")
        return tokenizer

    def to_json(self) -> str:
        """The whole tokenizer as text, for `from_json`."""
        return self._bpe.to_str()

    def encode(self, text: str) -> list[int]:
        """Tokens of plain text."""
        return self._bpe.encode(text, add_special_tokens=False).ids

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of `tokens`, special tokens left out; bytes that are no UTF-8 become U+FFFD."""
        return self._bpe.decode(list(tokens), skip_special_tokens=True)

    def encode_document(self, document: Document) -> Encoded:
        """The document as shards hold it: an image token for each picture, an end behind each answer or text."""
        return self.encode_documents([document])[0]

    def encode_documents(self, documents: list[Document]) -> list[Encoded]:
        """Many at once, over all processors (unless TOKENIZERS_PARALLELISM=false)."""
        texts = [text for document in documents for text in document.texts]
        tokens = iter(self._bpe.encode_batch_fast(texts, add_special_tokens=False))
        return [self._laid(document, [next(tokens).ids for _ in document.texts]) for document in documents]

    def _laid(self, document: Document, texts: list[list[int]]) -> Encoded:
        encoded, spans, remaining = Encoded(name=document.name, weight=document.weight), [], iter(texts)

        def put(ids: list[int], role: Role):
            encoded.tokens.extend(ids)
            if spans and spans[-1][1] == role:
                spans.pop()
            spans.append((len(encoded.tokens), role))

        for part in document.parts:
            match part:
                case Picture(data):
                    encoded.images.append((len(encoded.tokens), data))
                    put([self.image], Role.PROMPT)
                case Text(_, learned):
                    put(next(remaining), Role.TEXT if learned else Role.PROMPT)
                case Answer():
                    put([self.answer], Role.PROMPT)
                    put([*next(remaining), self.end], Role.ANSWER)
        if not isinstance(document.parts[-1], Answer):
            put([self.end], Role.TEXT)
        if spans != [(len(encoded.tokens), Role.TEXT)]:
            encoded.spans.extend(spans)
        return encoded


def _from_ranks(table: bytes, encoding: str) -> BPE:
    """A BPE from lines of base64 token and rank: a token's rank is its number and its merge's priority."""
    if encoding not in PATTERNS:
        known = ", ".join(f"{name}.tiktoken" for name in PATTERNS)
        raise DataError("a tiktoken table does not say how text is cut", "", f"name it as one of {known}")
    try:
        pairs = [line.split() for line in table.splitlines() if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    except (binascii.Error, ValueError):
        raise DataError("a line of the tiktoken table is not a token and a rank", "", "restore the file") from None
    letters = _byte_letters()
    spelled = {token: "".join(letters[byte] for byte in token) for token in ranks}
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda entry: entry[1]):
        if len(token) > 1:
            left = _last_merge(token, rank, ranks)
            merges.append((spelled[left], spelled[token[len(left) :]]))
    vocabulary = {spelled[token]: rank for token, rank in ranks.items()}
    bpe = BPE(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    split = pre_tokenizers.Split(Regex(PATTERNS[encoding]), "isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    return bpe


def _last_merge(token: bytes, rank: int, ranks: dict[bytes, int]) -> bytes:
    """The left one of the two tokens that merge into `token`: what merges of lower rank make of its bytes."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        joined = [ranks.get(a + b, rank) for a, b in itertools.pairwise(parts)]
        if min(joined) >= rank:
            raise DataError("a token of the table is no merge of two others", "", "restore the file")
        place = joined.index(min(joined))
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return parts[0]


def _byte_letters() -> list[str]:
    """The printable character that stands for each byte in a byte-level BPE: itself, or one from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]
