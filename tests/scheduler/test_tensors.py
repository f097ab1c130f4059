from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from scheduler.tensors import ALIGN, DATATYPES, InputLayout, Signature, TensorSpec

SPECS = st.builds(
    TensorSpec,
    st.just("x"),
    st.sampled_from(sorted(DATATYPES)),
    st.lists(st.sampled_from([-1, 1, 3, 7]), max_size=3).map(tuple),
)


@given(st.lists(SPECS, min_size=1, max_size=3), st.integers(1, 9), st.sampled_from([0, 8]), st.data())
def test_inputs_lie_aligned_side_by_side(
    specs: list[TensorSpec], items: int, max_batch: int, data: st.DataObject
) -> None:
    varying = sum(dim == -1 for spec in specs for dim in spec.dims)
    dims = tuple(data.draw(st.lists(st.integers(1, 5), min_size=varying, max_size=varying)))
    slot = InputLayout(Signature(tuple(specs), (), max_batch)).slot(items, dims)
    end = 0
    for spec, place in zip(specs, slot.places, strict=True):
        assert place.offset % ALIGN == 0
        assert end <= place.offset < end + ALIGN
        count = 1
        for dim in place.shape:
            count *= dim
        assert place.nbytes == count * DATATYPES[spec.datatype].itemsize
        assert place.shape[:1] == (items,) or max_batch == 0
        end = place.offset + place.nbytes
    assert slot.nbytes == end


def test_varying_axes_are_filled_in_order() -> None:
    signature = Signature((TensorSpec("a", "FP32", (-1, 2)), TensorSpec("b", "INT8", (3, -1))), (), 4)
    places = InputLayout(signature).slot(2, (5, 7)).places
    assert [place.shape for place in places] == [(2, 5, 2), (2, 3, 7)]
