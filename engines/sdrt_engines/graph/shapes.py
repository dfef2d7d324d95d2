"""What ``--shape`` and ``--batch`` mean for one component. No graph is touched here, and nothing but sdrt is needed."""

from __future__ import annotations

import math

from sdrt.bundle import Bundle, Component, DimRange, split_dim
from sdrt.engine import BuildOptions


def profiles(component: Component, options: BuildOptions) -> tuple[dict[str, DimRange], ...]:
    """The ranges that ``--shape`` and ``--batch`` mean for one component.

    Guidance runs the networks that see the prompt with twice the pictures, so the batch of a component that takes
    tokens or hidden states ranges up to 2 × batch.
    """
    symbols = {split_dim(d)[0] for spec in component.inputs for d in spec.shape if isinstance(d, str)}
    batch: dict[str, DimRange] = {}
    if options.batch is not None and "B" in symbols:
        most = options.batch * (2 if "T" in symbols else 1)
        batch = {"B": DimRange(1, most, most)}
    if not options.shapes or "H" not in symbols:
        return (batch,) if batch else ()
    return tuple(
        {**batch, "H": DimRange(height, height, height), "W": DimRange(width, width, width)}
        for width, height in options.shapes
    )


def fixed_dims(component: Component, options: BuildOptions) -> dict[str, int]:
    """Sizes of the symbolic dimensions (``H``, ``H/8``, …) that a single ``--shape`` fixes; none for several."""
    if len(options.shapes) != 1:
        return {}
    width, height = options.shapes[0]
    sizes = {"W": width, "H": height}
    dims = {dim for spec in (*component.inputs, *component.outputs) for dim in spec.shape if isinstance(dim, str)}
    split = {dim: split_dim(dim) for dim in dims}
    return {dim: -(-sizes[symbol] // divisor) for dim, (symbol, divisor) in split.items() if symbol in sizes}


def usual_shapes(
    source: Bundle, component: Component, options: BuildOptions, batch: int = 1
) -> dict[str, tuple[int, ...]]:  # fmt: skip
    """The inputs' shapes for ``batch`` pictures of the largest ``--shape``, else of the model's own size."""
    space = source.manifest.latents
    width, height = max(options.shapes, key=math.prod, default=(space.default_width, space.default_height))
    length = max((text.max_length for text in source.manifest.text_encoders), default=1)
    sizes = {"B": batch, "T": length, "W": width, "H": height}
    return {spec.name: spec.at(sizes) for spec in component.inputs}
