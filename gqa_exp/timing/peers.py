"""Our decoder against its peers on identical weights, interleaved in one run: transformers, CTranslate2, and T5GQA.

    pip install -e '.[bench]'
    python -m gqa_exp.timing.peers --model t5_base --batch-size 8 --source-length 512 --output-length 64

With `--device cuda` ours and transformers alone take part.

Decoding alone is the time of a long output less the time of one token, both from input ids and both in every round: the
encoder, the cross-attention cache and what a library does once per call cancel out, by the same rule for every engine.
CTranslate2 runs in a process of its own, and the package grouped-query-attention-pytorch, which needs a transformers of
before 4.32, in an environment of its own (`--t5gqa-python`), in turn with the others: see `peer_worker.py`.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from time import perf_counter, sleep
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from gqa_exp.config import DTYPES, TimingConfig, check_ranges, parse_kv_heads
from gqa_exp.errors import InputError, Parser, command
from gqa_exp.host import check_device, prepare, supports_dtype
from gqa_exp.model import T5, InferenceT5, T5Config, generate
from gqa_exp.model.checkpoint import save_hf
from gqa_exp.timing.cli import read_model_config
from gqa_exp.timing.compose import Sample
from gqa_exp.timing.environment import environment, hardware_id
from gqa_exp.timing.hostlock import timing_alone
from gqa_exp.timing.probe import local_device
from gqa_exp.timing.timer import Series, interleave, median_interval

Decode = Callable[[int], list[list[int]]]
"""Generates so many tokens for every input, end-of-sequence notwithstanding, and returns their ids."""
WORKER = Path(__file__).with_name("peer_worker.py")


def ours(model: T5, input_ids: Tensor, dtype: str) -> Decode:
    """This project's `generate`; on a GPU with compiled steps, as `gqa-time` does."""
    on_gpu = input_ids.device.type == "cuda"
    prepared = InferenceT5(model.to(input_ids.device, getattr(torch, dtype)).eval(), compile_step=on_gpu)
    return lambda tokens: generate(prepared, input_ids, max_new_tokens=tokens, stop_at_eos=False).tolist()


def transformers_t5(folder: Path, input_ids: Tensor, dtype: str) -> Decode:
    """Transformers' T5 and its `generate`, greedy, with its cache and default attention."""
    import transformers

    model: Any = transformers.T5ForConditionalGeneration.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    model.to(input_ids.device)
    model.generation_config.eos_token_id = None
    settings = {"do_sample": False, "num_beams": 1, "use_cache": True, "attention_mask": torch.ones_like(input_ids)}

    def decode(tokens: int) -> list[list[int]]:
        ids = model.generate(input_ids=input_ids, max_new_tokens=tokens, **settings)
        return ids[:, 1:].tolist()  # type: ignore[no-any-return]  # it begins with the start token

    return decode


REST = 0.3
"""Seconds before each timed run, until the threads of the engine before have stopped spinning (OpenMP: 0.2 s)."""
SPECIAL = ("<pad>", "</s>", "<unk>")


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """A tokenizer of one word per id, t0, t1, ..., which CTranslate2's converter asks for."""
    import tokenizers
    import transformers

    vocabulary = {(SPECIAL[i] if i < len(SPECIAL) else f"t{i}"): i for i in range(vocab_size)}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    pad, end, unknown = SPECIAL
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token=pad, eos_token=end, unk_token=unknown
    )
    wrapped.save_pretrained(folder)


class Worker:
    """An engine of `peer_worker.py`, over a pipe: a line with the number of tokens in, a line with the ids out."""

    def __init__(self, engine: str, python: str, folder: Path, input_ids: Tensor, *how: str) -> None:
        """Start it and wait until it is ready.

        Args:
            engine: its name there.
            python: interpreter to run it by.
            folder: of the weights.
            input_ids: what it decodes from, (B, S).
            how: what else the engine asks for.

        Raises:
            InputError: it ends instead; says how.
        """
        inputs = folder / "input_ids.json"
        inputs.write_text(json.dumps(input_ids.tolist()), encoding="utf-8")
        command_line = [python, str(WORKER), engine, str(folder), str(inputs), str(torch.get_num_threads()), *how]
        self.name = f"{engine}, run by {python},"
        # Not a pipe, which nobody would read while the engine runs.
        self.complaints = tempfile.TemporaryFile("w+")  # noqa: SIM115  # open as long as the engine runs
        self.process = subprocess.Popen(
            command_line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.complaints, text=True
        )
        while self._line() != "ready":
            pass

    def _line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if line:
            return line.strip()
        self.process.wait()
        self.complaints.seek(0)
        last = self.complaints.read().strip().splitlines()[-1:]
        raise InputError(f"{self.name} ended: {''.join(last) or f'exit code {self.process.returncode}'}")

    def __call__(self, tokens: int) -> list[list[int]]:
        """The ids of that many tokens.

        Raises:
            InputError: it has ended; says how.
        """
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # what it ended of is said below
            print(tokens, file=self.process.stdin, flush=True)
        return json.loads(self._line())  # type: ignore[no-any-return]

    def close(self) -> None:
        """End the other process, which ends of itself when nothing more can be asked."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()
        self.complaints.close()


def ctranslate2_t5(folder: Path, input_ids: Tensor, compute_type: str) -> Worker:
    """CTranslate2 on the converted folder; its compute types beside ours are int8 and their mixtures."""
    import ctranslate2

    with tempfile.TemporaryDirectory() as target:
        ctranslate2.converters.TransformersConverter(str(folder)).convert(target, force=True)
        return Worker("CTranslate2", sys.executable, Path(target), input_ids, compute_type)


def step_seconds(series: Series, name: str, tokens: int) -> list[float]:
    """Seconds of one further decode step in each round: a long output less a single token, over the further tokens."""
    long, short = series.per_round(name, "long"), series.per_round(name, "short")
    return [(a - b) / (tokens - 1) for a, b in zip(long, short, strict=True)]


def agreement(mine: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> float:
    """Share of equal ids before the first that differs in each sequence; 1 if all are equal."""
    equal = [
        next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), len(left))
        for left, right in zip(mine, theirs, strict=True)
    ]
    return sum(equal) / sum(map(len, mine))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m gqa_exp.timing.peers", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="t5_base", metavar="NAME", help="a file of conf/model")
    parser.add_argument(
        "--num-kv-heads", nargs="+", default=[], metavar="G", help="ours with fewer KV heads, beside MHA"
    )
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--source-length", type=int, default=512)
    parser.add_argument("--output-length", type=int, default=64)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtypes", nargs="+", metavar="|".join(DTYPES), help="default: float32, and bfloat16 if there")
    parser.add_argument("--ctranslate2", nargs="*", metavar="TYPE", help="compute types (default: all of this CPU)")
    parser.add_argument("--no-ctranslate2", action="store_true", help="leave CTranslate2 out")
    parser.add_argument("--t5gqa-python", metavar="PYTHON", help="interpreter of an environment with T5GQA")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int)
    return parser


def engines(arguments: argparse.Namespace, folder: Path, input_ids: Tensor, model: T5Config) -> dict[str, Decode]:
    """All that take part, by name; each holds its own copy of the weights."""
    found: dict[str, Decode] = {}
    for dtype in arguments.dtypes:
        for text in [str(model.num_heads), *arguments.num_kv_heads]:
            heads = parse_kv_heads(text)
            torch.manual_seed(arguments.seed)
            mine = T5(T5Config(**{**vars(model), "num_kv_heads": heads}))
            name = f"ours {dtype}" if heads == model.num_heads else f"ours {dtype}, G={text}"
            if heads == model.num_heads and not (folder / "config.json").exists():
                save_hf(mine, folder)
                write_tokenizer(folder, model.vocab_size)
            found[name] = ours(mine, input_ids, dtype)
        found[f"transformers {dtype}"] = transformers_t5(folder, input_ids, dtype)
        if arguments.t5gqa_python:
            for text in [str(model.num_heads), *arguments.num_kv_heads]:
                name = f"T5GQA {dtype}, G={text}"
                found[name] = Worker("T5GQA", arguments.t5gqa_python, folder, input_ids, text, dtype)
    if not arguments.no_ctranslate2 and arguments.device == "cpu":
        import ctranslate2

        types = arguments.ctranslate2 or sorted(ctranslate2.get_supported_compute_types("cpu"))
        found |= {f"CTranslate2 {kind}": ctranslate2_t5(folder, input_ids, kind) for kind in types}
    return found


@command
def main() -> None:
    """The command: a table, and last one line of JSON."""
    arguments = _parser().parse_args()
    check_ranges(
        TimingConfig(
            batch_size=arguments.batch_size,
            source_length=arguments.source_length,
            output_length=arguments.output_length,
        )
    )
    if arguments.output_length < 2:
        raise InputError("--output-length must be 2 or more: decoding is the time of further tokens")
    if arguments.device == "cuda" and (arguments.t5gqa_python or arguments.ctranslate2 is not None):
        raise InputError("CTranslate2 and T5GQA take part on a CPU alone; leave them out, or use --device cpu")
    check_device(arguments.device, "--device cuda")
    supported = [dtype for dtype in DTYPES if supports_dtype(dtype, arguments.device)]
    arguments.dtypes = arguments.dtypes or [dtype for dtype in ("float32", "bfloat16") if dtype in supported]
    for dtype in arguments.dtypes:
        if dtype not in supported:
            raise InputError(f"--dtypes {dtype} does not run on this {arguments.device}; use {' or '.join(supported)}")
    prepare(arguments.threads)
    geometry = T5Config.from_model_config(read_model_config(arguments.model))
    generator = torch.Generator().manual_seed(arguments.seed)
    shape = (arguments.batch_size, arguments.source_length)
    input_ids = torch.randint(len(SPECIAL), geometry.vocab_size, shape, generator=generator).to(arguments.device)
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory() as folder, timing_alone(), console.status("loading") as status:
        contestants = engines(arguments, Path(folder), input_ids, geometry)
        reference = f"ours {arguments.dtypes[0]}"
        ids = {name: decode(arguments.output_length) for name, decode in contestants.items()}
        equal = {name: agreement(ids[reference], theirs) for name, theirs in ids.items()}
        host = local_device(arguments.device, arguments.dtypes[0])
        series = interleave(
            {name: _timed(decode, arguments.output_length) for name, decode in contestants.items()},
            warmup_rounds=1,
            min_rounds=arguments.rounds,
            min_seconds=0.0,
            max_seconds=3600.0,
            rng=np.random.default_rng(arguments.seed),
            progress=status.update,
        )
        for decode in contestants.values():
            if isinstance(decode, Worker):
                decode.close()
    steps = {name: step_seconds(series, name, arguments.output_length) for name in contestants}
    mine = [name for name in contestants if name.startswith("ours ") and "G=" not in name]
    table = Table(
        title=f"{arguments.model}, batch {arguments.batch_size}, source {arguments.source_length}, "
        f"{arguments.output_length} tokens, {hardware_id(arguments.device)}",
        caption=f"Decoding alone. Medians over {arguments.rounds} interleaved rounds; ratios within a round, "
        f"with 95 % bootstrap interval. Plain read {host.bandwidth / 1e9:.1f} GB/s. Equal: share of ids before the "
        f"first that differs from {reference}.",
    )
    for heading in ("engine", "tokens/s", "ms per step", *(f"{name} / it" for name in mine), "equal ids"):
        table.add_column(heading, justify="left" if heading == "engine" else "right")
    summary: dict[str, Any] = {}
    for name, seconds in steps.items():
        ratios = [median_interval(own / s for own, s in zip(seconds, steps[other], strict=True)) for other in mine]
        speed = arguments.batch_size / float(np.median(seconds))
        shown = ["-" if r is None else f"{r.median:.2f} [{r.low:.2f}, {r.high:.2f}]" for r in ratios]
        table.add_row(name, f"{speed:.0f}", f"{1e3 * float(np.median(seconds)):.2f}", *shown, f"{equal[name]:.0%}")
        summary[name] = {
            "tokens_per_second": speed,
            "step_seconds": seconds,
            "equal_ids": equal[name],
            **{f"{other} / it": None if r is None else vars(r) for other, r in zip(mine, ratios, strict=True)},
        }
    out = Console()
    (out if out.is_terminal else Console(width=160)).print(table)
    settings = {**vars(arguments), "t5gqa_python": bool(arguments.t5gqa_python)}  # whether, not where
    print(json.dumps({"settings": settings, "engines": summary, "environment": environment()}))


def _timed(decode: Decode, tokens: int) -> Callable[[], Sample]:
    """One timed run of an engine: a long output and a single token.

    A single token comes before, not counted: memory that the engine has to ask the system for anew would be booked to
    whichever ran first, and there is more of it than a few steps take.
    """

    def run() -> Sample:
        sleep(REST)
        decode(1)
        readings = [perf_counter()]
        for count in (tokens, 1):
            decode(count)
            readings.append(perf_counter())
        long, short = np.diff(readings).tolist()
        return {"long": [long], "short": [short]}

    return run


if __name__ == "__main__":
    main()
