"""A process that is forked after the model was used answers as its parent does."""

import os
import subprocess
import sys

import pytest

#: The parent computes with two threads, so that OpenMP has made them; the child is given some seconds.
FORKED = """
import os, signal, torch
from qwen2vl import Qwen2VL, assets

model = Qwen2VL.from_pretrained(assets.FOLDER, device="cpu")
torch.set_num_threads(2)
ids = torch.randint(0, 100, (1, 600), generator=torch.Generator().manual_seed(0))
with torch.inference_mode():
    expected = model(ids)
    pid = os.fork()
    if pid == 0:
        signal.alarm(20)
        again = model(ids)
        os._exit(0 if torch.allclose(expected, again, atol=1e-3) and torch.get_num_threads() == 1 else 3)
assert torch.get_num_threads() == 2
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_child_of_a_fork_does_not_wait_for_threads_that_it_has_not():
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", FORKED], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "0", done.stderr[-2000:]
