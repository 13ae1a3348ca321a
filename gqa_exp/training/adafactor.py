"""Adafactor as T5 was trained with, and the handling of its second moments across conversion.

Uptraining continues a base's pre-training, so its optimizer has to be the base's optimizer, slots included. Those of
torch and transformers are not T5's: both factor every matrix, however small, and torch's bounds the step size too.
The rule is Algorithms 4 and 5 of Shazeer & Stern 2018 (arXiv 1804.04235) as in mesh_tensorflow/optimize.py and
t5x/adafactor.py, with T5's constants. Known differences from those two, none of which changes a T5 run's numbers:

- They tie the decay to the global step. Here every parameter counts its own steps, so that a parameter whose slots
  were reset starts its decay clock anew while the others run on.
- They factor over the two largest dimensions of a tensor of any rank; here only matrices are factored.
- They call "row" the mean over the larger dimension. Here `row` is always one value per output row of an nn.Linear
  weight, whatever its shape. The reconstruction row * col / mean is the same, since row and col have the same mean.
"""

import ctypes
import math
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from typing import Any, overload

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.optim.optimizer import ParamsT

from gqa_exp.errors import InputError, suggest
from gqa_exp.model import native

MIN_DIM_SIZE_TO_FACTOR = 128
"""t5x/adafactor.py's default, and the value in T5's gin files (Mesh TensorFlow's own default is 32)."""
FACTORED_SLOTS = ("row", "col", "step")
UNFACTORED_SLOTS = ("full", "step")
POOL_MODES = ("pool", "reset")


def is_factored(shape: torch.Size, min_dim_size_to_factor: int = MIN_DIM_SIZE_TO_FACTOR) -> bool:
    """Whether the second moments of a parameter of this shape are kept as row and column means."""
    return len(shape) == 2 and min(shape) >= min_dim_size_to_factor


def slot_shapes(shape: torch.Size, min_dim_size_to_factor: int = MIN_DIM_SIZE_TO_FACTOR) -> dict[str, torch.Size]:
    """Shapes of the second-moment slots of a parameter: `row` and `col`, or `full`."""
    if is_factored(shape, min_dim_size_to_factor):
        return {"row": shape[:1], "col": shape[1:]}
    return {"full": shape}


class Shards:
    """How a parameter lies on ranks: its rows divided between them, as torch's fully_shard does, or whole on each.

    What the optimizer needs of a whole parameter are sums over its rows; everything else is done where the rows are.
    """

    def __init__(self, param: Tensor) -> None:
        self.mesh = param.device_mesh if isinstance(param, DTensor) else None
        self.shape = param.shape

    def local(self, x: Tensor) -> Tensor:
        """This rank's rows of the parameter, its gradient, or a slot that has a value per row."""
        return x.to_local() if isinstance(x, DTensor) else x

    def sum(self, x: Tensor) -> Tensor:
        """The sum over ranks of a sum over their rows."""
        if self.mesh is not None:
            torch.distributed.all_reduce(x, group=self.mesh.get_group())
        return x

    def share(self, whole: Tensor) -> Tensor:
        """This rank's rows of a tensor that every rank has."""
        return whole if self.mesh is None else distribute_tensor(whole, self.mesh, [Shard(0)]).to_local()

    def gather(self, rows: Tensor) -> Tensor:
        """The whole of a tensor of which every rank has its rows; all ranks must ask for it."""
        if self.mesh is None:
            return rows
        shape = torch.Size((self.shape[0], *rows.shape[1:]))
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(rows, self.mesh, [Shard(0)], shape=shape, stride=stride).full_tensor()


WHOLE = Shards(torch.empty(0))


def rms(x: Tensor, shards: Shards = WHOLE) -> Tensor:
    """Root mean square of all elements, a scalar tensor; rows first, which keeps float32 sums of millions accurate."""
    row_norms = torch.linalg.vector_norm(x, dim=-1) if x.dim() > 1 else x
    norm: Tensor = torch.linalg.vector_norm(row_norms)
    if shards.mesh is None:
        return norm / math.sqrt(x.numel())
    return (shards.sum(norm.square()) / shards.shape.numel()).sqrt()


def factored_update(
    grad: Tensor, row: Tensor, col: Tensor, *, decay: float, eps: float, shards: Shards = WHOLE
) -> Tensor:
    """Advance factored second moments in place and return the gradient divided by their root (Algorithm 4).

    Args:
        grad: (rows, columns), float32; this rank's rows.
        row: (rows,), running mean over the columns of grad^2 + eps; changed in place.
        col: (columns,), running mean over the rows, all ranks' together; changed in place.
        decay: weight of the old moments.
        eps: the paper's eps1.
        shards: how the rows are divided between ranks.

    Returns:
        (rows, columns): grad / sqrt(row * col / mean(row)), not yet clipped.
    """
    squared = grad * grad
    row.lerp_(squared.mean(dim=1).add_(eps), 1.0 - decay)
    if shards.mesh is None:
        over_rows, mean = squared.mean(dim=0), None
    else:
        over_rows = shards.sum(squared.sum(dim=0)).div_(shards.shape[0])
        mean = shards.sum(row.sum()).div_(shards.shape[0])
    col.lerp_(over_rows.add_(eps), 1.0 - decay)
    row_factor = (row / (row.mean() if mean is None else mean)).rsqrt_()
    return torch.mul(grad, row_factor.unsqueeze(1), out=squared).mul_(col.rsqrt())  # reuses the buffer of the squares


def unfactored_update(grad: Tensor, full: Tensor, *, decay: float, eps: float) -> Tensor:
    """Advance full second moments in place and return grad / sqrt(full), not yet clipped; all of the same shape."""
    full.lerp_((grad * grad).add_(eps), 1.0 - decay)
    return full.rsqrt().mul_(grad)


class Adafactor(torch.optim.Optimizer):
    """T5's Adafactor: factored second moments, update clipping, parameter scaling; no momentum, no weight decay.

    For a parameter X with gradient G at its own step t = 1, 2, ...:
    V = decay_t * V + (1 - decay_t) * (G^2 + eps1) with decay_t = 1 - t^-decay_exponent (so decay_1 = 0);
    U = G / sqrt(V); X -= lr * max(eps2, RMS(X)) * U / max(1, RMS(U) / clip_threshold).

    State per parameter: `row` and `col`, or `full` (float32 tensors), and `step` (int). The arithmetic is float32, also
    for bfloat16 parameters, which are rounded once per step. `step()` never waits for the device.

    Args:
        params: parameters or parameter groups.
        lr: the relative step size rho; callers set `group["lr"]` from the schedule before every step.
        decay_exponent: 0.8 in T5.
        clip_threshold: bound of the update's RMS before scaling; 1.0 in T5.
        eps: (eps1, added to the squared gradient; eps2, the least parameter scale); (1e-30, 1e-3) in T5.
        min_dim_size_to_factor: a matrix is factored if both its dimensions are at least this.

    Raises:
        InputError: a hyperparameter out of range.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-2,
        *,
        decay_exponent: float = 0.8,
        clip_threshold: float = 1.0,
        eps: tuple[float, float] = (1e-30, 1e-3),
        min_dim_size_to_factor: int = MIN_DIM_SIZE_TO_FACTOR,
    ) -> None:
        positive = {"decay_exponent": decay_exponent, "clip_threshold": clip_threshold, "eps1": eps[0], "eps2": eps[1]}
        for name, value in positive.items():
            if not value > 0:
                raise InputError(f"Adafactor: {name}={value} must be above 0")
        if not lr >= 0:
            raise InputError(f"Adafactor: lr={lr} must be 0 or more")
        defaults = {"lr": lr, "decay_exponent": decay_exponent, "clip_threshold": clip_threshold, "eps": eps}
        super().__init__(params, {**defaults, "min_dim_size_to_factor": min_dim_size_to_factor})

    @property
    def min_dim_size_to_factor(self) -> int:
        """The least dimension of a factored matrix; one for all parameter groups."""
        return int(self.defaults["min_dim_size_to_factor"])

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient.

        Args:
            closure: recomputes the loss and the gradients.

        Returns:
            What the closure returns.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                state, shards = self.state[param], Shards(param)
                own = shards.local(param)
                if not state:
                    state["step"] = 0
                    for slot, shape in slot_shapes(param.shape, self.min_dim_size_to_factor).items():
                        here = shape if slot == "col" else (len(own), *shape[1:])
                        state[slot] = torch.zeros(here, dtype=torch.float32, device=param.device)
                state["step"] += 1
                decay = 1.0 - state["step"] ** -group["decay_exponent"]
                grad, value = shards.local(param.grad).float(), own.float()  # no copies of what is float32 already
                if _serves_kernel(value, grad, state, shards):
                    _step_by_kernel(value, grad, state, decay, group)
                else:
                    _step_by_torch(value, grad, state, decay, group, shards)
                if value is not own:
                    own.copy_(value)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but the slots stay float32 (torch casts them to the parameter's type) and are not shared."""
        super().load_state_dict(state_dict)
        ids = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        params = chain.from_iterable(group["params"] for group in self.param_groups)
        for id_, param in zip(ids, params, strict=True):
            if id_ in state_dict["state"]:
                self.state[param] = {
                    key: value.to(param.device, torch.float32, copy=True) if isinstance(value, Tensor) else value
                    for key, value in state_dict["state"][id_].items()
                }


def _step_by_torch(
    value: Tensor, grad: Tensor, state: dict[str, Any], decay: float, group: dict[str, Any], shards: Shards
) -> None:
    """Change a parameter, or this rank's rows of it, and its slots in place, all float32."""
    eps1, eps2 = group["eps"]
    if "full" in state:
        update = unfactored_update(grad, state["full"], decay=decay, eps=eps1)
    else:
        update = factored_update(grad, state["row"], state["col"], decay=decay, eps=eps1, shards=shards)
    clip = (rms(update, shards) / group["clip_threshold"]).clamp_(min=1.0)
    size = rms(value, shards).clamp_(min=eps2).mul_(group["lr"]).div_(clip)
    value.addcmul_(update, size, value=-1)


def _serves_kernel(value: Tensor, grad: Tensor, state: dict[str, Any], shards: Shards) -> bool:
    """Whether `adafactor.cpp` makes this step: in half the time of torch's operations, on 2 cores."""
    if "row" not in state or shards.mesh is not None:
        return False
    tensors = (value, grad, state["row"], state["col"])
    return all(each.device.type == "cpu" and each.is_contiguous() for each in tensors) and native.is_built()


def _step_by_kernel(value: Tensor, grad: Tensor, state: dict[str, Any], decay: float, group: dict[str, Any]) -> None:
    """The same as by torch, for factored slots.

    Raises:
        MemoryError: no room to work in.
    """
    library = native.library()
    assert library is not None
    row, col = state["row"], state["col"]
    numbers = (ctypes.c_float * 5)(1.0 - decay, *group["eps"], group["lr"], group["clip_threshold"])
    pointers = (ctypes.c_void_p(tensor.data_ptr()) for tensor in (value, grad, row, col))
    if library.adafactor(*pointers, *(ctypes.c_long(size) for size in value.shape), numbers):
        raise MemoryError(f"no memory for sums over {tuple(value.shape)}")
    increment_version((value, row, col))  # autograd then refuses a backward pass that would need what was there before


def _owned(optimizer: Adafactor, named_parameters: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """The optimizer's parameters by name; refuses an optimizer that holds one without a name."""
    held = {id(param) for group in optimizer.param_groups for param in group["params"]}
    owned = {name: param for name, param in named_parameters if id(param) in held}
    if len({id(param) for param in owned.values()}) != len(held):
        raise InputError(
            f"optimizer slots: the optimizer holds {len(held)} parameters, of which {len(owned)} have a name in "
            "this model; give the named parameters of the model that it trains"
        )
    return owned


def named_slots(
    optimizer: Adafactor, named_parameters: Iterable[tuple[str, Tensor]], gather: bool = True
) -> dict[str, Tensor]:
    """The optimizer's state under its parameters' names: "PARAM.row" and "PARAM.col", or "PARAM.full"; "PARAM.step".

    Args:
        optimizer: whose state to read; parameters that never had a gradient have no slots.
        named_parameters: of the model that it trains, as from `model.named_parameters()`.
        gather: of parameters divided between ranks, the whole rather than this rank's rows.

    Returns:
        Copies, fit for safetensors: float32 moments, and steps as int64 scalars. To gather, all ranks must ask for it.

    Raises:
        InputError: the optimizer holds a parameter that has no name here.
    """
    slots: dict[str, Tensor] = {}
    for name, param in _owned(optimizer, named_parameters).items():
        shards = Shards(param)
        for slot, value in optimizer.state.get(param, {}).items():
            if not isinstance(value, Tensor):
                slots[f"{name}.{slot}"] = torch.tensor(value)
            else:
                has_rows = gather and slot != "col"
                slots[f"{name}.{slot}"] = (shards.gather(value) if has_rows else value).detach().clone()
    return slots


def load_named_slots(
    optimizer: Adafactor, named_parameters: Iterable[tuple[str, Tensor]], slots: Mapping[str, Tensor]
) -> None:
    """Give an optimizer the state that `named_slots` read; the inverse, bitwise.

    A parameter without any slots starts afresh at its next step (see `pool_slots`, "reset"). All is checked before
    anything is changed.

    Raises:
        InputError: names the first slot that belongs to no parameter, is missing, or has another shape or type.
    """
    owned = _owned(optimizer, named_parameters)
    shapes = {name: param.shape for name, param in owned.items()}
    min_size = optimizer.min_dim_size_to_factor
    states: dict[str, dict[str, Any]] = {}
    for name, found in _slots_by_parameter(slots, shapes, min_size).items():
        param, shards = owned[name], Shards(owned[name])
        states[name] = {}
        for slot, value in found.items():
            if slot == "step":
                states[name][slot] = int(value)
            else:
                moments = value.detach().to(param.device, torch.float32, copy=True)
                states[name][slot] = moments if slot == "col" else shards.share(moments)
    for name, param in owned.items():
        optimizer.state.pop(param, None)
        if name in states:
            optimizer.state[param] = states[name]


def _slots_by_parameter(
    slots: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], min_dim_size_to_factor: int
) -> dict[str, dict[str, Tensor]]:
    """The slots grouped by parameter, each set complete and each tensor of the shape its parameter asks for."""
    grouped: dict[str, dict[str, Tensor]] = {}
    for key, value in slots.items():
        name, _, slot = key.rpartition(".")
        if name not in shapes:
            raise InputError(f'optimizer slot "{key}" belongs to no trained parameter of this model')
        grouped.setdefault(name, {})[slot] = value
    for name, found in grouped.items():
        moments = slot_shapes(shapes[name], min_dim_size_to_factor)
        expected: dict[str, torch.Size] = {**moments, "step": torch.Size(())}
        for slot in found:
            if slot not in expected:
                raise InputError(
                    f'optimizer slot "{name}.{slot}" is unknown; a parameter of shape {tuple(shapes[name])} has '
                    f"{', '.join(expected)}"
                )
        for slot, shape in expected.items():
            if slot not in found:
                raise InputError(f'optimizer slot "{name}.{slot}" is missing; the others of {name} are there')
            value = found[slot]
            if value.shape != shape:
                raise InputError(
                    f'optimizer slot "{name}.{slot}" has shape {tuple(value.shape)}; '
                    f"a parameter of shape {tuple(shapes[name])} asks for {tuple(shape)}"
                )
            if value.is_floating_point() == (slot == "step"):
                kind = "a whole number" if slot == "step" else "floating-point"
                raise InputError(f'optimizer slot "{name}.{slot}" has type {value.dtype}; it must be {kind}')
    return grouped


def pool_slots(
    slots: Mapping[str, Tensor],
    shapes_before: Mapping[str, torch.Size],
    shapes_after: Mapping[str, torch.Size],
    head_dim: int,
    mode: str,
    *,
    min_dim_size_to_factor: int = MIN_DIM_SIZE_TO_FACTOR,
) -> dict[str, Tensor]:
    """Carry the optimizer's slots over a conversion that merged K/V heads.

    A merged head serves all query heads of its group, so its gradient is the sum of the gradients that its members
    would have had. If those are independent with mean zero, the expected square of the sum is the sum of the
    expected squares: "pool" adds the members' second moments, and keeps the step count. Factored moments
    V = row * col / mean(row) stay factored where the smaller tensor is factored: adding the members' rows of V adds
    their `row`, and the mean over fewer rows multiplies `col` by the number of members. Otherwise V is expanded.

    Args:
        slots: as from `named_slots`.
        shapes_before: shape of every parameter before conversion; a K/V projection is (G_before * head_dim, d_model).
        shapes_after: the same names after conversion; a K/V projection is (G_after * head_dim, d_model).
        head_dim: rows of one head.
        mode: "pool", or "reset" to drop the slots of changed parameters, whose decay clock then starts anew.
        min_dim_size_to_factor: the optimizer's.

    Returns:
        The slots after conversion; those of unchanged parameters are the very same tensors.

    Raises:
        InputError: an unknown mode; other parameters before than after; a change that is no merging of heads; or slots
            that do not fit `shapes_before`, with the tensor's name.
    """
    if mode not in POOL_MODES:
        raise InputError(f'optimizer slots: mode "{mode}" is unknown; {suggest(mode, POOL_MODES)}')
    odd = sorted(shapes_before.keys() ^ shapes_after.keys())
    if odd:
        raise InputError(f'optimizer slots: parameter "{odd[0]}" exists only before or only after the conversion')
    after: dict[str, Tensor] = {}
    for name, found in _slots_by_parameter(slots, shapes_before, min_dim_size_to_factor).items():
        before_shape, after_shape = shapes_before[name], shapes_after[name]
        if before_shape == after_shape:
            pooled = found
        else:
            _check_merge(name, before_shape, after_shape, head_dim)
            if mode == "reset":
                continue
            stays_factored = is_factored(after_shape, min_dim_size_to_factor)
            pooled = _pool(found, before_shape[0] // after_shape[0], head_dim, stays_factored)
        after.update({f"{name}.{slot}": value for slot, value in pooled.items()})
    return after


def _check_merge(name: str, before: torch.Size, after: torch.Size, head_dim: int) -> None:
    """Refuse a change of shape that is no merging of whole groups of heads."""
    merges = (
        len(before) == len(after) == 2
        and before[1] == after[1]
        and after[0] >= head_dim > 0
        and after[0] % head_dim == 0
        and before[0] % after[0] == 0
    )
    if not merges:
        raise InputError(
            f'optimizer slots: parameter "{name}" changed from {tuple(before)} to {tuple(after)}, which merges no '
            f"K/V heads of {head_dim} rows; it must be (G * head_dim, d_model) with G after dividing G before"
        )


def _pool(found: Mapping[str, Tensor], members: int, head_dim: int, stays_factored: bool) -> dict[str, Tensor]:
    """Second moments of heads of which each replaces `members` neighbours; the members of a group are contiguous."""

    def add_members(x: Tensor) -> Tensor:
        return x.float().reshape(-1, members, head_dim, *x.shape[1:]).sum(dim=1).flatten(0, 1)

    if "full" in found:
        return {"full": add_members(found["full"]), "step": found["step"]}
    row, col = found["row"].float(), found["col"].float()
    if stays_factored:
        return {"row": add_members(row), "col": col * members, "step": found["step"]}
    return {"full": torch.outer(add_members(row) / row.mean(), col), "step": found["step"]}
