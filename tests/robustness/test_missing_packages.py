"""What is optional may be absent: the package imports, trains and says what is missing."""

import subprocess
import sys

# As if not installed: find_spec of a part raises ModuleNotFoundError where its parent is absent.
WITHOUT = """
import importlib.util, sys

class Without:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, *rest):
        return None if name.partition(".")[0] in ABSENT else self.finder.find_spec(name, *rest)

ABSENT = set(sys.argv[1:])
sys.meta_path[:] = map(Without, sys.meta_path)
assert all(importlib.util.find_spec(name) is None for name in ABSENT)
import torch
torch.version.cuda = torch.version.cuda or "13.0"  # a build for CUDA asks for its bindings
import fastmp
from fastmp import doctor, optim
weight = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
optimizer = optim.SGD([weight], lr=0.5)
weight.sum().backward()
optimizer.step()
assert weight.tolist() == [0.5] * 3
for finding in doctor.examine():
    print(finding)
"""


def test_without_optional_packages():
    absent = ["PIL", "cuda", "datasets", "matplotlib", "tqdm", "triton"]
    run = [sys.executable, "-c", WITHOUT, *absent]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "not checked: cuda-bindings is not installed" in done.stdout
