"""gqa-time: decode time alone, at any geometry, trained or not.

Time depends on the architecture and not on what the weights learned, so random weights serve as well as a checkpoint.
What this prints is never a result by itself: no quality stands beside it, and it says so.
"""

import argparse
import dataclasses
import hashlib
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.table import Table

import gqa_exp
from gqa_exp.config import DTYPES, ModelConfig, TimingConfig, check_ranges, parse_kv_heads, variant_label
from gqa_exp.errors import InputError, Parser, command, suggest
from gqa_exp.host import prepare
from gqa_exp.model import T5, T5Config
from gqa_exp.model.checkpoint import load
from gqa_exp.results import write_atomically
from gqa_exp.timing.timer import Estimate, TimingReport, time_variants

MODELS = Path(gqa_exp.__file__).parent.parent / "conf" / "model"
QUALITY = "not quality-checked"


def _parser() -> argparse.ArgumentParser:
    default = TimingConfig()
    parser = Parser(prog="gqa-time", description="Decode time of variants, interleaved in one process.")
    parser.add_argument("--checkpoint", action="append", default=[], metavar="NAME=DIR", help="a variant; repeatable")
    parser.add_argument("--model", metavar="NAME", help="time random weights of this geometry, a file of conf/model")
    parser.add_argument(
        "--num-kv-heads",
        nargs="+",
        metavar="G",
        help="with --model: one variant per value; G, or one per decoder layer as 8,4,2,1 (default: as query heads)",
    )
    parser.add_argument("--reference", metavar="NAME", help="compare with this variant (default: most KV heads)")
    parser.add_argument("--batch-size", type=int, default=default.batch_size)
    parser.add_argument("--source-length", type=int, default=default.source_length)
    parser.add_argument("--output-length", type=int, default=default.output_length)
    parser.add_argument("--dtype", default=default.dtype, metavar="|".join(DTYPES))
    parser.add_argument("--device", default=default.device, metavar="cpu|cuda")
    parser.add_argument("--min-rounds", type=int, default=default.min_rounds)
    parser.add_argument("--min-seconds", type=float, default=default.min_seconds)
    parser.add_argument("--max-seconds", type=float, default=default.max_seconds)
    parser.add_argument("--warmup-rounds", type=int, default=default.warmup_rounds)
    parser.add_argument("--seed", type=int, default=default.seed)
    parser.add_argument("--threads", type=int, help="CPU threads (default: all physical cores)")
    parser.add_argument("--output", type=Path, default=Path("runs"), help="folder; the report goes to times/KEY.json")
    return parser


@command
def main() -> None:
    """The command: a table, a file with the raw times, and last one line of JSON."""
    arguments = _parser().parse_args()
    settings = {spec.name for spec in dataclasses.fields(TimingConfig)}
    config = TimingConfig(**{name: value for name, value in vars(arguments).items() if name in settings})
    check_ranges(config, "timing.")
    if arguments.threads is not None and arguments.threads < 1:
        raise InputError(f"threads={arguments.threads} is out of range; it must be 1 or more")
    prepare(arguments.threads)  # as gqa-run does: the same machine gives the same times under both
    geometries = _geometries(arguments)  # everything cheap is checked before models are built and times taken
    folder = _writable(arguments.output / "times")
    trained, untrained = _loaded(arguments.checkpoint), _random(geometries, config)
    if twice := trained.keys() & untrained.keys():
        raise InputError(f"a checkpoint and a random model are both called {min(twice)}; rename the checkpoint")
    variants = {**trained, **untrained}
    if not variants:
        raise InputError("nothing to time; give --model NAME or --checkpoint NAME=DIR")
    reference = arguments.reference or max(variants, key=lambda name: sum(variants[name].config.kv_heads))

    console = Console(stderr=True)
    with console.status("timing") as status:
        report = time_variants(variants, config, reference=reference, progress=status.update)
    record = {
        "started": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "quality": QUALITY,
        "models": {name: dataclasses.asdict(model.config) for name, model in variants.items()},
        **report.to_dict(),
    }
    text = json.dumps(record, indent=1)
    path = folder / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"
    write_atomically(path, text + "\n")
    out = Console()
    if not out.is_terminal:
        out = Console(width=140)
    out.print(_table(report))
    if report.warning:
        out.print(f"warning: {report.warning}")
    print(json.dumps({"file": str(path), "quality": QUALITY, **_summary(report)}))


def read_model_config(name: str, folder: Path = MODELS) -> ModelConfig:
    """The geometry named by a file of `conf/model`.

    Args:
        name: file name without its ending.
        folder: where the files are.

    Raises:
        InputError: no such file, or one that is not a geometry.
    """
    path = folder / f"{name}.yaml"
    known = [entry.stem for entry in folder.glob("*.yaml")]
    if name not in known:
        raise InputError(f'model "{name}" is unknown; {suggest(name, known)}')
    fields: Any = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    fields.pop("defaults", None)  # Hydra's, not ours
    try:
        model = ModelConfig(**fields)
    except TypeError as error:
        raise InputError(f"{path} is not a model geometry ({error})") from error
    check_ranges(model, "model.")
    return model


def _geometries(arguments: argparse.Namespace) -> list[T5Config]:
    """The geometries asked for by --model and --num-kv-heads."""
    if arguments.model is None:
        if arguments.num_kv_heads is not None:
            raise InputError("--num-kv-heads needs --model; a checkpoint has its own")
        return []
    model = read_model_config(arguments.model)
    return [
        T5Config.from_model_config(model, parse_kv_heads(text))
        for text in arguments.num_kv_heads or [str(model.num_heads)]
    ]


def _random(geometries: Sequence[T5Config], config: TimingConfig) -> dict[str, T5]:
    torch.manual_seed(config.seed)
    return {variant_label(geometry.kv_heads, geometry.num_heads): T5(geometry).eval() for geometry in geometries}


def _loaded(checkpoints: Sequence[str]) -> dict[str, T5]:
    variants: dict[str, T5] = {}
    for text in checkpoints:
        name, equals, folder = text.partition("=")
        if not (name and equals and folder):
            raise InputError(f'--checkpoint "{text}" must be NAME=DIR, such as MQA=checkpoints/mqa')
        if name in variants:
            raise InputError(f'--checkpoint names "{name}" twice; give each variant its own name')
        variants[name] = load(Path(folder)).eval()
    return variants


def _writable(folder: Path) -> Path:
    """The folder, made and tried, before minutes are spent on what could then not be kept."""
    probe = folder / ".writable"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(
            f"cannot write to the output folder {folder} ({error.strerror}); give another --output"
        ) from error
    return folder


def _summary(report: TimingReport) -> dict[str, Any]:
    return {
        "reference": report.reference,
        "hardware": report.hardware,
        "noise_floor": report.noise_floor,
        "warning": report.warning,
        "variants": {name: {"verdict": report.verdict(name), **report.fields(name)} for name in report.names},
    }


def _table(report: TimingReport) -> Table:
    """What was measured, one line per variant."""
    config = report.config
    floor = "unknown" if report.noise_floor is None else f"{report.noise_floor:.1%}"
    table = Table(
        title=f"Decode time, batch {config.batch_size}, source {config.source_length}, output {config.output_length}, "
        f"{report.dtype}, {report.hardware}",
        caption=f"{QUALITY.capitalize()}. Brackets: 95 % bootstrap interval over rounds. Speed-up against "
        f"{report.reference}, noise floor {floor}; a difference below it is none. "
        f"Plain read of memory: {report.memory_bandwidth / 1e9:.1f} GB/s.",
    )
    headings = (
        "variant",
        "ms per sample",
        "speed-up",
        "difference",
        "decode step ms",
        "step speed-up",
        "GB/s",
        "cache MiB",
    )
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "variant" else "right")
    for name in report.names:
        row = report.fields(name)
        cache = report.allocated_cache_bytes_per_sample(name)
        table.add_row(
            name,
            _estimate(report.per_sample(name), 1e3),
            _estimate(report.speedup(name)),
            "reference" if name == report.reference else report.verdict(name),
            _scaled(row["decode_step"], 1e3),
            _estimate(report.decode_step_speedup(name)),
            _scaled(row["decode_bandwidth"], 1e-9),
            _scaled(cache, 2**-20),
        )
    return table


def _estimate(value: Estimate | None, scale: float = 1.0) -> str:
    if value is None:
        return "-"
    return f"{value.median * scale:.3g} [{value.low * scale:.3g}, {value.high * scale:.3g}]"


def _scaled(value: object, scale: float) -> str:
    return f"{value * scale:.3g}" if isinstance(value, int | float) else "-"


if __name__ == "__main__":
    main()
