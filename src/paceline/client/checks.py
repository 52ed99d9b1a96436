"""Checks that an intact reply is the right one, and that a server is the one the run expects."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from paceline.errors import CaptureMismatchError, HandshakeError
from paceline.schema.features import Features, FeatureSpec
from paceline.schema.layout import TensorLayout, layout_bytes, reply_layout
from paceline.schema.limits import Limits, RowSizes
from paceline.schema.parts import Part, part_range, part_reach
from paceline.schema.protocol import ReplyHeader
from paceline.schema.rows import RowRequest
from paceline.schema.target_info import TargetInfo


def check_reply(server: str, request: RowRequest, spec: FeatureSpec, info: TargetInfo, features: Features) -> None:
    """Return if `features` can only be the answer to `request`; reads a few numbers of them.

    Raises:
        CaptureMismatchError: token count, row hash, layers, tensors, shapes, dtypes, ranges or finiteness are wrong;
            names both values.
    """
    where = f"{server} answered row {request.position} (features {request.spec!r})"
    if features.part != request.part:
        raise CaptureMismatchError(f"{where} with {_named(features.part)}, {_named(request.part)} was asked for")
    if features.num_tokens != (num_tokens := _num_tokens(request)):
        raise CaptureMismatchError(_other_tokens(where, features.num_tokens, num_tokens))
    row_hash = request.row_hash()
    if features.row_hash != row_hash:
        raise CaptureMismatchError(f"{where} for the row of hash {features.row_hash}, {row_hash} was sent")
    if features.layers != spec.layers:
        raise CaptureMismatchError(
            f"{where} with capture layers {list(features.layers)}, {list(spec.layers)} were asked for"
        )
    _check_tensors(where, request, spec, info, features)
    if not features.finite:
        raise CaptureMismatchError(
            f"{where} with finite = {features.finite}, expected True: numbers overflowed in the target; "
            "try target.dtype = bfloat16 or float32"
        )
    _check_ranges(where, request, spec, info, features)


def _check_tensors(where: str, request: RowRequest, spec: FeatureSpec, info: TargetInfo, features: Features) -> None:
    expected = reply_layout(request, spec, info, request.part)
    received = features.tensors()
    if received.keys() != expected.keys():
        raise CaptureMismatchError(
            f"{where} with tensors {', '.join(sorted(received))}; {', '.join(sorted(expected))} were asked for"
        )
    for name, layout in expected.items():
        dtype = str(received[name].dtype).removeprefix("torch.")
        shape = tuple(received[name].shape)
        if (dtype, shape) != (layout.dtype, layout.shape):
            raise CaptureMismatchError(
                f"{where} with {name} {dtype}{list(shape)}, expected {layout.dtype}{list(layout.shape)}"
            )


def _check_ranges(where: str, request: RowRequest, spec: FeatureSpec, info: TargetInfo, features: Features) -> None:
    if features.greedy is not None and len(features.greedy):  # a part may be empty
        greedy = features.greedy.cpu().numpy()
        if greedy.min() < 0 or greedy.max() >= info.vocab_size:
            raise CaptureMismatchError(
                f"{where} with greedy tokens {greedy.min()}..{greedy.max()}, the vocabulary is 0..{info.vocab_size - 1}"
            )
    if features.final_index is not None:
        received = features.final_index.cpu().numpy()
        expected = _final_index(request, spec)
        wrong = np.flatnonzero(received != expected)
        if len(wrong):
            first = wrong[0]
            raise CaptureMismatchError(
                f"{where} with final_index[{first}] = {received[first]}, expected {expected[first]} "
                f"({len(wrong)} of {len(expected)} differ)"
            )


def _final_index(request: RowRequest, spec: FeatureSpec) -> np.ndarray:
    first, end = part_reach(len(request.tokens), request.part, spec.halo)
    index = np.arange(first, end)
    if spec.final_hidden == "all":
        return index
    supervised = np.zeros(len(request.tokens), np.bool_)
    for span_start, span_end in request.spans:
        supervised[span_start:span_end] = True
    return index[supervised[first:end]]


def _num_tokens(request: RowRequest) -> int:
    """Of the part that is asked for."""
    start, end = part_range(len(request.tokens), request.part)
    return end - start


def _named(part: Part) -> str:
    return f"part {part.index} of {part.count}"


def check_header(server: str, request: RowRequest, spec: FeatureSpec, info: TargetInfo, header: ReplyHeader) -> None:
    """Return if a reply's header announces exactly what was asked for, tensor by tensor; it is undamaged.

    Raises:
        CaptureMismatchError: token count, layers, tensors, dtypes, shapes or places are others; names both sides.
    """
    where = f"{server} answered row {request.position} (features {request.spec!r})"
    if (header.part, header.num_parts) != (request.part.index, request.part.count):
        raise CaptureMismatchError(
            f"{where} with part {header.part} of {header.num_parts}, {_named(request.part)} was asked for"
        )
    if header.num_tokens != (num_tokens := _num_tokens(request)):
        raise CaptureMismatchError(_other_tokens(where, header.num_tokens, num_tokens))
    if header.layers != spec.layers:
        raise CaptureMismatchError(
            f"{where} with capture layers {list(header.layers)}, {list(spec.layers)} were asked for"
        )
    expected = reply_layout(request, spec, info, request.part)
    if header.tensors.keys() != expected.keys():
        raise CaptureMismatchError(
            f"{where} with tensors {', '.join(sorted(header.tensors))}; {', '.join(sorted(expected))} were asked for"
        )
    for name, layout in expected.items():
        announced = header.tensors[name].layout()
        if announced != layout:
            raise CaptureMismatchError(f"{where} with {name} {_shown(announced)}, expected {_shown(layout)}")
    if header.num_bytes != layout_bytes(expected):
        raise CaptureMismatchError(f"{where} with {header.num_bytes} bytes, expected {layout_bytes(expected)}")


def _shown(layout: TensorLayout) -> str:
    return f"{layout.dtype}{list(layout.shape)} at byte {layout.offset}"


def _other_tokens(where: str, received: int, sent: int) -> str:
    return (
        f"{where} with {received} tokens, {sent} were sent: "
        "target and trainer tokenize differently; compare target.model with data.tokenizer"
    )


def check_target(server: str, served: TargetInfo, expected: TargetInfo) -> None:
    """Return if the two targets are interchangeable; `name` may differ: other hosts have other paths.

    Raises:
        HandshakeError: any other fact differs; names each with both sides.
    """
    facts = served.model_dump()
    differences = [
        f"{name}: {server} has {facts[name]!r}, this run expects {value!r}"
        for name, value in expected.model_dump().items()
        if name != "name" and facts[name] != value
    ]
    if differences:
        raise HandshakeError(f"{server} serves another target than this run expects:\n  " + "\n  ".join(differences))


def check_specs(server: str, served: TargetInfo, specs: Mapping[str, FeatureSpec]) -> None:
    """Return if the target has every capture layer that is asked for.

    Raises:
        HandshakeError: names the layers and how many there are.
    """
    for name, spec in specs.items():
        missing = [layer for layer in spec.layers if not 0 <= layer < served.num_layers]
        if missing:
            raise HandshakeError(
                f"features {name!r} ask for capture layers {missing}, {server} has 0..{served.num_layers - 1}: "
                "correct drafts.NAME.target_layers"
            )


def check_limits(server: str, limits: Limits, specs: Mapping[str, FeatureSpec], sizes: RowSizes) -> None:
    """Return if a server takes what will be asked of it.

    Raises:
        HandshakeError: capture layers that its engine was not started for, longer documents or rows than it takes.
    """
    if limits.layers is not None:
        for name, spec in specs.items():
            if missing := sorted(set(spec.layers) - set(limits.layers)):
                raise HandshakeError(
                    f"features {name!r} ask for capture layers {missing}, the engine of {server} was started for "
                    f"{list(limits.layers)}: start it for all layers that will be asked for (target.capture_layers)"
                )
    if limits.max_document_tokens is not None and sizes.longest_document > limits.max_document_tokens:
        raise HandshakeError(
            f"the longest document of these rows has {sizes.longest_document} tokens, {server} takes "
            f"{limits.max_document_tokens}: lower data.row_tokens, or start its engine for more, where the target has "
            "so many positions (max-model-len, context-length)"
        )
    if limits.max_row_tokens is not None and sizes.longest_row > limits.max_row_tokens:
        raise HandshakeError(
            f"the longest row has {sizes.longest_row} tokens, {server} takes {limits.max_row_tokens}: lower "
            "data.row_tokens, or raise --max-row-tokens of the server"
        )
