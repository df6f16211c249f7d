"""Runs of the stages: resuming, a cache for a teacher, learning, checkpoints."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from patch_files import (
    LITE,
    PAPER,
    QUICK,
    assert_resumes,
    assert_same_state,
    guided_config,
    prior_stage,
    run,
    story,
    student_stage,
    teacher_stage,
)

from uknowpan.models.checkpoints import load_model, read_card
from uknowpan.models.errors import ModelMismatch
from uknowpan.models.network import FSAStudentLite
from uknowpan.models.published.uknow.guided import GuidedTeacher, GuidedTeacherConfig
from uknowpan.models.published.uknow.prior import PriorConfig
from uknowpan.models.published.uknow.stages import FeatureMatcher, StudentOptions, TeacherOptions
from uknowpan.models.published.uknow.student import FSAStudent
from uknowpan.models.training.loop import train

GUIDED = guided_config()
DROPPING = GuidedTeacherConfig(replace(GUIDED.teacher, dropout=0.2, drop_path=0.3), PriorConfig(4, width=4, blocks=1))
RUNS = {
    "prior": lambda f: prior_stage(f),
    "teacher, dropout": lambda f: teacher_stage(f, config=DROPPING),
    "paper, teacher, dropout": lambda f: student_stage(
        f, StudentOptions(flips=True), replace(PAPER, dropout=0.2), f.teacher, flips=True
    ),
    "lite, teacher": lambda f: student_stage(f, None, LITE, f.teacher, flips=True),
    "lite, cache, flips, workers": lambda f: student_stage(
        f, StudentOptions(flips=True), LITE, flips=True, workers=2, caches=[f.cache("float32")]
    ),
    "paper, cache": lambda f: student_stage(f, caches=[f.cache("float16")]),
}


@pytest.mark.parametrize("name", RUNS)
def test_resumed_equals_unbroken(files, small, tmp_path, name):
    made = files if "lite" in name else small
    assert_resumes(lambda: RUNS[name](made), tmp_path)


def test_workers_read_the_same(small, tmp_path):
    alone = run(RUNS["prior"](small), tmp_path / "alone")
    assert run(prior_stage(small, workers=2), tmp_path / "helped") == alone
    assert_same_state(tmp_path / "alone", tmp_path / "helped")


def test_flips_turn_the_patches(small):
    plain, turned = (prior_stage(small, flips=flips) for flips in (False, True))
    (one,), (other,) = (list(s.batches(0, 1)) for s in (plain, turned))
    assert not one.origin[:, 1:].any() and other.origin[:, 1:].any()
    for i, (_, rows, columns) in enumerate(other.origin.tolist()):
        axes = [axis for axis, turn in ((-2, rows), (-1, columns)) if turn]
        assert torch.equal(one.gt[i].flip(axes), other.gt[i])


def test_a_finished_run_is_left_as_it_is(small, tmp_path):
    out = tmp_path / "run"
    best = train(prior_stage(small), QUICK, out)
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    assert train(prior_stage(small), QUICK, out, resume=True) == best
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before


def test_a_log_has_every_step_once(small, tmp_path):
    """A run that dies between two states does some steps again."""
    config, out = replace(QUICK, iterations=6, checkpoint_every=3, log_every=1), tmp_path / "run"

    def die(step, parts):
        if step == 5:
            raise MemoryError

    with pytest.raises(MemoryError):
        train(prior_stage(small), config, out, on_step=die)
    assert [entry["step"] for entry in story(out)] == [1, 2, 3, 4]
    with open(out / "log.jsonl", "a") as log:
        log.write('{"step": 5, "lo')
    run(prior_stage(small), out, config, resume=True)
    run(prior_stage(small), tmp_path / "whole", config)
    assert story(out) == story(tmp_path / "whole")
    assert_same_state(out, tmp_path / "whole")
    assert [entry["step"] for entry in story(out)] == [1, 2, 3, 4, 5, 6]


def test_a_run_killed_while_saving_keeps_the_state_before(small, tmp_path, monkeypatch):
    whole, out = tmp_path / "whole", tmp_path / "run"
    run(prior_stage(small), whole)
    save = torch.save

    def die(state, path):
        save(state, path)
        if state["step"] == 4:
            path.write_bytes(path.read_bytes()[:100])
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", die)
        with pytest.raises(KeyboardInterrupt):
            run(prior_stage(small), out)
    assert torch.load(out / "state.pt", weights_only=True)["step"] == 2
    run(prior_stage(small), out, resume=True)
    assert_same_state(whole, out)
    assert not list(out.glob(".state*"))


def test_the_teachers_prior_stays_what_it_was(small, tmp_path):
    """Neither weight decay nor averaging nor dropout moves the frozen network."""
    config = replace(QUICK, weight_decay=0.5, learning_rate=0.01)
    stage = teacher_stage(small)
    train(stage, config, tmp_path / "run")
    learnt, _ = load_model(tmp_path / "run" / "last.safetensors")
    given, _ = load_model(small.prior)
    kept, weights = learnt.prior_net.state_dict(), given.state_dict()
    assert all(torch.equal(kept[name], weights[name]) for name in weights)
    assert torch.equal(learnt.residual_std, stage.residual_std)
    fresh = stage.build().teacher.state_dict()
    assert any(not torch.equal(fresh[k], v) for k, v in learnt.teacher.state_dict().items())


@pytest.mark.parametrize("config", [PAPER, LITE], ids=["paper", "lite"])
def test_a_cache_teaches_what_its_teacher_does(files, tmp_path, config):
    asked = student_stage(files, config=config, teacher=files.teacher)
    stored, half = (student_stage(files, config=config, caches=[files.cache(d)]) for d in ("float32", "float16"))
    torch.testing.assert_close(asked.median, stored.median)
    on_the_fly = run(asked, tmp_path / "asked")
    exact, rounded = run(stored, tmp_path / "stored"), run(half, tmp_path / "half")
    for step, parts in on_the_fly.items():
        assert exact[step] == pytest.approx(parts, rel=1e-5)
        assert rounded[step] == pytest.approx(parts, rel=2e-3)
    for out in ("asked", "stored"):
        assert read_card(tmp_path / out / "last.safetensors").training["teacher"] == "t"


def test_deployed_the_student_has_no_adapters(files, tmp_path):
    stage = student_stage(files, config=LITE, teacher=files.teacher)
    assert isinstance(stage.build(), FeatureMatcher)
    out = tmp_path / "run"
    best = train(stage, QUICK, out)
    state = torch.load(out / "state.pt", weights_only=True)
    assert any(name.startswith("project.") for name in state["model"])
    model, card = load_model(best)
    assert type(model) is FSAStudentLite and card.architecture == "fsa-s-lite"
    assert (card.bands, card.ratios, card.residual_std) == (None, [4], [])
    # It starts another run, with adapters of its own.
    still = replace(QUICK, iterations=1, learning_rate=0.0, ema=0.0)
    train(stage, still, tmp_path / "again", init=best)
    again = load_model(tmp_path / "again" / "last.safetensors")[0].state_dict()
    assert all(torch.equal(again[name], weight) for name, weight in model.state_dict().items())
    unmatched = StudentOptions(feature_weight=0.0)
    plain = student_stage(files, unmatched, LITE, files.teacher).build()
    assert type(plain) is FSAStudentLite


def test_features_of_other_widths_are_refused(files, tmp_path):
    wide = replace(PAPER, width=8)
    stage = student_stage(files, config=wide, teacher=files.teacher)
    with pytest.raises(
        ModelMismatch,
        match=r"the student's features have \[8, 16, 16, 32, 16, 16\] channels, the teacher's "
        r"\[4, 8, 8, 16, 8, 8\]; give both the same width and multipliers, or set feature_weight",
    ):
        train(stage, QUICK, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    unmatched = StudentOptions(feature_weight=0.0)
    model = student_stage(files, unmatched, wide, files.teacher).build()
    assert isinstance(model, FSAStudent)


LEARNERS = {
    "prior": (lambda f: prior_stage(f), 5e-3, {"nll": 0.25}),
    "teacher": (lambda f: teacher_stage(f), 5e-3, {"nll": 0.2}),
    "paper": (lambda f: student_stage(f, teacher=f.teacher), 1e-2, {"hard": 0.15}),
    "lite": (
        lambda f: student_stage(f, config=LITE, teacher=f.teacher), 1e-2,
        {"hard": 0.1, "variance": 0.01},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LEARNERS)
def test_one_batch_can_be_learnt(files, small, tmp_path, name):
    make, rate, falls = LEARNERS[name]
    stage = make(files if name == "lite" else small)
    batch = next(stage.batches(0, 1))
    stage.batches = lambda start, stop: (batch for _ in range(start, stop))
    config = replace(
        QUICK, iterations=40, learning_rate=rate, warmup=5, validate_every=99, checkpoint_every=99,
        weight_decay=0.0,
    )  # fmt: skip
    losses = run(stage, tmp_path / "run", config)
    for part, fall in falls.items():
        begin, end = (np.mean([losses[s][part] for s in span]) for span in (range(1, 6), range(35, 41)))
        assert end < begin - fall, (part, begin, end)


def test_checkpoints_are_networks_with_their_cards(small, tmp_path):
    for name, kind, stage in (
        ("prior", "prior", prior_stage(small)),
        ("fsa-t", "fsa-t", teacher_stage(small, TeacherOptions(steps=2))),
        ("fsa-s", "fsa-s", student_stage(small)),
    ):
        best = train(stage, replace(QUICK, iterations=1), tmp_path / kind)
        model, card = load_model(best)
        assert (card.architecture, card.stage, card.name) == (kind, name, kind)
        assert (card.bands, card.ratios, card.max_value) == (4, [4], 2047.0)
        assert card.registration == "pancollection" and card.sensor == "generic"
        assert card.scores["validation_patches"]["score"] > 0
        assert isinstance(model, GuidedTeacher) == (kind == "fsa-t")
        assert card.steps == (2 if kind == "fsa-t" else 1)
