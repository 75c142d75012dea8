"""What only a fresh process can show: how its backend was started. Not yet run on a GPU."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from megasd.testing.tiny import tiny_qwen3

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
START = """
    import sys
    from pathlib import Path
    import torch
    from megasd.policy import backend
    from megasd.testing.ranks import forget_model_parallel
    from tests.distributed import policy_cases as cases
    folder = Path(sys.argv[1])
    views = cases.random_views(5, count=11, vocab=120)
    offsets = cases.offsets_of(views)
    batch, credit = cases.batch_and_credit(views, 1, "cuda")
    def learn(dtype):
        forget_model_parallel()
        policy = cases.make_policy(folder, {"dtype": dtype, "device": "cuda", "max_tokens": 200})
        done = [policy.update(views, offsets, batch, credit, cases.PlainLoss(), minibatch=0)
                for _ in range(3)]
        assert not any(one.skipped for one in done)
        return policy, cases.weights_of(policy)
"""


def run(text: str, folder: Path) -> str:
    """The last line that the program prints."""
    program = textwrap.dedent(START) + textwrap.dedent(text)
    command = [sys.executable, "-c", program, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    return tiny_qwen3(path, vocab=128, hidden=256, heads=4, kv_heads=2, head_dim=64, tie=False)


def test_a_deterministic_run_repeats_to_the_bit(folder: Path) -> None:
    program = """
        started = backend.start("cuda", deterministic=True)
        backend.join_ranks(started, timeout_seconds=60)
        (_, one), (_, other) = learn("bfloat16"), learn("bfloat16")
        print(all((one[name] == other[name]).all() for name in one))
    """
    assert run(program, folder) == "True"


def test_local_layers_leave_an_installed_transformer_engine_alone(folder: Path) -> None:
    program = """
        backend.join_ranks(backend.start("cuda", layers="local"), timeout_seconds=60)
        policy, _ = learn("bfloat16")
        adam = policy.state.optimizer.chained_optimizers[0].optimizer
        print(type(adam).__module__, sys.modules["transformer_engine"])
    """
    assert run(program, folder).endswith("None")


def test_local_attention_in_float32_keeps_no_scores(folder: Path) -> None:
    """Grouped heads, 4 GiB of scores: a small part of it is taken."""
    program = """
        backend.join_ranks(backend.start("cuda", layers="local"), timeout_seconds=60)
        policy, _ = learn("float32")
        attention = policy.state.gpt.decoder.layers[0].self_attention.core_attention
        from megatron.core.packed_seq_params import PackedSeqParams
        starts = torch.tensor([0, 16384], dtype=torch.int32, device="cuda")
        packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=starts, max_seqlen_q=16384)
        q, k, v = (torch.randn(16384, heads, 64, device="cuda", requires_grad=True)
                   for heads in (4, 2, 2))
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        attention(q, k, v, packed_seq_params=packed).sum().backward()
        print((torch.cuda.max_memory_allocated() - before) / 2**30)
    """
    assert float(run(program, folder)) < 0.5
