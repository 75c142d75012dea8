"""The backend: who computes the layers, and what CUDA reads from the environment when it starts."""

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megasd.policy import backend
from tests.decoys import install_decoys


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Puts the decoys on the path, and takes what was imported of them back afterwards."""
    for name in ("transformer_engine", "transformer_engine.pytorch"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield lambda *said: monkeypatch.syspath_prepend(install_decoys(tmp_path, *said))
    for name in [name for name in sys.modules if name.startswith("transformer_engine")]:
        del sys.modules[name]


NEEDS = "transformer_engine_torch"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (f"ModuleNotFoundError('No module named {NEEDS}')", f"No module named {NEEDS}"),
        (f"FileNotFoundError('Could not find shared object file for {NEEDS}')", "FileNotFoundErr"),
        ("OSError('libcudnn.so.9: cannot open\\nand more')", "OSError: libcudnn.so.9: cannot open"),
        ("AssertionError()", "AssertionError"),
    ],
)
def test_a_transformer_engine_that_cannot_be_imported_is_a_sentence_with_the_cause(
    error: str, said: str, install: Callable[..., None]
) -> None:
    install(f"raise {error}")
    assert backend.is_transformer_engine_installed()
    for layers in ("auto", "transformer_engine"):
        with pytest.raises(ValueError, match=r"model\.layers: .*model\.layers=local") as refused:
            backend._takes_transformer_engine(layers)
        assert said in str(refused.value)
        assert "\n" not in str(refused.value)
    assert not backend._takes_transformer_engine("local")
    assert not backend.is_transformer_engine_installed(), "Megatron does not see it"


def test_transformer_engine_is_taken_where_it_imports_and_only_asked_for_where_it_is(
    install: Callable[..., None],
) -> None:
    assert not backend._takes_transformer_engine("auto")
    with pytest.raises(ValueError, match=r"model\.layers: transformer_engine is not installed"):
        backend._takes_transformer_engine("transformer_engine")
    install()
    assert backend._takes_transformer_engine("auto")
    assert backend._takes_transformer_engine("transformer_engine")
    assert not backend._takes_transformer_engine("local")
    with pytest.raises(ImportError):  # as Megatron would
        importlib.import_module("transformer_engine.pytorch.optimizers")


def test_what_the_user_has_set_stays_and_what_contradicts_is_refused() -> None:
    def environment(given: dict[str, str], **asked: Any) -> dict[str, str]:
        backend.set_environment(given, **{"tensor": 1, "deterministic": False, **asked})
        return given

    assert environment({}) == {}
    assert environment({}, tensor=2) == {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    eight = {"CUDA_DEVICE_MAX_CONNECTIONS": "8"}
    assert environment(dict(eight), tensor=2) == eight
    ring = {"NCCL_ALGO": "Ring", "CUBLAS_WORKSPACE_CONFIG": ":16:8"}
    assert environment(dict(ring), deterministic=True) == {
        **ring,
        "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
    }
    with pytest.raises(ValueError, match=r"run\.deterministic: NCCL_ALGO=NVLS .*\^NVLS or Ring"):
        environment({"NCCL_ALGO": "NVLS"}, deterministic=True)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """What torch says on a node with two GPUs; nothing is computed there."""
    monkeypatch.setattr(backend, "_started", None)
    monkeypatch.setattr(backend.os, "environ", {"LOCAL_RANK": "3"})
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    return monkeypatch


def test_the_environment_is_set_before_cuda_is_initialised(gpu: pytest.MonkeyPatch) -> None:
    seen: dict[str, str] = {}
    gpu.setattr(torch.cuda, "is_available", lambda: bool(seen.update(backend.os.environ)) or True)
    gpu.setattr(torch, "use_deterministic_algorithms", lambda *_, **__: None)
    gpu.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.set_float32_matmul_precision("high")  # as TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1 does
    started = backend.start("auto", tensor=2, deterministic=True)
    assert torch.get_float32_matmul_precision() == "highest"
    assert (started.device, started.collectives) == (torch.device("cuda", 1), "nccl")
    assert (started.transformer_engine, started.deterministic) == (False, True)
    assert seen.keys() >= backend.TENSOR_PARALLEL.keys() | backend.DETERMINISTIC.keys()


def test_gpus_that_torch_cannot_use_are_no_reason_to_train_on_the_cpu_in_silence(
    gpu: pytest.MonkeyPatch,
) -> None:
    gpu.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"run\.device: auto .* none of 2 GPUs; set "):
        backend.start("auto")


def test_layers_that_want_a_gpu_are_refused_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_started", None)
    with pytest.raises(ValueError, match=r"model\.layers: transformer_engine runs on GPUs only"):
        backend.start("cpu", layers="transformer_engine")


FLOAT8 = """
    def is_fp8_available(return_reason):
        return True, ""
    def is_fp8_block_scaling_available(return_reason):
        return False, "FP8 block scaled GEMM requires CUDA >= 12.9."
"""


def test_a_recipe_is_refused_in_the_words_of_transformer_engine_before_anything_is_built(
    gpu: pytest.MonkeyPatch, install: Callable[..., None]
) -> None:
    gpu.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    with pytest.raises(ValueError, match=r"model\.fp8: .* is not installed or not taken"):
        backend.start("cuda", recipe="tensorwise")
    install(FLOAT8)
    with pytest.raises(ValueError, match=r"recipe: blockwise cannot .*\(FP8 block .* 12\.9\); ch"):
        backend.start("cuda", recipe="blockwise")
    assert backend.start("cuda", recipe="tensorwise").transformer_engine
    gpu.setattr(backend, "_started", None)
    with pytest.raises(ValueError, match=r"model\.fp8: .* not taken \(model\.layers\)"):
        backend.start("cuda", layers="local", recipe="tensorwise")
    with pytest.raises(ValueError, match=r"model\.fp8: float8 layers run on GPUs only"):
        backend.start("cpu", recipe="tensorwise")


def test_scales_of_blocks_are_those_of_engines_where_the_card_has_any_but_powers_of_2() -> None:
    hopper: dict[str, str] = {}
    backend.set_block_scales(hopper, (9, 0))
    assert hopper == {backend.BLOCK_SCALES: "1"}
    chosen = {backend.BLOCK_SCALES: "0"}
    backend.set_block_scales(chosen, (9, 0))
    assert chosen == {backend.BLOCK_SCALES: "0"}
    blackwell: dict[str, str] = {}
    backend.set_block_scales(blackwell, (10, 0))
    assert blackwell == {backend.BLOCK_SCALES: "0"}
    with pytest.raises(ValueError, match=r"model\.fp8\.recipe: blockwise .* unset it"):
        backend.set_block_scales({backend.BLOCK_SCALES: "1"}, (10, 0))
