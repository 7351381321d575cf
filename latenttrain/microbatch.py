"""The gradient of a batch, micro-batch by micro-batch, to the same bits however many threads or ranks compute it.

    batch -> micro-batches of about `norm_batch` samples -> a vector each (loss, gradients, statistics) -> their mean

BatchNorm's statistics are those of a micro-batch, so a micro-batch depends on nothing else, and one thread computes it.
Vectors are added pairwise along a binary tree over the micro-batches, whose shape their number alone decides. So a
process that has some of them can add those, and the others need only what it has added: no thread and no rank waits for
another before the batch is done, and beside busy programs nothing waits for the slowest core at every operation.
"""

from __future__ import annotations

import copy
import queue
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from latentprep.device import full_float32
from latenttrain.data import cut, pieces
from latenttrain.nets import MOMENTUM, BatchNorm, Net
from latenttrain.ranks import ALONE, Ranks


def micro_batches(samples: int, norm_batch: int) -> tuple[int, ...]:
    """Sizes of the micro-batches of a batch, with at most `norm_batch` samples each: see `pieces`."""
    return cut(samples, pieces(samples, norm_batch))


class Node(NamedTuple):
    """The sum of `size` vectors from number `start` on: a node of the tree, size a power of two that divides start."""

    start: int
    size: int
    value: Tensor


class PairwiseSum:
    """Adds vectors in order of their number, two sums of equal size at a time. The values given are overwritten.

    A node of the tree is the same whoever made it, so vectors may come one by one, or as nodes that others summed.
    """

    def __init__(self) -> None:
        self.nodes: list[Node] = []

    def add(self, node: Node) -> None:
        while self.nodes and self.nodes[-1].size == node.size and self.nodes[-1].start % (2 * node.size) == 0:
            left = self.nodes.pop()
            node = Node(left.start, 2 * node.size, left.value.add_(node.value))
        self.nodes.append(node)

    def total(self) -> Tensor:
        """The sum of all: what is left of the tree, from the right."""
        *left, last = self.nodes
        value = last.value
        for node in reversed(left):
            value = node.value.add_(value)
        return value


def nodes_of(numbers: range) -> list[tuple[int, int]]:
    """(start, size) of the nodes that `PairwiseSum` is left with after the vectors of these consecutive numbers."""
    tree = PairwiseSum()
    nothing = torch.empty(0)
    for number in numbers:
        tree.add(Node(number, 1, nothing))
    return [(node.start, node.size) for node in tree.nodes]


class Learner:
    """Computes the loss and the gradients of batches, which become the `.grad` of the net's parameters.

    loss_of: of (net, rows, labels, random) -> f32 []: the mean loss of some samples. pool: from `one_thread_each`;
    its threads take micro-batches as they get free. Without one, a rank's share of a batch is computed at once,
    BatchNorm in parts: what a GPU needs.
    """

    def __init__(
        self,
        net: Net,
        loss_of: Callable[[Net, Tensor, Tensor, dict[str, Tensor]], Tensor],
        norm_batch: int,
        pool: ThreadPoolExecutor | None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.loss_of, self.norm_batch, self.pool, self.ranks = loss_of, norm_batch, pool, ranks
        net.train()
        self.parameters = [p for p in net.parameters() if p.requires_grad]
        self.statistics = _statistics(net)
        self.like = [torch.zeros((), device=self.parameters[0].device), *self.parameters, *self.statistics]
        self.starts = list(accumulate((tensor.numel() for tensor in self.like), initial=0))
        self.replicas = queue.SimpleQueue[tuple[Net, list[Tensor]]]()  # one for each thread, and its statistics
        for _ in range(pool._max_workers if pool else 1):
            replica = _replica(net)
            self.replicas.put((replica, _statistics(replica)))

    def learn(self, rows: Tensor, labels: Tensor, random: dict[str, Tensor]) -> Tensor:
        """One batch: its mean loss, f32 [] on the device. rows, labels, random: of all its samples, on every rank.

        The parameters get their gradients; the net's running statistics move by BatchNorm's momentum.
        """
        sizes = micro_batches(len(labels), self.norm_batch)
        loss, *values = self._views(self._sum(sizes, rows, labels, random))
        for parameter in self.parameters:
            parameter.grad = values.pop(0)
        if values:
            torch._foreach_lerp_(self.statistics, values, MOMENTUM)
        return loss

    def _sum(self, sizes: tuple[int, ...], rows: Tensor, labels: Tensor, random: dict[str, Tensor]) -> Tensor:
        """The sum over all micro-batches, each weighed by its share of the samples: f32 [n]"""
        edges = list(accumulate(sizes, initial=0))

        def vector(first: int, last: int) -> Tensor:
            part = slice(edges[first], edges[last])
            drawn = {name: values[part] for name, values in random.items()}
            value = self._vector(rows[part], labels[part], drawn, sizes[first:last])
            return value.mul_((part.stop - part.start) / len(labels))

        tree, mine = PairwiseSum(), self.ranks.share(len(sizes))
        if self.pool is None:  # a share is one vector
            tree.add(Node(self.ranks.rank, 1, vector(mine.start, mine.stop)))
        else:
            for number, value in zip(mine, self.pool.map(lambda i: vector(i, i + 1), mine), strict=True):
                tree.add(Node(number, 1, value))
        return tree.total() if self.ranks.world == 1 else self._gathered(tree, len(sizes))

    def _gathered(self, mine: PairwiseSum, count: int) -> Tensor:
        """The sum over all ranks, each of which sends the nodes that it is left with. count: of micro-batches."""
        if self.pool is None:
            places = [[(rank, 1)] for rank in range(self.ranks.world)]
        else:
            places = [nodes_of(share) for share in self.ranks.shares(count)]
        values = torch.stack([node.value for node in mine.nodes])
        padded = values.new_zeros((max(map(len, places)), values.shape[1]))
        padded[: len(values)] = values
        tree = PairwiseSum()
        for own, gathered in zip(places, self.ranks.gathered(padded), strict=True):
            for (start, size), value in zip(own, gathered, strict=False):
                tree.add(Node(start, size, value))
        return tree.total()

    def _vector(self, rows: Tensor, labels: Tensor, random: dict[str, Tensor], parts: tuple[int, ...]) -> Tensor:
        """Loss, gradients and BatchNorm's statistics of these samples: f32 [n]"""
        net, statistics = self.replicas.get()
        try:
            net.cut_into(parts if len(parts) > 1 else ())
            with full_float32():  # for the stem; the network's body follows `bfloat16`
                loss = self.loss_of(net, rows, labels, random)
            gradients = torch.autograd.grad(loss, self.parameters)
            vector = torch.empty(self.starts[-1], device=loss.device)
            with torch.no_grad():
                torch._foreach_copy_(self._views(vector), [loss, *gradients, *statistics])
        finally:
            self.replicas.put((net, statistics))
        return vector

    def _views(self, vector: Tensor) -> list[Tensor]:
        """The parts of a vector in the shapes and memory layouts of what they belong to."""
        first = vector.storage_offset()
        return [
            vector.as_strided(tensor.shape, tensor.stride(), first + start)
            for tensor, start in zip(self.like, self.starts, strict=False)
        ]


def _replica(net: Net) -> Net:
    """The same parameters, with running statistics of its own that are those of the last samples it saw."""
    replica = copy.deepcopy(net, {id(parameter): parameter for parameter in net.parameters()}).train()
    for norm in _norms(replica):
        norm.momentum, norm.num_batches_tracked = 1.0, None
    return replica


def _norms(net: Net) -> list[BatchNorm]:
    """Those in training mode: what is frozen stays in evaluation mode."""
    return [module for module in net.modules() if isinstance(module, BatchNorm) and module.training]


def _statistics(net: Net) -> list[Tensor]:
    return [tensor for norm in _norms(net) for tensor in (norm.running_mean, norm.running_var)]
