"""Prune half of a torch Linear with Optimal Brain Surgeon, its Hessian gathered by grail_kernels.

python kernels/examples/obs_linear.py
"""

import torch

from grail_kernels import GramAccumulator, ridge_solve

torch.manual_seed(0)
layer = torch.nn.Linear(256, 64, bias=False).requires_grad_(False)
mixing = torch.randn(256, 256) / 16
batches = [torch.randn(512, 256) @ mixing for _ in range(8)]

hessian = GramAccumulator(256)
for x in batches:
    hessian.update(x)

keep, gone = torch.arange(0, 256, 2), torch.arange(1, 256, 2)
cross = hessian.gather(keep, gone) @ layer.weight[:, gone].T  # (128, 64)
update = ridge_solve(hessian.gather(keep, keep), cross, 1e-3).solution.T.float()

for name, weight in {"pruned": layer.weight[:, keep], "with OBS update": layer.weight[:, keep] + update}.items():
    error = sum((layer(x) - x[:, keep] @ weight.T).square().sum() for x in batches)
    print(f"{name}: {error / sum(layer(x).square().sum() for x in batches):.4f} of the output's energy lost")
