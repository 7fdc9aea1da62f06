"""The start of a worker process of validation. Importing this module does not import torch."""

import multiprocessing
import os
import threading


def start_worker(num_threads: int) -> None:
    """Prepare a worker process. It ends with its parent, even if that is killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "this is not a worker process"

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    import torch

    torch.set_num_threads(num_threads)
