"""Transformer Engine's own Python, and Megatron's modules over it, on a CPU without its kernels.

`start` makes this process one where `import transformer_engine` works and every module of it is the
real one, but for the compiled extension (kernels.py) and Triton's kernels. It is for a process
of its own: whoever imports Megatron after it gets Transformer Engine's layers.
"""

import contextlib
import importlib
import importlib.machinery
import os
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any, cast

import torch

from tests.te_stub import kernels
from tests.te_stub.fp8 import DType

FOLDER = Path(sys.prefix) / "transformer_engine"  # tools/setup.sh puts the wheel there
_ENVIRONMENT = {
    "NVTE_PROJECT_BUILDING": "1",  # import without the compiled libraries
    "NVTE_TORCH_COMPILE": "0",
    "NVTE_FRAMEWORK": "pytorch",
    "NVTE_FP8_BLOCK_SCALING_FP32_SCALES": "1",  # as policy/backend.py sets it on Hopper
}
_PACKAGE = "transformer_engine"
_TRITON = f"{_PACKAGE}.pytorch.triton"
_SUBSTITUTED = (
    *(_TRITON, f"{_TRITON}.permutation", f"{_TRITON}.pad", f"{_TRITON}.cross_entropy"),
    f"{_PACKAGE}.pytorch.onnx_extensions",
)


def is_installed() -> bool:
    return (FOLDER / _PACKAGE).is_dir()


class _Names:
    """An enumeration of which only the names matter: each is its own value."""

    def __getattr__(self, name: str) -> str:
        return name


def _extension() -> types.ModuleType:
    """`transformer_engine_torch`, as far as somebody here asks for it."""
    module: Any = types.ModuleType("transformer_engine_torch")
    places = ("INPUT", "WEIGHT", "OUTPUT")
    forward = [f"GEMM{gemm}_{place}" for gemm in (1, 2, 3) for place in places]
    backward = [f"GRAD_{place}{gemm}" for gemm in (1, 2, 3) for place in ("OUTPUT", "INPUT")]
    answers: dict[str, Any] = {
        "DType": DType,
        "NVTE_Fused_Attn_Backend": kernels.FusedAttnBackend,
        "FP8FwdTensors": types.SimpleNamespace(**{n: i for i, n in enumerate(forward)}),
        "FP8BwdTensors": types.SimpleNamespace(**{n: i for i, n in enumerate(backward)}),
        "Float8BlockScaleTensorFormat": _Names(),
        "CommOverlapType": _Names(),
    }
    enumerations = ("QKV_Layout", "QKV_Format", "Bias_Type", "Mask_Type", "Softmax_Type")
    answers |= {f"NVTE_{name}": _Names() for name in enumerations}
    classes = ("CommOverlap", "CommOverlapP2P", "CommOverlapHelper", "FP8TensorMeta")
    answers |= {name: type(name, (), {}) for name in classes}
    answers |= {n: kernels.as_kernel(n, f) for n, f in kernels.KERNELS.items()}
    answers |= {name: _missing(name) for name in ("layernorm_fwd", "layernorm_bwd")}
    module.__dict__.update(answers)
    module.__all__ = list(answers)
    module.__getattr__ = _missing  # PEP 562: only for names that are not there
    return module


def _missing(name: str) -> Callable[..., Any]:
    if name.startswith("__"):
        raise AttributeError(name)

    def refuse(*_: Any, **__: Any) -> Any:
        raise NotImplementedError(f"tests/te_stub/kernels.py has no kernel {name}: write it")

    return refuse


def _substitute(name: str) -> types.ModuleType:
    """In the place of a module that imports Triton or ONNX: nothing of most is called."""
    module: Any = types.ModuleType(name)
    if name == _TRITON:
        module.__path__ = []
        return module
    if name.endswith(".permutation"):
        table = kernels.PERMUTATION
        module.__dict__.update({n: kernels.as_kernel(n, f) for n, f in table.items()})
    module.__getattr__ = _missing
    return module


class _Finder(MetaPathFinder):
    """Gives every module of Transformer Engine a `torch` that answers like a Hopper GPU."""

    def __init__(self, stand_in: types.ModuleType) -> None:
        self.stand_in = stand_in

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] != _PACKAGE:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: types.ModuleType) -> None:
            execute(module)
            if module.__dict__.get("torch") is torch:
                module.__dict__["torch"] = self.stand_in
            if fullname == f"{_PACKAGE}.common":
                module.__dict__["load_framework_extension"] = _load_extension

        spec.loader.exec_module = exec_module
        return spec


def _load_extension(framework: str) -> None:
    assert framework == "torch"
    sys.modules["transformer_engine_torch"] = _extension()


def _properties(*_: Any) -> types.SimpleNamespace:
    return types.SimpleNamespace(major=9, minor=0, multi_processor_count=132, name="a stand-in")


class _Done:
    """What is left to wait for of collectives that gloo, which cannot coalesce, has run at once."""

    def wait(self) -> None: ...


def _torch_on_hopper() -> types.ModuleType:
    """Megatron's stand-in for torch on a CPU (policy/megatron/cpu.py), and a GPU that is there."""
    from megasd.policy.megatron import cpu

    stand_in = cpu._stand_in_for_torch()
    answers = {
        "is_available": lambda: True,
        "current_device": lambda: 0,
        "get_device_properties": _properties,
        "get_device_capability": lambda *_: (9, 0),
        "is_current_stream_capturing": lambda: False,
    }
    stand_in.cuda.__dict__.update(answers)
    one_by_one = {"_coalescing_manager": lambda **_: contextlib.nullcontext(_Done())}
    stand_in.__dict__["distributed"] = cpu._StandIn(torch.distributed, one_by_one)
    stand_in.__dict__["version"] = types.SimpleNamespace(cuda="13.0", hip=None)
    return stand_in


def _is_from(packages: tuple[str, ...]) -> bool:
    """Whether the caller of who asks is a module of one of `packages`."""
    name = sys._getframe(2).f_globals.get("__name__", "")
    return name.partition(".")[0] in packages


def _answer_tensor_methods() -> None:
    """Tensors are on CUDA for Transformer Engine, and have no way to go for Megatron and it."""
    tensor = cast(Any, torch.Tensor)
    real = torch._C.TensorBase
    real_cuda, real_to, real_is_cuda = real.cuda, real.to, real.is_cuda

    def cuda(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self if _is_from((_PACKAGE, "megatron")) else real_cuda(self, *args, **kwargs)

    def is_cuda(self: torch.Tensor) -> bool:
        return _is_from((_PACKAGE,)) or cast(Any, real_is_cuda).__get__(self)

    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if str(kwargs.get("device")).startswith("cuda") and _is_from((_PACKAGE,)):
            kwargs["device"] = "cpu"
        return real_to(self, *args, **kwargs)

    make = real._make_wrapper_subclass

    def make_wrapper(*args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
        place = torch.device("cpu") if isinstance(device, int) else device
        return make(*args, device=place, **kwargs)

    tensor._make_wrapper_subclass = staticmethod(make_wrapper)
    tensor.cuda = cuda
    tensor.to = to
    tensor.is_cuda = property(is_cuda)


def start() -> Any:
    """The backend of policies with Transformer Engine's layers on a CPU; once per process."""
    from megasd.policy import backend
    from megasd.policy.megatron import cpu

    if backend._started is not None:
        assert backend._started.transformer_engine, "this process runs without"
        return backend._started
    os.environ.update(_ENVIRONMENT)
    sys.path.insert(0, str(FOLDER))
    sys.meta_path.insert(0, _Finder(_torch_on_hopper()))
    for name in _SUBSTITUTED:
        sys.modules[name] = _substitute(name)
    with _a_gpu_while_importing():
        importlib.import_module(f"{_PACKAGE}.pytorch")
    distributed: Any = importlib.import_module(f"{_PACKAGE}.pytorch.distributed")
    distributed._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    distributed._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    cpu.prepare_megatron()
    _answer_tensor_methods()
    backend._started = backend.Backend(torch.device("cpu"), "gloo", True)
    return backend._started


def forget_groups() -> None:
    """Transformer Engine keeps what it was told of process groups, and so the groups."""
    distributed: Any = importlib.import_module(f"{_PACKAGE}.pytorch.distributed")
    distributed.get_distributed_world_size.cache_clear()
    distributed.get_distributed_rank.cache_clear()
    quantization: Any = importlib.import_module(f"{_PACKAGE}.pytorch.quantization")
    quantization.FP8GlobalStateManager.reset()  # groups whose largest values it compares
    attention: Any = f"{_PACKAGE}.pytorch.attention.dot_product_attention.dot_product_attention"
    importlib.import_module(attention)._attention_backends["attention_params"] = None


@contextlib.contextmanager
def _a_gpu_while_importing() -> Iterator[None]:
    """Modules ask for the GPU while they are executed, before they have their `torch`."""
    real = torch.cuda.get_device_properties
    torch.cuda.get_device_properties = _properties
    try:
        yield
    finally:
        torch.cuda.get_device_properties = real
