"""The registry of transforms. What a transform does, and when, is its own: the engine knows each kind."""

from __future__ import annotations

from typing import ClassVar, Protocol

from quantlab.registry import Registry


class Transform(Protocol):
    """A way to rewrite a model. An implementation is a frozen dataclass whose fields are its options."""

    name: ClassVar[str]


TRANSFORMS: Registry[Transform] = Registry("transform")
register = TRANSFORMS.register
make_transform = TRANSFORMS.make
transform_names = TRANSFORMS.names
