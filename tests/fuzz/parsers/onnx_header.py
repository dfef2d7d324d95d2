"""``sdrt.onnx_header.read``: an ONNX file's inputs, outputs and weight files, without the onnx package."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from sdrt import header, onnx_header
from tests.fuzz import mutate as mutators


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def number(field: int, value: int) -> bytes:
    return varint(field << 3) + varint(value)


def message(field: int, *parts: bytes) -> bytes:
    body = b"".join(parts)
    return varint(field << 3 | 2) + varint(len(body)) + body


def value(field: int, name: str, kind: int, *dims: int | str) -> bytes:
    """A ValueInfoProto: an input (11) or an output (12)."""
    sizes = [message(1, number(1, dim) if isinstance(dim, int) else message(2, dim.encode())) for dim in dims]
    return message(field, message(1, name.encode()), message(2, message(1, number(1, kind), message(2, *sizes))))


def tensor(name: str, location: str | None = None) -> bytes:
    """A TensorProto of four float32 zeros, or one whose data lie in a file."""
    data = message(9, bytes(16))
    if location is not None:
        data = b"".join(
            message(13, message(1, k), message(2, v)) for k, v in ((b"location", location.encode()), (b"offset", b"0"))
        )
    return message(5, number(1, 4), number(2, 1), message(8, name.encode()), data)


def graph(name: str) -> bytes:
    """A model with the tensors that the network ``name`` has in optimum's exports."""
    tensors = {
        "unet": [value(11, "sample", 1, "b", 4, "h", "w"), value(11, "timestep", 1, 1), value(11, "encoder_hidden_states", 1, "b", "t", 32),
                 value(12, "out_sample", 1, "b", 4, "h", "w")],
        "text_encoder": [value(11, "input_ids", 6, "b", "t"), value(12, "last_hidden_state", 1, "b", "t", 32), value(12, "pooler_output", 1, "b", 32)],
        "vae_decoder": [value(11, "latent_sample", 1, "b", 4, "h", "w"), value(12, "sample", 1, "b", 3, "h", "w")],
        "vae_encoder": [value(11, "sample", 1, "b", 3, "h", "w"), value(12, "latent_parameters", 1, "b", 8, "h", "w")],
    }[name]  # fmt: skip
    node = message(1, message(1, b"sample"), message(2, b"x"), message(4, b"Identity"))
    return (
        number(1, 8)
        + message(2, b"torch")
        + message(7, node * 5, message(2, b"main"), tensor("a"), tensor("b", "model.onnx_data"), *tensors)
    )


def seeds() -> list[bytes]:
    return [graph(name) for name in ("unet", "text_encoder", "vae_decoder", "vae_encoder")]


def monsters() -> list[tuple[str, bytes]]:
    good = graph("unet")
    return [
        ("many fields", good + number(1, 8) * 3 * 10**6),
        ("many graphs", message(7) * 10**6),
        ("many inputs", message(7, value(11, "sample", 1, 1) * 200_000)),
        ("many names", message(7, tensor("x") * 200_000)),
        ("many files", message(7, b"".join(tensor("x", f"f{i}") for i in range(50_000)))),
        ("many dimensions", message(7, value(11, "sample", 1, *([1] * 10**5)))),
        ("a name of megabytes", message(7, value(11, "x" * 10**7, 1, 1))),
        ("a number without end", message(7) + b"\x80" * 10**6),
        ("a length of 2^63", b"\x3a" + varint(2**63)),
        ("deep", b"\x3a\x7f" * 10**6),
        ("empty", b""),
    ]


def mutate(rng: random.Random, seeds: Sequence[bytes]) -> bytes:
    return mutators.raw_bytes(rng, seeds)


def feed(data: bytes, folder: Path) -> None:
    (folder / "model.onnx").write_bytes(data)
    found = onnx_header.read(folder / "model.onnx")
    for held in (*found.inputs, *found.outputs):
        assert len(held.dims) <= header.MAX_RANK
        assert all(dim is None or (isinstance(dim, int) and 0 <= dim < 2**64) for dim in held.dims)
    assert all(isinstance(name, str) for name in found.weights)
