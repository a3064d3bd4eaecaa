"""A fingerprint of the frozen weights: training an adapter must leave them as they were, bit for bit."""

from __future__ import annotations

import hashlib

import torch

from igrpo_lite.policy.loading import Policy


def base_fingerprint(policy: Policy) -> str:
    """SHA-256 over names, shapes, types and bytes of every parameter and saved buffer that is not the adapter's."""
    digest = hashlib.sha256()
    model = policy.model.get_base_model()
    adapter = {id(p) for _, p in policy.adapter_parameters()}
    saved = model.state_dict(keep_vars=True).items()
    named = {name: t for name, t in saved if isinstance(t, torch.Tensor) and id(t) not in adapter}
    for name in sorted(named):
        tensor = named[name].detach()
        digest.update(f"{name.replace('.base_layer.', '.')} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.reshape(-1).cpu().view(torch.uint8).numpy().data if tensor.numel() else b"")
    return digest.hexdigest()
