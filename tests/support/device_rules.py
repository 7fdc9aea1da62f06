"""What CUDA allows and forbids for tensors of a GPU and of the CPU; the pretend GPU must do the same.

Each entry works on x (3,) on the device and cpu (3,) on the CPU. Both are float32, and hold the numbers 0, 1
and 2.
"""

import torch

ALLOWED = {
    "a scalar of the CPU": lambda x, cpu: x + cpu.sum(),
    "a scalar of the CPU as a choice": lambda x, cpu: torch.where(x > 0, x, cpu.sum()),
    "an index of the CPU": lambda x, cpu: x[torch.tensor([0, 1])],
    "writing at an index of the CPU": lambda x, cpu: x.index_put_((torch.tensor([0]),), x[1:2].clone()),
    "a copy to the device": lambda x, cpu: x.copy_(cpu),
    "a slice copied to the device": lambda x, cpu: x[:2].copy_(cpu[:2]),
    "a copy to the CPU": lambda x, cpu: cpu.copy_(x),
    "a tensor like one of the device": lambda x, cpu: x + x.new_tensor([1.0, 2.0, 3.0]),
    "a tensor made on the device": lambda x, cpu: x + torch.tensor([1, 2, 3], device=x.device),
}
FORBIDDEN = {
    "a sum": lambda x, cpu: x + cpu,
    "a sum in place": lambda x, cpu: cpu.add_(x),
    "a sum in place of a scalar": lambda x, cpu: torch.zeros(()).add_(x.sum()),
    "a scalar of the device and the CPU's vector": lambda x, cpu: cpu + x.sum(),
    "a product of matrices": lambda x, cpu: torch.outer(x, x) @ torch.outer(cpu, cpu),
    "an index of the device": lambda x, cpu: cpu[x.long()],
    "writing at an index of the device": lambda x, cpu: cpu.index_put_((x.long(),), cpu),
    "values of the CPU": lambda x, cpu: x.index_put_((x.long(),), cpu),
    "gather": lambda x, cpu: x.gather(0, cpu.long()),
    "index_select": lambda x, cpu: x.index_select(0, cpu.long()),
    "embedding": lambda x, cpu: torch.nn.functional.embedding(cpu.long(), x[:, None]),
    "cat": lambda x, cpu: torch.cat([x, cpu]),
    "stacked scalars": lambda x, cpu: torch.stack([x.sum(), cpu.sum()]),
    "where": lambda x, cpu: torch.where(cpu > 0, x, 0.0),
    "searchsorted": lambda x, cpu: torch.searchsorted(x, cpu),
    "pin_memory": lambda x, cpu: x.pin_memory(),
}
# A part of the message of each error.
MISMATCH = "same device|cannot be indexed|cannot pin"
