"""The chain over a store: keys, sharing, resuming, outcomes."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gqa_exp.config import Config, CorpusConfig, PretrainConfig
from gqa_exp.data.embedded import TOKENIZER
from gqa_exp.errors import InputError
from gqa_exp.evaluation import score
from gqa_exp.model import T5, T5Config
from gqa_exp.model.checkpoint import save_hf
from gqa_exp.pipeline import stages
from gqa_exp.pipeline.closing import close
from gqa_exp.pipeline.plan import Plan
from gqa_exp.pipeline.point import new_result, results_folder, run_point, store_of
from gqa_exp.pipeline.stages import Pipeline
from gqa_exp.pipeline.store import Stage, Store, key_of
from gqa_exp.results import Result, read_examples, read_results
from gqa_exp.timing.environment import hardware_id
from gqa_exp.training import loop
from gqa_exp.training.loop import Diverged
from gqa_exp.training.state import TrainingState

Make = Callable[..., Config]


def pipeline(config: Config) -> Pipeline:
    return Pipeline(config, store_of(config))


def test_keys_are_canonical(make_config: Make) -> None:
    assert key_of({"a": 0.05, "b": 1}) == key_of({"b": 1.0, "a": 5e-2})
    mha = pipeline(make_config(num_kv_heads=None))
    for same in (4, [4, 4]):
        assert pipeline(make_config(num_kv_heads=same)).finetune_stage == mha.finetune_stage
    # The method has no part in MHA, the seed none in mean and first.
    assert pipeline(make_config(method="random", seed=3)).convert_stage == mha.convert_stage
    for method, shared in (("mean", True), ("first", True), ("random", False)):
        keys = {pipeline(make_config(num_kv_heads=1, method=method, seed=seed)).convert_stage.key for seed in (0, 1)}
        assert (len(keys) == 1) is shared
    assert len({pipeline(make_config(num_kv_heads=1, method=m)).convert_stage.key for m in ("mean", "first")}) == 2


def test_proportion_zero_has_no_uptraining(make_config: Make) -> None:
    point = pipeline(make_config(proportion=0.0))
    assert point.uptrain_stage is None
    assert point.pretrained_stage == point.convert_stage


def test_uptraining_continues_the_recipe_of_the_base(make_config: Make) -> None:
    config = make_config(proportion=0.1)
    config.pretrain = PretrainConfig()
    path = Path(config.model.base or "") / "training.json"
    record = json.loads(path.read_text())
    assert pipeline(config).config.pretrain == PretrainConfig()  # this base records none
    recipe = PretrainConfig(steps=20, batch_size=3, peak_lr=0.5)
    lengths = {"input_length": 44, "target_length": 10, "noise_density": 0.15, "mean_span": 3.0}
    corpus = {"name": "other", "files": ["elsewhere.txt"], **lengths}
    path.write_text(json.dumps({**record, "recipe": {"pretrain": vars(recipe), "corpus": corpus}}))
    with pytest.raises(InputError, match=r"corpus.input_length=28: .* trained with 44"):
        pipeline(config)
    files, config.corpus = config.corpus.files, CorpusConfig(files=config.corpus.files)
    point = pipeline(config)
    assert point.config.pretrain == recipe
    assert point.uptrain_stage is not None
    assert point.uptrain_stage.facts["pretrain"] == vars(recipe)
    assert point.uptrain_stage.facts["corruption"] == lengths
    assert point.config.corpus.files == files  # the text may be another
    config.pretrain.batch_size = 3  # the base's own value may be said
    assert pipeline(config).config.pretrain == recipe
    config.pretrain.batch_size = 5
    with pytest.raises(InputError, match=r"pretrain.batch_size=5: .* trained with 3"):
        pipeline(config)


def test_larger_proportion_continues_the_smaller_bitwise(make_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = make_config(num_kv_heads=2, proportion=0.1), make_config(num_kv_heads=2, proportion=0.2)
    direct = copy.deepcopy(large)
    direct.output += "-direct"
    steps: list[int] = []
    real = loop.TextToText.training_step

    def counted(self: loop.TextToText, batch: loop.Batch, batch_idx: int) -> torch.Tensor:
        steps.append(self.step)
        return real(self, batch, batch_idx)

    monkeypatch.setattr(loop.TextToText, "training_step", counted)
    folders = []
    for config in (small, large, direct):
        point = pipeline(config)
        assert point.uptrain_stage is not None
        folders.append(point.obtain(point.uptrain_stage))
    assert steps == [20, 21, 22, 23, 20, 21, 22, 23]  # two, two more, four at once
    assert folders[1].name == folders[2].name
    for file in ("model.safetensors", "optimizer.safetensors"):
        through, at_once = load_file(folders[1] / file), load_file(folders[2] / file)
        assert through.keys() == at_once.keys()
        assert all(torch.equal(through[name], at_once[name]) for name in through)
        assert any(not torch.equal(through[name], load_file(folders[0] / file)[name]) for name in through)


def test_point_row_and_sharing_between_tasks(make_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(num_kv_heads=2, proportion=0.1)
    plan = Plan([config], store_of(config))
    assert [name for name, _ in plan.work] == ["convert", "uptrain", "finetune", "evaluate", "time"]
    row = run_point(config, plan)
    assert (row.status, row.label, row.num_examples) == ("done", "GQA-2", 6)
    assert row.score is not None
    assert row.score_low is not None
    assert row.score_low <= row.score <= row.score_high  # type: ignore[operator]
    examples = read_examples(results_folder(config), row.key)
    assert examples["rouge1"].mean() == pytest.approx(row.score)
    assert set(row.baselines) == {"lead"}
    assert examples["baseline.lead.rouge1"].mean() == pytest.approx(row.baselines["lead"])
    again = score("summarization", list(examples["baseline.lead.prediction"]), list(map(list, examples["references"])))
    assert again.per_example["rouge1"] == pytest.approx(list(examples["baseline.lead.rouge1"]))
    assert row.finetune["lr"] == config.finetune.lr
    assert row.finetune["max_input_tokens"] == 32
    assert row.settings["evaluate.version"] == stages.EVALUATE_VERSION
    assert row.settings["finetune.task.prompt"] == config.task.prompt
    assert row.settings["finetune.data"] == pipeline(config).finetune_stage.facts["data"]
    assert row.settings["uptrain.pretrain.batch_size"] == 2
    alike = make_config(num_kv_heads=1, proportion=0.2, seed=3)
    assert new_result(pipeline(alike)).settings == row.settings, "what makes the point is not among them"
    alike.evaluation.dtype = "bfloat16"
    changed = new_result(pipeline(alike)).settings
    assert {name for name in changed if changed[name] != row.settings[name]} == {
        "finetune.dtype",
        "evaluate.evaluation.dtype",
    }

    other = make_config(num_kv_heads=2, proportion=0.1)
    other.task.name, other.task.kind, other.task.metric = "debian_cloze", "question answering", "f1"
    assert [name for name, _ in Plan([config, other], store_of(config)).work] == ["finetune", "evaluate", "time"]

    monkeypatch.setattr(stages, "train", lambda *a, **k: pytest.fail("a stage in the store was computed again"))
    assert run_point(config, Plan([config], store_of(config))).row() == row.row()


def test_closing_times_against_mha_and_joins_rows(make_config: Make) -> None:
    config = make_config(num_kv_heads=1, proportion=0.0)
    plan = Plan([config], store_of(config))
    run_point(config, plan)
    close([config], plan)
    (row,) = read_results(results_folder(config))
    assert row.time["per_sample"] > 0  # type: ignore[operator]
    assert row.kv_cache_bytes_per_sample_allocated == row.kv_cache_bytes_per_sample == 2 * 2 * 1 * 4 * (8 + 3) * 4
    (times,) = (results_folder(config) / "times").glob("*.json")
    record = json.loads(times.read_text())
    assert set(record["variants"]) == {"MHA", "MQA"}
    before = times.stat().st_mtime_ns
    close([config], plan)
    assert times.stat().st_mtime_ns == before  # not timed again


def test_each_model_of_a_sweep_gets_its_own_times(make_config: Make, tmp_path: Path) -> None:
    narrow, wide = make_config(num_kv_heads=1, proportion=0.0), make_config(num_kv_heads=1, proportion=0.0)
    wide.model.d_ff, wide.model.base = 40, str(tmp_path / "wide")
    TrainingState(T5(T5Config.from_model_config(wide.model)), step=20).save(tmp_path / "wide")
    plan = Plan([narrow, wide], store_of(narrow))
    for config in (narrow, wide):
        run_point(config, plan)
    close([narrow, wide], plan)
    rows = {row.stages["base"]: row for row in read_results(results_folder(narrow))}
    times = [rows[pipeline(config).base_key].time for config in (narrow, wide)]
    difference = times[1]["decode_step_bytes"] - times[0]["decode_step_bytes"]  # type: ignore[operator]
    assert difference == 2 * 3 * 16 * (40 - 24) * 4, "layers, matrices, D, F, bytes"
    assert len({row.stages["time"] for row in rows.values()}) == 2


def test_a_row_is_joined_to_the_timing_of_now(make_config: Make) -> None:
    first, other = (make_config(num_kv_heads=1, proportion=proportion) for proportion in (0.0, 0.1))
    plan = Plan([first, other], store_of(first))
    for config in (first, other):
        run_point(config, plan)
    close([first, other], plan)
    before = {row.proportion: row for row in read_results(results_folder(first))}
    assert before[0.0].time["hardware"] == hardware_id("cpu")
    assert before[0.0].time["per_sample"] == before[0.1].time["per_sample"]
    assert before[0.0].time["natural_length_per_sample"] > 0  # type: ignore[operator]
    assert before[0.1].time["natural_length_per_sample"] is None, "its own checkpoint was not timed"
    first.timing.source_length = 16
    run_point(first, plan)
    close([first], plan)
    after = {row.proportion: row for row in read_results(results_folder(first))}
    cache = 2 * 2 * 1 * 4 * (16 + 3) * 4
    assert after[0.0].kv_cache_bytes_per_sample_allocated == after[0.0].kv_cache_bytes_per_sample == cache
    assert after[0.0].time["source_length"] == 16
    assert after[0.0].config_hash != before[0.0].config_hash
    assert after[0.1].row() == before[0.1].row()


def test_rows_without_their_checkpoints_are_left_as_they_are(
    make_config: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = make_config(num_kv_heads=1, proportion=0.0)
    plan = Plan([config], store_of(config))
    run_point(config, plan)
    shutil.rmtree(pipeline(config).store.folder(pipeline(config).finetune_stage))
    monkeypatch.setattr("gqa_exp.pipeline.closing.time_variants", lambda *_, **__: pytest.fail("timed without weights"))
    close([config], plan)
    (row,) = read_results(results_folder(config))
    assert not row.time
    assert "the store has no checkpoint of MQA" in caplog.text


def test_a_row_tells_where_its_stages_were_computed(make_config: Make) -> None:
    config = make_config(num_kv_heads=1, proportion=0.1)
    row = run_point(config, Plan([config], store_of(config)))
    assert "finetune_git_commit" not in row.environment
    its = pipeline(config)
    for stage, commit, seconds in ((its.finetune_stage, "earlier", 0.0), (its.evaluate_stage, "later", 7.0)):
        path = its.store.folder(stage) / "stage.json"
        record = json.loads(path.read_text())
        record["environment"]["git_commit"], record["seconds"] = commit, seconds
        path.write_text(json.dumps(record))
    (results_folder(config) / f"{row.key}.json").unlink()
    again = run_point(config, Plan([config], store_of(config)))
    assert again.environment["git_commit"] == "later"
    assert again.environment["finetune_git_commit"] == "earlier"
    assert again.environment["uptrain_git_commit"] == row.environment["git_commit"]
    assert again.training["evaluate_seconds"] == 7.0
    assert again.training["finetune_seconds"] > 0, "its steps took longer than the process that was left with the rest"


def test_divergence_is_an_outcome_and_is_remembered(make_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(num_kv_heads=1, proportion=0.1)
    real = loop.token_loss
    monkeypatch.setattr(loop, "token_loss", lambda *a, **k: tuple(part * float("nan") for part in real(*a, **k)))
    row = run_point(config, Plan([config], store_of(config)))
    assert row.status == "diverged"
    assert "step" in (row.error or "")
    monkeypatch.setattr(loop, "token_loss", real)
    assert run_point(config, Plan([config], store_of(config))).status == "diverged"


def test_interrupted_stage_leaves_the_store_whole(tmp_path: Path) -> None:
    store, stage = Store(tmp_path), Stage("convert", "k", {})

    def interrupted(folder: Path) -> dict[str, object]:
        (folder / "half").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.obtain(stage, interrupted)
    assert not store.holds(stage)
    assert list((tmp_path / "convert").iterdir()) == []
    store.obtain(stage, lambda folder: {"ok": 1})
    store.obtain(stage, lambda folder: pytest.fail("computed twice"))
    with pytest.raises(Diverged):
        store.obtain(Stage("uptrain", "d", {}), lambda folder: (_ for _ in ()).throw(Diverged("uptrain", 7)))


def test_a_base_of_transformers_gives_what_the_same_weights_of_ours_give(make_config: Make, tmp_path: Path) -> None:
    def score_from(base: Path) -> Result:
        config = make_config(num_kv_heads=1, proportion=0.1, output=str(tmp_path / f"runs of {base.name}"))
        config.model.base, config.model.steps = str(base), 20
        return run_point(config, Plan([config], store_of(config)))

    trained = TrainingState.load(Path(make_config().model.base or ""))
    TrainingState(trained.model, step=20).save(tmp_path / "ours")
    save_hf(trained.model, tmp_path / "theirs")
    for folder in ("ours", "theirs"):
        shutil.copyfile(TOKENIZER, tmp_path / folder / "spiece.model")
    ours, theirs = score_from(tmp_path / "ours"), score_from(tmp_path / "theirs")
    assert theirs.status == "done"
    assert theirs.training["uptrain_steps"] == 2
    assert theirs.training["finetune_loss"] == ours.training["finetune_loss"]
    assert theirs.metrics == ours.metrics
    assert theirs.stages["base"] != ours.stages["base"]


def test_the_steps_of_a_base_of_transformers_are_part_of_its_conversion(make_config: Make, tmp_path: Path) -> None:
    save_hf(T5(T5Config.from_model_config(make_config().model)), tmp_path / "theirs")
    keys = set()
    for steps in (20, 40):
        config = make_config(num_kv_heads=1)
        config.model.base, config.model.steps = str(tmp_path / "theirs"), steps
        keys.add(pipeline(config).convert_stage.key)
    assert len(keys) == 2


def test_a_longer_uptraining_of_a_diverged_one_has_diverged(make_config: Make) -> None:
    short, long = (pipeline(make_config(num_kv_heads=1, proportion=proportion)) for proportion in (0.1, 0.2))
    assert short.uptrain_stage is not None
    assert long.uptrain_stage is not None

    def diverge(folder: Path) -> dict[str, object]:
        raise Diverged("uptrain", 21)

    with pytest.raises(Diverged):
        short.store.obtain(short.uptrain_stage, diverge)
    with pytest.raises(Diverged, match="step 21"):
        long.obtain(long.uptrain_stage)


def test_what_a_base_of_transformers_does_not_say_is_asked_for(make_config: Make, tmp_path: Path) -> None:
    config = make_config()
    save_hf(T5(T5Config.from_model_config(config.model)), tmp_path / "theirs")
    config.model.base = str(tmp_path / "theirs")
    with pytest.raises(InputError, match=r"how many steps .* give model.steps"):
        pipeline(config)
    config.model.steps = 20
    config.model.vocab_size = 32128
    with pytest.raises(InputError, match=r"no tokenizer .* has 8192 ids, which does not fit model.vocab_size=32128"):
        _ = pipeline(config).tokenizer
    config.model.vocab_size = 8100
    shutil.copyfile(TOKENIZER, tmp_path / "theirs" / "spiece.model")
    with pytest.raises(InputError, match=r"its tokenizer has 8192 ids, which does not fit model.vocab_size=8100"):
        _ = pipeline(config).tokenizer


def test_base_of_another_geometry_or_missing(make_config: Make, tmp_path: Path) -> None:
    config = make_config()
    config.model.d_ff = 32
    with pytest.raises(InputError, match="d_ff=24"):
        run_point(config, Plan([config], store_of(config)))
    config.model.base = str(tmp_path / "nowhere")
    with pytest.raises(InputError, match="no such checkpoint folder"):
        Plan([config], store_of(config))
    config.model.base, config.model.name = None, "huge"
    with pytest.raises(InputError, match="gqa-pretrain"):
        Pipeline(config, store_of(config))
