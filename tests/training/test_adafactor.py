import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from transformers.optimization import Adafactor as TransformersAdafactor

from gqa_exp.errors import InputError
from gqa_exp.model import native
from gqa_exp.training import adafactor
from gqa_exp.training.adafactor import Adafactor, load_named_slots, named_slots, pool_slots, rms


class PaperAdafactor:
    """Shazeer & Stern 2018, Algorithms 4 (matrices; R and C are sums) and 5 (vectors), as float64 scalar loops."""

    def __init__(self, x, factored, *, clip=1.0, eps1=1e-30, eps2=1e-3):
        self.x, self.factored, self.clip, self.eps1, self.eps2 = x.astype(np.float64), factored, clip, eps1, eps2
        n, m = self.x.shape
        self.R, self.C, self.V, self.t = [0.0] * n, [0.0] * m, [[0.0] * m for _ in range(n)], 0

    def step(self, g, rho):
        self.t += 1
        n, m = self.x.shape
        beta2 = 1 - self.t**-0.8
        mean_square = sum(float(self.x[i, j]) ** 2 for i in range(n) for j in range(m)) / (n * m)
        alpha = max(self.eps2, math.sqrt(mean_square)) * rho
        squared = [[float(g[i, j]) ** 2 + self.eps1 for j in range(m)] for i in range(n)]
        for i in range(n):
            self.R[i] = beta2 * self.R[i] + (1 - beta2) * sum(squared[i])
        for j in range(m):
            self.C[j] = beta2 * self.C[j] + (1 - beta2) * sum(squared[i][j] for i in range(n))
        for i in range(n):
            for j in range(m):
                if self.factored:
                    self.V[i][j] = self.R[i] * self.C[j] / sum(self.R)
                else:
                    self.V[i][j] = beta2 * self.V[i][j] + (1 - beta2) * squared[i][j]
        u = [[float(g[i, j]) / math.sqrt(self.V[i][j]) for j in range(m)] for i in range(n)]
        rms_u = math.sqrt(sum(u[i][j] ** 2 for i in range(n) for j in range(m)) / (n * m))
        for i in range(n):
            for j in range(m):
                self.x[i, j] -= alpha * u[i][j] / max(1.0, rms_u / self.clip)
        return rms_u


def gradients(shape, seed, scale, spread=1.0):
    """Heavy-tailed gradients whose size changes from step to step, so that clipping is active in some steps."""
    generator = np.random.default_rng(seed)
    while True:
        row = np.exp(spread * generator.normal(size=(shape[0], 1)))
        yield scale * np.exp(2 * generator.normal()) * row * generator.normal(size=shape)


@pytest.fixture(params=["kernel", "torch"])
def implementation(request, monkeypatch):
    """Of factored steps on a CPU."""
    if request.param == "torch":
        monkeypatch.setattr(native, "library", lambda: None)
    elif not native.is_built():
        pytest.skip("no kernels on this host")


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize(
    ("shape", "threshold", "parameter_scale", "gradient_scale"),
    [
        ((5, 8), 4, 0.3, 1e-2),  # factored, wide
        ((9, 4), 4, 0.3, 1e-2),  # factored, tall
        ((5, 3), 4, 0.3, 1e-2),  # a dimension too small to factor
        ((1, 12), 4, 1.0, 1e-2),  # stands for the vector of 12
        ((4, 6), 4, 1e-5, 1e-2),  # RMS(param) below eps2
        ((4, 6), 4, 0.3, 1e-14),  # gradients whose squares are near eps1, factored
        ((5, 3), 4, 0.3, 1e-14),  # and not
    ],
)
def test_agrees_with_the_paper(shape, threshold, parameter_scale, gradient_scale):
    start = parameter_scale * np.random.default_rng(0).normal(size=shape)
    paper = PaperAdafactor(start, factored=min(shape) >= threshold)
    param = torch.nn.Parameter(torch.tensor(start, dtype=torch.float32).squeeze(0))
    optimizer = Adafactor([param], min_dim_size_to_factor=threshold)
    clipped = []
    for step, grad in zip(range(8), gradients(shape, 1, gradient_scale), strict=False):
        rho = 0.1 / (step + 1)
        optimizer.param_groups[0]["lr"] = rho
        param.grad = torch.tensor(grad, dtype=torch.float32).view_as(param)
        optimizer.step()
        clipped.append(paper.step(grad, rho) > 1.0)
        moved = np.abs(paper.x - start).max()
        np.testing.assert_allclose(param.detach().numpy().reshape(shape), paper.x, atol=2e-5 * moved)
    assert True in clipped  # the case exercises both branches of the clipping
    assert False in clipped
    state = optimizer.state[param]
    assert state["step"] == 8
    if paper.factored:  # slots are means where the paper has sums
        np.testing.assert_allclose(state["row"], np.array(paper.R) / shape[1], rtol=1e-5)
        np.testing.assert_allclose(state["col"], np.array(paper.C) / shape[0], rtol=1e-5)
        assert "full" not in state
    else:
        np.testing.assert_allclose(state["full"].view(shape), paper.V, rtol=1e-5)
        assert "row" not in state


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize(("shape", "threshold"), [((5, 8), 4), ((5, 8), 128)], ids=["factored", "unfactored"])
def test_a_clock_that_has_run_before_goes_on(shape, threshold):
    """Slots that bring a step count, as a base's do: the decay is that of the steps behind them."""
    generator = np.random.default_rng(5)
    x, factored = generator.normal(size=shape), threshold <= 5
    reference = PaperAdafactor(x, factored)
    reference.t = 1000
    squares = generator.uniform(0.5, 2.0, size=shape)
    reference.V = squares.tolist()
    reference.R, reference.C = squares.sum(1).tolist(), squares.sum(0).tolist()
    param = torch.nn.Parameter(torch.tensor(x, dtype=torch.float32))
    optimizer = Adafactor([param], min_dim_size_to_factor=threshold)
    slots = {"x.step": torch.tensor(1000)}
    if factored:
        slots |= {"x.row": torch.tensor(squares.mean(1)).float(), "x.col": torch.tensor(squares.mean(0)).float()}
    else:
        slots["x.full"] = torch.tensor(squares).float()
    load_named_slots(optimizer, [("x", param)], slots)
    for g, _ in zip(gradients(shape, 1, 1.0), range(8), strict=False):
        reference.step(g, 0.01)
        optimizer.param_groups[0]["lr"] = 0.01
        param.grad = torch.tensor(g, dtype=torch.float32)
        optimizer.step()
    np.testing.assert_allclose(param.detach().numpy(), reference.x, rtol=2e-5, atol=2e-6)
    assert np.abs(reference.x - x).max() > 1e-3


@pytest.mark.parametrize(
    ("shape", "factored"),
    [((128, 128), True), ((300, 128), True), ((127, 512), False), ((512, 127), False), ((256,), False)],
)
def test_factors_from_128_on(shape, factored):
    param = torch.nn.Parameter(torch.ones(shape))
    param.grad = torch.ones(shape)
    optimizer = Adafactor([param])
    optimizer.step()
    assert ("row" in optimizer.state[param]) == factored
    assert ("full" in optimizer.state[param]) != factored


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("shape", [(128, 192), (200, 128), (64,)])
def test_agrees_with_transformers(shape):
    torch.manual_seed(0)
    ours = torch.nn.Parameter(0.1 * torch.randn(shape))
    theirs = torch.nn.Parameter(ours.detach().clone())
    optimizer = Adafactor([ours], lr=0.01)
    reference = TransformersAdafactor(
        [theirs],
        lr=0.01,
        eps=(1e-30, 1e-3),
        clip_threshold=1.0,
        decay_rate=-0.8,
        scale_parameter=True,
        relative_step=False,
    )
    start = ours.detach().clone()
    for _ in range(6):
        ours.grad = torch.randn(shape) * torch.randn(()).exp()
        theirs.grad = ours.grad.clone()
        optimizer.step()
        reference.step()
        moved = (theirs.detach() - start).abs().max()
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * float(moved))


def stepped(x, grads, by_torch):
    """The parameter and its slots after a step for each gradient."""
    param = torch.nn.Parameter(x.clone())
    optimizer = Adafactor([param], lr=0.1, min_dim_size_to_factor=1)
    with pytest.MonkeyPatch.context() as patched:
        if by_torch:
            patched.setattr(native, "library", lambda: None)
        for grad in grads:
            param.grad = grad
            optimizer.step()
    return param.detach(), optimizer.state[param]["row"], optimizer.state[param]["col"]


needs_kernels = pytest.mark.skipif(not native.is_built(), reason="no kernels on this host")


@needs_kernels
@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 4), st.integers(0, 999))
@settings(max_examples=40, deadline=None)
def test_the_kernel_steps_as_torchs_operations_do(rows, columns, threads, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator)
    grads = [torch.randn(columns, rows, generator=generator).t() * 10.0**power for power in (-3, 0, -1)]
    torch.set_num_threads(threads)
    for contiguous in (False, True):  # the kernel, which takes rows that lie in order, is left out of the first
        ours, theirs = ([*stepped(x, [g.contiguous() if contiguous else g for g in grads], by)] for by in (False, True))
        for found, expected in zip(ours, theirs, strict=True):
            torch.testing.assert_close(found, expected, rtol=2e-5, atol=1e-6)


@needs_kernels
def test_which_steps_are_the_kernels_and_that_autograd_knows_of_them(monkeypatch):
    stepped_by_kernel, step = [], adafactor._step_by_kernel
    monkeypatch.setattr(adafactor, "_step_by_kernel", lambda *a: stepped_by_kernel.append(a[0].shape) or step(*a))
    grad = torch.randn(5, 8)
    for dtype, gradient, threshold, expected in (
        (torch.float32, grad, 4, True),
        (torch.bfloat16, grad, 4, True),  # of a copy in float32
        (torch.float32, torch.randn(8, 5).t(), 4, False),
        (torch.float32, grad, 128, False),  # not factored
        (torch.float32, grad.to("meta"), 4, False),
    ):
        param = torch.nn.Parameter(torch.ones(5, 8, dtype=dtype, device=gradient.device))
        param.grad = gradient.to(dtype)
        version = param._version
        stepped_by_kernel.clear()
        Adafactor([param], min_dim_size_to_factor=threshold).step()
        assert len(stepped_by_kernel) == expected
        assert param._version > version


@needs_kernels
def test_the_kernel_sums_millions_of_squares_accurately():
    generator = torch.Generator().manual_seed(0)
    grad = torch.rand(70_000, 24, generator=generator)
    grad[0] = 3000.0  # beside which a single running sum would lose the others
    _, row, col = stepped(torch.ones(70_000, 24), [grad], by_torch=False)
    torch.testing.assert_close(row.double(), grad.double().square().mean(1), rtol=1e-6, atol=0)
    torch.testing.assert_close(col.double(), grad.double().square().mean(0), rtol=1e-6, atol=0)


@needs_kernels
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_spreads_as_with_torchs_operations(value):
    x, grad = torch.ones(8, 8), torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    grad[3, 5] = value
    ours, theirs = (stepped(x, [grad, torch.ones(8, 8)], by)[0] for by in (False, True))
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert ours.isnan().any()


def test_rms_is_accurate_for_millions_of_elements():
    x = 1e-3 * torch.randn(8192, 256, generator=torch.Generator().manual_seed(0))
    assert float(rms(x)) == pytest.approx(float(x.double().square().mean().sqrt()), rel=1e-6)
    assert float(rms(torch.tensor(-3.0))) == 3.0


def test_bfloat16_parameters_round_the_float32_update_once():
    torch.manual_seed(0)
    low = torch.nn.Parameter(torch.randn(6, 5, dtype=torch.bfloat16))
    high = torch.nn.Parameter(low.detach().float())
    low.grad = torch.randn(6, 5, dtype=torch.bfloat16)
    high.grad = low.grad.float()
    for param in (low, high):
        Adafactor([param], lr=0.3, min_dim_size_to_factor=4).step()
    assert torch.equal(low, high.to(torch.bfloat16))


def test_step_never_waits_for_the_device():
    # tensors without data: anything that asked for a value on the host would raise
    params = [torch.nn.Parameter(torch.empty(shape, device="meta")) for shape in [(128, 128), (8,), (4, 4)]]
    params.append(torch.nn.Parameter(torch.empty(8, device="meta", dtype=torch.bfloat16)))
    for param in params:
        param.grad = torch.empty_like(param)
    optimizer = Adafactor(params)
    optimizer.step()
    assert [optimizer.state[param]["step"] for param in params] == [1] * 4


def test_a_parameter_without_gradient_is_left_alone_and_the_closure_is_called():
    used, unused = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))
    optimizer = Adafactor([used, unused], lr=0.5)

    def closure():
        loss = used.square().sum()
        loss.backward()
        return float(loss.detach())

    assert optimizer.step(closure) == 3.0
    assert torch.equal(unused, torch.ones(3))
    assert torch.allclose(used, torch.full((3,), 0.5))  # RMS 1, update 1, rate 0.5
    assert unused not in optimizer.state


def small_model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3, bias=False))


def train(model, optimizer, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        optimizer.zero_grad()
        model(torch.randn(7, 6, generator=generator)).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("how", ["named slots through safetensors", "state dict"])
def test_resumed_run_is_bitwise_the_uninterrupted_one(how):
    straight = small_model()
    optimizer = Adafactor(straight.parameters(), lr=0.1, min_dim_size_to_factor=5)
    train(straight, optimizer, range(4))
    resumed = copy.deepcopy(straight)
    second = Adafactor(resumed.parameters(), lr=0.1, min_dim_size_to_factor=5)
    if how == "state dict":
        second.load_state_dict(optimizer.state_dict())
    else:
        slots = load(save(named_slots(optimizer, straight.named_parameters())))
        assert set(slots) == {"0.weight.row", "0.weight.col", "0.bias.full", "2.weight.full"} | {
            f"{name}.step" for name in ("0.weight", "0.bias", "2.weight")
        }
        load_named_slots(second, resumed.named_parameters(), slots)
    # order matters: had the two shared memory, the second run would now start from the first one's later state
    train(straight, optimizer, range(4, 9))
    train(resumed, second, range(4, 9))
    for name, expected in named_slots(optimizer, straight.named_parameters()).items():
        assert torch.equal(named_slots(second, resumed.named_parameters())[name], expected), name
    for expected, found in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(expected, found)


def test_named_slots_share_no_memory_with_the_optimizer():
    model = small_model()
    optimizer = Adafactor(model.parameters(), min_dim_size_to_factor=5)
    train(model, optimizer, range(2))
    slots = named_slots(optimizer, model.named_parameters())
    kept = copy.deepcopy(slots)
    train(model, optimizer, range(2, 3))
    assert all(torch.equal(slots[name], kept[name]) for name in kept)
    load_named_slots(optimizer, model.named_parameters(), slots)
    train(model, optimizer, range(2, 3))
    assert all(torch.equal(slots[name], kept[name]) for name in kept)


def test_state_dict_keeps_float32_slots_of_bfloat16_parameters():
    param = torch.nn.Parameter(torch.randn(4, 4, dtype=torch.bfloat16))
    param.grad = torch.randn(4, 4, dtype=torch.bfloat16)
    optimizer, second = Adafactor([param]), Adafactor([param])
    optimizer.step()
    second.load_state_dict(optimizer.state_dict())
    assert second.state[param]["full"].dtype == torch.float32
    assert torch.equal(second.state[param]["full"], optimizer.state[param]["full"])


def test_a_parameter_whose_slots_were_dropped_restarts_its_own_clock():
    model = small_model()
    optimizer = Adafactor(model.parameters(), min_dim_size_to_factor=5)
    train(model, optimizer, range(3))
    slots = named_slots(optimizer, model.named_parameters())
    load_named_slots(
        optimizer, model.named_parameters(), {k: v for k, v in slots.items() if not k.startswith("2.weight")}
    )
    train(model, optimizer, range(3, 4))
    after = named_slots(optimizer, model.named_parameters())
    assert int(after["2.weight.step"]) == 1
    assert int(after["0.weight.step"]) == 4
    # at its first step the decay is 0: the moments are this gradient's squares alone
    assert torch.equal(after["2.weight.full"], model[2].weight.grad.square() + 1e-30)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda s: s.pop("0.weight.col"), '"0.weight.col" is missing'),
        (lambda s: s.update({"0.weight.row": torch.ones(4)}), r'"0.weight.row" has shape \(4,\)'),
        (lambda s: s.update({"9.weight.full": torch.ones(4)}), '"9.weight.full" belongs to no trained parameter'),
        (lambda s: s.update({"0.weight.full": torch.ones(5, 6)}), '"0.weight.full" is unknown'),
        (lambda s: s.update({"0.weight.step": torch.tensor(1.5)}), '"0.weight.step" has type torch.float32'),
        (lambda s: s.update({"0.weight.row": torch.ones(5, dtype=torch.int64)}), '"0.weight.row" has type torch.int64'),
    ],
)
def test_slots_that_do_not_fit_are_named_and_nothing_changes(change, named):
    model = small_model()
    optimizer = Adafactor(model.parameters(), min_dim_size_to_factor=5)
    train(model, optimizer, range(2))
    slots = named_slots(optimizer, model.named_parameters())
    wrong = dict(slots)
    change(wrong)
    with pytest.raises(InputError, match=named):
        load_named_slots(optimizer, model.named_parameters(), wrong)
    for name, value in named_slots(optimizer, model.named_parameters()).items():
        assert torch.equal(value, slots[name])


def test_an_optimizer_of_another_model_is_refused():
    optimizer = Adafactor(small_model().parameters())
    with pytest.raises(InputError, match="of which 0 have a name"):
        named_slots(optimizer, small_model().named_parameters())


def test_hyperparameters_out_of_range_are_named():
    with pytest.raises(InputError, match="clip_threshold=0"):
        Adafactor([torch.nn.Parameter(torch.ones(1))], clip_threshold=0)


def expanded(slots, name):
    """The full second moments that a parameter's slots stand for, float64."""
    if f"{name}.full" in slots:
        return slots[f"{name}.full"].double()
    row, col = slots[f"{name}.row"].double(), slots[f"{name}.col"].double()
    return torch.outer(row, col) / row.mean()


@settings(deadline=None, max_examples=60)
@given(
    after_heads=st.integers(1, 3),
    members=st.integers(1, 4),
    head_dim=st.integers(1, 4),
    d_model=st.integers(2, 9),
    threshold=st.integers(1, 12),
    seed=st.integers(0, 1000),
)
def test_pooled_moments_are_the_sum_of_the_members(after_heads, members, head_dim, d_model, threshold, seed):
    torch.manual_seed(seed)
    heads = after_heads * members
    param = torch.nn.Parameter(torch.randn(heads * head_dim, d_model))
    other = torch.nn.Parameter(torch.randn(3))
    optimizer = Adafactor([param, other], min_dim_size_to_factor=threshold)
    for _ in range(3):
        param.grad, other.grad = torch.randn_like(param), torch.randn_like(other)
        optimizer.step()
    slots = named_slots(optimizer, [("k", param), ("norm", other)])
    before = {"k": param.shape, "norm": other.shape}
    after = {"k": torch.Size((after_heads * head_dim, d_model)), "norm": other.shape}
    pooled = pool_slots(slots, before, after, head_dim, "pool", min_dim_size_to_factor=threshold)

    sums = torch.stack(
        [
            sum(expanded(slots, "k")[(g * members + i) * head_dim + row] for i in range(members))
            for g in range(after_heads)
            for row in range(head_dim)
        ]
    )
    torch.testing.assert_close(expanded(pooled, "k"), sums, rtol=1e-5, atol=0)
    assert int(pooled["k.step"]) == 3
    for key in ("norm.full", "norm.step"):
        assert pooled[key] is slots[key]
    if members == 1:
        assert pooled.keys() == slots.keys()
        assert all(pooled[key] is slots[key] for key in slots)
    if "k.row" in pooled:  # still means of the same matrix, as the optimizer would keep them
        torch.testing.assert_close(pooled["k.row"].double(), sums.mean(dim=1), rtol=1e-5, atol=0)
        torch.testing.assert_close(pooled["k.col"].double(), sums.mean(dim=0), rtol=1e-5, atol=0)

    # the smaller model's optimizer takes them as they are
    small = torch.nn.Parameter(torch.randn(after["k"]))
    fresh = Adafactor([small, other], min_dim_size_to_factor=threshold)
    load_named_slots(fresh, [("k", small), ("norm", other)], pooled)
    assert fresh.state[small]["step"] == 3

    reset = pool_slots(slots, before, after, head_dim, "reset", min_dim_size_to_factor=threshold)
    assert set(reset) == {key for key in slots if members == 1 or not key.startswith("k.")}


@pytest.mark.parametrize(
    ("after", "mode", "named"),
    [
        ({"k": torch.Size((4, 3))}, "sum", 'mode "sum" is unknown'),
        ({"q": torch.Size((4, 3))}, "pool", '"k" exists only before or only after'),
        ({"k": torch.Size((4, 2))}, "pool", r'"k" changed from \(12, 3\) to \(4, 2\)'),
        ({"k": torch.Size((8, 3))}, "pool", r"to \(8, 3\)"),  # 6 heads into 4
        ({"k": torch.Size((3, 3))}, "pool", r"to \(3, 3\)"),  # half a head
        ({"k": torch.Size((0, 3))}, "reset", r"to \(0, 3\)"),
        ({"k": torch.Size((24, 3))}, "pool", r"to \(24, 3\)"),
    ],
)
def test_changes_that_merge_no_heads_are_refused(after, mode, named):
    slots = {"k.full": torch.ones(12, 3), "k.step": torch.tensor(2)}
    with pytest.raises(InputError, match=named):
        pool_slots(slots, {"k": torch.Size((12, 3))}, after, 2, mode)
