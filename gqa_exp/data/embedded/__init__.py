"""The embedded text: everything the experiments read, shipped with the code so that they need no network or account.

The tables are stored once and every task and the pre-training corpus are derived from them when they are loaded, so the
split into train, dev and test, made per source package when they were built, cannot differ between two uses.
`README.md` beside this file says where each part comes from and under which licence.
"""

from pathlib import Path
from typing import Literal

import datasets
import pandas as pd

FOLDER = Path(__file__).parent
TOKENIZER = FOLDER / "tokenizer.model"

_DESCRIPTION = ["name", "synopsis", "body", "synopsis_de", "body_de"]


def packages() -> datasets.Dataset:
    """The descriptions of Debian's packages, one row per package.

    Returns:
        Columns name, source (its source package), section, split (train, dev or test), synopsis, body (paragraphs,
        one per line), synopsis_de and body_de (null where there is no German translation).
    """
    return _dataset(_read("packages"))


def help_segments() -> datasets.Dataset:
    """LibreOffice's help as aligned English and German paragraphs, in the order of the page.

    Returns:
        Columns page, en, de, split (train, dev or test; a page lies in one split).
    """
    return _dataset(_read("help"))


def corpus_documents(split: Literal["train", "heldout"]) -> datasets.Dataset:
    """The documents of the pre-training corpus.

    What belongs together stands together: the packages of one source make one document, and where the German text has
    the paragraphs of the English, each stands behind the one it translates. A span that was taken out of such a
    document can often be found in the rest, which is what teaches a small model to read its input (compare the
    translation language modelling of Conneau & Lample 2019, section 3.3).

    Args:
        split: "train" (the train split of packages and help, and the other documents' train part) or "heldout" (their
            dev split, and the other documents' held-out part). The test split is in neither.

    Returns:
        Columns text (paragraphs, one per line) and source.
    """
    table_split = "train" if split == "train" else "dev"
    described = _read("packages").loc[lambda f: f["split"] == table_split]
    described = described.assign(
        text=[_description(*row) for row in described[_DESCRIPTION].fillna("").itertuples(index=False)]
    )
    pages = _read("help").loc[lambda f: f["split"] == table_split]
    pages = pages.assign(text=pages["en"] + "\n" + pages["de"])
    other = _read("corpus").loc[lambda f: f["split"] == split]
    parts = {
        "debian": described.sort_values("name").groupby("source")["text"].agg("\n".join),
        "help": pages.groupby("page", sort=False)["text"].agg("\n".join),
    }
    frames = [pd.DataFrame({"text": texts.array, "source": source}) for source, texts in parts.items()]
    return _dataset(pd.concat([*frames, other[["text", "source"]]], ignore_index=True))


def _description(name: str, synopsis: str, body: str, synopsis_de: str, body_de: str) -> str:
    """A package's description with its German one, if any: paragraph by paragraph where there are as many."""
    english = [f"{name}: {synopsis}", *body.split("\n")]
    german = [synopsis_de, *body_de.split("\n")] if body_de else []
    if len(english) == len(german):
        return "\n".join(line for pair in zip(english, german, strict=True) for line in pair)
    return "\n".join([*english, *german])


def _read(table: str) -> pd.DataFrame:
    return pd.read_parquet(FOLDER / f"{table}.parquet")


def _dataset(frame: pd.DataFrame) -> datasets.Dataset:
    # In memory: `from_parquet` would leave a second copy in a cache folder.
    return datasets.Dataset.from_pandas(frame, preserve_index=False)
