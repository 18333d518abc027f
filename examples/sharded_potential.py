"""One potential over several processes: run with `torchrun --nproc-per-node 2 examples/sharded_potential.py`.

Each process brings its own rows and keeps only those; every process gets the whole answer.
"""

import numpy as np
import torch
import torch.distributed as dist
from sklearn.datasets import load_digits

from otad.cip import BrenierPotential

gpu = torch.cuda.is_available()
dist.init_process_group("nccl" if gpu else "gloo")
rank, world = dist.get_rank(), dist.get_world_size()
device = torch.device("cuda", rank % torch.cuda.device_count()) if gpu else torch.device("cpu")
if gpu:
    torch.cuda.set_device(device)

# Here every process loads all digits and takes its share; it may as well read a file of its own.
x = torch.from_numpy(load_digits(return_X_y=True)[0] / 16).to(device)
z = 0.5 * x + torch.tanh(2 * x) / 4  # a smooth map to features
share = np.array_split(np.arange(1500), world)[rank]

phi = BrenierPotential.fit(x[share], z[share], process_group=dist.group.WORLD)
feature = phi.gradient(x[1500:])  # the same queries in every process
error = (feature.checked() - z[1500:]).norm(dim=1).mean()
size = sum(buffer.nbytes for buffer in phi.buffers()) / 2**20

if phi.proof is not None and rank == 0:
    print(f"L = {phi.lipschitz:.4f}, {phi.proof.pairs:,} pairs hold; none below {phi.proof.infeasible_below:.4f}")
print(f"process {rank} of {world} holds {len(phi.x)} points, {size:.1f} MiB; mean error at new digits {error:.4f}")
dist.destroy_process_group()
