"""Layers on a band of rows of an image that is spread over ranks, with no more memory than the band's share.

distvae's own layers are exact but copy the band several times over: measured on two ranks, a decode then
peaks at three quarters of one rank's peak instead of half, and 16-bit norms round their statistics.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn import functional as F

NUM_PARTS = 4
"""Norms work on this many parts of the groups, one after another: their float32 copies are that small."""


class BandNorm(nn.Module):
    """`torch.nn.GroupNorm` over the rows of all ranks; x_BCHW is this rank's band, any number of rows.

    Statistics are float32, whatever the input, as in torch's own. Collective over `group`.
    Source for the merging of variances: Chan, Golub, LeVeque 1979, "Updating Formulae …".
    """

    def __init__(self, norm: nn.GroupNorm, group: ProcessGroup) -> None:
        super().__init__()
        self.num_groups, self.eps, self.group = norm.num_groups, norm.eps, group
        self.weight, self.bias = norm.weight, norm.bias

    def forward(self, x_BCHW: Tensor) -> Tensor:
        batch, channels = x_BCHW.shape[:2]
        parts = x_BCHW.reshape(batch, self.num_groups, -1).tensor_split(NUM_PARTS, dim=1)
        means = torch.cat([part.sum(2, dtype=torch.float32) for part in parts], 1) / parts[0].shape[2]
        squares = torch.cat(
            [
                (part.float() - mean[:, :, None]).square_().sum(2)
                for part, mean in zip(parts, means.tensor_split(NUM_PARTS, dim=1), strict=True)
            ],
            1,
        )
        mean, var = self._merge(float(parts[0].shape[2]), means, squares)
        each = channels // self.num_groups
        scale = (var + self.eps).rsqrt().repeat_interleave(each, 1) * self.weight.float()
        shift = self.bias.float() - mean.repeat_interleave(each, 1) * scale
        out = torch.empty_like(x_BCHW)
        for at in torch.arange(channels).tensor_split(NUM_PARTS):
            cut = slice(int(at[0]), int(at[-1]) + 1)
            part = x_BCHW[:, cut].float()
            out[:, cut] = torch.addcmul(shift[:, cut, None, None], part, scale[:, cut, None, None])
        return out

    def _merge(self, count: float, mean_BG: Tensor, square_BG: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance over all ranks, from this rank's count, mean and sum of squared distances."""
        # Filled there: a copy of a number from the host would wait for the device, in each norm.
        size = mean_BG.new_full((1,), count, dtype=torch.float64)
        mine = torch.cat([size, mean_BG.flatten(), square_BG.flatten()])
        every = [torch.empty_like(mine) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(every, mine, group=self.group)
        table = torch.stack(every)
        counts_R1 = table[:, :1]
        means_RN, squares_RN = table[:, 1:].chunk(2, dim=1)
        mean_N = (counts_R1 * means_RN).sum(0) / counts_R1.sum()
        var_N = (squares_RN + counts_R1 * (means_RN - mean_N).square()).sum(0) / counts_R1.sum()
        return mean_N.view_as(mean_BG).float(), var_N.view_as(mean_BG).float()


class BandConv(nn.Module):
    """A 3 x 3 convolution with stride 1 and zero padding; x_BCHW is this rank's band, one row or more.

    The band is convolved as if it were the whole image while the neighbours' rows are on their way;
    then its first and last row are done again with them. Collective over `group`.
    """

    def __init__(self, conv: nn.Conv2d, group: ProcessGroup) -> None:
        super().__init__()
        self.weight, self.bias, self.group = conv.weight, conv.bias, group

    @staticmethod
    def fits(conv: nn.Conv2d) -> bool:
        """Whether `conv` is of the one kind that this layer can do."""
        kind = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode)
        return kind == ((3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros")

    def forward(self, x_BCHW: Tensor) -> Tensor:
        above, below, works = self._exchange(x_BCHW)
        out = F.conv2d(x_BCHW, self.weight, self.bias, padding=1)
        for work in works:
            work.wait()
        num_rows = x_BCHW.shape[2]
        if num_rows == 1:
            rows = [above if above is not None else torch.zeros_like(x_BCHW), x_BCHW]
            return self._row([*rows, below if below is not None else torch.zeros_like(x_BCHW)])
        if above is not None:
            out[:, :, :1] = self._row([above, x_BCHW[:, :, :2]])
        if below is not None:
            out[:, :, -1:] = self._row([x_BCHW[:, :, -2:], below])
        return out

    def _row(self, rows: list[Tensor]) -> Tensor:
        return F.conv2d(torch.cat(rows, 2), self.weight, self.bias, padding=(0, 1))

    def _exchange(self, x_BCHW: Tensor) -> tuple[Tensor | None, Tensor | None, list[dist.Work]]:
        """The rows above and below this band, still on their way, and what to wait for."""
        rank, num_ranks = dist.get_rank(self.group), dist.get_world_size(self.group)
        found: list[Tensor | None] = []
        todo = []
        for peer, row in ((rank - 1, x_BCHW[:, :, :1]), (rank + 1, x_BCHW[:, :, -1:])):
            if not 0 <= peer < num_ranks:
                found.append(None)
                continue
            theirs = torch.empty_like(row, memory_format=torch.contiguous_format)
            address = dist.get_global_rank(self.group, peer)
            todo.append(dist.P2POp(dist.isend, row.contiguous(), address, self.group))
            todo.append(dist.P2POp(dist.irecv, theirs, address, self.group))
            found.append(theirs)
        return found[0], found[1], dist.batch_isend_irecv(todo)
