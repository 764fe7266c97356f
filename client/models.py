"""Base models and prefix activations of a process, shared by its sites."""

from __future__ import annotations

import threading

import msgspec
import torch

from anabranch.client.tuning.bases import load_classifier
from anabranch.client.tuning.classifier import Classifier
from anabranch.client.tuning.prefix import PrefixCache
from anabranch.protocols.config import RunConfig
from anabranch.protocols.errors import ConfigError
from anabranch.protocols.tables import Device, Lora

CLASSIFIERS = 2  # held per thread: that of the run, and the wider one of the private adapter


def require_device(device: Device) -> None:
    """Raise ConfigError if the device is not there; nothing falls back to another one."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            'device = "cuda": torch sees no CUDA device here. Install a CUDA build of torch, or '
            'set device = "cpu"'
        )


_Asked = tuple[RunConfig, Device, Lora | None, Classifier]  # and what the answer was


class Models:
    """Base models and prefix activations of this process, shared by its sites.

    Frozen weights are loaded once; each thread has an adapter, head and cache of its own.
    """

    def __init__(self) -> None:
        self._local = threading.local()
        self._lock = threading.Lock()

    def classifier(self, config: RunConfig, device: Device, lora: Lora | None = None) -> Classifier:
        """Return this thread's classifier for the model, task and adapter of `config`.

        `lora` is for another adapter than `config.adapter`. Raises ConfigError if `device` is
        "cuda" and there is none.
        """
        last: _Asked | None = self._local.__dict__.get("last")
        if last is not None and last[0] is config and last[1:3] == (device, lora):
            return last[3]
        classifier = self._classifier(config, device, lora)
        self._local.last = (config, device, lora, classifier)
        return classifier

    def _classifier(self, config: RunConfig, device: Device, lora: Lora | None) -> Classifier:
        require_device(device)
        lora = config.adapter if lora is None else lora
        parts = (config.model, config.task, lora, config.data, config.seed, device)
        key = msgspec.json.encode(parts)
        held: dict[bytes, Classifier] = self._local.__dict__.setdefault("classifiers", {})
        classifier = held.pop(key, None)
        if classifier is None:
            while len(held) >= CLASSIFIERS:
                del held[next(iter(held))]  # the one that was not asked for the longest time
            with self._lock:
                classifier = load_classifier(config, lora=lora, device=device)
        held[key] = classifier
        return classifier

    def cache(self, config: RunConfig) -> PrefixCache:
        """Return this thread's prefix cache of the configured size."""
        limit = config.training.cache_bytes
        caches: dict[int, PrefixCache] = self._local.__dict__.setdefault("caches", {})
        return caches.setdefault(limit, PrefixCache(limit))


MODELS = Models()
