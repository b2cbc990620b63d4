"""What MindSpore computes on some devices only, and what to take elsewhere."""

from __future__ import annotations

from typing import Any

from .errors import ConfigError

# As MindSpore 2.8 states it. LAMB and LARS end with "Unsupported op" on other devices, in the midst of the first step.
OPTIMISERS = {
    "lamb": (("Ascend", "GPU"), "take adamw, with a smaller global batch or a longer warm-up"),
    "lars": (("Ascend",), "take momentum, with a smaller global batch or a longer warm-up"),
}
SYNC_BN = ("Ascend", "GPU")


def check_device(config: Any, device_target: str) -> None:
    """Whether the device has what the settings ask for.

    Raises:
        ConfigError: it has not.
    """
    if config.opt in OPTIMISERS:
        devices, instead = OPTIMISERS[config.opt]
        if device_target not in devices:
            raise ConfigError(
                f"opt is {config.opt}, which MindSpore has for {' and '.join(devices)} only, and this is "
                f"{device_target}: {instead}"
            )
    if config.sync_bn and device_target not in SYNC_BN:
        raise ConfigError(
            f"sync_bn is true, but MindSpore synchronises batch norms on {' and '.join(SYNC_BN)} only, and this is "
            f"{device_target}. Leave it out: each process then takes the statistics of its own images; a larger "
            f"batch_size in fewer processes comes close"
        )
