"""What the trainings on one GPU share: a schedule by time, averaged weights, steps as CUDA graphs.

A training of this folder is given seconds, not steps. Its learning rate depends on the share of the
time that is used, so that it ends as planned however quick the machine is:

    device = open_device("cuda", seed=0)
    initialise(model)
    optimizer = make_adamw(parameter_groups(model, 0.05), device)
    step = TrainingStep(model, optimizer, loss_of, [images, targets], clip_norm=5.0)
    ema = Ema(model)
    clock = Clock(seconds)  # from here on the time counts
    while not clock.ended:
        set_rate(optimizer, 3e-3 * cosine(clock.used))
        loss = step(*batch)
        ema.update()
    save_run(folder, "name", ema.model.state_dict(), {"score": ..., **clock.facts(device)})

Nothing here depends on Paddle.
"""

import copy
import itertools
import json
import math
import os
import platform
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MODES = ("auto", "compile", "graph", "eager")
# What each mode tries, in this order.
_ATTEMPTS = {
    "auto": ("compile", "graph", "eager"),
    "compile": ("compile", "graph", "eager"),
    "graph": ("graph", "eager"),
    "eager": ("eager",),
}
_WARMUPS = 3  # steps before a capture: kernels are compiled and chosen in them
_QUEUED = 4  # steps that the host may be ahead of the GPU; with more, a clock would run ahead too

LossOf = Callable[..., Tensor]


def open_device(name: str, seed: int) -> torch.device:
    """The device, with the seed of all its random numbers set.

    Args:
        name: `cuda` or `cpu`.
        seed: of PyTorch's generators.
    """
    torch.manual_seed(seed)
    if name == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 where float32 is multiplied
        torch.backends.cudnn.benchmark = True
    return torch.device(name)


def autocast(device: torch.device, enabled: bool = True) -> AbstractContextManager:
    """bfloat16 where PyTorch deems it safe, on a GPU; float32 elsewhere. Weights stay float32."""
    # The cache of converted weights must not outlive a captured graph.
    return torch.autocast(
        device.type, torch.bfloat16, enabled and device.type == "cuda", cache_enabled=False
    )


# -- time ------------------------------------------------------------------------------------------


class Clock:
    """The time that a training has. It counts from the construction.

    Args:
        seconds: that the training may take.

    Attributes:
        ended: whether they are over. SIGTERM and Ctrl-C end them early; the next signal is not
            caught.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._start = time.monotonic()
        self._stopped = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)

    def _stop(self, number: int, frame: object) -> None:
        print(f"stopped by {signal.Signals(number).name} after {self.elapsed:.1f} s", flush=True)
        self._stopped = True
        signal.signal(number, signal.SIG_DFL)

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self._start

    @property
    def used(self) -> float:
        """The share of the time that is used, 0 to 1."""
        return min(1.0, self.elapsed / self.seconds)

    @property
    def ended(self) -> bool:
        return self._stopped or self.used >= 1.0

    def facts(self, device: torch.device) -> dict[str, object]:
        """What a record says of time and machine."""
        gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
        return {
            "seconds": round(self.elapsed, 1),
            "share_of_time": round(self.used, 4),
            "gpu": gpu,
            "cpus": len(os.sched_getaffinity(0)),
            "torch": torch.__version__,
            "python": platform.python_version(),
        }


def cosine(used: float, *, warmup: float = 0.03, start: float = 0.01, end: float = 0.005) -> float:
    """Factor of the learning rate: a linear rise to 1, then a cosine.

    Args:
        used: share of the time.
        warmup: share of the time that the rise takes.
        start: factor that the rise begins with.
        end: factor at the end.
    """
    if used < warmup:
        return start + (1 - start) * used / warmup
    share = (used - warmup) / (1 - warmup)
    return end + (1 - end) * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))


# -- model and optimiser ---------------------------------------------------------------------------


def initialise(model: nn.Module) -> None:
    """The initial values of `ppvision.models.pale_transformer`: truncated normal (0.02) for
    pointwise layers, Kaiming for convolutions that look around, biases of 0."""
    for module in model.modules():
        if isinstance(module, nn.Linear) or (
            isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1)
        ):
            nn.init.trunc_normal_(module.weight, std=0.02, a=-0.04, b=0.04)
        elif isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
        else:
            continue
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def parameter_groups(
    model: nn.Module,
    weight_decay: float,
    rate_factor: Callable[[str], float] = lambda name: 1.0,
) -> list[dict]:
    """Groups for an optimiser, as `ppvision.engine.optimization.make_parameter_groups` makes them.

    Args:
        model: any; parameters that need no gradient are left out.
        weight_decay: of everything with two axes or more. Norms and biases have none.
        rate_factor: factor of the learning rate, by the name of a parameter.

    Returns:
        A dictionary per decay and factor: `params`, `weight_decay`, `rate_factor`.
    """
    groups: dict[tuple[float, float], dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decay, factor = weight_decay if parameter.ndim > 1 else 0.0, rate_factor(name)
        group = groups.setdefault(
            (decay, factor), {"params": [], "weight_decay": decay, "rate_factor": factor}
        )
        group["params"].append(parameter)
    return list(groups.values())


def make_adamw(
    groups: list[dict], device: torch.device, betas: tuple[float, float] = (0.9, 0.999)
) -> torch.optim.AdamW:
    """AdamW whose rate can change inside of a CUDA graph. Its rate is 0 until `set_rate`."""
    if device.type != "cuda":
        return torch.optim.AdamW(groups, lr=0.0, betas=betas)
    for group in groups:
        group["lr"] = torch.zeros((), device=device)
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, fused=True, capturable=True)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate; each group's is multiplied by its `rate_factor`."""
    for group in optimizer.param_groups:
        value = rate * group.get("rate_factor", 1.0)
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(value)
        else:
            group["lr"] = value


class Ema:
    """The running average of a model's weights and statistics.

    Args:
        model: that is trained.
        decay: fraction of the average kept at each step, at most.
        horizon: steps of the past that the average looks back on, as a share of those that were
            done: a short training has a quicker average.

    Attributes:
        model: a copy with the averaged weights, in evaluation mode.
        steps: how many updates there were.
    """

    def __init__(self, model: nn.Module, decay: float = 0.999, horizon: float = 0.05) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.steps = 0
        self._decay, self._horizon = decay, horizon
        pairs = list(zip(_tensors_of(self.model), _tensors_of(model), strict=True))
        self._averages = [a for a, b in pairs if b.is_floating_point()]
        self._values = [b.detach() for _, b in pairs if b.is_floating_point()]
        self._counters = [(a, b) for a, b in pairs if not b.is_floating_point()]

    @torch.no_grad()
    def update(self) -> None:
        self.steps += 1
        decay = min(self._decay, 1 - 1 / (1 + self._horizon * self.steps))
        torch._foreach_lerp_(self._averages, self._values, 1 - decay)
        for average, value in self._counters:
            average.copy_(value)

    @torch.no_grad()
    def restart(self) -> None:
        """Begin anew from the model as it is."""
        for average, value in zip(self._averages, self._values, strict=True):
            average.copy_(value)
        for average, value in self._counters:
            average.copy_(value)


def _tensors_of(model: nn.Module) -> Iterable[Tensor]:
    return itertools.chain(model.parameters(), model.buffers())


# -- convolutions ----------------------------------------------------------------------------------


class ShiftedConv(nn.Conv2d):
    """A depthwise 3x3 convolution as nine shifted products, which a compiler makes one kernel of.

    For `torch.compile` alone: as kernels of their own they take several times as long.
    """

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        height, width = x.shape[2:]
        padded = F.pad(x, (1, 1, 1, 1))
        taps = self.weight.flatten(1).unbind(1)  # nine of [C]
        total = x.new_zeros((), dtype=self.weight.dtype)
        if self.bias is not None:
            total = self.bias[:, None, None]
        for tap, (row, column) in zip(taps, itertools.product(range(3), range(3)), strict=True):
            part = padded[:, :, row : row + height, column : column + width]
            total = total + part * tap[:, None, None]
        return total.to(x.dtype)


def use_shifts(model: nn.Module) -> None:
    """Let every depthwise 3x3 convolution of stride 1 be a `ShiftedConv`, with the same weights."""
    for module in model.modules():
        if (
            type(module) is nn.Conv2d
            and module.groups == module.in_channels == module.out_channels
            and module.kernel_size == (3, 3)
            and (module.stride, module.padding, module.dilation) == ((1, 1), (1, 1), (1, 1))
        ):
            module.__class__ = ShiftedConv


# -- steps -----------------------------------------------------------------------------------------


class TrainingStep:
    """Loss, gradients, clipping and the optimiser's step, as one CUDA graph where that works.

    Args:
        model: in training mode. Its weights and statistics are as before after the construction.
        optimizer: of `make_adamw`.
        loss_of: `loss_of(network, *inputs)` gives the loss, a scalar; `network` is the model, or
            the compiled model. It runs under `autocast`. In a graph it must not read anything back
            from the GPU (`item`, masks as indices), and the shapes of its tensors must not change.
        inputs: an example of each input, of the shapes that all steps have.
        clip_norm: greatest norm of all gradients together; None does not clip.
        mode: one of `MODES`: `compile` (`torch.compile` and a CUDA graph), `graph` (a CUDA graph of
            PyTorch's own kernels), `eager`. What does not work is said, and the next one is tried.
            `auto` is `compile`.

    Attributes:
        mode: the one that works.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss_of: LossOf,
        inputs: Sequence[Tensor],
        *,
        clip_norm: float | None = None,
        mode: str = "auto",
    ) -> None:
        self._model, self._optimizer, self._loss_of = model, optimizer, loss_of
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._clip_norm = clip_norm
        self._device = self._parameters[0].device
        self._inputs = [value.clone() for value in inputs]
        self._events: list[torch.cuda.Event] = []
        self._graph: torch.cuda.CUDAGraph | None = None
        self._loss = torch.zeros((), device=self._device)
        self._network: Callable[..., Tensor] = model
        before = Snapshot(model, optimizer)
        attempts = _ATTEMPTS[mode]
        for attempt in attempts:
            try:
                begun = time.monotonic()
                self._prepare(attempt)
            except Exception as error:  # of compilers and drivers, of whatever kind
                if attempt == attempts[-1]:
                    raise
                reason = (str(error).strip() or "?").splitlines()[0][:300]
                print(f"step: {attempt} fails ({type(error).__name__}: {reason})", flush=True)
            else:
                self.mode = attempt
                print(f"step: {attempt}, ready in {time.monotonic() - begun:.1f} s", flush=True)
                break
            finally:
                before.restore()

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Do one step; returns the loss, a tensor that the next call overwrites."""
        for own, value in zip(self._inputs, inputs, strict=True):
            own.copy_(value, non_blocking=True)
        if self._graph is None:
            self._loss = self._run()
        else:
            self._graph.replay()
        if self._device.type == "cuda":
            event = torch.cuda.Event()
            event.record()
            self._events.append(event)
            if len(self._events) > _QUEUED:
                self._events.pop(0).synchronize()
        return self._loss

    def _run(self) -> Tensor:
        self._optimizer.zero_grad(set_to_none=True)
        with autocast(self._device):
            loss = self._loss_of(self._network, *self._inputs)
        loss.backward()
        if self._clip_norm is not None:
            nn.utils.clip_grad_norm_(self._parameters, self._clip_norm)
        self._optimizer.step()
        return loss.detach()

    def _prepare(self, attempt: str) -> None:
        compiled = attempt == "compile"
        self._network = torch.compile(self._model, dynamic=False) if compiled else self._model
        self._graph = None
        if self._device.type != "cuda":
            if compiled:
                self._run()  # what cannot be compiled raises here
            return
        stream = torch.cuda.Stream()  # a graph's warm-up may not run on the default stream
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARMUPS):
                self._run()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        if attempt == "eager":
            return
        graph = torch.cuda.CUDAGraph()
        self._optimizer.zero_grad(set_to_none=True)  # the graph makes gradients of its own
        with torch.cuda.graph(graph):
            self._loss = self._run()
        self._graph = graph
        graph.replay()  # what a capture hides raises here
        torch.cuda.synchronize()


class Snapshot:
    """Weights, statistics and an optimiser's state, to be put back in place.

    A captured graph works on the same memory: no tensor may be replaced by another.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._model, self._optimizer = model, optimizer
        self._values = [value.detach().clone() for value in _tensors_of(model)]
        self._state = {
            (id(parameter), name): value.clone() for parameter, name, value in self._state_tensors()
        }

    def _state_tensors(self) -> Iterable[tuple[Tensor, str, Tensor]]:
        for parameter, state in self._optimizer.state.items():
            for name, value in state.items():
                if isinstance(value, Tensor):
                    yield parameter, name, value

    @torch.no_grad()
    def restore(self) -> None:
        for own, value in zip(_tensors_of(self._model), self._values, strict=True):
            own.copy_(value)
        for parameter, name, value in self._state_tensors():
            known = self._state.get((id(parameter), name))
            if known is None:  # made since then, from zero
                value.zero_()
            else:
                value.copy_(known)


# -- results ---------------------------------------------------------------------------------------


def save_run(folder: Path, name: str, state: dict[str, Tensor], record: dict) -> Path:
    """Write `NAME.pt`, a state dict of float32 tensors, and `NAME.json`, whole or not at all.

    Args:
        folder: is made where it is not there.
        name: of both files.
        state: of the model.
        record: what is known about it.

    Returns:
        The path of the weights.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = folder / f"{name}.pt"
    tensors = {key: value.detach().cpu().clone() for key, value in state.items()}
    torch.save(tensors, folder / f"{name}.pt.part")
    os.replace(folder / f"{name}.pt.part", weights)
    part = folder / f"{name}.json.part"
    part.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    os.replace(part, folder / f"{name}.json")
    return weights
