"""``sdrt.ir_header.read``: what an OpenVINO IR file says of inputs, outputs and precision, without openvino."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from xml.sax.saxutils import quoteattr

from sdrt import header, ir_header
from tests.fuzz import mutate as mutators

PORT = {"f32": "FP32", "f16": "FP16", "bf16": "BF16", "i64": "I64", "i32": "I32", "boolean": "BOOL"}


def port(names: str | None, kind: str, *dims: str, number: int = 0) -> str:
    named = "" if names is None else f" names={quoteattr(names)}"
    return f'<port id="{number}" precision="{PORT.get(kind, kind)}"{named}>{"".join(f"<dim>{d}</dim>" for d in dims)}</port>'


def layer(number: int, kind: str, inside: str, **attributes: str) -> str:
    more = "".join(f" {name}={quoteattr(value)}" for name, value in attributes.items())
    return f'<layer id="{number}" name="l{number}" type="{kind}" version="opset1"{more}>{inside}</layer>'


def parameter(number: int, names: str | None, kind: str, shape: str) -> str:
    """The dims of its port are what OpenVINO writes, which knows no ranges there."""
    dims = [d if d.isdigit() else "-1" for d in shape.split(",") if d]
    return layer(
        number, "Parameter",
        f'<data shape={quoteattr(shape)} element_type="{kind}" /><output>{port(names, kind, *dims)}</output>',
    )  # fmt: skip


def constant(number: int, kind: str, size: int | str = 64) -> str:
    data = f'<data element_type="{kind}" shape="4, 4" offset="0" size="{size}" />'
    return layer(number, "Const", f"{data}<output>{port('w', kind, '4', '4')}</output>")


def result(number: int, names: str | None, kind: str, *dims: str) -> str:
    """A layer that computes, and the Result behind it; ``edge(number)`` joins them."""
    fed = layer(number, "Add", f"<output>{port(names, kind, *dims, number=2)}</output>")
    return fed + layer(number + 1, "Result", f"<input>{port(None, kind, *dims)}</input>")


def edge(number: int) -> str:
    return f'<edge from-layer="{number}" from-port="2" to-layer="{number + 1}" to-port="0" />'


def document(*layers: str, edges: Sequence[str] = (), version: str = "11") -> str:
    information = '<rt_info><info name="OpenVINO Runtime" value="2026.4" /></rt_info>'
    return (
        f'<?xml version="1.0"?>\n<net name="m" version="{version}"><layers>{"".join(layers)}</layers>'
        f"<edges>{''.join(edges)}</edges>{information}</net>\n"
    )


def graph(name: str, *more: str) -> bytes:
    """The IR of a network called ``name`` as optimum-intel names its tensors; ``more``: further layers."""
    inputs, outputs = {
        "unet": ([("sample", "f32", "?,4,?,?"), ("timestep", "i64", "?"), ("encoder_hidden_states", "f32", "?,77,32")],
                 [("out_sample", "-1", "4", "-1", "-1")]),
        "text_encoder": ([("input_ids", "i64", "1..8,1..77")], [("last_hidden_state", "-1", "-1", "32"), ("pooler_output", "-1", "32")]),
        "vae_decoder": ([("latent_sample", "f32", "?,4,?,?")], [("sample", "-1", "3", "-1", "-1")]),
        "vae_encoder": ([("sample", "f32", "?,3,?,?")], [("latent_parameters,x\\,y", "-1", "8", "-1", "-1")]),
    }[name]  # fmt: skip
    layers = [parameter(i, *told) for i, told in enumerate(inputs)]
    layers += [constant(100, "f32"), constant(101, "i64", 8), *more]
    layers += [result(200 + 2 * i, names, "f32", *dims) for i, (names, *dims) in enumerate(outputs)]
    return document(*layers, edges=[edge(200 + 2 * i) for i in range(len(outputs))]).encode()


def seeds() -> list[bytes]:
    eight_bits = constant(102, "i8") + layer(103, "FakeQuantize", "")
    return [
        graph("unet"),
        graph("text_encoder", eight_bits),
        graph("vae_decoder", constant(102, "u4")),
        graph("vae_encoder"),
    ]


def monsters() -> list[tuple[str, bytes]]:
    good = graph("unet").decode()
    inside, behind = good.index("<layer "), good.index("</layers>")

    def with_layers(text: str) -> bytes:
        return (good[:inside] + text + good[inside:]).encode()

    laughs = "".join(f'<!ENTITY l{i} "{f"&l{i - 1};" * 10}">' for i in range(1, 10))
    return [
        ("billion laughs", f'<!DOCTYPE net [<!ENTITY l0 "ha">{laughs}]>{good[22:].replace("<dim>4", "<dim>&l9;")}'.encode()),
        ("a file's entity", f'<!DOCTYPE net [<!ENTITY x SYSTEM "file:///etc/passwd">]>{good[22:]}'.encode()),
        ("many elements", with_layers("<a/>" * 3 * 10**6)),
        ("many layers", with_layers(constant(7, "f32") * 100_000)),
        ("many ports", with_layers(layer(7, "Add", "".join(f"<output>{port('x', 'f32', number=i)}</output>" for i in range(300_000))))),
        ("many inputs", with_layers("".join(parameter(1000 + i, f"i{i}", "f32", "1") for i in range(60_000)))),
        ("many dimensions", with_layers(parameter(7, "x", "f32", ",".join("1" * 10**6)))),
        ("many dims", with_layers(layer(7, "Add", f"<output>{port('x', 'f32', *('1' * 10**6))}</output>"))),
        ("many names", with_layers(parameter(7, "," * 10**7, "f32", "1"))),
        ("a name of megabytes", with_layers(parameter(7, "x" * 10**7, "f32", "1"))),
        ("a number of megabytes", with_layers(layer(7, "Add", f"<output>{port('x', 'f32', '1' * 10**7)}</output>"))),
        ("many attributes", with_layers(layer(7, "Add", "", **{f"a{i}": "1" for i in range(300_000)}))),
        ("a tag of megabytes", with_layers(f"<{'x' * 10**7}/>")),
        ("deep", with_layers("<a>" * 10**6)),
        ("many edges", (good[:behind] + good[behind:].replace("</edges>", edge(200) * 100_000 + "</edges>")).encode()),
        ("a text of megabytes", with_layers("x" * 3 * 10**7)),
        ("a comment without end", with_layers("<!--" + "x" * 3 * 10**7)),
        ("too large", with_layers(" " * 33 * 2**20)),
        ("empty", b""),
        ("another encoding", good.replace('"1.0"', '"1.0" encoding="UTF-16"', 1).encode("utf-16")),
    ]  # fmt: skip


PIECES = ("?", "-1", "..", "1..77", "77..1", "..77", "1..", "...", "<dim>", "</dim>", "<port", "</port>", "/>", "<layer ", "</layer>", "Result",
          "Parameter", "Const", "FakeQuantize", "i4", "nf4", "f8e4m3", "f16", "bf16", "boolean", "&amp;", "&#0;", "&#x41;", "&x;", "\\,", ",",
          "<!DOCTYPE net>", "<![CDATA[1]]>", "<!-- -->", "<?x y?>", 'names="', 'id="0"', 'version="10"', "é", "99999999999999999999")  # fmt: skip


def mutate(rng: random.Random, seeds: Sequence[bytes]) -> bytes:
    """Half of them keep the file's form: numbers, words and whole elements are put elsewhere or left out."""
    if rng.random() < 0.5:
        return mutators.raw_bytes(rng, seeds)
    text = rng.choice(seeds).decode("latin-1")
    for _ in range(rng.choice((1, 1, 2, 3))):
        quotes = [i for i, letter in enumerate(text) if letter in '">,']
        at = rng.choice(quotes) + 1
        end = next((i for i in quotes if i >= at), at)
        choice = rng.randrange(3)
        if choice == 0:
            text = text[:at] + rng.choice(PIECES) + text[end:]
        elif choice == 1:
            text = text[:at] + rng.choice(PIECES) + text[at:]
        else:
            elements = [i for i, letter in enumerate(text) if letter == "<"]
            first, last = sorted(rng.choices(elements, k=2))
            text = text[:first] + (text[first:last] * rng.choice((0, 2))) + text[last:]
    return text.encode("latin-1", "replace")


def feed(data: bytes, folder: Path) -> None:
    (folder / "openvino_model.xml").write_bytes(data)
    found = ir_header.read(folder / "openvino_model.xml")
    assert found.weights == ("openvino_model.bin",)
    for held in (*found.inputs, *found.outputs):
        assert len(held.dims) <= header.MAX_RANK
        for dim in held.dims:
            low, high = dim if isinstance(dim, tuple) else (1, 1 if dim is None else dim)
            assert (dim is not None and high == 0) or 1 <= low <= max(1, high) < 10**18
