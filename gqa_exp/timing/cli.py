"""gqa-time: decode time alone, at any geometry, trained or not.

Time depends on the architecture and not on what the weights learned, so random weights serve as well as a checkpoint.
What this prints is never a result by itself: no quality stands beside it, and it says so.
"""

import argparse
import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from gqa_exp.cli import ROOT, compose
from gqa_exp.config import (
    CROSS_KV,
    DTYPES,
    ModelConfig,
    TimingConfig,
    check_ranges,
    check_timing,
    parse_kv_heads,
    variant_label,
)
from gqa_exp.errors import InputError, Parser, command, suggest
from gqa_exp.host import check_device, prepare
from gqa_exp.model import T5, InferenceT5, T5Config
from gqa_exp.model.checkpoint import load
from gqa_exp.results import write_atomically
from gqa_exp.timing.cost import DEVICES, Work, seconds_per_sample
from gqa_exp.timing.geometry import depths_that_fit, free_memory, random_models
from gqa_exp.timing.timer import WHOLE, Estimate, TimingReport, runnable_dtype, time_variants

MODELS = ROOT / "conf" / "model"
QUALITY = "not quality-checked"
ELSEWHERE = (DEVICES["H100"], DEVICES["A100"], dataclasses.replace(DEVICES["TPUv4"], count=8))
"""Devices that the cost model is asked for beside this host; the last is what the paper timed on."""


def _parser() -> argparse.ArgumentParser:
    default = TimingConfig()
    parser = Parser(prog="gqa-time", description="Decode time of variants, interleaved in one process.")
    what = parser.add_argument_group("what to time")
    what.add_argument("--checkpoint", action="append", default=[], metavar="NAME=DIR", help="a variant; repeatable")
    what.add_argument("--model", metavar="NAME", help="time random weights of this geometry, a file of conf/model")
    what.add_argument(
        "--num-kv-heads",
        nargs="+",
        metavar="G",
        help="with --model: one variant per value; G, or one per decoder layer as 8,4,2,1 (default: as query heads)",
    )
    what.add_argument("--reference", metavar="NAME", help="compare with this variant (default: most KV heads)")
    what.add_argument("--sweep", metavar="NAME", help="options from sweeps/NAME.yaml; those given here go before")
    what.add_argument("--batch-size", type=int, default=default.batch_size)
    what.add_argument("--source-length", type=int, default=default.source_length)
    what.add_argument("--output-length", type=int, default=default.output_length)
    what.add_argument("--dtype", default=default.dtype, metavar="|".join(DTYPES))
    what.add_argument("--device", default=default.device, metavar="cpu|cuda")
    what.add_argument(
        "--cross-kv",
        default=default.cross_kv,
        metavar="|".join(CROSS_KV),
        help="recomputed: cross-attention's keys and values again at each step, as public JAX code does",
    )
    short = parser.add_argument_group("shortcuts, marked in every result")
    short.add_argument(
        "--depths",
        nargs="+",
        default=["auto"],
        metavar="N",
        help="layers to time and extend linearly, as 1 2 4; whole; or auto, which extends what does not fit in memory",
    )
    short.add_argument(
        "--fills",
        nargs="+",
        type=int,
        default=[],
        metavar="N",
        help="time decode steps at these cache fills only, from 1 to the output length",
    )
    short.add_argument(
        "--encoder-batch-size", type=int, default=0, metavar="N", help="time the encoder with N samples, and scale"
    )
    short.add_argument("--prove", action="store_true", help="time each variant whole as well, and compare")
    how = parser.add_argument_group("protocol")
    how.add_argument("--compile", default=default.compile, metavar="auto|on|off", help="torch.compile decode steps")
    how.add_argument("--min-rounds", type=int, default=default.min_rounds)
    how.add_argument("--min-seconds", type=float, default=default.min_seconds)
    how.add_argument("--max-seconds", type=float, default=default.max_seconds)
    how.add_argument("--warmup-rounds", type=int, default=default.warmup_rounds)
    how.add_argument("--seed", type=int, default=default.seed)
    how.add_argument("--threads", type=int, help="CPU threads (default: all physical cores)")
    how.add_argument("--output", type=Path, default=Path("runs"), help="folder; the report goes to times/KEY.json")
    return parser


def _parse() -> argparse.Namespace:
    """The command line, over the model, KV heads and timing of a sweep if one is named.

    Raises:
        InputError: no such sweep, or one that lists no numbers of KV heads.
    """
    parser = _parser()
    arguments = parser.parse_args()
    if arguments.sweep is None:
        return arguments
    config = compose([f"+sweeps={arguments.sweep}"])
    path = ROOT / "sweeps" / f"{arguments.sweep}.yaml"
    listed = OmegaConf.select(OmegaConf.load(path), "hydra.sweeper.params.num_kv_heads")
    if listed is None:
        raise InputError(f"{path} lists no num_kv_heads under hydra.sweeper.params; give --model and --num-kv-heads")
    heads = [one or several for several, one in re.findall(r"\[([^]]*)\]|([^,\s]+)", str(listed))]
    timing = {name: value for name, value in vars(config.timing).items() if name in vars(arguments)}
    timing["depths"] = [str(depth) for depth in config.timing.depths] or ["auto"]
    parser.set_defaults(model=config.model.name, num_kv_heads=heads, **timing)
    return parser.parse_args()


@command
def main() -> None:
    """The command: a table, a file with the raw times, and last one line of JSON."""
    arguments = _parse()
    settings = {spec.name for spec in dataclasses.fields(TimingConfig)} - {"depths"}
    config = TimingConfig(**{name: value for name, value in vars(arguments).items() if name in settings})
    config.depths = _depths(arguments.depths)
    if arguments.threads is not None and arguments.threads < 1:
        raise InputError(f"threads={arguments.threads} is out of range; it must be 1 or more")
    # Everything cheap is checked before models are built and times taken.
    geometries = _geometries(arguments)
    layers = min((min(g.num_encoder_layers, g.num_decoder_layers) for g in geometries.values()), default=2**31)
    check_timing(config, layers)
    check_device(config.device, 'timing.device="cuda"')
    dtype, _ = runnable_dtype(config)
    if geometries and arguments.depths != ["whole"]:
        config.depths = depths_that_fit(list(geometries.values()), config, dtype, free_memory(config.device))
    prepare(arguments.threads)  # as gqa-run does: the same machine gives the same times under both
    folder = _writable(arguments.output / "times")
    trained = _loaded(arguments.checkpoint)
    if twice := trained.keys() & geometries.keys():
        raise InputError(f"a checkpoint and a random model are both called {min(twice)}; rename the checkpoint")
    if not trained and not geometries:
        raise InputError("nothing to time; give --model NAME or --checkpoint NAME=DIR")
    depth = config.depths[-1] if config.depths and not arguments.prove else None
    variants: dict[str, T5 | InferenceT5] = {**trained, **random_models(geometries, config, dtype, depth)}
    reference = arguments.reference or max(variants, key=lambda name: sum(variants[name].config.kv_heads))

    console = Console(stderr=True)
    with console.status("timing") as status:
        report = time_variants(
            variants,
            config,
            reference=reference,
            geometries=geometries,
            prove=arguments.prove,
            progress=status.update,
        )
    record = {
        "started": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "quality": QUALITY,
        "sweep": arguments.sweep,
        "model": arguments.model,
        "models": {name: dataclasses.asdict(geometries.get(name, model.config)) for name, model in variants.items()},
        "elsewhere": _elsewhere({name: geometries.get(name, model.config) for name, model in variants.items()}, config),
        **report.to_dict(),
    }
    text = json.dumps(record, indent=1)
    path = folder / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"
    write_atomically(path, text + "\n")
    out = Console()
    if not out.is_terminal:
        out = Console(width=160)
    out.print(_table(report))
    for line in _remarks(report):
        out.print(line)
    print(json.dumps({"file": str(path), "quality": QUALITY, **_summary(report)}))


def _elsewhere(
    geometries: Mapping[str, T5Config], config: TimingConfig
) -> dict[str, dict[str, dict[str, float | int]]]:
    """The cost model on devices of data sheets, in bfloat16: by device and variant, batch and seconds per sample."""
    found: dict[str, dict[str, dict[str, float | int]]] = {}
    for device in ELSEWHERE:
        label = device.name if device.count == 1 else f"{device.count} {device.name}"
        for name, geometry in geometries.items():
            work = Work(geometry, 1, config.source_length, config.output_length, cross_kv=config.cross_kv)
            batch, seconds = seconds_per_sample(work, device)
            if batch:
                found.setdefault(label, {})[name] = {"batch_size": batch, "per_sample": seconds}
    return found


def _depths(words: Sequence[str]) -> list[int]:
    """The depths asked for; none for "auto" and "whole"."""
    if words in (["auto"], ["whole"]):
        return []
    try:
        return [int(word) for word in words]
    except ValueError:
        raise InputError(
            f'--depths {" ".join(words)} must be whole numbers, such as 1 2 4, or "auto" or "whole"'
        ) from None


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
    fields = fields.get("model", fields)  # beside other groups' fields where a model brings its recipe
    try:
        model = ModelConfig(**fields)
    except TypeError as error:
        raise InputError(f"{path} is not a model geometry ({error})") from error
    check_ranges(model, "model.")
    return model


def _geometries(arguments: argparse.Namespace) -> dict[str, T5Config]:
    """The geometries asked for by --model and --num-kv-heads, by label."""
    if arguments.model is None:
        if arguments.num_kv_heads is not None:
            raise InputError("--num-kv-heads needs --model; a checkpoint has its own")
        return {}
    model = read_model_config(arguments.model)
    geometries = [
        T5Config.from_model_config(model, parse_kv_heads(text))
        for text in arguments.num_kv_heads or [str(model.num_heads)]
    ]
    return {variant_label(geometry.kv_heads, geometry.num_heads): geometry for geometry in geometries}


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
    """What was measured, one line per variant, the cost model's prediction beside it."""
    config = report.config
    floor = "unknown" if report.noise_floor is None else f"{report.noise_floor:.1%}"
    table = Table(
        title=f"Decode time, batch {config.batch_size}, source {config.source_length}, output {config.output_length}, "
        f"{report.dtype}, {report.hardware}",
        caption=f"{QUALITY.capitalize()}. Brackets: 95 % bootstrap interval over rounds. Speed-up against "
        f"{report.reference}, noise floor {floor}; a difference below it is none. Bound: the least the cost model "
        f"allows at this host's {report.host.bandwidth / 1e9:.1f} GB/s and "
        f"{max(report.host.peak.values()) / 1e9:.0f} GFLOP/s.",
    )
    headings = (
        "variant",
        "ms per sample",
        "bound",
        "speed-up",
        "difference",
        "decode step ms",
        "bound",
        "step speed-up",
        "GB/s",
        "of read",
        "cache MiB",
    )
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "variant" else "right")
    for name in report.names:
        row = report.fields(name)
        table.add_row(
            f"{name} *" if row["composed"] else name,
            _estimate(report.per_sample(name), 1e3),
            _scaled(row["predicted_per_sample"], 1e3),
            _estimate(report.speedup(name)),
            "reference" if name == report.reference else report.verdict(name),
            _scaled(row["decode_step"], 1e3),
            _scaled(row["predicted_decode_step"], 1e3),
            _estimate(report.decode_step_speedup(name)),
            _scaled(row["decode_bandwidth"], 1e-9),
            _scaled(row["bandwidth_share"], 1),
            _scaled(report.allocated_cache_bytes_per_sample(name), 2**-20),
        )
    return table


def _remarks(report: TimingReport) -> list[str]:
    """What stands under the table: shortcuts and their errors, warnings."""
    lines = []
    composed = {name: how for name in report.names if (how := report.fields(name)["composed"])}
    lines += [f"* composed: {how}" for how in dict.fromkeys(composed.values())]
    for name in composed:
        if (error := report.fit_error(name)) is not None:
            lines.append(f"{name}: the timed depths lie within {error:.1%} of the line")
        if f"{name}{WHOLE}" in report.names:
            lines.append(f"{name}: composed / whole {_estimate(report.ratio(name, f'{name}{WHOLE}'))}, end to end")
    if report.warning:
        lines.append(f"warning: {report.warning}")
    return lines


def _estimate(value: Estimate | None, scale: float = 1.0) -> str:
    if value is None:
        return "-"
    return f"{value.median * scale:.3g} [{value.low * scale:.3g}, {value.high * scale:.3g}]"


def _scaled(value: object, scale: float) -> str:
    return f"{value * scale:.3g}" if isinstance(value, int | float) else "-"


if __name__ == "__main__":
    main()
