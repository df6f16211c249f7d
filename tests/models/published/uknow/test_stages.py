"""The stages on PanCollection files: losses, flags, validation, resuming, learning."""

import json
import math
from dataclasses import replace

import h5py
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from patch_files import (
    assert_same_state,
    guided_config,
    patch_data,
    stirred,
    write_patches,
    write_prior,
    write_teacher,
)

from uknowpan.models.checkpoints import load_model, read_card
from uknowpan.models.diffusion import NoiseSchedule
from uknowpan.models.errors import DataError, ModelMismatch
from uknowpan.models.network import FSAStudentLite, LiteConfig
from uknowpan.models.pancollection.file import PanCollectionFile
from uknowpan.models.published.stages import patch_scores, residual_std_of
from uknowpan.models.published.uknow.cache import write_cache
from uknowpan.models.published.uknow.distillation import FrozenTeacher
from uknowpan.models.published.uknow.guided import GuidedTeacher, GuidedTeacherConfig
from uknowpan.models.published.uknow.prior import PriorConfig
from uknowpan.models.published.uknow.stages import (
    FeatureMatcher,
    LiteStudentStage,
    PriorOptions,
    PriorStage,
    StudentBatch,
    StudentOptions,
    StudentStage,
    TeacherOptions,
    TeacherStage,
)
from uknowpan.models.published.uknow.student import FSAStudent, StudentConfig
from uknowpan.models.training.loop import Interrupted, TrainConfig, train
from uknowpan.models.training.run_folder import ConfigMismatch

CONFIG = TrainConfig(
    iterations=4, warmup=1, validate_every=2, checkpoint_every=2, log_every=2, batch_size=4,
    ema=0.5, amp=False,
)  # fmt: skip
GUIDED = guided_config()
PAPER = StudentConfig(4, width=4, blocks=1, heads=2, dropout=0.0)
LITE = LiteConfig(width=8, deep_width=8, deep_blocks=1)
BORDER = 8
"""PAN pixels at ratio 4 whose lms of the lite form has seen what lies beyond the patch."""


class Files:
    """Training and validation files, and the networks that they are trained with."""

    def __init__(self, folder, bands=4, full_scale=2047.0, size=32):
        self.folder, self.size = folder, size
        form = {"bands": bands, "full_scale": full_scale, "size": size}
        self.train = [write_patches(folder / "train.h5", **form)]
        self.valid = [write_patches(folder / "valid.h5", seed=1, **form)]
        self.config = guided_config(bands)
        self.prior = write_prior(folder / "prior.safetensors", self.config.prior)
        self.teacher = write_teacher(folder / "teacher.safetensors", self.config)
        self.paper = replace(PAPER, bands=bands)

    def data(self, **options):
        return patch_data(self.train, self.valid, **options)

    def cache(self, dtype):
        out = self.folder / f"{dtype}.h5"
        if not out.exists():
            with PanCollectionFile(self.train[0]) as file:
                scale = file.header.max_value
                write_cache(FrozenTeacher(self.teacher), file, scale, out, batch_size=4, dtype=dtype)
        return out


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return Files(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Patches of 16 x 16."""
    return Files(tmp_path_factory.mktemp("small"), size=16)


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
    """Eight bands in 10 bits."""
    return Files(tmp_path_factory.mktemp("eight"), bands=8, full_scale=1023.0)


@pytest.fixture(params=["files", "eight"])
def either(request):
    return request.getfixturevalue(request.param)


def prior_stage(files, options=None, config=None, **data):
    return PriorStage(config or files.config.prior, files.data(**data), options or PriorOptions())


def teacher_stage(files, options=None, config=None, prior=None, **data):
    return TeacherStage(
        config or files.config,
        files.data(**data),
        options or TeacherOptions(),
        prior or files.prior,
    )


def student_stage(files, options=None, config=PAPER, teacher=None, **data):
    asked = teacher and FrozenTeacher(teacher)
    kind = LiteStudentStage if isinstance(config, LiteConfig) else StudentStage
    return kind(config, files.data(**data), options or StudentOptions(), asked)


def seeded(seed=5):
    return torch.Generator().manual_seed(seed)


class Drawn:
    """What a stage draws for a batch: the same calls, written out."""

    def __init__(self, x0, share=0.0, seed=5):
        generator, count = seeded(seed), len(x0)
        t = torch.randint(0, 500, (count,), generator=generator)
        at_end = torch.rand(count, generator=generator) < share
        self.t = torch.where(at_end, 499, t)
        noise = torch.randn(x0.shape, generator=generator)
        self.again = float(torch.rand(1, generator=generator)) < 0.5
        left = NoiseSchedule.cosine(500).alphas_cumprod[self.t].view(-1, 1, 1, 1)
        self.x_t = (left.sqrt() * x0 + (1 - left).sqrt() * noise).float()


def told(model, drawn, condition, slot=True):
    """What the network says of a batch."""
    with torch.no_grad():
        if slot and drawn.again:
            condition = replace(condition, self_cond=model(drawn.x_t, drawn.t, condition).x0)
        return model(drawn.x_t, drawn.t, condition)


def close(found, expected):
    assert float(found.detach()) == pytest.approx(float(expected), rel=1e-4)


def run(stage, out, config=CONFIG, **options):
    """Train; the losses of every step."""
    losses = {}
    train(stage, config, out, on_step=losses.__setitem__, **options)
    return losses


# -------------------------------------------------------------------------------------- losses


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_the_prior_learns_by_its_likelihood(either, beta):
    stage = prior_stage(either, PriorOptions(beta=beta))
    model, batch = stirred(stage.build(), 0.02), next(stage.batches(0, 1))
    mean, variance = (x.detach().double() for x in model(batch.lms, batch.pan))
    miss = (mean - batch.gt) ** 2
    expected = (variance**beta * 0.5 * (miss / variance + variance.log())).mean()
    found = stage.losses(model, batch, seeded())
    assert list(found) == ["nll"]
    close(found["nll"], expected)


@pytest.mark.parametrize("share", [0.0, 0.6])
def test_the_teacher_learns_by_its_beta_likelihood(either, share):
    stage = teacher_stage(either, TeacherOptions(terminal_share=share))
    assert stage.options.beta == 0.5
    model, batch = stirred(stage.build(), 0.05), next(stage.batches(0, 1))
    x0 = (batch.gt - batch.lms) / stage.residual_std.view(1, -1, 1, 1)
    assert 0.5 < float(x0.square().mean()) < 2
    condition, _ = stage.view(batch)
    assert condition.lms is batch.lms and condition.pan is batch.pan
    first, other = Drawn(x0, share, 0), 1
    while Drawn(x0, share, other).again == first.again:
        other += 1
    for seed in (0, other):  # self-conditioned and not
        drawn = Drawn(x0, share, seed)
        said = told(model, drawn, condition)
        variance = (2 * said.log_sigma).exp()
        miss = (said.x0 - x0) ** 2
        expected = (variance.sqrt() * 0.5 * (miss / variance + variance.log())).mean()
        close(stage.losses(model, batch, seeded(seed))["nll"], expected)


def hand_theta(stage, variance, raw):
    return variance if raw else variance / (variance + stage.median.view(1, -1, 1, 1))


def feature_sum(mine, theirs):
    """Over pairs brought to the coarser grid, METHODS 1.5."""
    total = 0.0
    for a, b in zip(mine, theirs, strict=True):
        size = min(a.shape[-1], b.shape[-1])
        a, b = (F.avg_pool2d(x, x.shape[-1] // size) for x in (a, b))
        total += float(((a - b).double() ** 2 + 1e-12).sqrt().mean())
    return total


@pytest.mark.parametrize("raw", [False, True])
def test_the_published_student_learns_from_truth_and_teacher(either, raw):
    options = StudentOptions(raw_uncertainty=raw)
    stage = student_stage(either, options, either.paper, either.teacher)
    model, batch = stirred(stage.build(), 0.05), next(stage.batches(0, 1))
    patches, scale = batch.patches, stage.residual_std.view(1, -1, 1, 1)
    answer = stage.teacher.answer(patches)
    x0 = (patches.gt - patches.lms) / scale
    said = told(model, Drawn(x0), stage.view(patches)[0])
    theta = hand_theta(stage, answer.variance, raw)
    wanted = (answer.sr - patches.lms) / scale
    found = stage.losses(model, batch, seeded())
    assert list(found) == ["hard", "soft", "features"]
    close(found["hard"], ((1 + theta) * (x0 - said.x0).abs()).mean())
    close(found["soft"], 0.1 * ((1 - theta) * (wanted - said.x0).abs()).mean())
    close(found["features"], 0.001 * feature_sum(said.features, answer.features))


@pytest.mark.parametrize("raw", [False, True])
def test_the_lite_student_leaves_the_border_out(either, raw):
    options = StudentOptions(raw_uncertainty=raw)
    stage = student_stage(either, options, LITE, either.teacher)
    assert stage.border == BORDER
    matcher, batch = stirred(stage.build(), 0.05), next(stage.batches(0, 1))
    patches = batch.patches
    condition, scale = stage.conditioner.condition(patches)
    lms = condition.lms
    assert not torch.equal(lms, patches.lms)  # laid on the truth by its own interpolation
    x0 = (patches.gt - lms) / scale
    said = told(matcher, Drawn(x0), condition, slot=False)
    answer = stage.teacher.answer(patches)
    inner = (..., slice(BORDER, -BORDER), slice(BORDER, -BORDER))
    theta = hand_theta(stage, answer.variance, raw)[inner]
    soft = ((answer.sr - lms) / scale - said.x0)[inner].abs()
    miss = (said.x0 - x0)[inner]
    variance = (2 * said.log_sigma[inner]).exp()
    nll = variance.sqrt() * 0.5 * (miss**2 / variance + variance.log())
    found = stage.losses(matcher, batch, seeded())
    close(found["hard"], ((1 + theta) * miss.abs()).mean())
    close(found["soft"], 0.1 * ((1 - theta) * soft).mean())
    close(found["features"], 0.001 * feature_sum(said.features, answer.features))
    close(found["variance"], 0.1 * nll.mean())
    # What lies in the border changes nothing.
    moved = patches.gt.clone()
    moved[..., :BORDER, :] += 0.5
    x_t_kept = replace(patches, gt=moved)
    stage.denoise = lambda model, *rest: said
    again = stage.losses(matcher, StudentBatch(x_t_kept), seeded())
    close(again["hard"], float(found["hard"].detach()))


def test_without_a_teacher_the_truth_alone(files):
    paper, lite = (student_stage(files, config=c) for c in (PAPER, LITE))
    for stage, names in ((paper, ["hard"]), (lite, ["hard", "variance"])):
        model, batch = stirred(stage.build(), 0.05), next(stage.batches(0, 1))
        assert list(stage.losses(model, batch, seeded())) == names
    x0 = (batch.patches.gt - batch.patches.lms) / paper.residual_std.view(1, -1, 1, 1)
    model = stirred(paper.build(), 0.05)
    said = told(model, Drawn(x0), paper.view(batch.patches)[0])
    found = paper.losses(model, batch, seeded())["hard"]
    close(found, (said.x0 - x0).abs().mean())


def test_the_median_of_the_variance_makes_half_a_weight(files):
    stage = student_stage(files, config=PAPER, teacher=files.teacher)
    dataset = stage.data.dataset
    variance = torch.cat([stage.teacher.answer(dataset[i]).variance for i in range(len(dataset))])
    median = variance.transpose(0, 1).flatten(1).median(1).values
    torch.testing.assert_close(stage.median, median, rtol=0.1, atol=0)
    theta = stage.theta(variance)
    assert float(theta.min()) >= 0 and float(theta.max()) < 1
    assert 0.45 < float((theta > 0.5).float().mean()) < 0.55
    at_median = stage.median.view(1, 4, 1, 1).expand(1, 4, 2, 2)
    torch.testing.assert_close(stage.theta(at_median), torch.full((1, 4, 2, 2), 0.5))


# ---------------------------------------------------------------------------------- residuals


def test_residual_std_is_that_of_numpy(either):
    with h5py.File(either.train[0]) as file:
        miss = (file["gt"][()].astype("f8") - file["lms"][()]) / file.attrs["max_value"]
    expected = np.sqrt((miss**2).mean((0, 2, 3)))
    dataset = either.data().dataset
    np.testing.assert_allclose(residual_std_of(dataset).numpy(), expected, rtol=1e-5)
    some = np.sqrt((miss[[0, 3, 6]] ** 2).mean((0, 2, 3)))
    np.testing.assert_allclose(residual_std_of(dataset, 3).numpy(), some, rtol=1e-5)


def test_a_band_without_residual(tmp_path, files):
    same = write_patches(tmp_path / "same.h5", size=16)
    with h5py.File(same, "r+") as file:
        file["gt"][:, 2] = file["lms"][:, 2]
    data = patch_data([same], [same])
    with pytest.raises(DataError, match=r"^In band 3 of .* the same, .* leave that band out\.$"):
        TeacherStage(GUIDED, data, TeacherOptions(), files.prior)


def test_raw_residual_divides_by_nothing(files):
    for stage in (
        teacher_stage(files, TeacherOptions(raw_residual=True)),
        student_stage(files, StudentOptions(raw_residual=True)),
    ):
        assert stage.residual_std.tolist() == [1.0] * 4
        assert stage.card("x", 1, {}).residual_std == [1.0] * 4
    raw = teacher_stage(files, TeacherOptions(raw_residual=True)).build()
    assert raw.residual_std.tolist() == [1.0] * 4
    stage = teacher_stage(files)
    assert stage.build().residual_std.tolist() == stage.residual_std.tolist()
    assert stage.card("x", 1, {}).residual_std == pytest.approx(stage.residual_std.tolist())


# -------------------------------------------------------------------------------------- flags


class Heard:
    """Timesteps and slots that a network is called with."""

    def __init__(self, model):
        self.calls, self.answers = [], []
        model.register_forward_pre_hook(lambda module, given: self.calls.append(given))
        model.register_forward_hook(lambda module, given, said: self.answers.append(said.x0))

    @property
    def timesteps(self):
        return [int(call[1][0]) for call in self.calls]

    @property
    def slots(self):
        return [call[2].self_cond for call in self.calls]


STAGES = {
    "teacher": lambda files, **o: teacher_stage(files, TeacherOptions(**o)),
    "paper": lambda files, **o: student_stage(files, StudentOptions(**o)),
    "lite": lambda files, **o: student_stage(files, StudentOptions(**o), LITE),
}


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("respaced", [False, True])
def test_timesteps_that_the_network_is_told(files, name, respaced):
    stage = STAGES[name](files, steps=4, respaced_time_index=respaced)
    model = stirred(stage.build())
    heard = Heard(model)
    with torch.no_grad():
        stage.predict(model, stage.data.valid[0], 0)
    assert heard.timesteps == ([3, 2, 1, 0] if respaced else [499, 374, 249, 124])


@pytest.mark.parametrize("name", ["teacher", "paper"])
@pytest.mark.parametrize("carried", [True, False])
def test_self_conditioning_at_sampling(files, name, carried):
    stage = STAGES[name](files, steps=3, self_conditioning=carried)
    assert stage.card("x", 1, {}).self_conditioning is carried
    model = stirred(stage.build())
    heard = Heard(model)
    with torch.no_grad():
        stage.predict(model, stage.data.valid[0], 0)
    first, *later = heard.slots
    assert first is None and len(later) == 2
    for slot, said in zip(later, heard.answers, strict=False):
        assert torch.equal(slot, said) if carried else slot is None


@pytest.mark.parametrize("name", ["teacher", "paper"])
def test_half_of_the_training_batches_are_self_conditioned(small, name):
    stage = STAGES[name](small)
    model, batch = stirred(stage.build()), next(stage.batches(0, 1))
    heard, twice = Heard(model), 0
    with torch.no_grad():
        for seed in range(40):
            heard.calls.clear(), heard.answers.clear()
            stage.losses(model, batch, seeded(seed))
            assert heard.slots[0] is None
            if len(heard.calls) == 2:
                twice += 1
                assert torch.equal(heard.slots[1], heard.answers[0])
                assert heard.calls[0][0] is heard.calls[1][0]  # the same x_t
    assert 12 <= twice <= 28


def test_without_a_slot_there_is_one_pass(files):
    config = replace(files.paper, self_conditioning=False)
    for stage in (student_stage(files, config=config), student_stage(files, config=LITE)):
        model, batch = stirred(stage.build()), next(stage.batches(0, 1))
        heard = Heard(model)
        for seed in range(6):
            stage.losses(model, batch, seeded(seed))
        assert len(heard.calls) == 6 and heard.slots == [None] * 6


@pytest.mark.parametrize("amp", [True, False])
def test_a_first_pass_takes_no_gradient_from_the_second(small, amp):
    """Autocast keeps casts of weights: those made without gradients must not be used with."""
    stage = STAGES["paper"](small)
    model, batch = stirred(stage.build()), next(stage.batches(0, 1))
    seed = next(s for s in range(9) if Drawn(batch.patches.lms, seed=s).again)
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        parts = stage.losses(model, batch, seeded(seed))
    sum(parts.values()).backward()
    assert all(float(p.grad.abs().sum()) > 0 for p in model.unet.parameters() if p.dim() == 4)


@pytest.mark.parametrize("dead", [True, False])
def test_dead_prior(small, dead):
    config = replace(GUIDED, teacher=replace(GUIDED.teacher, dead_prior=dead))
    stage = teacher_stage(small, config=config)
    torch.manual_seed(0)
    model = stage.build().train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0)
    batch, before = next(stage.batches(0, 1)), model.teacher.prior.state_dict()
    before = {name: weight.clone() for name, weight in before.items()}
    for step in range(3):
        optimizer.zero_grad()
        stage.losses(model, batch, seeded(step))["nll"].backward()
        optimizer.step()
    reached = [float(p.grad.abs().max()) > 0 for p in model.teacher.prior.parameters()]
    after = model.teacher.prior.state_dict()
    moved = [not torch.equal(before[name], after[name]) for name in before]
    assert not any(reached + moved) if dead else all(reached + moved)


@pytest.mark.parametrize("highpass", [True, False])
def test_highpass_pan_does_not_see_brightness(files, highpass):
    guided = guided_config(highpass_pan=highpass)
    prior = write_prior(files.folder / f"highpass-{highpass}.safetensors", guided.prior)
    for stage in (
        prior_stage(files, config=guided.prior),
        teacher_stage(files, config=guided, prior=prior),
        student_stage(files, config=replace(PAPER, highpass_pan=highpass)),
    ):
        model, patches = stirred(stage.build()), stage.data.valid[0]
        brighter = replace(patches, pan=patches.pan + 0.2)
        with torch.no_grad():
            one, other = (stage.predict(model, p, 0)[0] for p in (patches, brighter))
        difference = float((one - other).abs().max())
        assert difference < 1e-5 if highpass else difference > 1e-4, stage.name


def test_raw_uncertainty_is_the_variance_itself(files):
    stage = student_stage(files, StudentOptions(raw_uncertainty=True), teacher=files.teacher, config=LITE)
    variance = torch.rand(1, 4, 2, 2)
    assert stage.theta(variance) is variance
    assert stage.median is None  # for which the teacher would be asked about many patches


# ------------------------------------------------------------------------------------ resuming


DROPPING = GuidedTeacherConfig(replace(GUIDED.teacher, dropout=0.2, drop_path=0.3), PriorConfig(4, width=4, blocks=1))
RUNS = {
    "prior": lambda f: prior_stage(f),
    "prior, workers": lambda f: prior_stage(f, workers=2),
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
    whole, broken = tmp_path / "whole" / "run", tmp_path / "broken" / "run"
    losses = run(RUNS[name](made), whole)
    asked = iter([False, False, True])
    with pytest.raises(Interrupted, match="stopped after step 3; --resume"):
        run(RUNS[name](made), broken, should_stop=lambda: next(asked))
    assert run(RUNS[name](made), broken, resume=True) == {4: losses[4]}
    assert_same_state(whole, broken)
    for file in ("last.safetensors", "best.safetensors"):
        assert (whole / file).read_bytes() == (broken / file).read_bytes()
    assert story(whole) == story(broken)


def story(out):
    """The log without its clock."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def test_workers_read_the_same(small, tmp_path):
    alone = run(RUNS["prior"](small), tmp_path / "alone")
    assert run(RUNS["prior, workers"](small), tmp_path / "helped") == alone
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
    best = train(prior_stage(small), CONFIG, out)
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    assert train(prior_stage(small), CONFIG, out, resume=True) == best
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before


def test_a_log_tells_every_step_once(small, tmp_path):
    """A run that dies between two states does some steps again."""
    config, out = replace(CONFIG, iterations=6, checkpoint_every=3, log_every=1), tmp_path / "run"

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
    assert not (out / ".state.tmp").exists()


def test_the_teachers_prior_stays_what_it_was(small, tmp_path):
    """Neither weight decay nor averaging nor dropout moves the frozen network."""
    config = replace(CONFIG, weight_decay=0.5, learning_rate=0.01)
    stage = teacher_stage(small)
    train(stage, config, tmp_path / "run")
    learnt, _ = load_model(tmp_path / "run" / "last.safetensors")
    given, _ = load_model(small.prior)
    kept, weights = learnt.prior_net.state_dict(), given.state_dict()
    assert all(torch.equal(kept[name], weights[name]) for name in weights)
    assert torch.equal(learnt.residual_std, stage.residual_std)
    fresh = stage.build().teacher.state_dict()
    assert any(not torch.equal(fresh[k], v) for k, v in learnt.teacher.state_dict().items())


# --------------------------------------------------------------------------- teacher and cache


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
    best = train(stage, CONFIG, out)
    state = torch.load(out / "state.pt", weights_only=True)
    assert any(name.startswith("project.") for name in state["model"])
    model, card = load_model(best)
    assert type(model) is FSAStudentLite and card.architecture == "fsa-s-lite"
    assert (card.bands, card.ratios, card.residual_std) == (None, [4], [])
    # It starts another run, with adapters of its own.
    still = replace(CONFIG, iterations=1, learning_rate=0.0, ema=0.0)
    train(stage, still, tmp_path / "again", init=best)
    again = load_model(tmp_path / "again" / "last.safetensors")[0].state_dict()
    assert all(torch.equal(again[name], weight) for name, weight in model.state_dict().items())
    unmatched = StudentOptions(feature_weight=0.0)
    plain = student_stage(files, unmatched, LITE, files.teacher).build()
    assert type(plain) is FSAStudentLite


def test_adapters_learn(files, tmp_path):
    """Features are compared behind them, so their gradient is that of the distance."""
    stage = student_stage(files, config=LITE, teacher=files.teacher)
    torch.manual_seed(0)
    model = stage.build()
    stage.losses(model, next(stage.batches(0, 1)), seeded())["features"].backward()
    for projection in model.project:
        assert float(projection.weight.grad.abs().max()) > 0


def test_features_of_other_widths_are_refused(files, tmp_path):
    wide = replace(PAPER, width=8)
    stage = student_stage(files, config=wide, teacher=files.teacher)
    with pytest.raises(
        ModelMismatch,
        match=r"the student's features have \[8, 16, 16, 32, 16, 16\] channels, the teacher's "
        r"\[4, 8, 8, 16, 8, 8\]; give both the same width and multipliers, or set feature_weight",
    ):
        train(stage, CONFIG, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    unmatched = StudentOptions(feature_weight=0.0)
    model = student_stage(files, unmatched, wide, files.teacher).build()
    assert isinstance(model, FSAStudent)


def test_a_teacher_of_coarser_features_teaches_the_published_student(files):
    coarse = write_teacher(files.folder / "coarse.safetensors", guided_config(patch=2))
    stage = student_stage(files, config=PAPER, teacher=coarse)
    model, batch = stirred(stage.build(), 0.05), next(stage.batches(0, 1))
    answer = stage.teacher.answer(batch.patches)
    assert answer.features[0].shape[-1] == 16
    x0 = (batch.patches.gt - batch.patches.lms) / stage.residual_std.view(1, -1, 1, 1)
    said = told(model, Drawn(x0), stage.view(batch.patches)[0])
    found = stage.losses(model, batch, seeded())["features"]
    close(found, 0.001 * feature_sum(said.features, answer.features))


# ---------------------------------------------------------------------------------- validating


def test_a_perfect_network_scores_perfectly(files, monkeypatch):
    stage = prior_stage(files)
    monkeypatch.setattr(stage, "predict", lambda model, patches, place: (patches.gt, None))
    scores = stage.validate(stage.build())
    assert scores["score"] == scores["ergas"] == 0
    assert scores["sam"] == pytest.approx(0, abs=1e-4)
    assert scores["q2n"] == pytest.approx(1) and scores["psnr"] > 100
    assert "coverage_1_sigma" not in scores


def darkened(tmp_path, dark, size=16):
    """A validation file of 36 patches, of which some are zero."""
    path = write_patches(tmp_path / "dark.h5", seed=1, size=size)
    with h5py.File(path, "r+") as file:
        for name in ("gt", "lms", "ms", "pan"):
            for i in dark:
                file[name][i] = 0
    return path


@pytest.mark.parametrize("miss", [0.0, 0.01])
def test_patches_of_zeros_are_left_out_of_scores(small, tmp_path, miss):
    """They have no angle, no relative error and, hit exactly, no finite PSNR."""
    paths = [darkened(tmp_path, [0, 5, 35])]
    dark = PriorStage(GUIDED.prior, patch_data(small.train, paths, samples=99), PriorOptions())
    full = prior_stage(small)
    dark.predict = lambda model, p, place: (p.lms + miss, None)
    scores = dark.validate(dark.build())
    assert all(math.isfinite(value) for value in scores.values())
    left = [full.data.valid[i] for i in range(36) if i not in (0, 5, 35)]
    each = [patch_scores(p.lms + miss, p, 2047.0) for p in left]
    sam, ergas, psnr = (sum(float(s[name]) for s in each) for name in ("sam", "ergas", "psnr"))
    assert scores["sam"] == pytest.approx(sam / 33)
    # A band of zeros that is hit exactly has an ERGAS of 0, and one that is missed a PSNR of 40.
    assert scores["ergas"] == pytest.approx(ergas / (33 if miss else 36))
    assert scores["psnr"] == pytest.approx((psnr + 3 * 40) / 36 if miss else psnr / 33)


def test_nothing_but_zeros_has_no_score(small, tmp_path):
    paths = [darkened(tmp_path, range(36))]
    stage = PriorStage(GUIDED.prior, patch_data(small.train, paths), PriorOptions())
    best = train(stage, CONFIG, tmp_path / "run")
    assert best.name == "last.safetensors"
    found = story(tmp_path / "run")[-1]
    assert math.isnan(found["score"]) and math.isnan(found["sam"])


def test_a_result_that_is_no_number_is_not_left_out(small):
    stage = prior_stage(small)

    def predict(model, patches, place):
        hrms = patches.gt.clone()
        hrms[0, 0, 0, 0] = math.nan
        return hrms, None

    stage.predict = predict
    assert all(math.isnan(value) for value in stage.validate(stage.build()).values())


@pytest.mark.parametrize("change", ["name", "count", "full scale"])
def test_a_run_goes_on_only_on_its_data(small, tmp_path, change):
    out = tmp_path / "run"
    with pytest.raises(Interrupted):
        run(prior_stage(small), out, should_stop=lambda: True)
    name = "other.h5" if change == "name" else "train.h5"
    path = tmp_path / "elsewhere" / name
    path.parent.mkdir()
    size = {"count": 32}.get(change, 16)
    write_patches(path, size=size, full_scale=1023.0 if change == "full scale" else 2047.0)
    stage = PriorStage(GUIDED.prior, patch_data([path], small.valid), PriorOptions())
    said = {
        "name": r"files \['train\.h5'\] \(here \['other\.h5'\]\)",
        "count": r"samples \[36\] \(here \[9\]\)",
        "full scale": r"full_scales \[2047\.0\] \(here \[1023\.0\]\)",
    }[change]
    with pytest.raises(ConfigMismatch, match=rf"was begun with data\.train\.{said}; --resume"):
        train(stage, CONFIG, out, resume=True)
    assert str(small.folder) not in (out / "config.json").read_text()


def test_each_file_is_scored_at_its_own_full_scale(tmp_path, files):
    """Digital numbers of 10 bits are no part of those of 11."""
    paths = [
        write_patches(tmp_path / "ten.h5", full_scale=1023.0, seed=2),
        write_patches(tmp_path / "eleven.h5", full_scale=2047.0, seed=3),
    ]
    stage = PriorStage(files.config.prior, patch_data(files.train, paths, samples=99), PriorOptions())
    seen = []

    def predict(model, patches, place):
        seen.append(patches)
        return patches.lms, None

    stage.predict = predict
    scores = stage.validate(stage.build())
    assert [len(p) for p in seen] == [9, 9]
    values = []
    for path, batch in zip(paths, seen, strict=True):
        with h5py.File(path) as file:
            gt, lms = (file[name][()].astype("f8") for name in ("gt", "lms"))
            top = file.attrs["max_value"]
        np.testing.assert_allclose(batch.gt.numpy() * top, gt, rtol=1e-5)
        rmse = np.sqrt(((lms - gt) ** 2).mean((2, 3)))
        values += list(25 * np.sqrt(((rmse / gt.mean((2, 3))) ** 2).mean(1)))
    assert scores["ergas"] == pytest.approx(np.mean(values), rel=1e-4)


def test_coverage_counts_errors_below_the_sigma(files):
    stage = prior_stage(files, samples=9)
    stage.predict = lambda model, p, place: (p.lms, torch.full_like(p.lms, 0.02))
    with h5py.File(files.valid[0]) as file:
        miss = np.abs(file["gt"][()].astype("f8") - file["lms"][()]) / 2047
    found = stage.validate(stage.build())["coverage_1_sigma"]
    assert found == pytest.approx((miss < 0.02).mean(), abs=1e-3)
    assert 0.1 < found < 0.99


@pytest.mark.parametrize("samples", [1, 5, 99])
def test_validation_reads_so_many_patches(small, monkeypatch, samples):
    stage, read = prior_stage(small, samples=samples), []
    whole = PanCollectionFile.read
    monkeypatch.setattr(
        PanCollectionFile,
        "read",
        lambda self, indices: (read.extend((self.path, i) for i in indices), whole(self, indices))[1],
    )
    stage.validate(stage.build())
    assert len(read) == len(set(read)) == min(samples, 36)
    assert {path for path, _ in read} == {str(small.valid[0])}


def test_the_lite_student_validates_by_the_validation_scenes(files):
    """Statistics are those of the patches at hand; training goes on with its own."""
    stage = student_stage(files, config=LITE)
    model, used = stirred(stage.build(), 0.02), []
    ours, theirs = stage.conditioner, stage.valid_conditioner
    assert repr(ours.statistics) != repr(theirs.statistics)
    for conditioner in (ours, theirs):
        whole = conditioner.condition
        conditioner.condition = lambda p, c=conditioner, w=whole: (used.append(c), w(p))[1]
    stage.validate(model)
    assert set(used) == {theirs} and stage.conditioner is ours


def test_examples_are_a_few_validation_patches(files):
    stage = prior_stage(files)
    shown = stage.examples(stage.build())
    first = stage.data.valid[0]
    assert shown.pan.shape == (4, 1, 32, 32) and shown.hrms.shape == (4, 4, 32, 32)
    assert torch.equal(shown.gt[:1], first.gt) and (shown.sigma > 0).all()


# ------------------------------------------------------------------------------- what is refused


def test_networks_of_other_bands(files, eight):
    three = guided_config(3)
    for make in (
        lambda: prior_stage(files, config=PriorConfig(8, width=4, blocks=1)),
        lambda: teacher_stage(files, config=three),
        lambda: student_stage(files, config=replace(PAPER, bands=3)),
    ):
        with pytest.raises(ModelMismatch, match=r"takes [38] bands, the files hold 4; give both"):
            make()
    with pytest.raises(ModelMismatch, match="serves 8 bands, but the patches have 4"):
        student_stage(files, config=PAPER, teacher=eight.teacher)


def test_patches_that_the_network_cannot_halve(tmp_path):
    odd = Files(tmp_path, size=24)
    wants = {
        16: lambda: teacher_stage(odd, config=guided_config(patch=2)),
        32: lambda: student_stage(odd, config=replace(PAPER, multipliers=(1,) * 6)),
    }
    for factor, make in wants.items():
        says = rf"train\.h5 has patches of 24 x 24 pixels, .* multiples of {factor}; cut the data"
        with pytest.raises(ModelMismatch, match=says):
            make()
    student_stage(odd, config=LITE)


def test_patches_that_are_all_border(small):
    with pytest.raises(ModelMismatch, match=r"16 x 16 pixels, .* leaves out 8 along every edge; "):
        student_stage(small, config=LITE)


def test_steps_that_the_schedule_has_not(files):
    with pytest.raises(ModelMismatch, match="501 sampling steps do not fit 500 timesteps"):
        student_stage(files, StudentOptions(steps=501))


def test_a_checkpoint_that_is_no_prior(files, tmp_path):
    stage = teacher_stage(files, prior=files.teacher)
    with pytest.raises(ModelMismatch, match=r"teacher\.safetensors \(fsa-t\) is not the PriorNet"):
        train(stage, CONFIG, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_sample_that_is_no_number_is_said_in_one_sentence(small, tmp_path, workers):
    """Opening a file looks into some samples only; the others are met while training."""
    stage = prior_stage(small, workers=workers)
    file = tmp_path / "nan.h5"
    file.write_bytes(small.train[0].read_bytes())
    with h5py.File(file, "r+") as opened:
        opened["lms"][3, 1, 5, 5] = np.nan
    stage.data.dataset.files[0].path = str(file)
    with pytest.raises(DataError) as caught:
        list(stage.batches(0, 9))
    said = f"{file}: lms of sample 3 holds NaN or infinite values; leave such samples out."
    assert str(caught.value) == said


# ------------------------------------------------------------------------------------ learning


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
        CONFIG, iterations=40, learning_rate=rate, warmup=5, validate_every=99, checkpoint_every=99,
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
        best = train(stage, replace(CONFIG, iterations=1), tmp_path / kind)
        model, card = load_model(best)
        assert (card.architecture, card.stage, card.name) == (kind, name, kind)
        assert (card.bands, card.ratios, card.max_value) == (4, [4], 2047.0)
        assert card.registration == "pancollection" and card.sensor == "generic"
        assert card.scores["validation_patches"]["score"] > 0
        assert isinstance(model, GuidedTeacher) == (kind == "fsa-t")
        assert card.steps == (2 if kind == "fsa-t" else 1)
