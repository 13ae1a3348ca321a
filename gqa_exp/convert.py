"""gqa-convert: a checkpoint folder to another with fewer KV heads, and a manifest that says how it came about.

Reads and writes folders of transformers too, so it also takes a checkpoint from there to here and back.
"""

import argparse
import dataclasses
import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors import SafetensorError

from gqa_exp.config import METHODS, OPTIMIZER_SLOTS, parse_kv_heads
from gqa_exp.data.tokenizer import FILES as TOKENIZER_FILES
from gqa_exp.errors import InputError, Parser, command
from gqa_exp.model.checkpoint import (
    CONFIG,
    OPTIMIZER,
    TRAINING,
    WEIGHTS,
    content_hash,
    hf_folder,
    is_hf,
    load,
    load_hf,
    save,
    save_hf,
)
from gqa_exp.model.convert import SiteReport, conversion_report
from gqa_exp.training.conversion import convert_state
from gqa_exp.training.state import TrainingState

MANIFEST = "manifest.json"
CHECKPOINT_FILES = {CONFIG, WEIGHTS, OPTIMIZER, TRAINING, MANIFEST, *TOKENIZER_FILES}
MAX_SEED = 2**31 - 1


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="gqa-convert", description="Convert a checkpoint to fewer KV heads in the decoder.")
    parser.add_argument("source", type=Path, metavar="SOURCE", help="checkpoint folder to read; --from-hf: or hub id")
    parser.add_argument("target", type=Path, metavar="TARGET", help="checkpoint folder to write")
    parser.add_argument(
        "--num-kv-heads",
        metavar="G",
        help="KV heads; or one number per decoder layer, as 8,4,2,1 (default: as many as there are)",
    )
    parser.add_argument("--method", default="mean", metavar="|".join(METHODS), help="how heads merge (default: mean)")
    parser.add_argument("--seed", type=int, default=0, help="of fresh weights, method random only (default: 0)")
    parser.add_argument(
        "--slots",
        default="pool",
        metavar="|".join(OPTIMIZER_SLOTS),
        help="the optimizer's second moments of merged heads, where SOURCE has any (default: pool)",
    )
    parser.add_argument("--from-hf", action="store_true", help="SOURCE is a T5 of transformers")
    parser.add_argument("--to-hf", action="store_true", help="write a folder of transformers, without optimizer slots")
    parser.add_argument(
        "--expand",
        action="store_true",
        help="with --to-hf: repeat KV heads, so that any tool can run the result as a plain T5 (without the savings)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint that TARGET holds already")
    return parser


@command
def main() -> None:
    """The command: converts, and prints what each attention site lost."""
    arguments = _parser().parse_args()
    report = convert_checkpoint(
        arguments.source,
        arguments.target,
        None if arguments.num_kv_heads is None else parse_kv_heads(arguments.num_kv_heads),
        arguments.method,
        arguments.seed,
        arguments.slots,
        from_hf=arguments.from_hf,
        to_hf=arguments.to_hf,
        expand=arguments.expand,
        overwrite=arguments.overwrite,
    )
    out = Console()
    if not out.is_terminal:
        out = Console(width=120)
    out.print(_table(report, arguments.method))
    print(f"written: {arguments.target}")


def convert_checkpoint(
    source: Path,
    target: Path,
    num_kv_heads: Any,
    method: str = "mean",
    seed: int = 0,
    slots: str = "pool",
    *,
    from_hf: bool = False,
    to_hf: bool = False,
    expand: bool = False,
    overwrite: bool = False,
) -> list[SiteReport]:
    """Convert a checkpoint folder to another, written whole or not at all.

    The target holds the weights in float32 (the mean of bfloat16 weights is in general no bfloat16 number),
    `config.json`, `manifest.json`, the tokenizer's files if the source has them, and, where it has a training record,
    that record and the optimizer's slots, so that uptraining continues from it.

    Args:
        source: a checkpoint folder of ours, or with `from_hf` one of transformers.
        target: folder to write; its parents are made.
        num_kv_heads: an int, or one per decoder layer; None: as many as the source has.
        method: "mean", "first" or "random".
        seed: of fresh weights; only "random" uses it.
        slots: "pool" or "reset"; see `gqa_exp.training.adafactor.pool_slots`.
        from_hf: read `source`, a folder or a hub id, with `load_hf`; it has no optimizer slots.
        to_hf: write `target` with `save_hf`, without record and slots.
        expand: with `to_hf`, repeat KV heads; see `save_hf`.
        overwrite: replace a checkpoint in `target`; a folder that holds anything else is never replaced.

    Returns:
        What conversion did, per decoder layer and attention site.

    Raises:
        InputError: a source that cannot be read, heads that do not fit it, or a target that is in use or cannot be
            written.
    """
    if not 0 <= seed <= MAX_SEED:
        raise InputError(f"seed={seed} is out of range; it must be between 0 and {MAX_SEED}")
    if expand and not to_hf:
        raise InputError("--expand repeats KV heads for other tools; give it together with --to-hf")
    _check_target(source, target, overwrite)
    if from_hf:
        source = hf_folder(source)
    state, trained = _read(source, from_hf)
    heads = list(state.model.config.kv_heads) if num_kv_heads is None else num_kv_heads
    converted = convert_state(state, heads, method, seed, slots)
    report = conversion_report(state.model, converted.model)
    manifest = {
        "source": str(source),
        "source_hash": content_hash(source),
        "method": method,
        "num_heads": converted.model.config.num_heads,
        "num_kv_heads": list(converted.model.config.kv_heads),
        "seed": seed if method == "random" else None,
        "optimizer_slots": slots if state.slots and not to_hf else None,
        "expanded": expand,
        "report": [dataclasses.asdict(row) for row in report],
        "versions": {"gqa_exp": version("gqa-exp"), "torch": torch.__version__},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    tokenizer = [source / name for name in TOKENIZER_FILES if (source / name).is_file()]

    def fill(folder: Path) -> None:
        if to_hf:
            save_hf(converted.model, folder, expand=expand)
        elif trained:
            converted.save(folder)
        else:
            save(converted.model, folder)
        for path in tokenizer:
            shutil.copyfile(path, folder / path.name)
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")

    _write(target, fill)
    return report


def _write(target: Path, fill: Callable[[Path], None]) -> None:
    """Let the target be filled aside and swap it in; what goes wrong, Ctrl-C included, leaves the target as it was."""
    target = target.resolve()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise InputError(f"{target}: cannot be written ({error}); choose another TARGET") from error
    new, old = aside / "new", aside / "old"
    try:
        fill(new)
        if target.exists():
            target.rename(old)
        new.rename(target)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{target}: cannot be written ({error}); choose another TARGET") from error
    finally:
        if old.exists() and not target.exists():
            old.rename(target)
        shutil.rmtree(aside, ignore_errors=True)


def _check_target(source: Path, target: Path, overwrite: bool) -> None:
    """Refuse a target whose contents would be lost, before anything is read."""
    if source.resolve().is_relative_to(target.resolve()):
        raise InputError(f"{target}: holds the source {source}; choose another TARGET")
    if target.exists() and not target.is_dir():
        raise InputError(f"{target}: is a file; TARGET must be a folder, new or empty")
    found = {path.name for path in target.iterdir()} if target.exists() else set()
    if found and not overwrite:
        raise InputError(f"{target}: exists and is not empty; choose another TARGET, or add --overwrite")
    if foreign := sorted(found - CHECKPOINT_FILES):
        raise InputError(f'{target}: holds "{foreign[0]}", which is no part of a checkpoint; choose another TARGET')


def _read(source: Path, from_hf: bool) -> tuple[TrainingState, bool]:
    """The source, and whether it holds more than a model: a training record, and slots."""
    if from_hf:
        return TrainingState(load_hf(source)), False
    if is_hf(source):
        raise InputError(f"{source}: a checkpoint of transformers; add --from-hf to read it")
    if (source / TRAINING).exists() or (source / OPTIMIZER).exists():
        return TrainingState.load(source), True
    return TrainingState(load(source)), False


def _table(report: Sequence[SiteReport], method: str) -> Table:
    table = Table(
        title=f"KV heads merged by {method}",
        caption="Error: distance between each head's projection and its group's one, relative to the projection.",
    )
    for heading in ("layer", "site", "KV heads", "K error", "V error"):
        table.add_column(heading, justify="left" if heading == "site" else "right")
    for row in report:
        heads = f"{row.heads_before} to {row.heads_after}"
        table.add_row(str(row.layer), row.site.replace("_", "-"), heads, f"{row.k_error:.3f}", f"{row.v_error:.3f}")
    return table


if __name__ == "__main__":
    main()
