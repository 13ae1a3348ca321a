"""The estimate against what autograd keeps, counted tensor by tensor."""

import pytest
import torch

from gqa_exp.config import ModelConfig
from gqa_exp.model import T5, T5Config
from gqa_exp.timing.cli import read_model_config
from gqa_exp.training.adafactor import Adafactor
from gqa_exp.training.loss import token_loss
from gqa_exp.training.memory import training_memory

GEOMETRY = {"vocab_size": 512, "d_model": 128, "d_ff": 256, "num_heads": 4, "head_dim": 32}


def batch(rows: int, source: int, target: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randint(3, 512, (rows, source)), torch.randint(3, 512, (rows, target))


@pytest.fixture(autouse=True)
def _torch_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The estimate is of torch's operations; our kernels, where a CPU has them, keep less."""
    monkeypatch.setattr("gqa_exp.model.native.library", lambda: None)


def kept_by_autograd(model: T5, rows: int, source: int, target: int, bfloat16: bool) -> float:
    """Bytes of all memory that the backward pass would read, but for the weights and their copies in bfloat16."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, tuple[int, torch.Tensor]] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes(), tensor  # held, so that no other comes to lie there
        return tensor

    input_ids, labels = batch(rows, source, target)
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        loss, _ = token_loss(model(input_ids, model.shift_right(labels)), labels, 1e-4)
    assert loss.requires_grad
    copies = 2 * sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and "bias" not in name)
    return sum(size for size, _ in kept.values()) - (copies - 2 * model.embedding.weight.numel() if bfloat16 else 0)


@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize(
    "changes",
    [{}, {"num_kv_heads": 1}, {"feed_forward": "relu"}, {"d_ff": 1024, "num_encoder_layers": 4}],
    ids=["MHA", "MQA", "ReLU", "deep and wide"],
)
@pytest.mark.parametrize("shape", [(4, 64, 16), (2, 256, 64)])
def test_activations_are_what_autograd_keeps(
    changes: dict[str, object], shape: tuple[int, int, int], bfloat16: bool
) -> None:
    layers = {"num_encoder_layers": 2, "num_decoder_layers": 2}
    model = T5(T5Config(**{**GEOMETRY, **layers, **changes})).train()  # type: ignore[arg-type]
    kept = kept_by_autograd(model, *shape, bfloat16)
    assert training_memory(model, *shape, bfloat16=bfloat16).activations == pytest.approx(kept, rel=0.2)


def test_checkpointing_keeps_layers_inputs_and_one_layer_at_a_time() -> None:
    model = T5(T5Config(**GEOMETRY, num_encoder_layers=6, num_decoder_layers=6)).train()
    whole = training_memory(model, 2, 256, 64, bfloat16=False).activations
    model.set_checkpointing(True)
    kept = kept_by_autograd(model, 2, 256, 64, False)
    estimate = training_memory(model, 2, 256, 64, bfloat16=False, checkpointing=True).activations
    assert kept < estimate < kept + whole / 6


def test_weights_gradients_and_moments_are_the_optimizers() -> None:
    model = T5(T5Config(**GEOMETRY, num_encoder_layers=1, num_decoder_layers=1))
    input_ids, labels = batch(2, 8, 4)
    optimizer = Adafactor(model.parameters())
    token_loss(model(input_ids, labels), labels, 0.0)[0].backward()
    optimizer.step()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    moments = sum(t.nbytes for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor))
    memory = training_memory(model, 2, 8, 4, bfloat16=False)
    assert (memory.weights, memory.gradients, memory.moments) == (weights, weights, moments)
    spread = training_memory(model, 2, 8, 4, bfloat16=True, ddp=True, shards=2)
    assert spread.weights == weights / 2 + weights / 2
    assert (spread.gradients, spread.moments) == (weights, moments / 2)


@pytest.mark.parametrize("size", ["large", "xl", "xxl"])
def test_the_papers_sizes_are_estimated_without_any_weights(size: str) -> None:
    model = read_model_config(f"t5_{size}")
    assert isinstance(model, ModelConfig)
    with torch.device("meta"):
        memory = training_memory(
            T5(T5Config.from_model_config(model)), 4, 2048, 512, bfloat16=True, checkpointing=True, shards=8
        )
    print(f"t5_{size}, 4 samples of 2048 + 512 tokens, 8 ranks: {memory}")
    assert 0 < memory.moments < 0.1 * memory.weights
