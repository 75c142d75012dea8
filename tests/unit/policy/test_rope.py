"""RoPE as config.json says it, in both styles of transformers; what Megatron cannot is refused."""

import copy
import itertools
from typing import Any

import pytest
from transformers import Qwen3Config

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


@pytest.mark.parametrize("rope", [None, {}, LLAMA3])
def test_a_base_is_never_guessed(rope: dict[str, Any] | None) -> None:
    with pytest.raises(ValueError, match="names no rope_theta"):
        rope_arguments({"rope_scaling": rope})


ANYWHERE: dict[str, list[Any]] = {
    "rope_theta": [None, 10_000, 5e5],
    "rope_parameters": [
        None,
        {},
        {"rope_theta": 5e5},
        {"rope_type": "default", "rope_theta": 10_000.0},
        {**LLAMA3, "rope_theta": 5e5},
        {"full_attention": {"rope_type": "default", "rope_theta": 5e5}},
    ],
    "rope_scaling": [
        None,
        {},
        {"type": "default"},
        LLAMA3,
        {**LLAMA3, "rope_theta": 5e5},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
        {"type": "linear", "factor": 2.0},
        {"rope_type": "dynamic", "factor": 2.0},
    ],
    "layer_types": [None, ["full_attention"] * 2],
}


def test_whatever_is_accepted_is_what_transformers_reads() -> None:
    """Every combination of the places where versions of transformers wrote RoPE."""
    accepted = 0
    for values in itertools.product(*ANYWHERE.values()):
        stated = zip(ANYWHERE, copy.deepcopy(values), strict=True)
        hf_config = {key: value for key, value in stated if value is not None}
        try:
            ours = rope_arguments(hf_config)
        except ValueError:
            continue
        accepted += 1
        config = Qwen3Config(num_hidden_layers=2, **copy.deepcopy(hf_config))
        theirs: Any = config.rope_parameters
        assert ours["rotary_base"] == theirs["rope_theta"], hf_config
        assert theirs["rope_type"] == ("llama3" if "rope_scaling" in ours else "default"), hf_config
        assert ours.get("rope_scaling_factor") == theirs.get("factor"), hf_config
    assert accepted == 74


@pytest.mark.parametrize(
    ("hf_config", "message"),
    [
        (
            {"rope_theta": 1e6, "rope_parameters": {"rope_theta": 1e4}},
            r"rope_theta 1e\+06 and rope_parameters.rope_theta 10000, which differ",
        ),
        (
            {"rope_parameters": {**LLAMA3, "rope_theta": 5e5}, "rope_scaling": LLAMA3},
            "rope_parameters.rope_theta 500000, where it is not read beside rope_scaling",
        ),
        (
            {"rope_theta": 5e5, "rope_parameters": {"rope_theta": 5e5}, "rope_scaling": LLAMA3},
            "rope_scaling and rope_parameters .* ask for different RoPE",
        ),
        (
            {"rope_parameters": {"rope_theta": 1e6}, "rope_scaling": {"type": "yarn"}},
            "RoPE of type 'yarn'",
        ),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}},
            "rope_parameters .* not one RoPE for all layers",
        ),
        (
            {"rope_theta": 1e4, "rope_scaling": {"type": "default", "rope_type": "llama3"}},
            "rope_type 'llama3' and type 'default'",
        ),
        (
            {"rope_theta": 1e4, "rope_parameters": {"mrope_section": [16, 24]}},
            r"mrope_section: \[16, 24\] in rope_parameters",
        ),
        (
            {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "partial_rotary_factor: 0.5",
        ),
        ({"rope_theta": "1e4"}, 'rope_theta: "1e4" .* must be a finite number above 0'),
        ({"rope_theta": 1e4, "rope_scaling": "yarn"}, "rope_scaling .* not one RoPE"),
    ],
)
def test_places_that_disagree_and_rope_of_other_models_are_named(
    hf_config: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=f"^model.path: .*{message}"):
        rope_arguments(hf_config)


def test_llama3s_scaling_starts_from_the_context_where_nothing_else_is_said() -> None:
    rope = {k: v for k, v in LLAMA3.items() if k != "original_max_position_embeddings"}
    hf_config = {"rope_theta": 5e5, "rope_scaling": rope, "max_position_embeddings": 8192}
    assert rope_arguments(hf_config) == SCALED
    with pytest.raises(ValueError, match=r"original_max_position_embeddings .* is 4096"):
        rope_arguments(hf_config | {"max_position_embeddings": 4096})
