"""The paper's experiment end to end, as a user types it, on a random checkpoint and small local files."""

import gzip
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from test_readme import HYDRA, points

from gqa_exp.cli import compose
from gqa_exp.data.embedded import TOKENIZER
from gqa_exp.model import T5, T5Config
from gqa_exp.model.checkpoint import save_hf
from gqa_exp.results import read_frame
from gqa_exp.timing.cli import read_model_config
from gqa_exp.training.memory import training_memory


def test_the_papers_settings_compose() -> None:
    config = compose(["model=t5_large", "task=cnn_dailymail", "num_kv_heads=8", "proportion=0.05"])
    assert (config.model.base, config.model.steps, config.corpus.name) == ("google/t5-v1_1-large", 1_000_000, "c4")
    assert (config.corpus.input_length, config.corpus.target_length) == (512, 114)
    pretrain, finetune = config.pretrain, config.finetune
    assert (pretrain.batch_size, pretrain.peak_lr, pretrain.flat_fraction) == (2048, 0.01, 0.01)
    assert (finetune.lr, finetune.dropout, finetune.batch_tokens) == (1e-3, 0.1, 128 * (512 + 256))
    assert (config.task.max_input_tokens, config.task.max_target_tokens, config.evaluation.split) == (512, 256, "dev")


PAPER = [line for line in HYDRA if any(word.startswith("model=t5_") for word in line)]


@pytest.mark.parametrize("line", PAPER, ids=" ".join)
def test_what_the_readme_proposes_fits_a_device_of_80_gb(line: list[str]) -> None:
    for overrides in points(line[1:]):
        config = compose([each for each in overrides if not each.startswith("output=")])
        with torch.device("meta"):
            model = T5(T5Config.from_model_config(config.model))
        trainer, corpus, task = config.trainer, config.corpus, config.task
        assert trainer.micro_batch_tokens is not None
        shapes = {"uptrain": (corpus.input_length, corpus.target_length)}
        shapes["finetune"] = (task.max_input_tokens, task.max_target_tokens)
        for stage, (source, target) in shapes.items():
            memory = training_memory(
                model,
                max(1, trainer.micro_batch_tokens // (source + target)),
                source,
                target,
                bfloat16=trainer.precision == "bf16-mixed",
                checkpointing=trainer.gradient_checkpointing,
                ddp=trainer.strategy == "ddp",
                shards=trainer.devices if trainer.strategy == "fsdp" else 1,
            )
            print(f"{config.model.name} {stage}: {memory}")
            assert memory.total < 75e9, f"{stage}: {memory}"


@pytest.mark.slow
def test_one_point_from_a_random_checkpoint_and_local_files(tmp_path: Path) -> None:
    """The shape of T5-Small but for the vocabulary, which is the embedded tokenizer's."""
    torch.manual_seed(0)
    model = read_model_config("t5_small")
    model.vocab_size = 8192
    save_hf(T5(T5Config.from_model_config(model)), tmp_path / "base")
    shutil.copyfile(TOKENIZER, tmp_path / "base" / "spiece.model")
    texts = [f"The {n}th article says that prices rose by {n} percent. " * (n % 7) for n in range(40)]
    articles = pd.DataFrame(
        {"article": texts, "highlights": [f"Prices rose by {n} percent." for n in range(40)], "id": range(40)}
    )
    for split in ("train", "validation"):
        folder = tmp_path / "cnn" / "3.0.0"
        folder.mkdir(parents=True, exist_ok=True)
        articles.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    (tmp_path / "c4").mkdir()
    lines = "".join(
        json.dumps({"text": f"Page {n} of the web. " * 30, "url": "", "timestamp": ""}) + "\n" for n in range(99)
    )
    (tmp_path / "c4" / "c4-train.00000-of-01024.json.gz").write_bytes(gzip.compress(lines.encode()))

    command = [
        sys.executable, "-m", "gqa_exp.run", "model=t5_small", "task=cnn_dailymail", "num_kv_heads=2",
        "proportion=2e-6", "model.vocab_size=8192", f"model.base={tmp_path / 'base'}",
        f"task.data_dir={tmp_path / 'cnn'}",
        f"corpus.data_dir={tmp_path / 'c4'}", f"output={tmp_path / 'runs'}", "tracking=disabled",
        "trainer.compile=false",
        "pretrain.batch_size=4", "trainer.micro_batch_tokens=1300", "trainer.gradient_checkpointing=true",
        "finetune.steps=4", "finetune.evaluate_every=2", "finetune.batch_tokens=4096", "finetune.dev_examples=6",
        "evaluation.max_examples=6", "task.max_target_tokens=16", "timing.batch_size=2", "timing.source_length=64",
        "timing.output_length=4", "timing.min_seconds=0", "timing.compile=off",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "memory per device, estimated" in done.stdout + done.stderr
    (row,) = read_frame(tmp_path / "runs" / "results" / "single").to_dict("records")
    assert (row["status"], row["label"], row["training.uptrain_steps"], row["num_examples"]) == ("done", "GQA-2", 2, 6)
    assert row["time.per_sample"] > 0
    again = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert "in the store" in again.stdout + again.stderr
