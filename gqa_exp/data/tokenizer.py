"""The one place that knows how text becomes ids: a SentencePiece model with T5's sentinels on top.

The sentinels mark the spans that corruption takes out. They are no pieces of the model, so any SentencePiece model with
T5's ids for padding, end of sequence and unknown can be used, T5's own included. It may come as SentencePiece's file
(`spiece.model` in folders of transformers) or as the `tokenizer.json` that the library tokenizers writes.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import sentencepiece

from gqa_exp.errors import InputError, one_line

PAD_ID = 0
EOS_ID = 1
UNK_ID = 2
NUM_SENTINELS = 100
"""As T5 has them (its paper, section 3.1.4; `extra_ids` in google/seqio, seqio/vocabularies.py)."""
SENTINEL = re.compile(r"<extra_id_([0-9]{1,4})>")
"""How a task's text names a sentinel, in the words of T5's tokenizer in transformers."""


SPACE = "\u2581"
"""SentencePiece's sign for a space."""
FILES = ("spiece.model", "tokenizer.json")
"""Names of tokenizers in folders of transformers, the one to prefer first."""


class Pieces(Protocol):
    """What turns text into ids and back, without sentinels and without adding anything."""

    size: int
    special: tuple[int, int, int]
    """Ids of padding, end of sequence and unknown."""

    def encode(self, texts: Sequence[str], threads: int) -> list[list[int]]:
        """Ids of each text."""

    def decode(self, ids: list[int]) -> str:
        """The text of ids."""


class SentencePieces:
    """A SentencePiece model, run by its own library.

    Raises:
        RuntimeError: the data is no such model.
    """

    def __init__(self, data: bytes) -> None:
        self._pieces = sentencepiece.SentencePieceProcessor()
        self._pieces.LoadFromSerializedProto(data)
        self.size = int(self._pieces.get_piece_size())
        while self.size and SENTINEL.fullmatch(self._pieces.id_to_piece(self.size - 1).lstrip(SPACE)):
            self.size -= 1  # mT5's model holds its sentinels
        self.special = self._pieces.pad_id(), self._pieces.eos_id(), self._pieces.unk_id()

    def encode(self, texts: Sequence[str], threads: int) -> list[list[int]]:
        """Ids of each text."""
        return self._pieces.encode(list(texts), num_threads=threads)  # type: ignore[no-any-return]

    def decode(self, ids: list[int]) -> str:
        """The text of ids."""
        return str(self._pieces.decode(ids))


class JsonPieces:
    """The same model as `tokenizer.json`, run by the library tokenizers.

    There, special tokens and sentinels are pieces like others, and stand for themselves wherever a text names them. For
    SentencePiece a text is text, so they are taken out, or renamed to what no text can hold.

    Raises:
        ValueError: no such file, of another kind of model, or without T5's special tokens.
    """

    def __init__(self, data: bytes) -> None:
        import tokenizers  # here, since only this kind needs it

        record: dict[str, Any] = json.loads(data)
        if record["model"]["type"] != "Unigram":
            raise ValueError(f"its model is {record['model']['type']}, and T5's is Unigram")
        vocabulary = [list(entry) for entry in record["model"]["vocab"]]
        while vocabulary and SENTINEL.fullmatch(vocabulary[-1][0].lstrip(SPACE)):
            vocabulary.pop()
        names = [name for name, _ in vocabulary]
        pad, eos, unk = self.special = names.index("<pad>"), names.index("</s>"), int(record["model"]["unk_id"])
        for i in (pad, eos):
            vocabulary[i][0] = f"\0{names[i]}"
        vocabulary[unk][0] = f"{SPACE}\u2047{SPACE}"  # what SentencePiece writes for it
        record["model"]["vocab"] = vocabulary
        record |= {"added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
        self._pieces = tokenizers.Tokenizer.from_str(json.dumps(record))
        self.size = len(vocabulary)

    def encode(self, texts: Sequence[str], threads: int) -> list[list[int]]:
        """Ids of each text; the library chooses its threads by itself."""
        return [encoding.ids for encoding in self._pieces.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: list[int]) -> str:
        """The text of ids."""
        return str(self._pieces.decode(ids, skip_special_tokens=False))


class Tokenizer:
    """Pieces plus `num_sentinels` ids above them.

    Args:
        path: a SentencePiece `.model` file, a `tokenizer.json`, or a folder that holds one of `FILES`.
        num_sentinels: how many ids to add.

    Raises:
        InputError: the file is missing, empty, no such model, or has other special ids than T5.
    """

    pad_id = PAD_ID
    eos_id = EOS_ID
    unk_id = UNK_ID

    def __init__(self, path: str | Path, num_sentinels: int = NUM_SENTINELS) -> None:
        path = Path(path)
        if path.is_dir():
            path = next((path / name for name in FILES if (path / name).is_file()), path / FILES[0])
        try:
            data = path.read_bytes()
        except OSError as error:
            raise InputError(
                f"tokenizer {path} cannot be read ({error.strerror}); give a SentencePiece .model file"
            ) from None
        if not data:
            raise InputError(f"tokenizer {path} is empty; give a SentencePiece .model file")
        json_file = path.suffix == ".json"
        try:
            self._pieces: Pieces = JsonPieces(data) if json_file else SentencePieces(data)
        except Exception as error:  # the libraries raise nothing more specific
            kind = "tokenizer.json of a T5" if json_file else "SentencePiece model"
            raise InputError(f"tokenizer {path} is not a {kind} ({one_line(error)})") from None
        if self._pieces.special != (PAD_ID, EOS_ID, UNK_ID):
            raise InputError(
                f"tokenizer {path} has pad, eos, unk = {self._pieces.special}; "
                f"train it with pad_id={PAD_ID}, eos_id={EOS_ID}, unk_id={UNK_ID}"
            )
        self.num_sentinels = num_sentinels
        self.num_pieces = self._pieces.size
        self.vocab_size = self.num_pieces + num_sentinels
        """Ids that exist; a model may round its vocabulary up."""
        self.content_hash = hashlib.sha256(data + b"\0%d" % num_sentinels).hexdigest()
        """Same ids for the same text if and, almost surely, only if this is equal."""

    def sentinel(self, i: int) -> int:
        """The id of the i-th sentinel, counted down from the top of the vocabulary as T5 does."""
        if not 0 <= i < self.num_sentinels:
            raise ValueError(f"sentinel {i} does not exist; there are {self.num_sentinels}")
        return self.vocab_size - 1 - i

    def encode(
        self, text: str, max_tokens: int | None = None, add_eos: bool = True, sentinels: bool = False
    ) -> list[int]:
        """Ids of a text.

        Args:
            text: any text; the model normalises it, so line breaks become spaces.
            max_tokens: cut to so many ids, the end-of-sequence id included.
            add_eos: end with the end-of-sequence id.
            sentinels: whether `<extra_id_0>` in the text is a sentinel, or text like any other.

        Raises:
            InputError: the text names a sentinel that does not exist.
        """
        return self.encode_batch([text], max_tokens, add_eos, threads=1, sentinels=sentinels)[0]

    def encode_batch(
        self,
        texts: Sequence[str],
        max_tokens: int | None = None,
        add_eos: bool = True,
        threads: int = 2,
        sentinels: bool = False,
    ) -> list[list[int]]:
        """Ids of many texts; see `encode`."""
        eos = [EOS_ID] if add_eos else []
        room = None if max_tokens is None else max_tokens - len(eos)
        # What stands between sentinels, and their numbers, in turn.
        split = [SENTINEL.split(text) if sentinels else [text] for text in texts]
        between = [part for parts in split for part in parts[::2]]
        pieces = iter(self._pieces.encode(between, threads))
        encoded = []
        for parts in split:
            ids = list(next(pieces))
            for number in map(int, parts[1::2]):
                if number >= self.num_sentinels:
                    raise InputError(f"<extra_id_{number}> in a text: the tokenizer has {self.num_sentinels} sentinels")
                ids += [self.sentinel(number), *next(pieces)]
            encoded.append(ids[:room] + eos)
        return encoded

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids up to the first end-of-sequence id; padding and what is no piece (sentinels) is left out."""
        kept: list[int] = []
        for token in ids:
            if token == EOS_ID:
                break
            if token != PAD_ID and 0 <= token < self.num_pieces:
                kept.append(int(token))
        return self._pieces.decode(kept)


VOCABULARY_ROUNDED_TO = 128
"""Models round the vocabulary of their tokenizer up to a multiple of it, as T5 32,100 to 32,128."""


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int, what: str) -> None:
    """Check that a tokenizer is a model's own, as far as its size tells.

    Args:
        tokenizer: which.
        vocab_size: ids that the model knows.
        what: how to call the tokenizer.

    Raises:
        InputError: it has more ids than the model, or so few that it must belong to another.
    """
    if not 0 <= vocab_size - tokenizer.vocab_size < VOCABULARY_ROUNDED_TO:
        raise InputError(
            f"{what} has {tokenizer.vocab_size} ids, which does not fit model.vocab_size={vocab_size}; a model needs "
            "the tokenizer that it was trained with, beside its weights"
        )


def default_tokenizer() -> Tokenizer:
    """The tokenizer that is shipped with the embedded text."""
    from gqa_exp.data.embedded import TOKENIZER  # here, since only this needs the tables' libraries

    return Tokenizer(TOKENIZER)
