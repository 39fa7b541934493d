"""An engine for tests of what surrounds DeepSpeed's: it saves a state, and loads nothing."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch


class Engine:
    """What the code asks of an engine when it saves a run and takes it up."""

    def __init__(self) -> None:
        weight = torch.nn.Parameter(torch.ones(3))
        own = torch.optim.SGD([weight], lr=1.0)
        self.optimizer = SimpleNamespace(optimizer=own, state_dict=own.state_dict)
        self.checkpoint_engine: Any = None
        self.loaded: list[str] = []
        self._config = SimpleNamespace(load_universal_checkpoint=False)

    def save_checkpoint(self, folder: str, tag: str, client_state: Any, save_latest: bool) -> None:
        assert not save_latest
        self.checkpoint_engine.save(client_state, str(Path(folder) / tag / "model_states.pt"))

    def load_checkpoint(self, folder: str, tag: str) -> None:
        assert (Path(folder) / tag / "model_states.pt").is_file()
        self.loaded.append(tag)
