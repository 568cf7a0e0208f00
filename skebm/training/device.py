"""Where to compute."""

import torch


def resolve_device(device: str | torch.device) -> torch.device:
    """torch.device for "auto" (CUDA where there is one) or a device string."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device={str(device)!r} cannot be used here: {error}") from error
    return device
