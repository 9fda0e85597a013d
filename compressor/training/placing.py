"""A model as it lies while it trains: on a device, copied to or spread over the processes."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from compressor.errors import StageError, one_line
from compressor.training.settings import Training
from compressor.training.world import World

State = dict[str, Tensor]


class Placed:
    """``net`` is what a step calls, ``inner`` the module whose parameters move.

    With one process both are the model, unless it is compiled. With several, ``net`` is its
    DistributedDataParallel wrapper, which averages gradients; or, sharded, every process holds a
    part of each tensor (FSDP2, ``fully_shard``) and ``inner`` is a copy.
    """

    def __init__(self, model: nn.Module, training: Training, world: World) -> None:
        self.device = device_for(training)
        self._sharded = training.shard and world.size > 1
        self._world = world
        self.inner = copy.deepcopy(model) if self._sharded else model
        self.inner.to(self.device)
        if training.channels_last:
            # Not by ``Module.to``, which refuses a model with a convolution of volumes.
            for held in (*self.inner.parameters(), *self.inner.buffers()):
                if held.ndim == 4:
                    held.data = held.data.contiguous(memory_format=torch.channels_last)
        if self.device.type == "cuda" and world.size > 1:
            # Statistics of the whole batch; on the CPU PyTorch has none, and each process its own.
            convert = nn.SyncBatchNorm.convert_sync_batchnorm
            self.inner = convert(self.inner)  # type: ignore[no-untyped-call]
        if self._sharded:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            mesh = init_device_mesh(self.device.type, (world.size,))
            fully_shard(self.inner, mesh=mesh)
        self.net: Any = torch.compile(self.inner) if training.compile else self.inner
        self._around: Any = None  # what averages gradients, where something has to

    def joint(self, objective: Any, beside: Sequence[nn.Module]) -> Any:
        """``objective(net, batch)`` as a function of the batch alone, whose backward pass averages
        the gradients of the model, and of the modules ``beside``, over the processes."""
        step = _Step(self.inner, self.net, objective, beside)
        moved = any(parameter.requires_grad for parameter in step.parameters())
        if self._world.size == 1 or self._sharded or not moved:
            return step
        from torch.nn.parallel import DistributedDataParallel

        cuda = self.device.type == "cuda"
        # The objective is inside: what it leaves out of a model that is somebody else's (an
        # auxiliary head, all behind a hint) is looked for at every step in what it gave.
        self._around = DistributedDataParallel(
            step, device_ids=[self.device] if cuda else None, find_unused_parameters=True
        )
        return self._around

    def quiet(self, last: bool) -> AbstractContextManager[None]:
        """Around a backward pass: gradients are averaged over the processes in the ``last`` of
        those that are accumulated."""
        if self._sharded:
            self.inner.set_requires_gradient_sync(last)  # type: ignore[operator]
            return nullcontext()
        return nullcontext() if last or self._around is None else self._around.no_sync()

    def state(self) -> State:
        """A copy of all weights and buffers, whole, in every process."""
        if self._sharded:
            from torch.distributed.tensor import DTensor

            return {
                name: (one.full_tensor() if isinstance(one, DTensor) else one).detach().clone()
                for name, one in self.inner.state_dict().items()
            }
        return {name: one.detach().clone() for name, one in self.inner.state_dict().items()}

    def put(self, state: Mapping[str, Tensor]) -> None:
        """Back to what :meth:`state` gave."""
        if self._sharded:
            from torch.distributed.tensor import DTensor, distribute_tensor

            whole = self.inner.state_dict()
            state = {
                name: distribute_tensor(one, whole[name].device_mesh, whole[name].placements)
                if isinstance(whole[name], DTensor)
                else one
                for name, one in state.items()
            }
        self.inner.load_state_dict(dict(state))

    def back(self, model: nn.Module) -> None:
        """Ends: ``model`` is on the CPU, in eval mode, with the weights as they are now."""
        if self.inner is not model:
            model.load_state_dict({name: one.cpu() for name, one in self.state().items()})
        model.to("cpu")
        model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        model.eval()


class _Step(nn.Module):
    """An objective, with the modules that it moves."""

    def __init__(
        self, inner: nn.Module, net: Any, objective: Any, beside: Sequence[nn.Module]
    ) -> None:
        super().__init__()
        self.inner, self.beside = inner, nn.ModuleList(beside)
        self._run: Callable[[Any], Any] = lambda batch: objective(net, batch)

    def forward(self, batch: Any) -> Any:
        return self._run(batch)


def device_for(training: Training) -> torch.device:
    """The device that ``training.device`` stands for here."""
    cuda = training.device != "cpu" and torch.cuda.is_available()
    return torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")


def clipped(parameters: Sequence[nn.Parameter], limit: float) -> None:
    """Scales gradients to a norm of ``limit`` over all, where it is more; some may be sharded."""
    from torch.distributed.tensor import DTensor

    if not any(isinstance(one, DTensor) for one in parameters):
        nn.utils.clip_grad_norm_(parameters, limit)
        return
    gradients = [one.grad for one in parameters if one.grad is not None]
    norms = [torch.linalg.vector_norm(one) for one in gradients]
    whole = [one.full_tensor() if isinstance(one, DTensor) else one for one in norms]
    share = limit / (float(torch.stack(whole).norm()) + 1e-6)
    if share < 1:
        for gradient in gradients:
            gradient.mul_(share)


@contextmanager
def undisturbed() -> Iterator[None]:
    """What PyTorch warns of that is no news to the user: that DDP found every parameter used, and
    that a step was left out while fp16 looks for its scale."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="find_unused_parameters=True was specified")
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
        yield


@contextmanager
def compiling(training: Training) -> Iterator[None]:
    """A compiler that is missing or fails is one line that says how to do without."""
    if training.compile:
        # What was compiled for the same class before would run without the hooks of this model.
        torch._dynamo.reset()
    try:
        yield
    except Exception as error:
        if training.compile and type(error).__module__.startswith(("torch._dynamo", "torch._ind")):
            raise StageError(
                f"compile = true: torch.compile failed ({one_line(error, 160)}): remove it"
            ) from error
        raise
