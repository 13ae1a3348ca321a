import copy
import json
import math
import signal
from dataclasses import replace

import pytest
import torch

from gqa_exp.config import TrainerConfig
from gqa_exp.errors import InputError
from gqa_exp.model import T5, T5Config, generate
from gqa_exp.training import loop, state
from gqa_exp.training.adafactor import Adafactor
from gqa_exp.training.loop import Diverged, Recipe, heldout_loss, step_seed, train
from gqa_exp.training.loss import token_loss
from gqa_exp.training.state import TrainingState

STOP = 6
CONFIG = TrainerConfig(
    precision="32-true", compile=False, threads=1, deterministic=True, checkpoint_minutes=1e9, report_seconds=0.0
)


@pytest.fixture(autouse=True)
def settings_of_the_process():
    """Training chooses deterministic algorithms, and Lightning takes Ctrl-C for itself."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)
    torch.use_deterministic_algorithms(False)


def fresh(**changes):
    """A state at step 0; wide enough (128) for factored optimizer slots, beside unfactored ones."""
    torch.manual_seed(0)
    geometry = {"vocab_size": 128, "d_model": 128, "d_ff": 32, "num_heads": 4, "head_dim": 32}
    layers = {"num_encoder_layers": 1, "num_decoder_layers": 1, "num_kv_heads": 2}
    return TrainingState(T5(T5Config(**{**geometry, **layers, **changes})))


def batch(step):
    generator = torch.Generator().manual_seed(1000 + step)
    mask = torch.ones(3, 8, dtype=torch.long)
    mask[1, 5:] = 0
    labels = torch.randint(2, 128, (3, 5), generator=generator)
    labels[2, 3:] = 0
    return {
        "input_ids": torch.randint(2, 128, (3, 8), generator=generator) * mask,
        "labels": labels,
        "attention_mask": mask,
    }


def rate(step):
    return 0.05 / (step + 1)


def recipe(**changes):
    settings = {"stage": "uptrain", "seed": 3, "batch": batch, "learning_rate": rate, "stop": STOP}
    return Recipe(**{**settings, **changes})


def run(start, config=CONFIG, folder=None, **changes):
    return train(start, recipe(**changes), config, label="test", resume_folder=folder)


def assert_same(ours, theirs):
    assert ours.step == theirs.step
    assert ours.model.config == theirs.model.config
    for mine, other in ((ours.model.state_dict(), theirs.model.state_dict()), (ours.slots, theirs.slots)):
        assert mine.keys() == other.keys()
        for name, tensor in mine.items():
            assert torch.equal(tensor, other[name]), name


def differs(ours, theirs):
    return not all(torch.equal(a, b) for a, b in zip(ours.model.parameters(), theirs.model.parameters(), strict=True))


@pytest.mark.parametrize(("dropout", "precision"), [(0.0, "32-true"), (0.1, "32-true"), (0.1, "bf16-mixed")])
def test_an_interrupted_run_equals_an_uninterrupted_one(tmp_path, dropout, precision):
    config = replace(CONFIG, precision=precision)
    straight = run(fresh(), config, dropout=dropout)
    run(fresh(), config, dropout=dropout, stop=3).save(tmp_path / "half")
    half = TrainingState.load(tmp_path / "half")
    assert half.step == 3
    assert differs(half, straight)
    resumed = run(half, config, dropout=dropout)
    assert_same(resumed, straight)
    assert resumed.step == STOP
    assert {name.rpartition(".")[2] for name in resumed.slots} == {"row", "col", "full", "step"}
    for name in ("tokens", "loss", "curve"):
        assert resumed.record[name] == straight.record[name]


def test_steps_equal_a_loop_written_out():
    trained = run(fresh(), z_loss=0.01)
    model = fresh().model
    optimizer = Adafactor(model.parameters())
    losses, tokens = [], 0
    for step in range(STOP):
        given = batch(step)
        start = torch.zeros(3, 1, dtype=torch.long)
        decoder_ids = torch.cat([start, given["labels"][:, :-1]], dim=1)
        logits = model(given["input_ids"], decoder_ids, given["attention_mask"])
        loss, nll = token_loss(logits, given["labels"], 0.01)
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = rate(step)
        optimizer.step()
        losses.append([step + 1, round(float(nll), 4)])
        tokens += 8 + 5 + 8 + 5 + 5 + 3  # of the three rows, padding not counted
    for ours, theirs in zip(trained.model.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert trained.record["curve"] == losses
    assert trained.record["tokens"] == tokens
    assert not trained.model.training


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("changes", [{"seed": 4}, {"stage": "finetune"}])
def test_dropout_depends_on_seed_and_stage(changes, precision):
    config = replace(CONFIG, precision=precision)
    first = run(fresh(), config, dropout=0.1, stop=2)
    assert differs(first, run(fresh(), config, dropout=0.1, stop=2, **changes))
    assert not differs(first, run(fresh(), config, dropout=0.1, stop=2))


def test_step_seeds_differ():
    seeds = [step_seed(seed, stage, step) for seed in (0, 1) for stage in ("uptrain", "finetune") for step in range(9)]
    assert len(set(seeds)) == len(seeds)
    torch.manual_seed(max(seeds))  # within torch's range


def test_looking_at_the_state_changes_nothing():
    def look(seen):
        seen.model.eval()
        generate(seen.model, batch(0)["input_ids"], max_new_tokens=3)
        torch.manual_seed(99)
        return False

    assert_same(run(fresh(), dropout=0.1, evaluate_every=2, evaluate=look), run(fresh(), dropout=0.1))


def test_evaluates_at_multiples_and_at_the_end():
    seen = []

    def evaluate(at):
        assert at.slots
        assert at.record["curve"][-1][0] == at.step
        seen.append((at.step, copy.deepcopy(at.model.state_dict())))
        return False

    final = run(fresh(), stop=7, evaluate_every=3, evaluate=evaluate)
    assert [step for step, _ in seen] == [3, 6, 7]
    three = run(fresh(), stop=3)
    assert all(torch.equal(tensor, seen[0][1][name]) for name, tensor in three.model.state_dict().items())
    assert all(torch.equal(tensor, seen[2][1][name]) for name, tensor in final.model.state_dict().items())
    seen.clear()
    run(three, stop=7, evaluate_every=3, evaluate=evaluate)  # multiples of the absolute step
    assert [step for step, _ in seen] == [6, 7]


def test_never_evaluates_without_an_interval():
    run(fresh(), stop=2, evaluate_every=0, evaluate=lambda at: pytest.fail("called"))


def test_evaluation_may_stop_the_run():
    stopped = run(fresh(), evaluate_every=2, evaluate=lambda at: at.step == 4)
    assert stopped.step == 4
    assert_same(stopped, run(fresh(), stop=4))


def test_uses_the_learning_rate_of_each_step(monkeypatch):
    used = []

    class Watched(Adafactor):
        def step(self, closure=None):
            loss = super().step(closure)
            used.append(self.param_groups[0]["lr"])
            return loss

    monkeypatch.setattr(loop, "Adafactor", Watched)
    half = run(fresh(), stop=3)
    assert used == [rate(0), rate(1), rate(2)]
    run(half)
    assert used[3:] == [rate(3), rate(4), rate(5)]


def test_a_state_to_resume_from_is_kept(tmp_path):
    folder = tmp_path / "resume"
    config = replace(CONFIG, checkpoint_minutes=0.0, report_seconds=1e9)
    straight = run(fresh(), config, folder)
    kept = TrainingState.load(folder)
    assert kept.step == STOP - 1  # the last step is the caller's to keep
    assert kept.record["tokens"] == (STOP - 1) * 34
    resumed = run(kept, config, folder)
    assert_same(resumed, straight)
    assert resumed.record["tokens"] == straight.record["tokens"] == STOP * 34
    assert [path.name for path in tmp_path.iterdir()] == ["resume"]


def test_no_state_is_kept_before_its_time(tmp_path):
    run(fresh(), folder=tmp_path / "resume", stop=2)
    assert not (tmp_path / "resume").exists()


@pytest.mark.parametrize("at", [1, 4])
def test_ctrl_c_leaves_the_last_state(tmp_path, at):
    def interrupted(step):
        if step == at:
            raise KeyboardInterrupt
        return batch(step)

    config = replace(CONFIG, checkpoint_minutes=0.0)
    straight = run(fresh(), dropout=0.1)
    with pytest.raises(KeyboardInterrupt):
        run(fresh(), config, tmp_path / "resume", dropout=0.1, batch=interrupted)
    left = [path.name for path in tmp_path.iterdir()]
    if at == 1:  # batches are fetched one ahead: no step was finished yet
        assert left == []
        return
    assert left == ["resume"]
    kept = TrainingState.load(tmp_path / "resume")
    assert kept.step in (at - 1, at)
    assert_same(run(kept, dropout=0.1), straight)


def test_divergence_names_the_step():
    with pytest.raises(Diverged, match="uptrain: loss is not finite or far above its lowest at step 4") as raised:
        run(fresh(), learning_rate=lambda step: math.nan if step == 2 else rate(step))
    assert raised.value.step == 4  # the third step spoilt the weights, the fourth one's loss shows it


@pytest.mark.parametrize("loss", [math.inf, -math.inf])
def test_an_infinite_loss_is_a_divergence(monkeypatch, loss):
    """What float32 makes of a loss beyond its range; the gradient may be finite all the same."""
    calls = iter(range(STOP))

    def overflowing(*args, **kwargs):
        value, nll = token_loss(*args, **kwargs)
        return value, nll + loss if next(calls) == 2 else nll

    monkeypatch.setattr(loop, "token_loss", overflowing)
    with pytest.raises(Diverged, match=r"at step 3$"):
        run(fresh())


def test_a_loss_that_rises_far_is_a_divergence(monkeypatch):
    monkeypatch.setattr(loop, "SPIKE_WINDOW", 4)

    def jump(step):
        return 0.01 if step < 8 else 20.0

    for report_seconds in (0.0, 1e9):  # whatever is reported, and when
        with pytest.raises(Diverged, match="far above its lowest at step 12"):
            run(fresh(), config=replace(CONFIG, spike=2.0, report_seconds=report_seconds), learning_rate=jump, stop=40)
    assert run(fresh(), config=replace(CONFIG, spike=2.0), stop=40).step == 40  # it goes up and down by less
    assert run(fresh(), config=replace(CONFIG, spike=1e9), learning_rate=jump, stop=12).step == 12


@pytest.mark.parametrize("tokens", [1, 13, 26, 1000])
def test_a_batch_in_parts_trains_as_a_whole_one(tokens):
    """The parts hold 1, 1, 2, or all 3 rows of 13 tokens, of which different shares are padding."""
    whole = run(fresh(), z_loss=0.01)
    parts = run(fresh(), config=replace(CONFIG, micro_batch_tokens=tokens), z_loss=0.01)
    assert parts.record["tokens"] == whole.record["tokens"]
    for (step, ours), (_, theirs) in zip(parts.record["curve"], whole.record["curve"], strict=True):
        assert ours == pytest.approx(theirs, abs=2e-4), step
    for ours, theirs in zip(parts.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("precision", "compiled"), [("32-true", False), ("bf16-mixed", False), ("bf16-mixed", True)])
def test_checkpointing_changes_memory_alone(precision, compiled):
    """Dropout included: what is computed again draws the same numbers."""
    config = replace(CONFIG, precision=precision, compile=compiled)
    plain = run(fresh(), config, dropout=0.1)
    assert_same(run(fresh(), config=replace(config, gradient_checkpointing=True), dropout=0.1), plain)


def test_checkpointing_keeps_one_activation_per_layer():
    kept = {}
    for on in (False, True):
        model = fresh(num_encoder_layers=3).model.train()
        model.set_checkpointing(on)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.numel()) or t, lambda t: t):
            given = batch(0)
            model(given["input_ids"], given["labels"], given["attention_mask"]).sum()
        kept[on] = sum(sizes)
    assert kept[True] < 0.5 * kept[False]


def test_divergence_is_seen_at_the_end_at_the_latest():
    with pytest.raises(Diverged):
        run(fresh(), replace(CONFIG, report_seconds=1e9), learning_rate=lambda step: math.nan)


def test_no_diverged_state_is_kept_to_resume_from(tmp_path):
    start = fresh()

    def poisoned(step):
        if step == 4:
            with torch.no_grad():
                start.model.embedding.weight.fill_(math.nan)
        return batch(step)

    config = replace(CONFIG, checkpoint_minutes=0.0, report_seconds=1e9)
    with pytest.raises(Diverged):
        run(start, config, tmp_path / "resume", batch=poisoned)
    assert TrainingState.load(tmp_path / "resume").step >= 3


def test_a_finished_state_is_returned_as_it_is():
    start = fresh()
    start.step = STOP
    assert run(start, batch=lambda step: pytest.fail("fetched")) is start


def test_bfloat16_training_keeps_float32_weights():
    trained = run(fresh(), replace(CONFIG, precision="bf16-mixed"))
    assert {parameter.dtype for parameter in trained.model.parameters()} == {torch.float32}
    exact = run(fresh())
    assert differs(trained, exact)
    assert trained.record["loss"] == pytest.approx(exact.record["loss"], rel=0.05)


def test_training_learns():
    copies = {"input_ids": torch.arange(2, 26).view(3, 8), "labels": torch.arange(2, 17).view(3, 5)}
    trained = run(fresh(), stop=40, batch=lambda step: copies, learning_rate=lambda step: 0.05)
    curve = dict(trained.record["curve"])
    assert curve[40] < 0.5 * curve[1]


def test_heldout_loss_is_the_mean_over_tokens():
    model = fresh().model.train()
    batches = [{name: batch(step)[name] for name in ("input_ids", "labels")} for step in range(3)]
    batches[1]["labels"] = batches[1]["labels"][:1]
    batches[1]["input_ids"] = batches[1]["input_ids"][:1]
    total, tokens = 0.0, 0
    for given in batches:
        logits = model(given["input_ids"], model.shift_right(given["labels"])).log_softmax(-1)
        for row, labels in zip(logits, given["labels"], strict=True):
            for step, label in enumerate(labels.tolist()):
                if label != 0:
                    total -= float(row[step, label].detach())
                    tokens += 1
    assert heldout_loss(model, batches, CONFIG) == pytest.approx(total / tokens, rel=1e-5)
    assert heldout_loss(model, batches, replace(CONFIG, precision="bf16-mixed")) == pytest.approx(
        total / tokens, rel=0.05
    )


# -- the state's folder ------------------------------------------------------------------------------------------------


def test_an_interrupted_save_leaves_the_old_state(tmp_path, monkeypatch):
    folder = tmp_path / "kept"
    old = run(fresh(), stop=1)
    old.save(folder)
    expected = copy.deepcopy(old)

    def fail(*_):
        raise KeyboardInterrupt

    new = run(old, stop=2)
    with monkeypatch.context() as patched:
        patched.setattr(state, "save_file", fail)
        with pytest.raises(KeyboardInterrupt):
            new.save(folder)
    assert_same(TrainingState.load(folder), expected)
    new.save(folder)
    assert_same(TrainingState.load(folder), new)


def test_a_state_may_be_stored_in_bfloat16(tmp_path):
    trained = run(fresh(), stop=1)
    trained.save(tmp_path / "half", torch.bfloat16)
    loaded = TrainingState.load(tmp_path / "half")
    assert loaded.record == trained.record
    for ours, theirs in zip(loaded.model.parameters(), trained.model.parameters(), strict=True):
        assert torch.equal(ours, theirs.bfloat16().float())
    assert all(torch.equal(slot, trained.slots[name]) for name, slot in loaded.slots.items())
    run(loaded, stop=2)


@pytest.mark.parametrize("text", [None, "", "[]", "{}", '{"step": "x"}', '{"step": null}'])
def test_a_missing_or_broken_record_is_named(tmp_path, text):
    folder = tmp_path / "kept"
    fresh().save(folder)
    (folder / "training.json").unlink()
    if text is not None:
        (folder / "training.json").write_text(text)
    with pytest.raises(InputError, match=r"training\.json: no readable training record"):
        TrainingState.load(folder)


def test_record_is_json(tmp_path):
    trained = run(fresh(), stop=2)
    trained.save(tmp_path / "kept")
    record = json.loads((tmp_path / "kept" / "training.json").read_text())
    assert record.pop("step") == 2
    assert record == trained.record
    assert TrainingState.load(tmp_path / "kept").record == record
