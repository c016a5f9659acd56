"""The wire form of protocol buffers, against the package's own."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto

from embedder.errors import MalformedError
from embedder.readers.protobuf import encode_varint, fields, packed_varints, signed, varints

numbers = st.lists(st.integers(-(2**63), 2**63 - 1), max_size=40)


@given(numbers, st.integers(10, 64))
def test_packed_numbers_come_back_whatever_the_piece(values: list[int], piece_bytes: int) -> None:
    message = TensorProto(int64_data=values).SerializeToString()
    for _, _, start, _, stop in fields(message, (0, len(message)), "x"):
        found = packed_varints(message[start:stop], "i8", "x", piece_bytes=piece_bytes)
        assert found.tolist() == values
        assert [signed(each) for each in varints(message, (start, stop), "x")] == values


@given(st.binary(max_size=60))
def test_any_bytes_are_fields_or_an_error_of_ours(content: bytes) -> None:
    try:
        for _, _, _, start, stop in fields(content, (0, len(content)), "x"):
            assert 0 <= start < stop <= len(content)
    except MalformedError as error:
        assert "not a valid protocol-buffer message" in str(error)  # noqa: PT017


@given(st.integers(0, 2**64 - 1))
def test_a_number_comes_back(value: int) -> None:
    encoded = encode_varint(value)
    assert list(varints(encoded, (0, len(encoded)), "x")) == [value]


@pytest.mark.parametrize("content", [b"\x80", b"\xff" * 11 + b"\x01"], ids=["cut", "too long"])
def test_a_number_that_does_not_end_is_refused(content: bytes) -> None:
    with pytest.raises(MalformedError, match="not a valid protocol-buffer message"):
        packed_varints(content, "i8", "x")
    with pytest.raises(MalformedError, match="not a valid protocol-buffer message"):
        list(varints(content, (0, len(content)), "x"))


def test_no_numbers_are_no_numbers() -> None:
    assert packed_varints(b"", "i4", "x").dtype == np.int32
