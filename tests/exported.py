"""Bundles as the Hugging Face directories that transformers reads."""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path

from pop_node.store.manifest import MANIFEST_FILE, WEIGHTS_FILE
from pop_node.store.store import Bundle


def exported(bundle: Bundle, root: Path) -> Path:
    """A directory below ``root`` with the bundle's model; made once, by one process at a time."""
    import torch
    from safetensors.torch import save_file

    from pop_node.models.registry import load_weights

    root.mkdir(parents=True, exist_ok=True)
    folder = root / bundle.manifest.bundle
    lock = os.open(root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.is_dir():
            staged = root / "staged"
            shutil.rmtree(staged, ignore_errors=True)
            staged.mkdir()
            weights, _ = load_weights(bundle.path, bundle.manifest, torch.device("cpu"))
            save_file(weights, staged / "model.safetensors", metadata={"format": "pt"})
            for path in bundle.path.iterdir():
                if path.name not in (MANIFEST_FILE, WEIGHTS_FILE):
                    shutil.copyfile(path, staged / path.name)
            staged.rename(folder)
    finally:
        os.close(lock)
    return folder
