"""The byte-level BPE that turns documents into tokens, and its special tokens."""

from collections.abc import Iterable

from tokenizers import Tokenizer as BPE
from tokenizers import decoders, models, pre_tokenizers, trainers

from armillary.data_pipeline.document import Answer, Document, Encoded, Picture, Role, Text
from armillary.errors import DataError

IMAGE, ANSWER, END = "<|image|>", "<|answer|>", "<|end|>"


class Tokenizer:
    """Byte-level BPE: any text has tokens, and they decode to exactly that text.

    `<|end|>` (token 0) ends an answer or a document, `<|image|>` stands for an image, `<|answer|>` asks for an answer.
    """

    def __init__(self, bpe: BPE):
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
            special_tokens=[END, IMAGE, ANSWER],  # the end is token 0, which padding is made of
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        bpe.train_from_iterator(texts, trainer)
        return cls(bpe)

    @classmethod
    def from_json(cls, text: str) -> "Tokenizer":
        """The tokenizer that `to_json` wrote; DataError where the text is none."""
        try:
            tokenizer = cls(BPE.from_str(text))
        except Exception as error:  # tokenizers raises bare Exception for every malformed input
            raise DataError(f"the tokenizer cannot be read: {error}", "manifest", "build the shards again") from None
        if None in (tokenizer.image, tokenizer.answer, tokenizer.end):
            raise DataError("the tokenizer lacks a special token", "manifest", "build the shards again")
        return tokenizer

    def to_json(self) -> str:
        """The whole tokenizer as text, for `from_json`."""
        return self._bpe.to_str()

    def encode(self, text: str) -> list[int]:
        """Tokens of plain text. What looks like a special token in it is encoded as ordinary characters."""
        pieces = [text]
        for special in (IMAGE, ANSWER, END):
            pieces = [part for piece in pieces for part in _cut(piece, special)]
        return [token for piece in pieces for token in self._bpe.encode(piece, add_special_tokens=False).ids]

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of `tokens`, special tokens left out; bytes that are no UTF-8 become U+FFFD."""
        return self._bpe.decode(list(tokens), skip_special_tokens=True)

    def encode_document(self, document: Document) -> Encoded:
        """The document as shards hold it: an image token for each picture, an end behind each answer or text."""
        encoded, spans = Encoded(name=document.name, weight=document.weight), []

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
                case Text(text, learned):
                    put(self.encode(text), Role.TEXT if learned else Role.PROMPT)
                case Answer(text):
                    put([self.answer], Role.PROMPT)
                    put([*self.encode(text), self.end], Role.ANSWER)
        if not isinstance(document.parts[-1], Answer):
            put([self.end], Role.TEXT)
        if spans != [(len(encoded.tokens), Role.TEXT)]:
            encoded.spans.extend(spans)
        return encoded


def _cut(text: str, special: str) -> list[str]:
    """Split `special` after its first character wherever it occurs, so that it is never matched whole."""
    pieces = text.split(special)
    return [
        (special[1:] if i else "") + piece + (special[0] if i + 1 < len(pieces) else "")
        for i, piece in enumerate(pieces)
    ]
