"""Float8 by arithmetic: which lengths and widths Transformer Engine takes, what is refused."""

from typing import Any

import pytest

from megasd.planner.presets import preset
from megasd.policy import checks
from megasd.policy.config import FP8Config, ModelConfig, ParallelConfig
from megasd.policy.float8 import FORMATS, tokens_of_a_multiple

QWEN3_8B, MOE_30B = ({**preset(size), "tie_word_embeddings": False} for size in ("8B", "30B-A3B"))


@pytest.fixture(autouse=True)
def with_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)


def faults(hf_config: dict[str, Any] = QWEN3_8B, **asked: Any) -> list[str]:
    """`asked`: keys of model.fp8, and of model or parallel where these have them."""
    cut = {key: asked.pop(key) for key in [*asked] if hasattr(ParallelConfig(), key)}
    own = {key: asked.pop(key) for key in [*asked] if key in ("layers", "dtype")}
    device = asked.pop("device", "auto")
    model = ModelConfig(path="m", fp8=FP8Config(**asked), **own)
    return checks.check_fp8(model, ParallelConfig(**cut), hf_config, device=device)


@pytest.mark.parametrize("recipe", FORMATS)
@pytest.mark.parametrize("tensor", [1, 2, 8])
@pytest.mark.parametrize("sequence", [False, True])
def test_every_ranks_share_of_the_tokens_is_one_that_transformer_engine_takes(
    recipe: Any, tensor: int, sequence: bool
) -> None:
    """Products of a GEMM along the tokens take 16; a quantized all-gather whole blocks."""
    multiple = tokens_of_a_multiple(FP8Config(recipe=recipe), tensor=tensor, sequence=sequence)
    is_cut = sequence and tensor > 1
    share = multiple / (tensor if is_cut else 1)
    assert share % 16 == 0
    assert share % 128 == 0 or not (is_cut and recipe == "blockwise")
    assert share <= 128
    assert tokens_of_a_multiple(None, tensor=tensor, sequence=sequence) == multiple / share


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"device": "cpu"}, "model.fp8: float8 layers run on GPUs only; set it to null"),
        ({"layers": "local"}, "model.fp8: float8 layers are Transformer Engine's; set model.layer"),
        ({"dtype": "float32"}, "model.fp8: what is not float8 is bfloat16, and model.dtype is fl"),
        ({"meter_every": -1}, "model.fp8.meter_every: -1 is out of range; set it to 0 or more"),
        ({"first_last_bf16": -1}, "model.fp8.first_last_bf16: -1 is out of range"),
        ({"train": False, "score": False}, "model.fp8.train: nothing is in float8"),
        ({"first_last_bf16": 18}, "model.fp8.first_last_bf16: 18 layers at either end of the 36"),
        ({"first_last_bf16": 10, "pipeline": 4}, "model.fp8.first_last_bf16: 10 layers at either"),
        ({"recipe": "delayed", "meter_every": 0}, "model.fp8.score: delayed scaling would scale b"),
        (
            {"recipe": "delayed", "score": False},
            "model.fp8.meter_every: delayed scaling would scale by what the meter reads; set it",
        ),
        (
            {"recipe": "delayed", "score": False, "meter_every": 0, "first_last_bf16": 1},
            "model.fp8.first_last_bf16: delayed scaling cannot leave layers out in Megatron; set ",
        ),
    ],
)
def test_what_no_float8_pass_can_do_is_one_sentence(asked: dict[str, Any], said: str) -> None:
    (fault,) = faults(**asked)
    assert fault.startswith(said)


def test_the_defaults_and_every_recipe_fit_the_models_that_layouts_are_shipped_for() -> None:
    for model in (QWEN3_8B, MOE_30B):
        for cut in ({}, {"tensor": 4, "sequence": True}, {"tensor": 2, "pipeline": 2}):
            assert faults(model, **cut) == []
            assert faults(model, recipe="tensorwise", first_last_bf16=1, **cut) == []
            assert faults(model, recipe="delayed", score=False, meter_every=0, **cut) == []
    assert checks.check_fp8(ModelConfig(path="m"), ParallelConfig(), {}, device="cpu") == []


def test_widths_that_a_float8_gemm_cannot_add_up_along_are_refused() -> None:
    narrow = QWEN3_8B | {"intermediate_size": 12288 + 8}
    (fault,) = faults(narrow)
    assert fault.startswith("model.fp8: of model.path's intermediate_size a rank has 12296, which")
    (fault,) = faults(MOE_30B, expert=8, expert_tensor=96)
    assert (
        "moe_intermediate_size a rank has 8, which float8 layers need as a multiple of 16" in fault
    )
    odd = QWEN3_8B | {"hidden_size": 4096 + 64}
    assert faults(odd, tensor=2) == []
    (fault,) = faults(odd, tensor=2, sequence=True)
    assert "hidden_size a rank has 4160, which float8 layers need as a multiple of 128" in fault
    assert faults(odd, tensor=2, sequence=True, recipe="tensorwise") == []
