"""Protect the counter of what a GPU would do (tests/helpers/op_counts.py), on programs of a few
operations whose kernels and bytes are worked out by hand.

Run: pytest tests/engine/test_op_counts.py
"""

from __future__ import annotations

import pytest
import torch

from tests.helpers.op_counts import Counts, OpCounts, as_on_cuda, list_launches, stored

META = torch.device("meta")


def made(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


def counted(work, answer: int = 0) -> Counts:
    with as_on_cuda(), OpCounts(answer) as counter:
        result = work()
        counts = counter.take()
        del result
    return counts


# x [3,4] fp32 is 48 bytes, bf16 24, a row of it 16, a column 12, a mask of it 12, an index [2] 16.
@pytest.mark.parametrize(
    ("work", "launches", "read", "written"),
    [
        (lambda x: x + x, 1, 96, 48),
        (lambda x: x + 1, 1, 48, 48),
        (lambda x: x.add_(x), 1, 96, 48),
        (lambda x: x + made(3, 1), 1, 48 + 12, 48),
        (lambda x: x + made(1, 4).expand(3, 4), 1, 48 + 16, 48),  # a row is broadcast
        (lambda x: x.to(torch.bfloat16), 1, 48, 24),
        (lambda x: x.float(), 0, 0, 0),  # it is fp32 already
        (lambda x: x.view(4, 3).t()[1:, None].expand(2, 5, 4), 0, 0, 0),  # views alone
        (lambda x: x.t().contiguous(), 1, 48, 48),
        (lambda x: x.copy_(made(4)), 1, 16, 48),  # what was there is not read
        (lambda x: x.zero_(), 1, 0, 48),
        (lambda x: torch.zeros_like(x), 1, 0, 48),
        (lambda x: torch.empty_like(x), 0, 0, 0),
        (lambda x: torch.mul(x, x, out=made(3, 4)), 1, 96, 48),
        (lambda x: x @ made(4, 5), 1, 48 + 80, 60),
        (lambda x: x.sum(1), 1, 48, 12),
        (lambda x: x.softmax(-1), 1, 48, 48),
        (lambda x: torch.cat([x, x]), 1, 96, 96),
        (lambda x: torch.cat([x] * 129), 2, 129 * 48, 129 * 48),  # 128 a launch
        # the same shapes with another type of number, which makes another type of tensor
        (lambda x: x.long() + 1, 2, 48 + 96, 96 + 96),
        (lambda x: x.long() + 1.0, 2, 48 + 96, 96 + 48),
        # of 3 rows an index takes 2: 32 bytes and the index
        (lambda x: x.index_select(0, made(2, dtype=torch.long)), 1, 32 + 16, 32),
        (lambda x: x[made(2, dtype=torch.long)], 1, 32 + 16, 32),
        (lambda x: x.gather(1, made(3, 2, dtype=torch.long)), 1, 24 + 48, 24),
        # 2 rows are written in place, of which the values are read; else all is copied before
        (lambda x: x.index_copy_(0, made(2, dtype=torch.long), made(2, 4)), 1, 16 + 32, 32),
        (lambda x: x.index_copy(0, made(2, dtype=torch.long), made(2, 4)), 2, 48 + 48, 48 + 32),
        (lambda x: x.index_fill_(1, made(2, dtype=torch.long), 0.0), 1, 16, 24),
        (lambda x: x.index_put_((made(2, dtype=torch.long),), made(2, 4)), 1, 16 + 32, 32),
        (lambda x: x.scatter_(1, made(3, 2, dtype=torch.long), 1.0), 1, 48, 24),
        (lambda x: x.masked_fill_(made(3, 4, dtype=torch.bool), 0.0), 1, 48 + 12, 48),
        (lambda x: x.masked_fill(made(3, 4, dtype=torch.bool), 0.0), 2, 48 + 60, 96),
        # five passes over the operand, values and int64 indices of 2 of 4
        (lambda x: x.topk(2), 20, 5 * 48, 24 + 48),
        (lambda x: made(0, 4) + made(0, 4), 0, 0, 0),  # nothing to do, so nothing is launched
        (lambda x: torch.ones(3, 4) + torch.ones(3, 4), 0, 0, 0),  # on the CPU
    ],
)
def test_kernels_and_bytes(work, launches, read, written):
    x = made(3, 4)
    counts = counted(lambda: work(x))
    assert (counts.launches, counts.read, counts.written) == (launches, read, written)
    assert counts.waits == 0 and counts.moved == read + written


def test_what_the_host_reads_is_a_wait_and_gets_the_answer():
    x = made(3, 4)
    assert counted(lambda: x.sum().item()).waits == 1
    counts = counted(lambda: x.tolist())  # one copy of 48 bytes
    assert (counts.launches, counts.read, counts.written, counts.waits) == (1, 48, 0, 1)
    assert counted(lambda: torch.ones(3, 4).copy_(x)).waits == 1
    with OpCounts(answer=1):
        assert x.isfinite().all() and x.long().tolist() == [[1] * 4] * 3
    with OpCounts():
        assert not x.isfinite().all() and x.cpu().tolist() == [[0.0] * 4] * 3


def test_a_copy_to_the_device_waits_unless_told_not_to():
    """torch's copy to CUDA waits for the stream but with non_blocking; a list becomes such one."""
    host = torch.ones(3, 4)
    for work, waits in (
        (lambda: host.to(META), 1),
        (lambda: host.to(META, non_blocking=True), 0),
        (lambda: torch.tensor([1.0, 2.0], device=META), 1),
        (lambda: made(3, 4).copy_(host), 1),
        (lambda: made(3, 4).copy_(host, non_blocking=True), 0),
    ):
        counts = counted(work)
        assert (counts.launches, counts.read, counts.waits) == (1, 0, waits)
    assert counted(lambda: made(3, 4) + torch.tensor(2.0)).waits == 0  # a kernel's argument


def test_peak_of_live_tensors():
    """Of four tensors of 48 bytes two live at a time, then three; what was there before is not
    counted, and a view is no tensor of its own.
    """
    x = made(3, 4)

    def work():
        y = x + 1
        y = y + 1  # 2
        y = y.t() + 1  # 2
        return y, x + y.t()  # 2, the older are gone

    assert counted(work).peak == 96
    # three times x and their sum of 4 bytes, then the sum and x again
    assert counted(lambda: x + torch.cat([x, x, x]).sum()).peak == 148
    with OpCounts() as counter:
        kept = x * 2
        assert counter.take().peak == 48
        again = kept * 2  # 48 over what was there at the beginning
        assert counter.take().peak == 48
        del kept, again
        assert counter.take().peak == 0


def test_shapes_tell_programs_of_other_shapes_or_operations():
    def shapes(work):
        return counted(work).shapes

    first = shapes(lambda: made(3, 4) + 1)
    assert first == shapes(lambda: made(3, 4) + 2)
    others = [
        shapes(lambda: made(3, 5) + 1),
        shapes(lambda: made(3, 4) * 1),
        shapes(lambda: (made(3, 4) + 1) + 1),
    ]
    assert len({first, *others}) == 4


def test_shapes_of_a_part_are_those_it_has_alone():
    with OpCounts() as counter:
        alone = counter.shapes_of(lambda: made(3, 4) + 1)
        made(3, 4) * 2
        assert counter.shapes_of(lambda: made(3, 4) + 1) == alone
        assert counter.shapes_of(lambda: made(3, 5) + 1) != alone
        assert counter.take().launches == 4
        whole = [
            counter.shapes_of(lambda n=n: made(n, 4) + 1) and counter.take() for n in (3, 3, 5)
        ]
    assert whole[0].shapes == whole[1].shapes != whole[2].shapes  # and are part of all


def test_launches_over_lists():
    """One launch takes 110 tensors of one list, 64 of two, 36 of four, and 320 chunks of 65,536."""
    assert list_launches([10] * 110, 1) == 1
    assert list_launches([10] * 111, 1) == 2
    assert list_launches([10] * 128, 2) == 2
    assert list_launches([10] * 129, 2) == 3
    assert list_launches([10] * 73, 4) == 3
    assert list_launches([65_536 * 320], 1) == 1
    assert list_launches([65_536 * 320 + 1], 1) == 2
    # 321 chunks: the second tensor goes on in the second launch
    assert list_launches([65_536 * 160, 65_536 * 161], 2) == 2
    assert list_launches([65_536 * 2] * 320, 1) == 3  # by tensors; by chunks it would be 2
    # what is left of the first is a tensor of the second launch, beside 109 others
    assert list_launches([65_536 * 321] + [10] * 109, 1) == 2
    assert list_launches([65_536 * 321] + [10] * 110, 1) == 3


def test_lists_of_tensors_go_in_one_launch():
    """Three of 48 bytes: added in place, copied, their norms, and AdamW's fused step."""
    first, second = ([made(3, 4) for _ in range(3)] for _ in range(2))
    for work, launches, read, written in (
        (lambda: torch._foreach_add_(first, second), 1, 288, 144),
        (lambda: torch._foreach_copy_(first, second), 1, 144, 144),
        (lambda: torch._foreach_norm(first), 3, 144, 12),
    ):
        counts = counted(work)
        assert (counts.launches, counts.read, counts.written) == (launches, read, written)
    parameters = [torch.nn.Parameter(one) for one in first]
    for parameter, gradient in zip(parameters, second, strict=True):
        parameter.grad = gradient
    with as_on_cuda(), OpCounts() as counter:
        optimizer = torch.optim.AdamW(parameters, fused=True)
        optimizer.step()
        counter.take()
        optimizer.step()
        counts = counter.take()
    # Counters of steps up by one, 3 x 4 bytes read and written. Then weights, gradients and two
    # moments are read with the counters, and all but the gradients written.
    assert (counts.launches, counts.read, counts.written) == (2, 12 + 4 * 144 + 12, 12 + 3 * 144)
    assert counts.waits == 0


def test_attention_is_one_kernel_as_on_cuda():
    """engine.attention's product of scores, softmax and values, on bf16 [2,3,5,8] and a mask of one
    row: 480 bytes each of q, k, v and output, the mask 2 x 5 x 5.
    """
    from engine import attention

    q, mask = made(2, 3, 5, 8, dtype=torch.bfloat16), made(1, 1, 5, 5, dtype=torch.bfloat16)

    def attend():
        return attention.scaled_dot_product_attention(
            q, q, q, attn_mask=mask, dropout_p=0.0, scale=0.5
        )

    counts = counted(attend)
    assert (counts.launches, counts.read) == (1, 3 * 480 + 50)


def test_a_broadcast_operand_has_the_bytes_it_has():
    assert stored(made(3, 1).expand(3, 4)) == 12
    assert stored(made(1, 1).expand(3, 4)) == 4
    assert stored(made(0, 4)) == 0
    assert stored(torch.empty((), dtype=torch.bfloat16, device=META)) == 2
