"""The kernel for linear layers over whole sequences against formulas in float64, on the same bfloat16 inputs."""

import ctypes

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from gqa_exp.model import T5, T5Config, native, sequence

pytestmark = pytest.mark.skipif(not native.has_bfloat16(), reason="no AVX-512 with bfloat16, or no compiler")
CONFIG = T5Config(64, 64, 96, 4, 32, 1, 1, 2)
KERNELS = {"linear_outputs_float32", "linear_input_gradient_float32", "linear_weight_gradient"}


@pytest.fixture(autouse=True, params=["vectors", "tiles"])
def unit(request, monkeypatch):
    """What multiplies, on a processor without AMX and on one with it; if this has none, vectors stand in for tiles."""
    tiles = request.param == "tiles"
    if native.use_tiles(tiles) != tiles and native.has_tiles():
        pytest.skip("AMX is there, but not granted")
    monkeypatch.setattr(native, "has_tiles", lambda: tiles)
    monkeypatch.setattr(native, "multiplies_in_tiles", lambda: tiles)
    monkeypatch.setattr(sequence, "MOST_SUMS_IN_TILES", 256 * 256)
    yield
    native.use_tiles(True)


@pytest.fixture
def serving(monkeypatch):
    """The kernels serve, however few the rows."""
    monkeypatch.setattr(sequence, "LEAST_ROWS", 1)


def assert_is_the_formula(x, weight, d_y):
    """Results in bfloat16 are rounded once; sums, and with them a float32 weight's gradient, are float32's."""
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = sequence._linear(x, weight)
    y.backward(d_y)
    exact = [tensor.detach().bfloat16().double() for tensor in (x, weight, d_y)]
    expected = {"y": (exact[0] @ exact[1].T, exact[0].abs() @ exact[1].abs().T)}
    expected["d_x"] = (exact[2] @ exact[1], exact[2].abs() @ exact[1].abs())
    expected["d_weight"] = (exact[2].T @ exact[0], exact[2].abs().T @ exact[0].abs())
    found = {"y": y, "d_x": x.grad, "d_weight": weight.grad}
    assert found["d_weight"].dtype == weight.dtype
    for name, (result, size) in expected.items():
        ours = found[name].double()
        rounding = 0.0 if found[name].dtype == torch.float32 else 2.0**-8
        assert ours.shape == result.shape
        assert ((ours - result).abs() <= rounding * result.abs() + 1e-6 * size).all(), name


@given(
    st.integers(1, 600),
    st.integers(1, 6),
    st.integers(1, 6),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(1, 5),
    st.integers(0, 999),
)
@example(385, 4, 3, torch.float32, 2, 0)  # a third chunk, of one row
@example(513, 4, 3, torch.float32, 2, 0)  # the same in tiles
@example(300, 40, 16, torch.float32, 2, 0)  # more weights, and more of a gradient, than are taken at a time
@example(300, 16, 40, torch.bfloat16, 3, 0)
@example(1, 1, 1, torch.float32, 5, 0)  # threads without work
@example(300, 5, 3, torch.float32, 2, 0)  # blocks of an odd number of 16 outputs
@example(31, 2, 2, torch.float32, 2, 0)  # one row too few for tiles, and one more than they take at a time
@example(33, 1, 1, torch.float32, 2, 0)
@example(40, 1, 1, torch.float32, 5, 0)  # threads without a row in tiles
@example(513, 5, 3, torch.float32, 2, 0)  # the odd 16 outputs in a chunk that is neither the first nor the last
@example(70, 40, 65, torch.bfloat16, 2, 0)  # in tiles more panels than are taken at a time, and inputs in three parts
@example(40, 2, 65, torch.float32, 5, 0)  # such parts, and threads without a row
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_products_and_their_gradients_are_the_formula(rows, outputs, inputs, dtype, threads, seed):
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    x, d_y = torch.randn(rows, 32 * inputs).bfloat16(), torch.randn(rows, 32 * outputs).bfloat16()
    assert_is_the_formula(x, torch.randn(32 * outputs, 32 * inputs, dtype=dtype), d_y)


def test_results_do_not_depend_on_the_number_of_threads():
    torch.manual_seed(0)
    x, d_y, weight = torch.randn(500, 96).bfloat16(), torch.randn(500, 160).bfloat16(), torch.randn(160, 96)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append([sequence._linear(x, weight), *sequence._linear_backward(x, weight, d_y, True, True)])
    for other in found[1:]:
        for ours, first in zip(other, found[0], strict=True):
            assert torch.equal(ours, first)


@pytest.mark.skipif(not native.has_tiles(), reason="no AMX")
def test_tiles_multiply_where_they_are_asked_to():
    """They sum in another order than vectors, which some results show."""
    torch.manual_seed(0)
    x, d_y, weight = torch.randn(512, 512).bfloat16(), torch.randn(512, 512).bfloat16(), torch.randn(512, 512)
    found = []
    for tiles in (False, True):
        if native.use_tiles(tiles) != tiles:
            pytest.skip("AMX is there, but not granted")
        found.append((sequence._linear(x, weight), *sequence._linear_backward(x, weight, d_y, True, True)))
    for by_vectors, by_tiles in zip(*found, strict=True):
        assert not torch.equal(by_vectors, by_tiles)
        torch.testing.assert_close(by_vectors, by_tiles, rtol=2**-7, atol=1e-3)


def test_tensors_in_any_layout_and_no_rows_at_all():
    torch.manual_seed(0)
    x, d_y = torch.randn(64, 50).bfloat16().T, torch.randn(96, 50).bfloat16().T
    assert not x.is_contiguous()
    assert_is_the_formula(x, torch.randn(64, 96).T, d_y)
    assert_is_the_formula(torch.empty(0, 64).bfloat16(), torch.randn(96, 64), torch.empty(0, 96).bfloat16())


def test_a_gradient_that_is_one_number_seen_many_times():
    torch.manual_seed(0)
    x, weight = torch.randn(50, 32).bfloat16(), torch.randn(64, 32)
    assert_is_the_formula(x, weight, torch.tensor(0.5).bfloat16().expand(50, 64))


@pytest.mark.usefixtures("serving")
def test_an_autocast_to_another_format_changes_nothing():
    torch.manual_seed(0)
    x, weight = torch.randn(50, 32).bfloat16(), torch.randn(64, 32).bfloat16()
    with torch.autocast("cpu", torch.float16):
        assert sequence.linear(x, weight).dtype == torch.bfloat16
        assert_is_the_formula(x, weight, torch.randn(50, 64).bfloat16())


def test_what_does_not_multiply_in_tiles_though_it_could_is_torchs(monkeypatch):
    torch.set_num_threads(2)
    x, weight = torch.randn(300, 64).bfloat16(), torch.randn(96, 64).bfloat16()
    assert sequence.serves_linear(x, weight)
    monkeypatch.setattr(native, "multiplies_in_tiles", lambda: not native.has_tiles())
    assert not sequence.serves_linear(x, weight)


@pytest.mark.usefixtures("serving")
def test_shapes_that_do_not_fit_are_refused_as_torch_does():
    x = torch.randn(300, 64)
    with torch.autocast("cpu", torch.bfloat16):
        for weight in (torch.randn(96, 32), torch.randn(96, 96), torch.randn(2, 96, 64)):
            with pytest.raises(RuntimeError):
                sequence.linear(x, weight)


@pytest.mark.parametrize("of", ["x", "weight"])
def test_only_the_gradient_that_is_needed(of):
    torch.manual_seed(0)
    x, weight = torch.randn(2, 19, 32).bfloat16(), torch.randn(64, 32)
    leaves = {"x": x.clone(), "weight": weight.clone()}
    leaves[of].requires_grad_()
    d_y = torch.randn(2, 19, 64).bfloat16()
    sequence._linear(leaves["x"], leaves["weight"]).backward(d_y)
    both = dict(zip(("x", "weight"), sequence._linear_backward(x, weight, d_y, True, True), strict=True))
    assert torch.equal(leaves.pop(of).grad, both[of])
    assert all(other.grad is None for other in leaves.values())
    unneeded = sequence._linear_backward(x, weight, d_y, of == "x", of == "weight")
    assert sorted(tensor.numel() for tensor in unneeded) == [0, both[of].numel()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operations_keep_torchs_rules(dtype):
    """What torch.compile and autograd rely on: strides and types of results as promised, nothing written elsewhere."""
    x, weight = torch.randn(2, 17, 64).bfloat16().requires_grad_(), torch.randn(32, 64, dtype=dtype).requires_grad_()
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(sequence._linear, (x, weight), test_utils=checks)
    d_y = torch.randn(2, 17, 32).bfloat16()
    for needed in ((True, True), (True, False), (False, True)):
        given = (x.detach(), weight.detach(), d_y, *needed)
        torch.library.opcheck(sequence._linear_backward, given, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_shows(value):
    """Training looks for it in the loss."""
    x, weight = torch.randn(40, 32).bfloat16(), torch.randn(64, 32)
    x[7, 3] = value
    y = sequence._linear(x, weight)
    assert not y[7].isfinite().any()
    assert y[torch.arange(40) != 7].isfinite().all()
    d_weight = sequence._linear_backward(x, weight, torch.ones_like(y), True, True)[1]
    assert not d_weight[:, 3].isfinite().any()
    d_y = torch.ones_like(y)
    d_y[9, 4] = value
    d_x = sequence._linear_backward(x, weight, d_y, True, True)[0]
    assert not d_x[9].isfinite().any()
    assert d_x[torch.arange(40) != 9].isfinite().all()
    weight[5, 2] = value
    assert not sequence._linear(x, weight)[:, 5].isfinite().any()


def test_no_memory_is_said_and_not_fatal():
    sizes = (ctypes.c_long * 4)(1, 1 << 50, 32, 1)
    assert native.library().linear_weight_gradient(*[ctypes.c_void_p()] * 3, sizes) == 1
    assert_is_the_formula(torch.ones(3, 32).bfloat16(), torch.ones(32, 32), torch.ones(3, 32).bfloat16())


def test_what_the_kernel_serves(monkeypatch):
    torch.set_num_threads(2)
    x, weight = torch.randn(2, 128, 64), torch.randn(96, 64)
    with torch.autocast("cpu", torch.bfloat16):
        for pair in ((x, weight), (x.bfloat16(), weight), (x, weight.bfloat16()), (x.bfloat16(), weight.bfloat16())):
            assert sequence.serves_linear(*pair)
        assert not sequence.serves_linear(x.double(), weight)
        assert not sequence.serves_linear(x[:, :127], weight)  # too few rows
        assert not sequence.serves_linear(x, weight[:95])
        assert not sequence.serves_linear(x.to("meta"), weight.to("meta"))
        assert not sequence.serves_linear(x[..., :63], weight[:, :63])
        assert not sequence.serves_linear(x[..., :0], weight[:, :0])
        with torch.no_grad():
            assert not sequence.serves_linear(x, weight)
        torch.set_num_threads(4)  # for three blocks of the gradient
        assert not sequence.serves_linear(x, weight)
        torch.set_num_threads(2)
        with monkeypatch.context() as patch:
            patch.setattr(native, "library", lambda: None)
            assert not sequence.serves_linear(x, weight)
    with torch.autocast("cpu", torch.float16):
        assert not sequence.serves_linear(x, weight)
    assert sequence.serves_linear(x.bfloat16(), weight.bfloat16())
    assert not sequence.serves_linear(x, weight)
    assert not sequence.serves_linear(x.bfloat16(), weight)


def train(model, input_ids, labels):
    """The gradients of a step, by parameter."""
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids, model.shift_right(labels))
        F.cross_entropy(logits.float().flatten(0, 1), labels.flatten()).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.usefixtures("serving")
@pytest.mark.parametrize("tied", [False, True])
def test_every_linear_layer_trains_by_it(calls, tied):
    torch.manual_seed(0)
    model = T5(T5Config(64, 64, 96, 4, 32, 1, 1, 2, tied_embeddings=tied)).train()
    ids = torch.randint(3, 60, (3, 21))
    train(model, ids, ids)
    linear = [name for name in calls if name.startswith("linear")]
    weights = 7 + 11 + 1  # encoder layer, decoder layer, output
    for name in KERNELS:
        assert linear.count(name) == weights
    assert len(linear) == len(KERNELS) * weights
    calls.clear()
    with torch.no_grad():
        model(ids, ids)
    model.float()(ids, ids).sum().backward()
    assert not [name for name in calls if name.startswith("linear")]


@pytest.mark.usefixtures("serving")
@pytest.mark.parametrize(("compiled", "checkpointing"), [(False, False), (True, False), (False, True)])
def test_training_by_it_follows_training_without(calls, monkeypatch, compiled, checkpointing):
    torch.manual_seed(0)
    model = T5(CONFIG).train()
    ids = torch.randint(3, 60, (3, 21))
    with monkeypatch.context() as patch:
        patch.setattr(sequence, "LEAST_ROWS", 1 << 30)
        expected = train(model, ids, ids)
    assert not [name for name in calls if name.startswith("linear")]
    if compiled:
        model.compile_layers()
    model.set_checkpointing(checkpointing)
    found = train(model, ids, ids)
    assert set(calls) >= KERNELS
    for name, gradient in found.items():
        assert F.cosine_similarity(gradient.flatten(), expected[name].flatten(), dim=0) > 0.995, name
        assert 0.9 < gradient.norm() / expected[name].norm() < 1.1, name


@pytest.mark.usefixtures("serving")
def test_layers_compile_to_one_graph_each(calls):
    """Each break of it costs a call of Python, and keeps what stands on both sides from being fused."""
    model = T5(CONFIG).train()
    x = torch.randn(2, 9, 64, requires_grad=True)
    bias = torch.zeros(1, 4, 9, 9)
    with torch.autocast("cpu", torch.bfloat16):
        torch.compile(model.encoder.layers[0], fullgraph=True)(x, bias, None).sum().backward()
        torch.compile(model.decoder.layers[0], fullgraph=True)(x, bias, x, None).sum().backward()
    assert set(calls) >= KERNELS


def test_compiled_layers_change_over_with_the_number_of_rows(calls):
    layer = sequence.Linear(64, 96)
    compiled = torch.compile(layer, dynamic=True, fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        for rows in (300, 320, 200, 256):
            x = torch.randn(rows, 64)
            calls.clear()
            y = compiled(x)
            y.sum().backward()
            assert set(calls) == (KERNELS - {"linear_input_gradient_float32"} if rows >= 256 else set())
            torch.testing.assert_close(y, F.linear(x, layer.weight), rtol=2**-7, atol=1e-3)
