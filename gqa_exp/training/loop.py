"""One training loop for pre-training, uptraining and fine-tuning, on Lightning.

What a step does is a function of the state before it, the batch of its number, and random numbers drawn from
(seed, stage, step): so a run that was interrupted, or that continues a shorter one, gives what an uninterrupted run
gives. Lightning moves, scales out and loops; the state is kept in our own checkpoint folders, without pickles.
"""

import dataclasses
import hashlib
import logging
import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, IterableDataset

from gqa_exp.config import TrainerConfig
from gqa_exp.host import can_compile
from gqa_exp.model import T5
from gqa_exp.timing.hostlock import training_allowed
from gqa_exp.training.adafactor import Adafactor, Shards, load_named_slots, named_slots
from gqa_exp.training.loss import summed_nll, token_loss
from gqa_exp.training.memory import training_memory
from gqa_exp.training.state import TrainingState, save_shards

Batch = dict[str, Tensor]
PATIENCE = timedelta(days=1)
"""How long ranks wait for each other: the first one evaluates on dev alone, which may take hours."""
SPIKE_WINDOW = 20
"""Steps whose mean loss is compared with that of others, to tell a divergence from a hard batch."""
STEPS_BETWEEN_AGREEMENTS = 10
"""Several ranks ask the first one so often whether it is time to report, or to keep a state to resume from."""
logger = logging.getLogger(__name__)


class Diverged(Exception):  # noqa: N818  an outcome, not an error
    """The loss became NaN or infinite, or rose far. An outcome to be recorded, not a crash (paper, appendix A)."""

    def __init__(self, stage: str, step: int) -> None:
        super().__init__(f"{stage}: loss is not finite or far above its lowest at step {step}")
        self.step = step


@dataclass(frozen=True)
class Recipe:
    """What a training stage is made of."""

    stage: str
    """"pretrain", "uptrain" or "finetune"; part of the random seed."""
    seed: int
    batch: Callable[[int], Batch]
    """The batch of a step: input_ids (B, S), labels (B, T), and attention_mask (B, S) where inputs are padded."""
    learning_rate: Callable[[int], float]
    stop: int
    """Step count at which the stage ends."""
    z_loss: float = 1e-4
    dropout: float = 0.0
    evaluate_every: int = 0
    """Steps between calls of `evaluate`; 0: never."""
    evaluate: Callable[[TrainingState], bool] | None = None
    """Looks at the state after a step, may write into its record; returns whether to stop early."""
    batch_of_rank: Callable[[int, int, int], Batch] | None = None
    """Of (step, rank, ranks): the rank's rows, where it need not make the whole batch for them."""
    positions: Callable[[int], dict[str, Any]] | None = None
    """Where this rank stands in a streamed corpus after so many steps, to be kept in the state's record."""


def step_seed(seed: int, stage: str, step: int) -> int:
    """Seed of the random numbers of one step."""
    digest = hashlib.sha256(f"{seed}/{stage}/{step}".encode()).digest()
    return int.from_bytes(digest[:7], "big")


class _StepBatches(IterableDataset[Batch]):
    """The batches of a range of steps; a rank of a distributed run takes its share of each batch's rows.

    A rank without a share, where a batch has fewer rows than there are ranks, gets a row whose labels do not count.
    """

    def __init__(self, recipe: Recipe, start: int, pad_id: int) -> None:
        self.recipe, self.start, self.pad_id = recipe, start, pad_id

    def __iter__(self) -> Iterator[Batch]:
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        rank = torch.distributed.get_rank() if distributed else 0
        world = torch.distributed.get_world_size() if distributed else 1
        for step in range(self.start, self.recipe.stop):
            if self.recipe.batch_of_rank is not None:
                yield self.recipe.batch_of_rank(step, rank, world)
                continue
            whole = self.recipe.batch(step)
            share = {name: tensor[rank::world] for name, tensor in whole.items()}
            if not len(share["labels"]):
                share = blank({name: tensor[:1] for name, tensor in whole.items()}, self.pad_id)
            yield share


def blank(batch: Batch, pad_id: int) -> Batch:
    """A batch of the same shapes that counts for nothing."""
    return {
        name: tensor if name == "attention_mask" else torch.full_like(tensor, pad_id) for name, tensor in batch.items()
    }


class TextToText(L.LightningModule):
    """Teacher-forced training of a T5 with Adafactor.

    The loss of a step is the mean over all target tokens of its batch, on however many ranks and in however many parts
    the batch is computed.
    """

    def __init__(
        self, state: TrainingState, recipe: Recipe, micro_batch_tokens: int | None = None, compiled: bool = False
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        # Compiled, the loss reads and writes logits once, in their own number format.
        self.loss = torch.compile(token_loss) if compiled else token_loss
        self.model = state.model
        self.state = state
        self.recipe = recipe
        self.micro_batch_tokens = micro_batch_tokens
        self.start = state.step
        self.sharded = False
        """Whether ranks hold parts of the weights."""
        self.nll = torch.zeros(())
        """Cross-entropy of the last step, on the device."""
        self.nll_sum = torch.zeros(())
        """Of the steps since the last look for a spike."""
        self.tokens = torch.zeros((), dtype=torch.long)
        """Input and target tokens of this rank since the last report, padding not counted; on the device."""

    @property
    def step(self) -> int:
        """Optimizer steps done since the stage's clock began (for uptraining: the base's first step)."""
        return self.start + self.global_step

    def configure_model(self) -> None:
        """Divide the weights of each layer between ranks, where the strategy asks for it (torch's fully_shard)."""
        if isinstance(self.trainer.strategy, ModelParallelStrategy) and not self.sharded:
            mesh = self.trainer.strategy.device_mesh["data_parallel"]
            for layer in (*self.model.encoder.layers, *self.model.decoder.layers):
                fully_shard(layer, mesh=mesh)
            fully_shard(self.model, mesh=mesh)
            self.sharded = True

    def configure_optimizers(self) -> Adafactor:
        """Adafactor with the slots that the state brings."""
        optimizer = Adafactor(self.model.parameters())
        load_named_slots(optimizer, self.model.named_parameters(), self.state.slots)
        return optimizer

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Set the learning rate and the random numbers of this step."""
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = self.recipe.learning_rate(self.step)
        stage = self.recipe.stage if self.global_rank == 0 else f"{self.recipe.stage}/rank {self.global_rank}"
        torch.manual_seed(step_seed(self.recipe.seed, stage, self.step))

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """One optimizer step on one batch, or on this rank's share of it."""
        pad_id = self.model.config.pad_id
        parts = self._parts(batch)
        if self.step == self.start:
            self._say_memory(parts[0])
        counted = (batch["labels"] != pad_id).sum()
        total = self.over_ranks(counted).clamp(min=1)
        nll = torch.zeros((), device=self.device)
        for number, part in enumerate(parts, 1):
            labels = part["labels"]
            share = (labels != pad_id).sum() / total
            with nullcontext() if number == len(parts) else self._without_gradient_exchange():
                logits_BTV = self.model(part["input_ids"], self.model.shift_right(labels), part.get("attention_mask"))
                loss, part_nll = self.loss(logits_BTV, labels, self.recipe.z_loss, pad_id)
                self.manual_backward(loss * (share * self.trainer.world_size))  # ranks' gradients are averaged
            nll += part_nll * share
        optimizer = self.optimizers()
        assert isinstance(optimizer, LightningOptimizer)
        optimizer.step()
        optimizer.zero_grad()
        self.nll = self.over_ranks(nll)
        self.nll_sum = self.nll_sum.to(self.device) + self.nll
        self.tokens = self.tokens.to(self.device) + (batch["input_ids"] != pad_id).sum() + counted

    def _parts(self, batch: Batch) -> list[Batch]:
        """The batch in parts of at most `micro_batch_tokens` padded tokens, or of one row where that has more."""
        if self.micro_batch_tokens is None:
            return [batch]
        rows = max(1, self.micro_batch_tokens // (batch["input_ids"].shape[1] + batch["labels"].shape[1]))
        split = {name: torch.split(tensor, rows) for name, tensor in batch.items()}
        parts = [dict(zip(split, tensors, strict=True)) for tensors in zip(*split.values(), strict=True)]
        if self.sharded:  # every pass gathers the weights of all ranks, so all make the same number of them
            most = torch.tensor(len(parts), device=self.device)
            torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
            parts += [blank(parts[0], self.model.config.pad_id)] * (int(most) - len(parts))
        return parts

    def _say_memory(self, part: Batch) -> None:
        """Say what training will need of each device, before the first pass."""
        (rows, source), target = part["input_ids"].shape, part["labels"].shape[1]
        memory = training_memory(
            self.model,
            rows,
            source,
            target,
            bfloat16=self.trainer.precision == "bf16-mixed",
            checkpointing=self.model.encoder.checkpointing,
            ddp=isinstance(self.trainer.strategy, DDPStrategy),
            shards=self.trainer.world_size if self.sharded else 1,
        )
        if self.trainer.is_global_zero:
            said = "%s: memory per device, estimated for %d samples of %d + %d tokens at a time: %s"
            logger.info(said, self.recipe.stage, rows, source, target, memory)

    def over_ranks(self, value: Tensor) -> Tensor:
        """The sum of a scalar over all ranks."""
        if self.trainer.world_size > 1:
            value = value.clone()
            torch.distributed.all_reduce(value)
        return value

    def _without_gradient_exchange(self) -> AbstractContextManager[None]:
        """Spares DDP the exchange of gradients in all but the last part of a step.

        With weights divided between ranks it would keep whole gradients on each, which is what dividing is to avoid.
        """
        strategy = self.trainer.strategy
        return strategy.block_backward_sync() if isinstance(strategy, DDPStrategy) else nullcontext()

    def capture(self) -> TrainingState:
        """The present state, to be saved or continued.

        With weights divided between ranks all ranks must ask for it, and the first one gets them whole, on the CPU.
        """
        optimizer = self.trainer.optimizers[0]
        assert isinstance(optimizer, Adafactor)
        self.state.slots = named_slots(optimizer, self.model.named_parameters())
        self.state.step = self.step
        self._note_positions()
        if not self.sharded:
            return self.state
        weights = get_model_state_dict(self.model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        model = self.model
        if weights:
            with torch.device("meta"):
                model = T5(self.model.config)
            model.load_state_dict(weights, assign=True)
        return dataclasses.replace(self.state, model=model)

    def _note_positions(self) -> None:
        """Put into the record where all ranks stand in a streamed corpus."""
        if self.recipe.positions is None:
            return
        found = [self.recipe.positions(self.step)]
        if self.trainer.world_size > 1:
            found *= self.trainer.world_size
            torch.distributed.all_gather_object(found, found[0])
        self.state.record["positions"] = {name: where for each in found for name, where in each.items()}

    def keep(self, folder: Path) -> None:
        """Write the present state, to be resumed from; all ranks must call it, and each writes what it holds."""
        if not self.sharded:
            state = self.capture()
            if self.trainer.is_global_zero:
                state.save(folder)
            return
        self._note_positions()
        optimizer, named = self.trainer.optimizers[0], dict(self.model.named_parameters())
        assert isinstance(optimizer, Adafactor)
        save_shards(
            folder,
            self.model.config,
            {name: Shards(parameter).local(parameter) for name, parameter in named.items()},
            named_slots(optimizer, named.items(), gather=False),
            self.step,
            self.state.record,
            self.global_rank,
            self.trainer.world_size,
            self.trainer.strategy.barrier,
        )


class _Watch(L.Callback):
    """Looks after a run: loss curve, rate and time left, divergence, dev evaluation, states to resume from."""

    def __init__(self, label: str, folder: Path | None, config: TrainerConfig) -> None:
        self.label, self.folder, self.config = label, folder, config

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, TextToText)
        self.began = self.reported = self.saved = time.perf_counter()
        self.reported_step = self.looked_step = pl_module.step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, TextToText)
        recipe, step = pl_module.recipe, pl_module.step
        last = step == recipe.stop
        every = recipe.evaluate_every
        evaluate = recipe.evaluate is not None and every > 0 and (last or step % every == 0)
        now = time.perf_counter()
        report = now - self.reported > self.config.report_seconds
        due = self.folder is not None and not last and now - self.saved > 60 * self.config.checkpoint_minutes
        if trainer.world_size > 1:  # clocks differ, and ranks must agree on what they do together
            if step % STEPS_BETWEEN_AGREEMENTS == 0:
                report, due = trainer.strategy.broadcast((report, due))
            else:
                report = due = False
        if step % SPIKE_WINDOW == 0:
            self._look_for_spike(pl_module)
        # A state is reported before it is saved: its record is then complete, and its loss known to be finite.
        if last or evaluate or due or report:
            self._report(trainer, pl_module)
        if evaluate:
            assert recipe.evaluate is not None
            before = time.perf_counter()
            state = pl_module.capture()
            stop = trainer.is_global_zero and recipe.evaluate(state)
            if trainer.strategy.broadcast(stop):
                trainer.should_stop = True
            pl_module.model.train()
            self.reported += time.perf_counter() - before
        if due and self.folder is not None:
            pl_module.keep(self.folder)
            self.saved = time.perf_counter()

    def _report(self, trainer: L.Trainer, module: TextToText) -> None:
        recipe, step, record = module.recipe, module.step, module.state.record
        loss, now = float(module.nll), time.perf_counter()
        if not math.isfinite(loss):
            raise Diverged(recipe.stage, step)
        seconds, steps = now - self.reported, step - self.reported_step
        tokens = int(module.over_ranks(module.tokens))
        module.tokens, self.reported, self.reported_step = torch.zeros_like(module.tokens), now, step
        record["tokens"] = record.get("tokens", 0) + tokens
        record["seconds"] = record.get("seconds", 0.0) + seconds
        record["loss"] = loss
        record.setdefault("curve", []).append([step, round(loss, 4)])
        if not trainer.is_global_zero:
            return
        rate = tokens / seconds
        left = (recipe.stop - step) * seconds / max(steps, 1)
        logger.info(
            "%s: step %d/%d, loss %.3f, %.0f tokens/s, %s left",
            self.label, step, recipe.stop, loss, rate, clock(left),
        )  # fmt: skip
        values = {f"{recipe.stage}/loss": loss, f"{recipe.stage}/tokens_per_second": rate}
        for tracker in trainer.loggers:
            tracker.log_metrics({**values, f"{recipe.stage}/step": step})

    def _look_for_spike(self, module: TextToText) -> None:
        """Compare the mean loss of a whole window of steps with the lowest one so far."""
        mean = float(module.nll_sum) / SPIKE_WINDOW
        whole = module.step - self.looked_step == SPIKE_WINDOW
        module.nll_sum, self.looked_step = torch.zeros_like(module.nll_sum), module.step
        if not math.isfinite(mean):
            raise Diverged(module.recipe.stage, module.step)
        if whole:
            record = module.state.record
            record["lowest_loss"] = min(record.get("lowest_loss", math.inf), mean)
            if mean > record["lowest_loss"] + self.config.spike:
                raise Diverged(module.recipe.stage, module.step)


def _strategy(config: TrainerConfig) -> Strategy | str:
    if config.strategy == "ddp":
        return DDPStrategy(timeout=PATIENCE)
    if config.strategy == "fsdp":
        ranks = config.devices * config.num_nodes
        return ModelParallelStrategy(data_parallel_size=ranks, tensor_parallel_size=1, timeout=PATIENCE)
    return config.strategy


def clock(seconds: float) -> str:
    """Seconds as minutes:seconds, for people."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def train(
    state: TrainingState,
    recipe: Recipe,
    config: TrainerConfig,
    *,
    label: str,
    resume_folder: Path | None = None,
    trackers: Sequence[Logger] = (),
) -> TrainingState:
    """Train from `state.step` to `recipe.stop`.

    Args:
        state: where to start; its model is trained in place.
        recipe: what to do at each step.
        config: hardware and precision.
        label: what progress lines call the run.
        resume_folder: where states to resume from are kept; the caller starts from the one it finds there.
        trackers: Lightning loggers, such as W&B's.

    Returns:
        The state after the last step.

    Raises:
        Diverged: the loss is not finite, or its mean over `SPIKE_WINDOW` steps rose by `config.spike` above the lowest.
        KeyboardInterrupt: Ctrl-C; the states kept so far stay.
    """
    if state.step >= recipe.stop:
        return state
    state.model.train()
    state.model.set_dropout(recipe.dropout)
    compiled = config.compile and can_compile(config.accelerator)
    if compiled:
        state.model.compile_layers()
    torch.use_deterministic_algorithms(config.deterministic)
    state.model.set_checkpointing(config.gradient_checkpointing)
    module = TextToText(state, recipe, config.micro_batch_tokens, compiled)
    with training_allowed(), warnings.catch_warnings():
        # One worker is enough: batches are cheap and the loop is the process's own.
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        trainer = L.Trainer(
            accelerator=config.accelerator,
            devices=config.devices,
            num_nodes=config.num_nodes,
            strategy=_strategy(config),
            precision=config.precision,  # type: ignore[arg-type]  # checked by our own configuration
            max_steps=recipe.stop - state.step,
            callbacks=[_Watch(label, resume_folder, config)],
            logger=list(trackers) or False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            log_every_n_steps=1_000_000_000,  # the callback logs
            use_distributed_sampler=False,
        )
        batches = _StepBatches(recipe, state.step, state.model.config.pad_id)
        try:
            trainer.fit(module, DataLoader(batches, batch_size=None))
        except SystemExit:
            if trainer.interrupted:  # Lightning makes an exit of Ctrl-C; our commands have a line to say about it
                raise KeyboardInterrupt from None
            raise
        state = module.capture()
    state.model.eval()
    return state


@torch.inference_mode()
def heldout_loss(model: T5, batches: Iterable[Batch], config: TrainerConfig) -> float:
    """Mean cross-entropy per target token, in nats, of teacher-forced batches, at the training precision."""
    total, tokens = 0.0, 0
    model.eval()
    enabled = config.precision == "bf16-mixed"
    for batch in batches:
        with torch.autocast(model.device.type, torch.bfloat16, enabled=enabled):
            labels = batch["labels"].to(model.device)
            logits_BTV = model(batch["input_ids"].to(model.device), model.shift_right(labels))
        nll, count = summed_nll(logits_BTV, labels, model.config.pad_id)
        total, tokens = total + nll, tokens + count
    return total / tokens
