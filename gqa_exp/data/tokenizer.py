"""The one place that knows how text becomes ids: a SentencePiece model with T5's sentinels on top.

The sentinels mark the spans that corruption takes out. They are no pieces of the model, so any SentencePiece model with
T5's ids for padding, end of sequence and unknown can be used, T5's own included.
"""

import hashlib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import sentencepiece

from gqa_exp.errors import InputError, one_line

PAD_ID = 0
EOS_ID = 1
UNK_ID = 2
NUM_SENTINELS = 100
"""As T5 has them (its paper, section 3.1.4; `extra_ids` in google/seqio, seqio/vocabularies.py)."""
SENTINEL = re.compile(r"<extra_id_([0-9]{1,4})>")
"""How a task's text names a sentinel, in the words of T5's tokenizer in transformers."""


class Tokenizer:
    """A SentencePiece model plus `num_sentinels` ids above its pieces.

    Args:
        model_path: the SentencePiece `.model` file.
        num_sentinels: how many ids to add.

    Raises:
        InputError: the file is missing, empty, no SentencePiece model, or has other special ids than T5.
    """

    pad_id = PAD_ID
    eos_id = EOS_ID
    unk_id = UNK_ID

    def __init__(self, model_path: str | Path, num_sentinels: int = NUM_SENTINELS) -> None:
        try:
            data = Path(model_path).read_bytes()
        except OSError as error:
            raise InputError(
                f"tokenizer {model_path} cannot be read ({error.strerror}); give a SentencePiece .model file"
            ) from None
        if not data:
            raise InputError(f"tokenizer {model_path} is empty; give a SentencePiece .model file")
        self._pieces = sentencepiece.SentencePieceProcessor()
        try:
            self._pieces.LoadFromSerializedProto(data)
        except RuntimeError as error:
            raise InputError(f"tokenizer {model_path} is not a SentencePiece model ({one_line(error)})") from None
        special = self._pieces.pad_id(), self._pieces.eos_id(), self._pieces.unk_id()
        if special != (PAD_ID, EOS_ID, UNK_ID):
            raise InputError(
                f"tokenizer {model_path} has pad, eos, unk = {special}; "
                f"train it with pad_id={PAD_ID}, eos_id={EOS_ID}, unk_id={UNK_ID}"
            )
        self.num_sentinels = num_sentinels
        self.num_pieces = int(self._pieces.get_piece_size())
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
        pieces = iter(self._pieces.encode(between, num_threads=threads))
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
        return str(self._pieces.decode(kept))


def default_tokenizer() -> Tokenizer:
    """The tokenizer that is shipped with the embedded text."""
    from gqa_exp.data.embedded import TOKENIZER  # here, since only this needs the tables' libraries

    return Tokenizer(TOKENIZER)
