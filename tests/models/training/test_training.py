import fcntl
import json
import math
import os
import shutil
from dataclasses import replace

import h5py
import numpy as np
import pytest
import torch
from patch_files import assert_resumes
from patch_files import run as run_stage
from textures import make_pair

from uknowpan.models.checkpoints import Card, load_model, read_card, save_checkpoint
from uknowpan.models.errors import CheckpointError, DataError, ModelMismatch
from uknowpan.models.features import StreamsConfig
from uknowpan.models.network import LiteConfig
from uknowpan.models.sharpeners import load_sharpener, sharpen_array
from uknowpan.models.streams import StreamsStudent
from uknowpan.models.training import scenes
from uknowpan.models.training.loop import Diverged, Interrupted, TrainConfig, train
from uknowpan.models.training.parallel import World
from uknowpan.models.training.run_folder import ConfigMismatch
from uknowpan.models.training.scenes import GenericBatches, TrainBatch, read_scenes
from uknowpan.models.training.stages import GenericOptions, GenericStudentStage

TINY = LiteConfig(width=8, deep_width=8, deep_blocks=1)
CONFIG = TrainConfig(iterations=6, warmup=2, validate_every=2, checkpoint_every=2, batch_size=3)


def run(stage, out, config=CONFIG, **options):
    """Train with this module's configuration; the losses of every step."""
    return run_stage(stage, out, config, **options)


@pytest.fixture(scope="module")
def scenes_file(tmp_path_factory):
    """Two scenes to train on, one of them without PAN, and one to validate."""
    path = tmp_path_factory.mktemp("scenes") / "scenes.h5"
    with h5py.File(path, "w") as file:
        for seed, (name, split, with_pan) in enumerate(
            [("a", "train", True), ("b", "train", False), ("c", "valid", True)]
        ):
            pair = make_pair(1, (80, 96), bands=4, seed=seed + 20)
            group = file.create_group(name)
            group.attrs.update(sensor="waves", licence="CC0-1.0", split=split, weight=1.0)
            group["gt"] = np.round(100 * pair.gt.numpy()).astype(np.uint16)
            if with_pan:
                group["pan"] = (100 * pair.pan.numpy()).astype(np.float32)
    return path


def batches(scenes_file, split="train", **options):
    options = {"seed": 4, "batch_size": 3, "patch": 24, "variants": 2, **options}
    return GenericBatches(read_scenes(scenes_file, split), **options)


@pytest.fixture
def make_stage(scenes_file):
    def make(network=TINY, **options):
        valid = batches(scenes_file, "valid", seed=5)
        notes = {"licence": "CC0-1.0"}
        return GenericStudentStage(network, batches(scenes_file), valid, validation_batches=1, notes=notes, **options)

    return make


def test_scenes_come_back(scenes_file):
    first, second = read_scenes(scenes_file, "train")
    assert (first.name, first.sensor, first.weight) == ("a", "waves", 1.0)
    assert first.gt.shape == (4, 80, 96) and first.pan.shape == (1, 80, 96)
    assert first.gt.dtype == first.pan.dtype == torch.float32
    assert second.pan is None
    with h5py.File(scenes_file) as file:
        assert np.array_equal(first.gt.numpy(), file["a/gt"][()])


def test_files_that_are_no_scenes_files(tmp_path, scenes_file):
    with pytest.raises(DataError, match="holds no scene of the split 'test'"):
        read_scenes(scenes_file, "test")
    (tmp_path / "text.h5").write_text("no")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file.create_group("x").attrs["split"] = "train"
    for name in ("none.h5", "text.h5", "other.h5"):
        with pytest.raises(DataError, match=f"{name} is not a scenes file made by `uknowpan pack`"):
            read_scenes(tmp_path / name, "train")


def test_a_pan_of_another_size_is_refused_unread(scenes_file, tmp_path, monkeypatch):
    """A size bomb: a PAN of a million rows took 2 GB before it was compared with its truth."""
    path = shutil.copy(scenes_file, tmp_path)
    with h5py.File(path, "a") as file:
        del file["c/pan"]
        file["c"].create_dataset("pan", (1, 10**6, 72), np.uint16, chunks=(1, 100, 72))
    monkeypatch.setattr(scenes, "_image", lambda *arguments: pytest.fail("it was read"))
    with pytest.raises(DataError, match=r"the PAN of scene c is \(1, 1000000, 72\), its truth \(4, 80, 96\)"):
        read_scenes(path, "valid")


def test_flat_validation_scenes_have_scores(scenes_file, make_stage, tmp_path):
    """A division by a measured number that may be 0."""
    path = shutil.copy(scenes_file, tmp_path)
    with h5py.File(path, "a") as file:
        file["c/gt"][...] = 0
        file["c/pan"][...] = 0
    stage = make_stage()
    stage.valid_data = batches(path, "valid")
    assert all(math.isfinite(value) for value in stage.validate(stage.build()).values())


def test_workers_and_processes_change_no_batch(scenes_file):
    """Batches that worker processes make ahead, or that two processes share, are those of one process."""
    data = batches(scenes_file, batch_size=4)
    whole = [data(step) for step in (5, 6)]
    ahead = batches(scenes_file, batch_size=4).stream(5, 7, World(), workers=2)
    shares = [[data(step, World(rank, 2)) for rank in range(2)] for step in (5, 6)]
    for one, other, parts in zip(whole, ahead, shares, strict=True):
        for name in ("x0", "scale"):
            assert torch.equal(getattr(one, name), getattr(other, name))
            assert torch.equal(getattr(one, name), torch.cat([getattr(part, name) for part in parts]))
        assert torch.equal(one.condition.band_features, other.condition.band_features)


def test_a_batch_is_a_function_of_seed_and_step(scenes_file):
    in_order, later = batches(scenes_file), batches(scenes_file, cache=1)
    expected = [in_order(step) for step in range(4)]
    for step in (3, 1):
        batch = later(step)
        assert torch.equal(batch.x0, expected[step].x0)
        assert torch.equal(batch.condition.band_features, expected[step].condition.band_features)
    assert expected[0].x0.shape != expected[1].x0.shape or not torch.equal(expected[0].x0, expected[1].x0)
    other = batches(scenes_file, seed=99)(0).x0
    assert other.shape != expected[0].x0.shape or not torch.equal(other, expected[0].x0)


def test_scenes_of_few_bands_serve_every_step(scenes_file):
    data = batches(scenes_file)
    counts = {data(step).x0.shape[1] for step in range(30)}
    assert counts == {1, 3, 4}  # six bands are drawn too, and no scene has them


def test_targets_are_residuals_of_the_truth(scenes_file):
    """The condition's own injection explains most of x0: truth and condition lie on each other."""
    data = batches(scenes_file)
    unexplained, total = 0.0, 0.0
    for step in range(8):
        batch = data(step)
        inner = (..., slice(4, -4), slice(4, -4))
        target = batch.x0[inner]
        injected = batch.condition.band_features[:, :, 1][inner]
        unexplained += float((target - injected).square().mean())
        total += float(target.square().mean())
    assert unexplained < 0.5 * total


@pytest.mark.parametrize("amp", [True, False])
def test_resumed_equals_unbroken(make_stage, tmp_path, amp):
    assert_resumes(make_stage, tmp_path, replace(CONFIG, amp=amp))


def test_a_run_folder_tells_its_story(make_stage, tmp_path):
    out = tmp_path / "run"
    best = train(make_stage(), replace(CONFIG, amp=False), out)
    assert best == out / "best.safetensors"
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log] == [2, 4, 6]
    configured = json.loads((out / "config.json").read_text())
    assert configured["stage"] == "fsa-s"
    assert configured["train"]["iterations"] == 6
    assert configured["network"]["width"] == TINY.width
    lowest = min(log, key=lambda entry: entry["score"])
    assert read_card(best).training == {"licence": "CC0-1.0", "iterations": lowest["step"]}
    assert read_card(best).scores["validation_patches"]["score"] == lowest["score"]
    assert read_card(out / "last.safetensors").training["iterations"] == 6
    assert read_card(best).name == "run"
    assert sorted(p.name for p in out.iterdir()) == [
        "best.safetensors", "config.json", "last.safetensors", "log.jsonl", "state.pt"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "network", "says"),
    [
        ({"seed": 1, "iterations": 4}, {}, r"train\.iterations 6 \(here 4\), train\.seed 0 \(here 1\)"),
        ({}, {"deep_blocks": 2}, r"network\.deep_blocks 1 \(here 2\)"),
        ({}, {"timesteps": 100}, r"network\.timesteps 500 \(here 100\)"),
        ({}, "names", r"data\.train\.scenes \['a', 'b'\] \(here \['a', 'x'\]\)"),
        ({}, "sizes", r"data\.valid\.sizes \[\[4, 80, 96\]\] \(here \[\[4, 80, 95\]\]\)"),
    ],
)
def test_a_run_goes_on_only_as_it_was_configured(make_stage, tmp_path, one_step, changed, network, says):
    before = {p.name: p.read_bytes() for p in one_step.iterdir()}
    data, network = (network, {}) if isinstance(network, str) else ("", network)
    stage, config = make_stage(replace(TINY, **network)), replace(CONFIG, **changed)
    if data == "names":
        stage.train_data.scenes[1] = replace(stage.train_data.scenes[1], name="x")
    elif data == "sizes":
        scene = stage.valid_data.scenes[0]
        stage.valid_data.scenes[0] = replace(scene, gt=scene.gt[..., 1:])
    with pytest.raises(ConfigMismatch, match=f"was begun with {says}; --resume"):
        train(stage, config, one_step, resume=True)
    assert {p.name: p.read_bytes() for p in one_step.iterdir()} == before


def test_a_run_goes_on_with_more_iterations(make_stage, tmp_path):
    """Missing case: a run that should train longer had to begin anew."""
    run(make_stage(), tmp_path / "run")
    more = run(make_stage(), tmp_path / "run", replace(CONFIG, iterations=CONFIG.iterations + 2), resume=True)
    assert list(more) == [CONFIG.iterations + 1, CONFIG.iterations + 2]


@pytest.fixture
def one_step(make_stage, tmp_path):
    """The folder of a run that was stopped after its first step."""
    out = tmp_path / "stopped"
    with pytest.raises(Interrupted):
        run(make_stage(), out, should_stop=lambda: True)
    return out


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "folder", "optimizer", "step", "before", "endless"])
def test_a_damaged_state_is_said_to_be(make_stage, one_step, damage):
    state = one_step / "state.pt"
    raw, parts = state.read_bytes(), torch.load(state, weights_only=True)
    if damage == "folder":
        state.unlink()
        state.mkdir()
    elif damage == "optimizer":
        del parts["optimizer"]
        torch.save(parts, state)
    elif damage in ("step", "before", "endless"):
        step = {"step": CONFIG.iterations + 1, "before": -1, "endless": math.inf}[damage]
        torch.save({**parts, "step": step}, state)
    else:
        state.write_bytes({"truncated": raw[: len(raw) // 2], "empty": b"", "text": b"no"}[damage])
    with pytest.raises(CheckpointError, match=r"state\.pt is damaged or cannot be read.*; begin"):
        train(make_stage(), CONFIG, one_step, resume=True)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[1]", ""),
        ("{}", "it lacks data and network and options and stage and train"),
        ('{"stage": "fsa-s", "train": {}, "network": {"width": 8}}', "it lacks data and options"),
    ],
)
def test_a_damaged_configuration_is_said_to_be(make_stage, one_step, text, says):
    (one_step / "config.json").write_text(text)
    said = rf"config\.json cannot be read \(.*{says}.*; begin"
    with pytest.raises(CheckpointError, match=said):
        train(make_stage(), CONFIG, one_step, resume=True)


def test_lines_of_the_log_that_are_no_text_are_cut(make_stage, one_step):
    log = one_step / "log.jsonl"
    log.write_bytes(b'{"step": 1, "l1": 3}\n\xff\xfe\x80\n{"step": Infinity}\n{"step": 1, "\xe9')
    run(make_stage(), one_step, resume=True)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 4, 6] and lines[0]["l1"] == 3


@pytest.mark.parametrize("resume", [False, True])
def test_two_runs_in_one_folder_are_kept_apart(make_stage, one_step, resume):
    refused = []

    def intrude(step, parts):
        before = {p.name: p.read_bytes() for p in one_step.iterdir()}
        with pytest.raises(DataError, match=r"Another run is training in .*; wait for it, or"):
            train(make_stage(), CONFIG, one_step, resume=resume)
        refused.append(step)
        assert {p.name: p.read_bytes() for p in one_step.iterdir()} == before

    train(make_stage(), replace(CONFIG, amp=True), one_step, resume=True, on_step=intrude)
    assert refused == [2, 3, 4, 5, 6]
    assert not (one_step / ".lock").exists()


def test_a_lock_that_its_owner_removes_meanwhile(make_stage, tmp_path, monkeypatch):
    """The locked file is then nobody's, and the next run would not see it."""
    flock, path, taken = fcntl.flock, tmp_path / "run" / ".lock", []

    def vanish(file, operation):
        if isinstance(file, int):  # the folder of a file that is being written
            return flock(file, operation)
        if not taken:
            path.unlink()
        flock(file, operation)
        taken.append(path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()))

    monkeypatch.setattr(fcntl, "flock", vanish)
    run(make_stage(), path.parent, replace(CONFIG, iterations=1))
    assert taken == [False, True]


def test_weights_to_start_from(make_stage, tmp_path):
    config = replace(CONFIG, iterations=2)
    first = train(make_stage(), config, tmp_path / "first")
    # A learning rate of zero leaves what it started from.
    still = replace(config, learning_rate=0.0, ema=0.0)
    again = train(make_stage(), still, tmp_path / "again", init=first)
    wanted, found = (load_model(p)[0].state_dict() for p in (first, again))
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    other = make_stage(replace(TINY, width=4))
    with pytest.raises(ModelMismatch, match=r"\(fsa-s-lite: width 8 \(here 4\)\) do not fit"):
        train(other, config, tmp_path / "other", init=first)
    assert not (tmp_path / "other").exists()


def test_a_resumed_run_needs_no_weights_to_start_from(make_stage, tmp_path):
    first = train(make_stage(), replace(CONFIG, iterations=2), tmp_path / "first")
    out = tmp_path / "run"
    with pytest.raises(Interrupted):
        train(make_stage(), CONFIG, out, init=first, should_stop=lambda: True)
    first.unlink()
    train(make_stage(), CONFIG, out, init=first, resume=True)
    assert torch.load(out / "state.pt", weights_only=True)["step"] == 6


@pytest.mark.parametrize("error", [OSError("No space left"), RuntimeError("writer failed\nat 7")])
def test_a_state_that_cannot_be_written(make_stage, tmp_path, monkeypatch, error):
    out, save = tmp_path / "run", torch.save

    def full(state, path):
        save(state, path)
        if state["step"] == 4:
            raise error

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        said = str(error).splitlines()[0]
        with pytest.raises(DataError, match=rf"state\.pt cannot be written \({said}\); make room"):
            train(make_stage(), CONFIG, out)
    assert torch.load(out / "state.pt", weights_only=True)["step"] == 2
    assert not list(out.glob(".state*"))


def test_a_state_holds_the_mean_of_all_processes(make_stage, tmp_path, monkeypatch):
    """Each process sums the losses of its own share until a line of the log is due."""
    own = {}
    monkeypatch.setattr(World, "mean", lambda world, values: values / 2)
    with pytest.raises(Interrupted):
        train(make_stage(), CONFIG, tmp_path, on_step=lambda step, parts: own.update(parts), should_stop=lambda: True)
    window, steps = torch.load(tmp_path / "state.pt", weights_only=True)["window"]
    assert steps == 1 and {"l1", "variance"} <= own.keys() < window.keys()
    for name, value in own.items():
        assert float(window[name]) == pytest.approx(value / 2)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_run_that_diverges_stops(make_stage, tmp_path, where):
    stage, out = make_stage(), tmp_path / "run"
    losses, steps = stage.losses, iter(range(9))

    def diverging(model, batch, generator):
        parts = losses(model, batch, generator)
        if next(steps) == 2:
            weights = next(model.parameters())
            root = (weights - weights.detach()).abs().sum().sqrt()  # 0, and of infinite slope
            parts["l1"] = parts["l1"] + (root if where == "gradient" else math.nan)
        return parts

    stage.losses = diverging
    with pytest.raises(Diverged, match=r"step 3 has a loss of .*\bnan\b.*; begin anew"):
        train(stage, replace(CONFIG, amp=False), out)
    state = torch.load(out / "state.pt", weights_only=True)
    assert state["step"] == 2
    assert all(torch.isfinite(v).all() for v in state["model"].values())


@pytest.mark.parametrize("scores", [[math.nan] * 3, [math.nan, 0.5, math.nan]])
def test_a_score_that_is_no_number_is_never_best(make_stage, tmp_path, scores):
    stage, left = make_stage(), iter(scores)
    stage.validate = lambda model: {"score": next(left)}
    best = train(stage, CONFIG, tmp_path / "run")
    some = any(math.isfinite(s) for s in scores)
    assert best.name == ("best.safetensors" if some else "last.safetensors")
    assert read_card(best).training["iterations"] == (4 if some else 6)


def test_everything_is_trained_on_the_device(make_stage, tmp_path, monkeypatch):
    """No GPU is asked for: what counts is that batches and autocast get the device named."""
    moved, cast = [], []
    to, autocast = TrainBatch.to, torch.autocast
    monkeypatch.setattr(TrainBatch, "to", lambda self, device, **o: (moved.append(device), to(self, device))[1])
    monkeypatch.setattr(torch, "autocast", lambda kind, **options: (cast.append(kind), autocast(kind, **options))[1])
    train(make_stage(), CONFIG, tmp_path / "run", device="cpu")
    assert moved == [torch.device("cpu")] * 9  # six steps and three validations of one batch
    assert cast == ["cpu"] * 6


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_trains_and_the_cpu_goes_on(make_stage, tmp_path):
    config, out = replace(CONFIG, iterations=4, amp=False), tmp_path / "run"
    seen, expected = {}, run(make_stage(), tmp_path / "cpu", config)
    asked = iter([False, True])
    with pytest.raises(Interrupted):
        train(
            make_stage(), config, out,
            device="cuda", on_step=seen.__setitem__, should_stop=lambda: next(asked),
        )  # fmt: skip
    train(make_stage(), config, out, resume=True, on_step=seen.__setitem__)
    for step, parts in expected.items():
        assert seen[step] == pytest.approx(parts, rel=1e-3)


def test_a_trained_checkpoint_sharpens(make_stage, tmp_path):
    best = train(make_stage(), replace(CONFIG, iterations=2, amp=False), tmp_path / "run")
    pair = make_pair(4, (12, 10), bands=3)
    done = sharpen_array(load_sharpener(str(best)), pair.pan, pair.ms)
    assert done.hrms.shape == (3, 48, 40)
    assert torch.isfinite(done.hrms).all() and (done.sigma > 0).all()


def test_a_card_of_more_steps_than_timesteps(make_stage, tmp_path):
    model = make_stage().build()
    config = {"width": 8, "deep_width": 8, "deep_blocks": 1}
    card, path = Card("m", "fsa-s-lite", config, "fsa-s", steps=500), tmp_path / "m.safetensors"
    save_checkpoint(path, model, card)
    assert load_sharpener(str(path)).steps == 500
    for name, value in (("steps", 501), ("config", {**config, "timesteps": 499})):
        wrong = replace(card)
        object.__setattr__(wrong, name, value)
        save_checkpoint(path, model, wrong)
        with pytest.raises(CheckpointError, match=r"m\.safetensors cannot be read: steps must be"):
            load_sharpener(str(path))


def test_one_batch_can_be_learnt(make_stage, tmp_path):
    stage = make_stage()
    batch = next(stage.batches(0, 1))
    stage.batches = lambda start, stop: (batch for _ in range(start, stop))
    losses = {}
    config = TrainConfig(iterations=40, warmup=5, learning_rate=5e-3, validate_every=99, amp=False, weight_decay=0)
    train(stage, config, tmp_path / "run", on_step=losses.__setitem__)
    steps = sorted(losses)
    for part, fall in (("l1", 0.15), ("variance", 1.0)):
        begin, end = (np.mean([losses[s][part] for s in span]) for span in (steps[:3], steps[-3:]))
        assert end < begin - fall * abs(begin), part


def test_the_uncertainty_does_not_bend_the_answer(make_stage):
    stage = make_stage()
    model = stage.build()
    parts = stage.losses(model, next(stage.batches(0, 1)), torch.Generator().manual_seed(0))
    rows = model.out.weight.shape[0] - 4  # the last four (2 x 2 pixels) are log_sigma's
    (of_variance,) = torch.autograd.grad(parts["variance"], model.out.weight, retain_graph=True)
    (of_mean,) = torch.autograd.grad(parts["l1"], model.out.weight)
    assert of_variance[:rows].abs().max() == 0 < of_variance[rows:].abs().max()
    assert of_mean[rows:].abs().max() == 0 < of_mean[:rows].abs().max()


def test_a_teacher_is_followed_where_it_predicts(make_stage):
    """At the last timestep the student is drawn to the teacher's x0, elsewhere to the truth alone."""
    network = StreamsConfig(pan_width=8, trunk_width=8, band_width=8, head_width=8)
    teacher = StreamsStudent(network)
    with torch.no_grad():
        teacher.out.bias.add_(0.5)
    for share, taught in ((1.0, True), (0.0, False)):
        stage = make_stage(network, options=GenericOptions(terminal_share=share), teacher=teacher)
        parts = stage.losses(stage.build(), next(stage.batches(0, 1)), torch.Generator().manual_seed(0))
        assert ("soft" in parts) == taught
    stage = make_stage(network, options=GenericOptions(terminal_share=1.0), teacher=teacher)
    assert float(stage.losses(teacher, next(stage.batches(0, 1)), torch.Generator().manual_seed(0))["soft"]) < 1e-3
    assert not any(p.requires_grad for p in teacher.parameters())


def test_an_unknown_error_is_refused():
    with pytest.raises(ValueError, match="error is l1 or rms, not 'l2'"):
        GenericOptions(error="l2")


def test_learning_rate_warms_up_and_falls(make_stage, tmp_path, monkeypatch):
    seen = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW,
        "step",
        lambda self, *a, **k: (seen.append(self.param_groups[0]["lr"]), step(self, *a, **k))[1],
    )
    run(make_stage(), tmp_path / "run", replace(CONFIG, learning_rate=1.0, iterations=6, amp=False))
    cosine = [0.01 + 0.99 * (1 + math.cos(math.pi * k / 4)) / 2 for k in range(4)]
    assert seen == pytest.approx([0.5, 1.0, *cosine])
