"""RoPE as config.json says it, in both styles of transformers; what Megatron cannot is refused."""

from typing import Any

import pytest

from megasd.policy.megatron.rope import rope_arguments

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
PLAIN = {"rotary_base": 1e6}
SCALED = {"rotary_base": 5e5, "rope_scaling": True, "rope_scaling_factor": 32.0}


@pytest.mark.parametrize(
    ("hf_config", "expected"),
    [
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, PLAIN),
        ({"rope_theta": 1_000_000, "rope_scaling": None}, PLAIN),
        ({"rope_parameters": {**LLAMA3, "rope_theta": 5e5}}, SCALED),
        ({"rope_theta": 500_000.0, "rope_scaling": LLAMA3}, SCALED),
    ],
)
def test_the_old_style_and_that_of_transformers_5_say_the_same(
    hf_config: dict[str, Any], expected: dict[str, Any]
) -> None:
    assert rope_arguments(hf_config) == expected


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({**LLAMA3, "rope_type": "yarn"}, "RoPE of type 'yarn', which is not supported"),
        ({**LLAMA3, "low_freq_factor": 2.0}, "low_freq_factor .* is 2.0, .* with 1 only"),
        (
            {**LLAMA3, "original_max_position_embeddings": 4096},
            "original_max_position_embeddings .* is 4096, .* with 8192 only",
        ),
        ({**LLAMA3, "factor": None}, "names no factor of its RoPE scaling"),
    ],
)
def test_a_scaling_that_megatron_computes_otherwise_is_refused(
    rope: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=f"model.path: .*{message}"):
        rope_arguments({"rope_theta": 5e5, "rope_scaling": rope})
    with pytest.raises(ValueError, match="names no rope_theta"):
        rope_arguments({"rope_scaling": rope})
