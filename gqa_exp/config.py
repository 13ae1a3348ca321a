"""The typed configuration behind `conf/`: every field documented and range-checked, before anything runs.

Hydra composes the YAML files of `conf/` onto these dataclasses, so an unknown field or a wrong type is refused while
composing; `check` then refuses values out of range and combinations that make no sense.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from gqa_exp.errors import InputError, suggest

METHODS = ("mean", "first", "random")
"""How the K/V heads of a group become one (paper section 2.1 and Figure 4)."""
DTYPES = ("float32", "bfloat16", "float16")
Split = Literal["train", "dev", "test"]
METRICS_OF_KIND = {
    "summarization": ("rouge1", "rouge2", "rougeLsum"),
    "translation": ("bleu",),
    "question answering": ("f1", "exact_match"),
}
TASK_KINDS = tuple(METRICS_OF_KIND)
METRICS = tuple(metric for metrics in METRICS_OF_KIND.values() for metric in metrics)
OPTIMIZER_SLOTS = ("pool", "reset")
INITIALIZATIONS = ("reading", "t5")
FEED_FORWARDS = ("gated-gelu", "gated-silu", "relu")
"""By transformers' names: of T5.1.1, Flan-T5 and mT5; of UL2; of T5 1.0."""
CROSS_KV = ("cached", "recomputed")
"""Whether cross-attention's keys and values are computed once, or again at each decode step as public JAX code does."""


def bounded(default: Any, low: float = -math.inf, high: float = math.inf) -> Any:
    """A dataclass field whose value must lie in [low, high]."""
    return field(default=default, metadata={"low": low, "high": high})


def one_of(default: str, choices: tuple[str, ...]) -> Any:
    """A dataclass field whose value must be one of `choices`."""
    return field(default=default, metadata={"choices": choices})


@dataclass
class ModelConfig:
    """Geometry of the multi-head base, and where its checkpoint lies."""

    name: str = "mini"
    d_model: int = bounded(256, 1)
    d_ff: int = bounded(768, 1)
    num_heads: int = bounded(8, 1)
    head_dim: int = bounded(32, 1)
    num_encoder_layers: int = bounded(4, 1)
    num_decoder_layers: int = bounded(4, 1)
    vocab_size: int = bounded(8192, 128)
    feed_forward: str = one_of("gated-gelu", FEED_FORWARDS)
    tied_embeddings: bool = False
    """Whether the output projection is the embedding, as in T5 1.0."""
    base: str | None = None
    """The MHA base checkpoint: a folder of ours or of transformers, with its tokenizer, or a hub id; null: the one
    shipped under gqa_exp/checkpoints/NAME."""
    steps: int | None = None
    """Steps that a base of transformers was pre-trained for; ours say so themselves."""


@dataclass
class CorpusConfig:
    """Pre-training text and its span corruption (T5: 512 input / 114 target tokens, 15 % noise, mean span 3)."""

    name: str = "embedded"
    input_length: int = bounded(512, 8)
    target_length: int = bounded(114, 4)
    noise_density: float = bounded(0.15, 0.01, 0.9)
    mean_span: float = bounded(3.0, 1.0, 100.0)
    files: list[str] = field(default_factory=list)
    """UTF-8 text files to use instead of the embedded text, one document per file."""
    data_dir: str | None = None
    """corpus=c4 only: folder of local files; null: from the hub."""


@dataclass
class PretrainConfig:
    """Recipe of a base: Adafactor, flat then reciprocal square root, z-loss.

    Uptraining continues the base's own recipe, which its training record holds; these fields are for `gqa-pretrain`,
    and for bases that record none.
    """

    steps: int = bounded(30000, 1)
    """Length of the base's run; uptraining for proportion p takes round(p * steps) more steps."""
    batch_size: int = bounded(56, 1)
    """Windows per optimizer step."""
    peak_lr: float = bounded(0.03, 1e-8, 1.0)
    flat_fraction: float = bounded(0.003, 0.0, 1.0)
    """The rate stays at its peak for this share of the base's steps, then falls as 1/sqrt(step). T5: 0.01."""
    z_loss: float = bounded(1e-4, 0.0, 1.0)
    init: str = one_of("reading", INITIALIZATIONS)
    """Where training starts: "t5" draws all weights as T5 does; "reading" also sets cross-attention keys to the queries
    and lets encoder heads favour neighbours, without which a small base hardly learns to read its input."""


@dataclass
class ConvertConfig:
    """Details of conversion beside the number of heads and the method."""

    optimizer_slots: str = one_of("pool", OPTIMIZER_SLOTS)
    """What happens to Adafactor's second moments of the pooled K/V projections."""


@dataclass
class TaskConfig:
    """A text-to-text task: what its examples look like and how it is scored."""

    name: str = "debian_synopsis"
    kind: str = one_of("summarization", TASK_KINDS)
    metric: str = one_of("rouge1", METRICS)
    """The primary metric: reported as `score`, used to select on dev."""
    prompt: str = ""
    """Put before every input."""
    max_input_tokens: int = bounded(512, 1)
    max_target_tokens: int = bounded(64, 1)
    """Also the generation limit."""
    passages: int = bounded(1, 1, 64)
    """debian_cloze only: packages in the context, the right one among them."""
    data_dir: str | None = None
    """Public data sets only: folder of the files of its hub repository; null: from the hub."""
    train_files: list[str] = field(default_factory=list)
    """task=custom only: Parquet, JSON lines or CSV files, with the two columns below."""
    dev_files: list[str] = field(default_factory=list)
    test_files: list[str] = field(default_factory=list)
    """task=custom only; not needed with evaluation.split=dev."""
    source_column: str = "source"
    """task=custom only: column of the input."""
    target_column: str = "target"
    """task=custom only: column of the output; where it holds lists, all of an example's count as right."""


PUBLIC_TASKS = ("cnn_dailymail", "arxiv", "pubmed", "mediasum", "multi_news", "wmt14_en_de", "triviaqa")
"""The paper's data sets (section 3.1)."""
CORPUS_PATHS = ("name", "files", "data_dir")
"""Fields that say where text lies; what counts is its content."""
C4 = "c4"
"""The corpus that is streamed."""
CUSTOM = "custom"
"""The task, and the corpus, of the user's own files."""
TASK_PATHS = ("data_dir", "train_files", "dev_files", "test_files")
"""Fields that say where text lies; what counts is its content."""


@dataclass
class FinetuneConfig:
    """Fine-tuning: constant learning rate, best checkpoint on dev (paper section 3.1)."""

    steps: int = bounded(150, 0)
    batch_tokens: int = bounded(4096, 1)
    """Input plus target tokens of an optimizer step, padding included; examples of similar length share a batch."""
    batch_examples: int | None = None
    """Examples of an optimizer step at most, as the paper's batch of 128; null: as many as there is room for."""
    lr: float = bounded(1e-3, 1e-8, 1.0)
    dropout: float = bounded(0.1, 0.0, 0.9)
    z_loss: float = bounded(1e-4, 0.0, 1.0)
    evaluate_every: int = bounded(75, 1)
    """Steps between dev evaluations."""
    patience: int = bounded(5, 1)
    """Stop after this many dev evaluations without a better score."""
    dev_examples: int = bounded(128, 1)


@dataclass
class EvaluationConfig:
    """Greedy evaluation of a fine-tuned checkpoint."""

    split: str = one_of("test", ("dev", "test"))
    max_examples: int = bounded(500, 1)
    """The first so many examples of the split in its fixed shuffled order."""
    batch_tokens: int = bounded(16384, 1)
    """Input tokens of a generation batch, padding included."""
    dtype: str = one_of("auto", (*DTYPES, "auto"))
    """Number format of weights, caches and arithmetic while generating; auto: bfloat16 where the device computes it."""


@dataclass
class TrainerConfig:
    """Where and how training runs."""

    accelerator: str = one_of("cpu", ("cpu", "gpu", "auto"))
    devices: int = bounded(1, 1)
    num_nodes: int = bounded(1, 1)
    strategy: str = one_of("auto", ("auto", "ddp", "fsdp"))
    """How several devices share the work: each with the whole model, or weights divided (torch's fully_shard)."""
    precision: str = one_of("auto", ("32-true", "bf16-mixed", "auto"))
    """bf16-mixed: float32 weights, bfloat16 matrix products; auto: that where the device computes bfloat16."""
    compile: bool = True
    """torch.compile the layers; eager where there is no C++ compiler."""
    micro_batch_tokens: int | None = None
    """Input and target tokens, padding included, that a device computes at a time: of larger batches the gradients of
    parts add up. Null: a whole batch."""
    gradient_checkpointing: bool = False
    """Keep one activation per layer, and compute the others again in the backward pass: a third more time for far less
    memory."""
    spike: float = bounded(3.0, 0.0)
    """Nats: training has diverged when the mean loss of 20 steps is so far above the lowest such mean."""
    threads: int | None = None
    """CPU threads; null: all physical cores."""
    deterministic: bool = False
    """torch.use_deterministic_algorithms, for bitwise promises."""
    checkpoint_minutes: float = bounded(5.0, 0.0)
    """Minutes between checkpoints from which an interrupted stage resumes."""
    report_seconds: float = bounded(10.0, 0.0)
    """Seconds between progress lines."""


@dataclass
class TimingConfig:
    """The timing protocol (DESIGN.md, "Timing that can be trusted")."""

    enabled: bool = True
    batch_size: int = bounded(64, 1)
    source_length: int = bounded(1024, 1)
    output_length: int = bounded(64, 1)
    dtype: str = one_of("auto", (*DTYPES, "auto"))
    """Number format of weights, caches and arithmetic; auto: bfloat16 where the device computes it, else float32."""
    device: str = one_of("cpu", ("cpu", "cuda"))
    min_rounds: int = bounded(5, 2)
    min_seconds: float = bounded(20.0, 0.0)
    """Counted rounds go on until both minima are reached."""
    max_seconds: float = bounded(600.0, 1.0)
    warmup_rounds: int = bounded(1, 1)
    compile: str = one_of("auto", ("auto", "on", "off"))
    """torch.compile decode steps; auto: on a GPU all, on a CPU those that read less than 500 MB and for which there are
    no kernels of our own. Others gain nothing there, and compiling would hold their weights twice. Eager where there is
    no compiler."""
    cross_kv: str = one_of("cached", CROSS_KV)
    depths: list[int] = field(default_factory=list)
    """Layers of encoder and decoder to time, two numbers or more; extended linearly to the geometry's. Empty: whole."""
    fills: list[int] = field(default_factory=list)
    """Cache fills at which decode steps are timed, from 1 to output_length; linear between them. Empty: every step."""
    encoder_batch_size: int = bounded(0, 0)
    """Samples to time the encoder with, scaled to batch_size; 0: all of them. With fewer than some 1,000 tokens in all,
    each takes longer: in T5-Base's encoder 10 %, with one sample of 512."""
    seed: int = bounded(0, 0)


@dataclass
class TrackingConfig:
    """Weights & Biases; offline writes run folders that `wandb sync` uploads later."""

    mode: str = one_of("offline", ("disabled", "offline", "online"))
    project: str = "gqa_exp"
    entity: str | None = None


@dataclass
class Config:
    """One point, and how to compute it."""

    model: ModelConfig = field(default_factory=ModelConfig)
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    convert: ConvertConfig = field(default_factory=ConvertConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    timing: TimingConfig = field(default_factory=TimingConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    num_kv_heads: Any = None
    """null: as many as query heads (MHA); an int; or a list with one int per decoder layer."""
    method: str = one_of("mean", METHODS)
    proportion: float = bounded(0.05, 0.0, 1.0)
    """Uptraining steps as a share of the base's steps (the paper's alpha)."""
    seed: int = bounded(0, 0, 2**31 - 1)
    sweep: str = "single"
    output: str = "runs"
    """Folder of the store, the results and the tracking files."""


def kv_heads_per_layer(num_kv_heads: Any, num_heads: int, num_layers: int) -> tuple[int, ...]:
    """The canonical form of `num_kv_heads`: one int per decoder layer.

    Args:
        num_kv_heads: None (as many as query heads), an int, or a sequence of one int per decoder layer.
        num_heads: query heads H.
        num_layers: decoder layers.

    Raises:
        InputError: not an int or list of ints, a wrong number of them, or one that is 0, above H or no divisor of H.
    """
    if num_kv_heads is None:
        return (num_heads,) * num_layers
    if isinstance(num_kv_heads, int) and not isinstance(num_kv_heads, bool):
        heads: tuple[Any, ...] = (num_kv_heads,) * num_layers
    elif isinstance(num_kv_heads, list | tuple):
        heads = tuple(num_kv_heads)
        if len(heads) != num_layers:
            raise InputError(
                f"num_kv_heads={list(heads)} has {len(heads)} entries, but the decoder has {num_layers} layers; "
                "give one int, or one per decoder layer"
            )
    else:
        raise InputError(f"num_kv_heads={num_kv_heads!r} must be an int or a list of one int per decoder layer")
    divisors = [g for g in range(1, num_heads + 1) if num_heads % g == 0]
    for value in heads:
        if not isinstance(value, int) or isinstance(value, bool) or value not in divisors:
            raise InputError(f"num_kv_heads={value!r} does not divide num_heads={num_heads}; use one of {divisors}")
    return heads


def parse_kv_heads(text: str) -> int | list[int]:
    """A number of KV heads as a user writes it: "2" is 2, "8,4,2,1" a list.

    Raises:
        InputError: not whole numbers.
    """
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(
            f'num_kv_heads="{text}" must be an int, or one int per decoder layer such as 8,4,2,1'
        ) from None
    return values[0] if len(values) == 1 else values


def variant_label(kv_heads: tuple[int, ...], num_heads: int) -> str:
    """What tables and figures call an architecture: MHA, GQA-G, MQA, or GQA-[...] where layers differ."""
    distinct = set(kv_heads)
    if distinct == {num_heads}:
        return "MHA"
    if distinct == {1}:
        return "MQA"
    return f"GQA-{kv_heads[0]}" if len(distinct) == 1 else f"GQA-{list(kv_heads)}".replace(" ", "")


def check_ranges(config: object, where: str = "") -> None:
    """Check every bounded or enumerated field of a (nested) config dataclass.

    Raises:
        InputError: names the field, its value and what is allowed.
    """
    for spec in dataclasses.fields(config):  # type: ignore[arg-type]
        value, name = getattr(config, spec.name), f"{where}{spec.name}"
        if dataclasses.is_dataclass(value):
            check_ranges(value, f"{name}.")
        elif "choices" in spec.metadata and value not in spec.metadata["choices"]:
            raise InputError(f'{name}="{value}" is unknown; {suggest(str(value), spec.metadata["choices"])}')
        elif "low" in spec.metadata:
            low, high = spec.metadata["low"], spec.metadata["high"]
            if value is None or not low <= value <= high:  # NaN fails too
                span = f"between {low:g} and {high:g}" if math.isfinite(high) else f"{low:g} or more"
                raise InputError(f"{name}={value} is out of range; it must be {span}")


def check_timing(timing: TimingConfig, layers: int) -> None:
    """Check the timing protocol's settings against each other and the geometry.

    Args:
        timing: checked for ranges.
        layers: of the shallower of encoder and decoder.

    Raises:
        InputError: names the field, its value and what is allowed.
    """
    check_ranges(timing, "timing.")
    depths, fills = timing.depths, timing.fills
    if depths and (len(depths) < 2 or depths != sorted(set(depths)) or not 1 <= depths[0] <= depths[-1] <= layers):
        raise InputError(
            f"timing.depths={depths} must be at least two ascending numbers between 1 and the {layers} layers there are"
        )
    if fills and (fills != sorted(set(fills)) or fills[0] != 1 or fills[-1] != timing.output_length):
        raise InputError(f"timing.fills={fills} must ascend from 1 to output_length={timing.output_length}")
    if timing.encoder_batch_size > timing.batch_size:
        raise InputError(
            f"timing.encoder_batch_size={timing.encoder_batch_size} is above batch_size={timing.batch_size}; use less"
        )


def check(config: Config) -> None:
    """All checks on a composed configuration, cross-field ones included; run before any work starts.

    Raises:
        InputError: the first thing that is wrong.
    """
    check_ranges(config)
    model = config.model
    kv_heads_per_layer(config.num_kv_heads, model.num_heads, model.num_decoder_layers)
    check_timing(config.timing, min(model.num_encoder_layers, model.num_decoder_layers))
    if config.corpus.input_length + config.corpus.target_length < 16:
        raise InputError("corpus: input_length + target_length must be at least 16 tokens")
    if config.finetune.batch_tokens < config.task.max_input_tokens + config.task.max_target_tokens:
        raise InputError(
            f"finetune.batch_tokens={config.finetune.batch_tokens} cannot hold one example of task {config.task.name} "
            f"({config.task.max_input_tokens} + {config.task.max_target_tokens} tokens); raise it or shorten the task"
        )
    task = config.task
    if task.metric not in METRICS_OF_KIND[task.kind]:
        known = ", ".join(METRICS_OF_KIND[task.kind])
        raise InputError(f'task.metric="{task.metric}" is no score of task.kind="{task.kind}"; use {known}')
    if task.passages != 1 and task.name != "debian_cloze":
        raise InputError(f"task.passages={task.passages} has no meaning for task {task.name}")
    files = {"train": task.train_files, "dev": task.dev_files}
    files |= {"test": task.test_files} if config.evaluation.split == "test" else {}
    for split, paths in files.items():
        if task.name == CUSTOM and not paths:
            raise InputError(f"task.{split}_files is empty; task={CUSTOM} needs files of this split")
    if task.data_dir is not None and task.name not in PUBLIC_TASKS:
        raise InputError(
            f"task.data_dir={task.data_dir} has no meaning for task {task.name}; it is for public data sets"
        )
    trainer, finetune = config.trainer, config.finetune
    for name, value in (
        ("trainer.micro_batch_tokens", trainer.micro_batch_tokens),
        ("finetune.batch_examples", finetune.batch_examples),
    ):
        if value is not None and value < 1:
            raise InputError(f"{name}={value} must be 1 or more, or null")
    if config.corpus.data_dir is not None and config.corpus.name != C4:
        raise InputError(f"corpus.data_dir={config.corpus.data_dir} has no meaning for corpus {config.corpus.name}")
    if config.corpus.files and config.corpus.name == C4:
        raise InputError(f"corpus.files has no meaning for corpus {C4}; use corpus={CUSTOM} with them")
    if config.corpus.name == CUSTOM and not config.corpus.files:
        raise InputError(f"corpus.files is empty; corpus={CUSTOM} needs text files, one document each")
    if task.name != CUSTOM and any(files.values()):
        raise InputError(f"task.train_files and its like have no meaning for task {task.name}; use task={CUSTOM}")
    if Path(config.output).exists() and not Path(config.output).is_dir():
        raise InputError(f"output={config.output} is a file; it must be a folder that can be written")
