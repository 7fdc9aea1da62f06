"""Which errors mean that memory ran out."""

from accelerate.utils.memory import should_reduce_batch_size


def is_out_of_memory(error: RuntimeError) -> bool:
    """True for a GPU's error, for that of torch's CPU allocator, and for oneDNN's, which names no reason."""
    return should_reduce_batch_size(error) or "could not create a primitive" in str(error)
