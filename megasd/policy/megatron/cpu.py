"""Megatron-core on a CPU: what must be in place before its first import.

Megatron asks for CUDA by name in places (the current device, RNG state, streams, factories with
device="cuda"). Its modules get a stand-in for their module-global `torch` that answers for a CPU;
torch itself stays as it is for everybody else, and an operation costs nothing extra. Two methods
of torch.Tensor have no module to stand in for: they behave differently for Megatron callers only.
"""

import contextlib
import importlib.machinery
import sys
import types
import warnings
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from typing import Any

import torch

_CPU = torch.device("cpu")
_FACTORIES = (
    *("zeros", "ones", "empty", "full", "tensor", "arange", "rand", "randn", "eye", "linspace"),
    *("as_tensor", "zeros_like", "ones_like", "empty_like", "full_like"),
)


def _names_cuda(device: Any) -> bool:
    if isinstance(device, bool) or device is None:
        return False
    return isinstance(device, int) or str(device).startswith("cuda")


class _Stream:
    """A stream or an event: on a CPU everything has already happened."""

    def __init__(self, *_: Any, **__: Any) -> None: ...
    def __enter__(self) -> "_Stream":
        return self

    def __exit__(self, *_: object) -> None: ...
    def wait_stream(self, *_: Any) -> None: ...
    def wait_event(self, *_: Any) -> None: ...
    def synchronize(self) -> None: ...
    def record(self, *_: Any) -> None: ...
    def record_event(self, *_: Any) -> "_Stream":
        return self

    def wait(self, *_: Any) -> None: ...
    def query(self) -> bool:
        return True


class _Generators:
    def __getitem__(self, _: int) -> torch.Generator:
        return torch.default_generator


_ANSWERS: dict[str, Any] = {
    "is_available": lambda: False,
    "current_device": lambda: _CPU,
    "device_count": lambda: 1,
    "set_device": lambda *_: None,
    "synchronize": lambda *_, **__: None,
    "empty_cache": lambda: None,
    "get_rng_state": lambda *_, **__: torch.get_rng_state(),
    "set_rng_state": lambda state, *_, **__: torch.set_rng_state(state),
    "manual_seed": lambda seed: torch.manual_seed(seed),
    "current_stream": lambda *_, **__: _Stream(),
    "default_stream": lambda *_, **__: _Stream(),
    "stream": lambda _: contextlib.nullcontext(),
    "Stream": _Stream,
    "Event": _Stream,
    "default_generators": _Generators(),
}


class _StandIn(types.ModuleType):
    """A module that answers some names itself and passes all others on."""

    def __init__(self, real: types.ModuleType, answers: dict[str, Any]) -> None:
        super().__init__(real.__name__)
        self.__dict__.update(answers)
        self.__dict__["_real"] = real

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_real"], name)


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    def make(*args: Any, **kwargs: Any) -> Any:
        if _names_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return factory(*args, **kwargs)

    return make


def _stand_in_for_torch() -> types.ModuleType:
    random = types.SimpleNamespace(
        get_rng_state=_ANSWERS["get_rng_state"], set_rng_state=_ANSWERS["set_rng_state"]
    )
    answers: dict[str, Any] = {name: _on_cpu(getattr(torch, name)) for name in _FACTORIES}
    answers["cuda"] = _StandIn(torch.cuda, _ANSWERS | {"random": random})
    return _StandIn(torch, answers)


class _MegatronFinder(MetaPathFinder):
    """Gives every megatron.core module the stand-in as soon as it has been executed."""

    def __init__(self, stand_in: types.ModuleType) -> None:
        self.stand_in = stand_in

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> ModuleSpec | None:
        if not fullname.startswith("megatron.core"):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: types.ModuleType) -> None:
            execute(module)
            if module.__dict__.get("torch") is torch:
                module.__dict__["torch"] = self.stand_in
            if fullname == "megatron.core.jit":  # before any other module uses its decorator
                module.__dict__["disable_jit_fuser"]()

        spec.loader.exec_module = exec_module
        return spec


def _called_from_megatron() -> bool:
    return sys._getframe(2).f_globals.get("__name__", "").startswith("megatron.core")


def _answer_tensor_methods() -> None:
    """`tensor.cuda()` and `tensor.type()`, as Megatron expects them, for Megatron only."""
    real_cuda, real_type = torch.Tensor.cuda, torch.Tensor.type

    def cuda(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self if _called_from_megatron() else real_cuda(self, *args, **kwargs)

    def type_(self: torch.Tensor, dtype: Any = None, **kwargs: Any) -> Any:
        if dtype is None and not kwargs and _called_from_megatron():
            return real_type(self).replace("torch.", "torch.cuda.", 1)
        return real_type(self, dtype, **kwargs)

    torch.Tensor.cuda = cuda  # pyright: ignore[reportAttributeAccessIssue]
    torch.Tensor.type = type_  # pyright: ignore[reportAttributeAccessIssue]


def prepare_megatron() -> None:
    """Called once, before the first import of megatron.core."""
    if any(name.startswith("megatron.core") for name in sys.modules):
        raise RuntimeError("megatron.core was imported before the backend was chosen")
    sys.meta_path.insert(0, _MegatronFinder(_stand_in_for_torch()))
    _answer_tensor_methods()

    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message=".*(Apex|Transformer Engine|transformer_engine).*"
        )
        import megatron.core.tensor_parallel.random as random

    # It would queue RNG calls until CUDA is initialised, which never happens here.
    random._lazy_call = lambda callback, **_: callback()
