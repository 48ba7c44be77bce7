import math

import pytest
import torch

from lightning_nas.binary.codes import pack, unpack

LENGTHS = (1, 31, 63, 64, 65, 127, 512, 513)


def codes(length, values, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.tensor(values)[torch.randint(len(values), (3, length), generator=generator)]


def number(row):
    """The bits of a row as one integer, bit k for entry k."""
    return sum(1 << k for k, bit in enumerate(row) if bit)


@pytest.mark.parametrize("length", LENGTHS)
def test_bit_k_of_a_rows_integer_says_whether_code_k_is_negative(length):
    signs = codes(length, [-1.0, 1.0])
    packed = pack(signs)
    assert packed.shape == (3, 8 * math.ceil(length / 64))
    for row, bits in zip(signs, packed, strict=True):
        assert int.from_bytes(bytes(bits.tolist()), "little") == number(code < 0 for code in row.tolist())


@pytest.mark.parametrize("length", LENGTHS)
def test_ternary_codes_have_a_plane_of_what_is_negative_and_one_of_what_is_not_zero(length):
    ternary = codes(length, [-1, 0, 1])
    for plane, of in zip(pack(ternary, is_ternary=True), (lambda c: c < 0, lambda c: c != 0), strict=True):
        for row, bits in zip(ternary, plane, strict=True):
            assert int.from_bytes(bytes(bits.tolist()), "little") == number(map(of, row.tolist()))


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("is_ternary", [False, True])
def test_unpacked_codes_are_those_that_were_packed(length, dtype, is_ternary):
    before = codes(length, [-1, 0, 1] if is_ternary else [-1, 1]).to(dtype)
    after = unpack(pack(before, is_ternary), before.shape, dtype)
    assert after.dtype == dtype
    assert torch.equal(after, before)


def test_the_entries_of_a_convolution_are_in_the_order_of_its_tensor():
    weight = codes(5 * 9, [-1.0, 1.0]).view(3, 5, 3, 3)
    assert torch.equal(pack(weight), pack(weight.flatten(1)))
    assert torch.equal(unpack(pack(weight), weight.shape), weight)


@pytest.mark.parametrize(("entry", "is_ternary"), [(0.0, False), (0.5, True), (float("nan"), True)])
def test_what_is_no_code_is_refused(entry, is_ternary):
    with pytest.raises(ValueError, match="1 entries are not"):
        pack(torch.tensor([[1.0, entry]]), is_ternary)


@pytest.mark.parametrize(
    ("bits", "message"),
    [
        (torch.zeros(3, 8, dtype=torch.uint8), r"\(3, 16\)"),
        (torch.zeros(3, 16), "uint8"),
        (torch.full((3, 16), 255, dtype=torch.uint8), "behind the end"),
    ],
)
def test_bits_of_other_codes_are_refused(bits, message):
    with pytest.raises(ValueError, match=message):
        unpack(bits, (3, 65))
