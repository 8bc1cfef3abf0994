"""Recommenders, point sets, graphs and fields in plain torch.nn."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.architecture import Extent, integers, normal, of_batch, stack, unit
from tests.zoo.networks import plain


class Recommender(nn.Module):
    """Naumov et al., arXiv:1906.00091: products of all pairs of what the tables hold."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.EmbeddingBag(50, 8, mode="sum") for _ in range(3))
        self.bottom = stack([nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU()])
        self.top = stack([nn.Linear(14, 16), nn.ReLU(), nn.Linear(16, 1)])
        self.register_buffer("pairs", torch.tril_indices(4, 4, -1), persistent=False)

    def forward(self, dense: Tensor, sparse: Tensor) -> Tensor:
        x = self.bottom(dense)
        rows = torch.stack([x, *(table(sparse[:, i]) for i, table in enumerate(self.tables))], 1)
        products = torch.bmm(rows, rows.transpose(1, 2))[:, self.pairs[0], self.pairs[1]]
        return self.top(torch.cat([x, products], 1)).sigmoid()


class Factorization(nn.Module):
    """Guo et al., arXiv:1703.04247: a factorization machine beside a deep network."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Embedding(60, 1), nn.Embedding(60, 8)
        self.deep = stack([nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 1)])

    def forward(self, fields: Tensor) -> Tensor:
        rows = self.second(fields)
        pairs = 0.5 * (rows.sum(1).square() - rows.square().sum(1)).sum(1, keepdim=True)
        return self.first(fields).sum(1) + pairs + self.deep(rows.flatten(1))


class TwoTowers(nn.Module):
    """Users and items side by side, compared by their cosine."""

    def __init__(self) -> None:
        super().__init__()
        self.users, self.items = nn.Embedding(40, 16), nn.Embedding(40, 16)
        self.left, self.right = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        a, b = self.left(self.users(user)), self.right(self.items(item))
        return F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T


class Points(nn.Module):
    """Qi et al., arXiv:1612.00593: the same layers for every point, then the largest value."""

    def __init__(self) -> None:
        super().__init__()
        self.each = stack([nn.Conv1d(3, 16, 1), nn.BatchNorm1d(16), nn.ReLU(), nn.Conv1d(16, 32, 1), nn.ReLU()])
        self.align, self.head = nn.Linear(32, 9), nn.Linear(32, 8)

    def forward(self, points: Tensor) -> Tensor:
        turn = self.align(self.each(points).amax(2)).view(-1, 3, 3) * 0.1 + torch.eye(3)
        return self.head(self.each(torch.bmm(turn, points)).amax(2))


class DeepSet(nn.Module):
    """Zaheer et al., arXiv:1703.06114: a sum over the members, however many there are."""

    def __init__(self) -> None:
        super().__init__()
        self.each = stack([nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 16)])
        self.all = stack([nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2)])

    def forward(self, members: Tensor) -> Tensor:
        return self.all(self.each(members).sum(1))


class Neighbours(nn.Module):
    """Wang et al., arXiv:1801.07829: edges to the nearest points, found anew in each layer."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.head = stack([nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16)]), nn.Linear(16, 4)

    def forward(self, points: Tensor) -> Tensor:
        batch, count, width = points.shape
        near = torch.cdist(points, points).topk(4, largest=False).indices
        index = near.flatten(1)[..., None].expand(-1, -1, width)
        others = points.gather(1, index).view(batch, count, 4, width)
        centre = points[:, :, None].expand_as(others)
        return self.head(self.one(torch.cat([centre, others - centre], -1)).amax(2).amax(1))


class GraphConvolution(nn.Module):
    """Kipf and Welling, arXiv:1609.02907: features mixed by a normalized adjacency."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, nodes: Tensor, adjacency: Tensor) -> Tensor:
        near = (adjacency > 0.6).to(nodes.dtype) + torch.eye(adjacency.shape[0])
        mix = near / near.sum(1, keepdim=True)
        return mix @ self.two(F.relu(mix @ self.one(nodes)))


class Messages(nn.Module):
    """Hamilton et al., arXiv:1706.02216: messages along a list of edges are summed where they arrive."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.near, self.head = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, nodes: Tensor, edges: Tensor) -> Tensor:
        sums = torch.zeros_like(nodes).index_add(0, edges[1], nodes[edges[0]])
        return self.head(F.relu(self.own(nodes) + self.near(sums)))


class GraphAttention(nn.Module):
    """Veličković et al., arXiv:1710.10903: neighbours weighted by attention."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.left, self.right = nn.Linear(8, 16), nn.Linear(16, 1), nn.Linear(16, 1)

    def forward(self, nodes: Tensor, adjacency: Tensor) -> Tensor:
        x = self.wide(nodes)
        scores = F.leaky_relu(self.left(x) + self.right(x).T, 0.2).masked_fill(adjacency < 0.4, float("-inf"))
        return F.elu(scores.softmax(-1) @ x)


class Radiance(nn.Module):
    """Mildenhall et al., arXiv:2003.08934: sines of places, a deep network, a density and a colour."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(27, 32), nn.Linear(59, 32)
        self.density, self.colour = nn.Linear(32, 1), nn.Linear(32, 3)

    def forward(self, places: Tensor) -> tuple[Tensor, Tensor]:
        angles = torch.cat([places * 2.0**i for i in range(4)], -1)
        x = torch.cat([places, angles.sin(), angles.cos()], -1)
        h = F.relu(self.two(torch.cat([F.relu(self.one(x)), x], -1)))
        return F.softplus(self.density(h)), self.colour(h).sigmoid()


class Tabular(nn.Module):
    """Gorishniy et al., arXiv:2106.11959: a token for each column, then a transformer of torch's own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(6, 16)), nn.Parameter(torch.randn(6, 16))
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True)
        self.body, self.head = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), nn.Linear(16, 2)

    def forward(self, columns: Tensor) -> Tensor:
        return self.head(self.body(columns[..., None] * self.weight + self.bias)[:, 0])


class Forecast(nn.Module):
    """Oreshkin et al., arXiv:1905.10437: blocks that explain a part of the past, and forecast with it."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(stack([nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 20)]) for _ in range(2))

    def forward(self, past: Tensor) -> Tensor:
        forecast = past.new_zeros(past.shape[0], 4)
        for one in self.blocks:
            explained, ahead = one(past).split([16, 4], -1)
            past, forecast = past - explained, forecast + ahead
        return forecast


ADJACENT = {"nodes": normal(10, 8), "adjacency": unit(10, 10)}

TABLES = (
    plain("dlrm", "recommender", Recommender, sizes=of_batch(),
          inputs={"dense": normal("batch", 6), "sparse": integers(50, "batch", 3, 2)}),
    plain("deepfm", "recommender", Factorization, inputs={"fields": integers(60, "batch", 4)}, sizes=of_batch(),
          floor_db=10.0),  # a difference of two sums, which XNNPACK takes on integers
    plain("two-towers", "recommender", TwoTowers, inputs={"user": integers(40, 4), "item": integers(40, 4)}),
    plain("pointnet", "point set", Points, inputs={"points": normal("batch", 3, 24)}, sizes=of_batch(), inductor=True),
    plain("deep-sets", "point set", DeepSet, inputs={"members": normal(2, "count", 4)},
          sizes={"count": Extent(10, 5, 16)}),
    plain("edge-convolution", "point set", Neighbours, inputs={"points": normal(2, 12, 3)}),
    plain("graph-convolution", "graph", GraphConvolution, inputs=ADJACENT),
    plain("graph-sage", "graph", Messages, inputs={"nodes": normal(10, 8), "edges": integers(10, 2, "edges")},
          sizes={"edges": Extent(24, 15, 32)}),
    plain("graph-attention", "graph", GraphAttention, inputs=ADJACENT),
    plain("nerf", "field", Radiance, inputs={"places": unit("batch", 3)}, sizes={"batch": Extent(32, 20, 64)}),
    plain("tabular-transformer", "table", Tabular, inputs={"columns": normal("batch", 6)}, sizes=of_batch(),
          floor_db=10.0),  # one row of two or three is all that is compared, and one value beyond the ranges shows
    plain("n-beats", "time series", Forecast, inputs={"past": normal("batch", 16)}, sizes=of_batch()),
)  # fmt: skip
"""Recommenders, sets, graphs and tables."""
