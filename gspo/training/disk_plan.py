"""How much room a run takes on the disk."""

import torch


def disk_bytes(
    parameters: int, trained: torch.dtype, saved: torch.dtype, optimizer_bytes: int
) -> dict[str, int]:
    """The bytes of a run's large files by part. All together are the most that the run ever takes.

    After the run the last part is free again. The record, the tokenizer and the like are not counted.

    Args:
        parameters: how many weights a checkpoint has.
        trained: their type in a checkpoint.
        saved: their type in best_model and final_model.
        optimizer_bytes: the optimizer's moments, of all weights.
    """
    weights, model = parameters * trained.itemsize, parameters * saved.itemsize
    is_linked = trained == saved  # final_model's file is then that of the last checkpoint
    return {
        "newest checkpoint": weights + optimizer_bytes,
        "checkpoint before it": weights,
        "best_model": model,
        "final_model": 0 if is_linked else model,
        # Until the new one is whole, the one before keeps its moments, and final_model its own file.
        "while a checkpoint is written": optimizer_bytes + (model if is_linked else 0),
    }
