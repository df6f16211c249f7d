"""The stages on PanCollection files: losses, flags, sampling, what they refuse."""

from dataclasses import replace

import h5py
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from patch_files import (
    LITE,
    PAPER,
    QUICK,
    Files,
    guided_config,
    patch_data,
    prior_stage,
    stirred,
    student_stage,
    teacher_stage,
    write_patches,
    write_prior,
    write_teacher,
)

from uknowpan.models.diffusion import NoiseSchedule
from uknowpan.models.errors import DataError, ModelMismatch
from uknowpan.models.published.stages import residual_std_of
from uknowpan.models.published.uknow.prior import PriorConfig
from uknowpan.models.published.uknow.stages import (
    PriorOptions,
    StudentBatch,
    StudentOptions,
    TeacherOptions,
    TeacherStage,
)
from uknowpan.models.training.loop import train

GUIDED = guided_config()
BORDER = 8
"""PAN pixels at ratio 4 whose lms of the lite form has seen what lies beyond the patch."""


def seeded(seed=5):
    return torch.Generator().manual_seed(seed)


class Drawn:
    """A stage's draws for a batch: the same calls, written out."""

    def __init__(self, x0, share=0.0, seed=5):
        generator, count = seeded(seed), len(x0)
        t = torch.randint(0, 500, (count,), generator=generator)
        at_end = torch.rand(count, generator=generator) < share
        self.t = torch.where(at_end, 499, t)
        noise = torch.randn(x0.shape, generator=generator)
        self.again = float(torch.rand(1, generator=generator)) < 0.5
        left = NoiseSchedule.cosine(500).alphas_cumprod[self.t].view(-1, 1, 1, 1)
        self.x_t = (left.sqrt() * x0 + (1 - left).sqrt() * noise).float()


def predicted(model, drawn, condition, slot=True):
    """The network's prediction for a batch."""
    with torch.no_grad():
        if slot and drawn.again:
            condition = replace(condition, self_cond=model(drawn.x_t, drawn.t, condition).x0)
        return model(drawn.x_t, drawn.t, condition)


def close(parts, expected):
    assert float(parts.detach()) == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_the_prior_learns_by_its_likelihood(either, beta):
    stage = prior_stage(either, PriorOptions(beta=beta))
    model, batch = stirred(stage.build(), 0.02), next(stage.batches(0, 1))
    mean, variance = (x.detach().double() for x in model(batch.lms, batch.pan))
    miss = (mean - batch.gt) ** 2
    expected = (variance**beta * 0.5 * (miss / variance + variance.log())).mean()
    parts = stage.losses(model, batch, seeded())
    assert list(parts) == ["nll"]
    close(parts["nll"], expected)


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
        output = predicted(model, drawn, condition)
        variance = (2 * output.log_sigma).exp()
        miss = (output.x0 - x0) ** 2
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
    output = predicted(model, Drawn(x0), stage.view(patches)[0])
    theta = hand_theta(stage, answer.variance, raw)
    wanted = (answer.sr - patches.lms) / scale
    parts = stage.losses(model, batch, seeded())
    assert list(parts) == ["hard", "soft", "features"]
    close(parts["hard"], ((1 + theta) * (x0 - output.x0).abs()).mean())
    close(parts["soft"], 0.1 * ((1 - theta) * (wanted - output.x0).abs()).mean())
    close(parts["features"], 0.001 * feature_sum(output.features, answer.features))


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
    output = predicted(matcher, Drawn(x0), condition, slot=False)
    answer = stage.teacher.answer(patches)
    inner = (..., slice(BORDER, -BORDER), slice(BORDER, -BORDER))
    theta = hand_theta(stage, answer.variance, raw)[inner]
    soft = ((answer.sr - lms) / scale - output.x0)[inner].abs()
    miss = (output.x0 - x0)[inner]
    variance = (2 * output.log_sigma[inner]).exp()
    nll = variance.sqrt() * 0.5 * (miss**2 / variance + variance.log())
    parts = stage.losses(matcher, batch, seeded())
    close(parts["hard"], ((1 + theta) * miss.abs()).mean())
    close(parts["soft"], 0.1 * ((1 - theta) * soft).mean())
    close(parts["features"], 0.001 * feature_sum(output.features, answer.features))
    close(parts["variance"], 0.1 * nll.mean())
    # What lies in the border changes nothing.
    moved = patches.gt.clone()
    moved[..., :BORDER, :] += 0.5
    x_t_kept = replace(patches, gt=moved)
    stage.denoise = lambda model, *rest: output
    again = stage.losses(matcher, StudentBatch(x_t_kept), seeded())
    close(again["hard"], float(parts["hard"].detach()))


def test_without_a_teacher_the_truth_alone(files):
    paper, lite = (student_stage(files, config=c) for c in (PAPER, LITE))
    for stage, names in ((paper, ["hard"]), (lite, ["hard", "variance"])):
        model, batch = stirred(stage.build(), 0.05), next(stage.batches(0, 1))
        assert list(stage.losses(model, batch, seeded())) == names
    x0 = (batch.patches.gt - batch.patches.lms) / paper.residual_std.view(1, -1, 1, 1)
    model = stirred(paper.build(), 0.05)
    output = predicted(model, Drawn(x0), paper.view(batch.patches)[0])
    parts = paper.losses(model, batch, seeded())["hard"]
    close(parts, (output.x0 - x0).abs().mean())


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


class Heard:
    """Timesteps and slots that a network is called with."""

    def __init__(self, model):
        self.calls, self.answers = [], []
        model.register_forward_pre_hook(lambda module, given: self.calls.append(given))
        model.register_forward_hook(lambda module, given, output: self.answers.append(output.x0))

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
@pytest.mark.parametrize(
    ("option", "timesteps"),
    [
        ({}, [499, 374, 249, 124]),
        ({"respaced_time_index": True}, [3, 2, 1, 0]),
        ({"strided_timesteps": True}, [375, 250, 125, 0]),
    ],
)
def test_timesteps_that_the_network_gets(files, name, option, timesteps):
    stage = STAGES[name](files, steps=4, **option)
    model = stirred(stage.build())
    heard = Heard(model)
    with torch.no_grad():
        stage.predict(model, stage.data.valid[0], 0)
    assert heard.timesteps == timesteps


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
    for slot, output in zip(later, heard.answers, strict=False):
        assert torch.equal(slot, output) if carried else slot is None


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


def test_networks_of_other_bands(files, eight):
    three = guided_config(3)
    for make in (
        lambda: prior_stage(files, config=PriorConfig(8, width=4, blocks=1)),
        lambda: teacher_stage(files, config=three),
        lambda: student_stage(files, config=replace(PAPER, bands=3)),
    ):
        with pytest.raises(ModelMismatch, match=r"takes [38] bands, the files hold 4; give both"):
            make()
    with pytest.raises(ValueError, match="was built for 8"):
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
        train(stage, QUICK, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_adapters_learn(files, tmp_path):
    """Features are compared behind them, so their gradient is that of the distance."""
    stage = student_stage(files, config=LITE, teacher=files.teacher)
    torch.manual_seed(0)
    model = stage.build()
    stage.losses(model, next(stage.batches(0, 1)), seeded())["features"].backward()
    for projection in model.project:
        assert float(projection.weight.grad.abs().max()) > 0


def test_a_teacher_of_coarser_features_teaches_the_published_student(files):
    coarse = write_teacher(files.folder / "coarse.safetensors", guided_config(patch=2))
    stage = student_stage(files, config=PAPER, teacher=coarse)
    model, batch = stirred(stage.build(), 0.05), next(stage.batches(0, 1))
    answer = stage.teacher.answer(batch.patches)
    assert answer.features[0].shape[-1] == 16
    x0 = (batch.patches.gt - batch.patches.lms) / stage.residual_std.view(1, -1, 1, 1)
    output = predicted(model, Drawn(x0), stage.view(batch.patches)[0])
    parts = stage.losses(model, batch, seeded())["features"]
    close(parts, 0.001 * feature_sum(output.features, answer.features))
