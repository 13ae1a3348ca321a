import tempfile
from collections.abc import Callable, Iterator

import pytest
import torch

from gqa_exp.model import T5, T5Config


@pytest.fixture(autouse=True)
def own_host_lock(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests must not wait for, nor hold up, real training and timing on this host."""
    folder = tmp_path_factory.mktemp("lock")
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", str(folder))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny models on several threads mostly wait for each other, the more so on a busy host."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., T5Config]:
    """Makes small geometries in which no two sizes are equal, so that mixed-up axes cannot go unseen."""

    def make(**changes: object) -> T5Config:
        geometry = {
            "vocab_size": 60,
            "d_model": 20,
            "d_ff": 28,
            "num_heads": 4,
            "head_dim": 6,
            "num_encoder_layers": 2,
            "num_decoder_layers": 3,
        }
        return T5Config(**{**geometry, **changes})  # type: ignore[arg-type]

    return make


@pytest.fixture(scope="session")
def tiny_model(tiny_config: Callable[..., T5Config]) -> Callable[..., T5]:
    """Makes small models in evaluation mode whose norm weights differ from 1, as those of a trained model do."""

    def make(seed: int = 0, **changes: object) -> T5:
        torch.manual_seed(seed)
        model = T5(tiny_config(**changes)).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name:
                    parameter += 0.3 * torch.randn_like(parameter)
        return model

    return make


@pytest.fixture(scope="session")
def padded_batch() -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """Makes (input_ids, attention_mask) of different lengths, the first row the longest."""

    def make(lengths: list[int], vocab_size: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
        ids = torch.randint(2, vocab_size, mask.shape, generator=generator)
        return ids * mask, mask

    return make
