"""What OpenVINO IR says of itself: good files, ours and openvino's own; damaged and hostile ones."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdrt import ir_header
from sdrt.errors import BundleError
from sdrt.header import Header, Value
from tests.fuzz.parsers.ir_header import constant, document, edge, graph, layer, parameter, port, result


def read(path: Path, raw: bytes | str) -> Header:
    (path / "openvino_model.xml").write_bytes(raw.encode() if isinstance(raw, str) else raw)
    return ir_header.read(path / "openvino_model.xml")


def small(*layers: str, names: str = "x", shape: str = "?,4", kind: str = "f32", version: str = "11") -> str:
    """One input, one output, and what is given."""
    return document(
        parameter(0, names, kind, shape), *layers, result(8, "y", "f32", "-1"), edges=[edge(8)], version=version
    )


def test_header(tmp_path: Path) -> None:
    header = read(tmp_path, graph("unet"))
    assert header == Header(
        (
            Value("sample", "f32", (None, 4, None, None)),
            Value("timestep", "i64", (None,)),
            Value("encoder_hidden_states", "f32", (None, 77, 32)),
        ),
        (Value("out_sample", "f32", (None, 4, None, None)),),
        ("openvino_model.bin",),
        "fp32",
    )
    assert [value.name for value in read(tmp_path, graph("text_encoder")).outputs] == [
        "last_hidden_state",
        "pooler_output",
    ]
    assert read(tmp_path, small(version="10")) == read(tmp_path, small())


@pytest.mark.parametrize(("shape", "dims"), [
    ("", ()), ("2,77", (2, 77)), ("?,-1", (None, None)), ("1..77", ((1, 77),)), ("..77", ((1, 77),)), ("0..77", ((1, 77),)),
    ("8..", (None,)), ("3..3", (3,)), ("1, 4 , ?", (1, 4, None)),
])  # fmt: skip
def test_shapes(tmp_path: Path, shape: str, dims: tuple[Any, ...]) -> None:
    assert read(tmp_path, small(shape=shape)).inputs[0].dims == dims


@pytest.mark.parametrize(("names", "found"), [
    ("x", ("x",)), ("x,z", ("x", "z")), ("a\\,b,c", ("a,b", "c")), ("a&b<", ("a&b<",)), ("ü", ("ü",)),
])  # fmt: skip
def test_names(tmp_path: Path, names: str, found: tuple[str, ...]) -> None:
    (value,) = read(tmp_path, small(names=names)).inputs
    assert (value.name, *value.aliases) == found


FAKE = layer(7, "FakeQuantize", "")


@pytest.mark.parametrize(("layers", "precision"), [
    ((), "fp32"),
    ((constant(1, "f32"), constant(2, "i64", 1000)), "fp32"),
    ((constant(1, "f16", 1000), constant(2, "f32", 8)), "fp16"),
    ((constant(1, "f16", 8), constant(2, "f32", 1000)), "fp32"),
    ((constant(1, "bf16"),), "bf16"),
    ((constant(1, "i8"), constant(2, "f32", 1000)), "w8"),
    ((constant(1, "u8"), FAKE), "int8"),
    ((constant(1, "f32"), FAKE), "fp32"),
    ((constant(1, "i8"), constant(2, "nf4"), FAKE), "w4"),
    ((constant(1, "u4"),), "w4"),
    ((layer(1, "If", f"<then_body><layers>{constant(2, 'i8')}</layers></then_body>"),), "fp32"),
])  # fmt: skip
def test_precision(tmp_path: Path, layers: tuple[str, ...], precision: str) -> None:
    assert read(tmp_path, small(*layers)).precision == precision


def test_networks_within_layers_are_not_the_network(tmp_path: Path) -> None:
    body = f"<body><layers>{parameter(0, 'inner', 'f32', '1')}{result(8, 'z', 'f32', '1')}</layers></body>"
    assert read(tmp_path, small(layer(1, "TensorIterator", body))) == read(tmp_path, small())


def test_against_openvino(tmp_path: Path) -> None:
    """A model with ranges, several names, and a comma in one, as openvino writes it and reads it again."""
    openvino = pytest.importorskip("openvino")
    from openvino import opset13 as opset

    x = opset.parameter(openvino.PartialShape([-1, 4, openvino.Dimension(8, 64)]), openvino.Type.f32, name="x")
    ids = opset.parameter(openvino.PartialShape([]), openvino.Type.i64, name="ids")
    weight = opset.constant([[1.0, 2.0]] * 64, openvino.Type.f32)
    y = opset.multiply(x, opset.reduce_sum(weight, [0, 1], keep_dims=False))
    x.output(0).get_tensor().set_names({"x", "comma, here"})
    ids.output(0).get_tensor().set_names({"ids"})
    y.output(0).get_tensor().set_names({"y"})
    z = opset.convert(ids, "f16")
    z.output(0).get_tensor().set_names({"z"})
    model = openvino.Model([y, z], [x, ids])
    openvino.save_model(model, tmp_path / "openvino_model.xml", compress_to_fp16=True)
    header = ir_header.read(tmp_path / "openvino_model.xml")
    held = openvino.Core().read_model(tmp_path / "openvino_model.xml")
    for values, ports in ((header.inputs, held.inputs), (header.outputs, held.outputs)):
        for value, theirs in zip(values, ports, strict=True):
            assert {value.name, *value.aliases} == set(theirs.names)
            assert value.dtype == theirs.element_type.get_type_name()
    assert header.inputs[0].dims == (None, 4, (8, 64))
    assert header.outputs[0].dims == (None, 4, None)
    assert (header.inputs[1].dims, header.outputs[1].dtype) == ((), "f16")


GOOD = small()


@pytest.mark.parametrize(("text", "said"), [
    ("", "no element found"),
    ("PK\x03\x04", "not well-formed"),
    ("<net version='11'>", "no element found"),
    ("<net version='9'></net>", "'net' of version '9', expected 'net' of version 10 or 11"),
    ("<net></net>", "version ''"),
    ("<html version='11'></html>", "'html'"),
    ("<net version='11'></net>", "no inputs, or no outputs"),
    (document(parameter(0, "x", "f32", "1")), "no inputs, or no outputs"),
    ('<!DOCTYPE net [<!ENTITY a "ha">]>' + GOOD[22:], "declares a document type"),
    ('<!DOCTYPE net SYSTEM "http://localhost/x">' + GOOD[22:], "declares a document type"),
    (small(parameter(1, None, "f32", "1")), "an input without a name, layer '1'"),
    (small(kind="f64"), "element type 'f64', which a bundle cannot say"),
    (small(kind="string"), "element type 'string'"),
    (small(shape="..."), "does not say what shape 'x' has"),
    (small(shape="1,,2"), "does not say what shape"),
    (small(shape="-2"), "does not say what shape"),
    (small(shape="77..1"), "does not say what shape"),
    (small(shape=".."), "does not say what shape"),
    (small(shape="1" * 19), "does not say what shape"),
    (small(shape=",".join("1" * 17)), "more than 16 dimensions"),
    (small(names="x" * 20_000), "no 'names', or one of more than 16384 characters"),
    (small(constant(1, "f8e4m3")), "weights of element type 'f8e4m3'"),
    (small(constant(1, "u2")), "weights of element type 'u2'"),
    (small(constant(1, "f32", "-1")), "a constant of '-1' bytes"),
    (small(layer(1, "Const", "")), "has no 'element_type'"),
    (small(result(20, "z", "f32", "1")), "nothing with a name feeds, layer '21'"),
    (small(layer(20, "Add", f"<output>{port('z', 'f32', '1') * 2}</output>")), "port '0' of layer '20' twice"),
    (document(parameter(0, "x", "f32", "1"), result(8, "y", "FP64", "1"), edges=[edge(8)]), "precision 'FP64'"),
    (document(parameter(0, "x", "f32", "1"), result(8, None, "f32", "1"), edges=[edge(8)]), "nothing with a name feeds"),
    (document(parameter(0, "x", "f32", "1"), result(8, "y", "f32", "four"), edges=[edge(8)]), "what shape 'y' has"),
    (document(parameter(0, "x", "f32", "1"), result(8, "y", "f32", "1" * 50), edges=[edge(8)]), "no number"),
    (document(parameter(0, "x", "f32", "1"), result(8, "y", "f32", "1"), edges=[edge(8)] * 2), "two edges to the output '9'"),
    (GOOD.replace(' id="0" name=', " name="), "a 'layer' has no 'id'"),
    ("<net version='11'>" + "<a>" * 100, "64 in each other"),
])  # fmt: skip
def test_refused(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(BundleError) as caught:
        read(tmp_path, text)
    assert said in caught.value.message
    assert str(tmp_path / "openvino_model.xml") in caught.value.message


def test_a_git_lfs_pointer(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="Git LFS pointer"):
        read(tmp_path, "version https://git-lfs.github.com/spec/v1\n")


def test_no_file(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(BundleError, match="cannot be read"):
            ir_header.read(path)


def test_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ir_header, "MAX_ELEMENTS", 100)
    with pytest.raises(BundleError, match="more than 100 elements"):
        read(tmp_path, small("<a/>" * 100))
    monkeypatch.setattr(ir_header, "MAX_BYTES", 500)
    with pytest.raises(BundleError, match="at most 500 are read"):
        read(tmp_path, small(" " * 500))


def test_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever the file is cut for reading."""
    whole = read(tmp_path, graph("text_encoder"))
    for size in (1, 7, 100):
        monkeypatch.setattr(ir_header, "_CHUNK", size)
        assert read(tmp_path, graph("text_encoder")) == whole


def test_truncated_at_every_byte(tmp_path: Path) -> None:
    raw = graph("vae_decoder").rstrip()
    assert read(tmp_path, raw).precision == "fp32"
    for length in range(len(raw)):
        with pytest.raises(BundleError):
            read(tmp_path, raw[:length])


@given(st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=8))
def test_damaged(tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, int]]) -> None:
    raw = bytearray(graph("unet"))
    for position, value in changes:
        raw[position % len(raw)] = value
    with contextlib.suppress(BundleError):
        assert isinstance(read(tmp_path_factory.getbasetemp(), bytes(raw)), Header)


@given(st.binary(max_size=200))
def test_anything(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    for wrapped in (raw, b'<net version="11"><layers>' + raw, raw.join((b"<net>", b"</net>"))):
        with contextlib.suppress(BundleError):
            assert isinstance(read(tmp_path_factory.getbasetemp(), wrapped), Header)


@given(
    st.text(
        st.characters(codec="utf-8", exclude_categories=("Cc", "Cs"), exclude_characters="\\,\ufffe\uffff"), min_size=1
    ),
    st.lists(st.none() | st.integers(0, 10**6) | st.tuples(st.integers(1, 99), st.integers(100, 10**6)), max_size=8),
)
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, name: str, dims: list[Any]) -> None:
    shape = ",".join("?" if d is None else f"{d[0]}..{d[1]}" if isinstance(d, tuple) else str(d) for d in dims)
    (value,) = read(tmp_path_factory.getbasetemp(), small(names=name, shape=shape)).inputs
    assert (value.name, value.dims) == (name, tuple(dims))
