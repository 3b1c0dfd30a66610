"""The Triton kernel against plain loops, in Triton's interpreter: compiled it runs in tests/test_gpu.py."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

CHECK = """
import torch
from moe.dispatch import expert_rows
from moe.row_sum_kernel import sum_rows

torch.manual_seed(0)
index_BEC = torch.rand(3, 4, 10).topk(5, -1).indices
index_BEC[0, 0] = index_BEC[0, 0, :1]  # a token with several rows of one expert, as rows that fill up a share are
rows = expert_rows(index_BEC, 10)
for width in (7, 512, 700):
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
        value = torch.randn(60, width).to(dtype)
        for weight in (None, torch.rand(60).to(dtype)):
            wanted = torch.zeros(30, width)
            for row, token in enumerate(rows.token_R.tolist()):
                wanted[token] += value[row].float() * (1.0 if weight is None else weight[row].float())
            found = sum_rows(value, rows.order_R, rows.first_T1, weight)
            torch.testing.assert_close(found.float(), wanted, rtol=tolerance, atol=tolerance)
print("equal")
"""


def test_kernel_equals_plain_loops() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", CHECK], capture_output=True, text=True, env=environment, timeout=120)
    assert done.stdout == "equal\n", done.stderr[-3000:]
