"""Training speed against transformers' T5: same weights, batches, loss, precision, optimizer, interleaved in one run.

    pip install -e '.[bench]'
    python -m gqa_exp.training.benchmark --models mini t5_small [--device cuda]

A run is a few steps: forward, loss, backward and Adafactor. Each side takes part eagerly and compiled, and is compared
by its faster form. Only the model differs, so the ratio says what the model is worth. A profiled step tells how much of
ours is products with weights. They and the products of attention have to be computed by any side: at the best rate that
large products reached here, and were all else free, the ratio would be `bound`.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from gqa_exp.errors import InputError, Parser, command
from gqa_exp.host import can_compile, check_device, prepare, resolve_dtype
from gqa_exp.model import T5, T5Config
from gqa_exp.model.checkpoint import save_hf
from gqa_exp.model.t5 import allow_many_versions
from gqa_exp.timing.cli import read_model_config
from gqa_exp.timing.compose import Sample
from gqa_exp.timing.environment import environment, hardware_id
from gqa_exp.timing.hostlock import timing_alone
from gqa_exp.timing.probe import matmul_flops, synchronised_clock
from gqa_exp.timing.timer import interleave, median_interval
from gqa_exp.training.adafactor import Adafactor
from gqa_exp.training.loss import token_loss

PRODUCTS = (
    *("aten::mm", "aten::addmm"),
    *("gqa_exp::sequence_linear", "gqa_exp::sequence_linear_backward"),
    "GeneratedBackwardFor_gqa_exp_sequence_linear_default",  # what autograd calls the forward one, in spite of the name
)
"""Products with weights, as torch's profiler names them: torch's, and ours of `model/sequence.py`."""
SHAPES = {
    "pre-training": (56, 128, 29, 0.0),
    "windows of 512": (14, 512, 114, 0.0),
    "fine-tuning": (14, 256, 32, 0.0),
    "fine-tuning with dropout": (14, 256, 32, 0.1),
    "cnn_dailymail": (6, 512, 256, 0.1),
}
"""Windows or examples of a step, input tokens, target tokens, dropout: the mini base's own pre-training and T5's, as of
conf/corpus/c4.yaml, as many tokens; fine-tuning on debian_synopsis, mini's, without and with the paper's dropout, and
on cnn_dailymail, T5's, as many tokens."""
Logits = Callable[[Tensor, Tensor], Tensor]


class Trainee:
    """A model in training on one fixed batch.

    Args:
        model: trained in place.
        logits: (input ids, decoder input ids) to logits (B, T, V).
        batch: input ids (B, S) and labels (B, T).
        dtype: of matrix products; weights are float32.
        compiled: whether the loss is; the model's layers are the caller's to compile.
    """

    def __init__(
        self, model: nn.Module, logits: Logits, batch: tuple[Tensor, Tensor], dtype: str, compiled: bool
    ) -> None:
        self.model, self.logits = model.train(), logits
        self.input_ids, self.labels = batch
        self.decoder_input_ids = torch.cat([torch.zeros_like(self.labels[:, :1]), self.labels[:, :-1]], dim=1)
        self.dtype = dtype
        self.device = batch[0].device.type
        self.token_loss = torch.compile(token_loss) if compiled else token_loss
        self.optimizer = Adafactor(model.parameters(), lr=1e-3)

    def loss(self) -> Tensor:
        """Of the batch, before a step."""
        with torch.autocast(self.device, torch.bfloat16, enabled=self.dtype == "bfloat16"):
            return self.token_loss(self.logits(self.input_ids, self.decoder_input_ids), self.labels, 1e-4, 0)[0]

    def step(self) -> None:
        """One optimizer step."""
        self.optimizer.zero_grad(set_to_none=True)
        self.loss().backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()

    def product_flops(self) -> int:
        """FLOPs of a step's products with weights: 2 per weight and row forward, and twice as many for gradients."""
        found = []

        def count(layer: nn.Module, inputs: tuple[Tensor], _: Tensor) -> None:
            assert isinstance(layer, nn.Linear)
            found.append(6 * layer.weight.numel() * (inputs[0].numel() // inputs[0].shape[-1]))

        hooks = [layer.register_forward_hook(count) for layer in self.model.modules() if isinstance(layer, nn.Linear)]
        self.loss()
        for hook in hooks:
            hook.remove()
        return sum(found)

    def product_seconds(self, steps: int = 3) -> float:
        """Seconds that products with weights take of a step, the median of a few."""
        found = []
        activities, by = [ProfilerActivity.CPU], "self_cpu_time_total"
        if self.device == "cuda":
            activities, by = [*activities, ProfilerActivity.CUDA], "self_device_time_total"
        for _ in range(steps):
            with profile(activities=activities) as profiled:
                self.step()
            products = [event for event in profiled.key_averages() if event.key in PRODUCTS]
            found.append(sum(getattr(event, by) for event in products) * 1e-6)
        return float(np.median(found))


def attention_flops(geometry: T5Config, B: int, S: int, T: int) -> int:
    """FLOPs of a step's attention: two products forward, and for each two more for gradients; nothing twice.

    Of the decoder's self-attention only the pairs that are not masked.
    """
    pairs = geometry.num_encoder_layers * S * S + geometry.num_decoder_layers * (T * (T + 1) // 2 + T * S)
    return 12 * B * geometry.num_heads * geometry.head_dim * pairs


def trainees(
    geometry: T5Config, batch: tuple[Tensor, Tensor], dropout: float, dtype: str, seed: int
) -> dict[str, Trainee]:
    """Both sides from the same weights, eager and, where there is a compiler, compiled."""
    import transformers

    found = {}
    device = batch[0].device
    for form in ("eager", "compiled") if can_compile("gpu" if device.type == "cuda" else "cpu") else ("eager",):
        torch.manual_seed(seed)
        mine = T5(geometry).to(device)
        mine.set_dropout(dropout)
        with tempfile.TemporaryDirectory() as folder:
            save_hf(mine, folder)
            theirs: Any = transformers.T5ForConditionalGeneration.from_pretrained(
                folder, dtype=torch.float32, dropout_rate=dropout
            )
        theirs.to(device)
        theirs.config.use_cache = False
        compiled = form == "compiled"
        if compiled:
            mine.compile_layers()
            allow_many_versions()
            for block in (*theirs.encoder.block, *theirs.decoder.block):
                block.compile()
        found[f"ours {form}"] = Trainee(mine, mine, batch, dtype, compiled)
        found[f"transformers {form}"] = Trainee(theirs, _logits_of(theirs), batch, dtype, compiled)
    losses = {}
    for name, trainee in found.items():
        trainee.model.train(not dropout)  # each drops other elements, so such losses are compared without
        losses[name] = trainee.loss().item()
        trainee.model.train()
    if max(losses.values()) - min(losses.values()) > 0.02 * max(losses.values()):
        raise RuntimeError(f"the same weights give different losses: {losses}")
    return found


def _logits_of(model: Any) -> Logits:
    def logits(input_ids: Tensor, decoder_input_ids: Tensor) -> Tensor:
        return model(input_ids=input_ids, decoder_input_ids=decoder_input_ids, use_cache=False).logits  # type: ignore[no-any-return]

    return logits


def _timed(trainee: Trainee, steps: int) -> Callable[[], Sample]:
    clock = synchronised_clock(trainee.device)

    def run() -> Sample:
        start = clock()
        for _ in range(steps):
            trainee.step()
        return {"steps": [clock() - start]}

    return run


def measure(model: str, shape: str, arguments: argparse.Namespace, dtype: str) -> dict[str, Any]:
    """Tokens per second of each side and form, and the ratio of their faster forms."""
    geometry = T5Config.from_model_config(read_model_config(model))
    B, S, T, dropout = SHAPES[shape]
    generator = torch.Generator().manual_seed(arguments.seed)
    batch = tuple(torch.randint(3, geometry.vocab_size, (B, length), generator=generator) for length in (S, T))
    ids, labels = (each.to(arguments.device) for each in batch)
    contestants = trainees(geometry, (ids, labels), dropout, dtype, arguments.seed)
    series = interleave(
        {name: _timed(trainee, arguments.steps) for name, trainee in contestants.items()},
        warmup_rounds=2,
        min_rounds=arguments.rounds,
        min_seconds=0.0,
        max_seconds=3600.0,
        rng=np.random.default_rng(arguments.seed),
    )
    seconds = {name: np.array(series.per_round(name, "steps")) / arguments.steps for name in contestants}
    speeds = {name: B * (S + T) / float(np.median(each)) for name, each in seconds.items()}
    sides = ("ours", "transformers")
    best = {side: max((form for form in speeds if form.startswith(side)), key=speeds.__getitem__) for side in sides}
    ratio = median_interval(seconds[best["transformers"]] / seconds[best["ours"]])
    assert ratio is not None
    return {
        "model": model,
        "shape": shape,
        "dropout": dropout,
        "dtype": dtype,
        "tokens_per_second": speeds,
        "best": best,
        "ratio": vars(ratio),
        "product_seconds": contestants[best["ours"]].product_seconds(),
        "product_flops": contestants["ours eager"].product_flops(),
        "attention_flops": attention_flops(geometry, B, S, T),
        "step_seconds": {name: each.tolist() for name, each in seconds.items()},
    }


@command
def main() -> None:
    """The command: a table, and last one line of JSON."""
    parser = Parser(prog="python -m gqa_exp.training.benchmark", description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", default=["mini", "t5_small"], metavar="NAME", help="files of conf/model")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--dtype", default="auto", metavar="float32|bfloat16|auto")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps of a timed run")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    check_device(arguments.device, "--device cuda")
    dtype = resolve_dtype(arguments.dtype, arguments.device)
    if dtype not in ("float32", "bfloat16") or arguments.steps < 1 or arguments.rounds < 2:
        raise InputError("--dtype must be float32, bfloat16 or auto, --steps 1 or more, --rounds 2 or more")
    prepare(arguments.threads)
    results = []
    with timing_alone():
        for model in arguments.models:
            results += [measure(model, shape, arguments, dtype) for shape in arguments.shapes]
        large = matmul_flops(arguments.device, dtype)
    peak = max(large, *(result["product_flops"] / result["product_seconds"] for result in results))
    for result in results:
        theirs = float(np.median(result["step_seconds"][result["best"]["transformers"]]))
        result["bound"] = theirs * peak / (result["product_flops"] + result["attention_flops"])
    table = Table(
        title=f"Training, {dtype}, {hardware_id(arguments.device)}",
        caption=f"Tokens per second, medians over {arguments.rounds} interleaved rounds of {arguments.steps} steps. "
        "Ratio of the faster forms within a round, with 95 % bootstrap interval. Products: share of our step in "
        f"products with weights, and their GFLOP/s, where torch's of large matrices ran at {large * 1e-9:,.0f}; bound: "
        f"the ratio if these products and attention's ran at {peak * 1e-9:,.0f}, and all else took no time.",
    )
    forms = list(results[0]["tokens_per_second"])
    for heading in ("model", "steps of", *forms, "ours / transformers", "products", "GFLOP/s", "bound"):
        table.add_column(heading, justify="left" if heading in ("model", "steps of") else "right")
    for result in results:
        speeds, ratio = result["tokens_per_second"], result["ratio"]
        shown = f"{ratio['median']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]"
        ours = float(np.median(result["step_seconds"][result["best"]["ours"]]))
        rate = result["product_flops"] / result["product_seconds"] * 1e-9
        products = f"{result['product_seconds'] / ours:.0%}", f"{rate:,.0f}", f"{result['bound']:.2f}"
        table.add_row(result["model"], result["shape"], *(f"{speeds[form]:,.0f}" for form in forms), shown, *products)
    out = Console()
    (out if out.is_terminal else Console(width=140)).print(table)
    print(
        json.dumps(
            {"settings": vars(arguments), "results": results, "matmul_flops": large, "environment": environment()}
        )
    )


if __name__ == "__main__":
    main()
