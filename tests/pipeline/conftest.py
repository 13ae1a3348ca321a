import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gqa_exp.config import Config
from gqa_exp.model import T5, T5Config
from gqa_exp.training.loop import Recipe, train
from gqa_exp.training.state import TrainingState


@pytest.fixture
def make_config(tmp_path: Path) -> Callable[..., Config]:
    """A point that takes seconds: a tiny trained base, a text file as corpus, few and short steps, deterministic."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    base = tmp_path / "base"
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("The package manager installs, upgrades and removes packages. " * 60, encoding="utf-8")

    def make(**changes: object) -> Config:
        config = Config(output=str(tmp_path / "runs"))
        model = config.model
        model.base, model.d_model, model.d_ff, model.num_heads, model.head_dim = str(base), 16, 24, 4, 4
        model.num_encoder_layers = model.num_decoder_layers = 2
        config.corpus.files = [str(corpus)]
        config.corpus.input_length, config.corpus.target_length = 28, 6
        config.pretrain.steps, config.pretrain.batch_size = 20, 2
        config.task.max_input_tokens, config.task.max_target_tokens = 32, 8
        config.finetune.steps, config.finetune.evaluate_every, config.finetune.dev_examples = 2, 1, 4
        config.finetune.batch_tokens = 96
        config.evaluation.max_examples, config.evaluation.batch_tokens, config.evaluation.dtype = 6, 256, "float32"
        config.trainer.precision, config.trainer.compile, config.trainer.deterministic = "32-true", False, True
        config.tracking.mode = "disabled"
        timing = config.timing
        timing.batch_size, timing.source_length, timing.output_length, timing.min_rounds = 2, 8, 3, 2
        timing.min_seconds, timing.dtype, timing.compile = 0.0, "float32", "off"
        for name, value in changes.items():
            setattr(config, name, value)
        if not base.exists():
            torch.manual_seed(0)
            state = TrainingState(T5(T5Config.from_model_config(model)))
            ids = torch.randint(3, 8000, (2, 8))
            recipe = Recipe("pretrain", 0, lambda step: {"input_ids": ids, "labels": ids}, lambda step: 0.01, stop=20)
            train(state, recipe, config.trainer, label="base").save(base)
        return config

    return make
