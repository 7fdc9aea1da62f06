"""The run in TensorBoard: tensorboard/ in the run's folder. A resumed run goes on in the same folder."""

import json
from typing import Any

from gspo.training.trackers import Tracker

# Held-out problems whose texts are shown: each is an entry of its own in the page.
PROBLEMS_SHOWN = 10


class TensorBoard(Tracker):
    name = "tensorboard"
    writer: Any

    def start(self, settings: dict, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # here, since most runs do not use it

        is_new = not (self.folder / "tensorboard").exists()
        # What a process that was killed has written after the checkpoint is hidden, and written again. Before
        # the first checkpoint this is all of it, the evaluation at step 0 included.
        self.writer = SummaryWriter(str(self.folder / "tensorboard"), purge_step=step + 1 if step else 0)
        if is_new or not step:
            self.writer.add_text("config", verbatim(json.dumps(settings, indent=2)), step)

    def log(self, step: int, figures: dict[str, float]) -> None:
        for name, value in figures.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def log_texts(self, step: int, samples: list[dict], held_out: list[dict]) -> None:
        for line in samples:
            fields = {name: value for name, value in line.items() if name not in ("step", "kind")}
            self.writer.add_text(f"samples/{line['kind']}", fields_as_text(fields), line["step"])
        for line in held_out:
            if line["problem"] < PROBLEMS_SHOWN:
                fields = {"prompt": line["prompt"], "answer": line["answer"]}
                answered = zip(line["responses"], line["rewards"], strict=True)
                for number, (response, reward) in enumerate(answered, 1):
                    fields[f"response {number}, reward {reward}"] = response
                self.writer.add_text(f"held_out/{line['problem']:03}", fields_as_text(fields), step)

    def summarise(self, step: int, figures: dict[str, float]) -> None:
        self.writer.add_text("summary", verbatim(json.dumps(figures, indent=2)), step)

    def finish(self) -> None:
        self.writer.close()


def fields_as_text(fields: dict) -> str:
    """Fields as Markdown, each with its value as it stands."""
    return "\n\n".join(f"{name}\n\n{verbatim(str(value))}" for name, value in fields.items())


def verbatim(text: str) -> str:
    """A text that Markdown is to leave as it is."""
    return "\n".join("    " + line for line in text.splitlines() or [""])
